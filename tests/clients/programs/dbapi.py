"""PyPI `libsql` and `turso-serverless`: the two DB-API clients."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.steps import BIG_ROWS, PROCESSES, ROUNDS, VALUES, WORKERS, Program, each_in, expect, fill_sql, main


def connect(client: str, url: str) -> Any:
    if client == "libsql":
        import libsql

        return libsql.connect(url, auth_token="")
    import turso_serverless

    return turso_serverless.connect(url)


def unique_error(client: str) -> type[Exception]:
    if client == "libsql":
        return ValueError  # it has no classes of its own
    import turso_serverless

    error: type[Exception] = turso_serverless.IntegrityError
    return error


def rows(connection: Any, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.execute(sql, parameters).fetchall()]


class DbApi(Program):
    def __init__(self, client: str, url: str) -> None:
        super().__init__(client, url)
        self.connection = connect(client, url)

    def run(self, sql: str, parameters: tuple[object, ...] = ()) -> Any:
        cursor = self.connection.execute(sql, parameters)
        self.connection.commit()
        return cursor

    def ddl(self) -> None:
        self.run(f"CREATE TABLE {self.table}_items (id INTEGER PRIMARY KEY, name TEXT UNIQUE, size INTEGER)")
        self.run(f"ALTER TABLE {self.table}_items ADD COLUMN note TEXT")
        self.run(f"CREATE INDEX {self.table}_by_size ON {self.table}_items (size)")
        self.run(f"DROP INDEX {self.table}_by_size")
        self.run(f"CREATE TABLE {self.table}_values (n INTEGER PRIMARY KEY, value)")
        self.run(f"CREATE TABLE {self.table}_big (n INTEGER PRIMARY KEY, label TEXT)")
        self.run(f"CREATE TABLE {self.table}_work (worker INTEGER, n INTEGER)")
        expect(rows(self.connection, self.made_sql()), [(5,)])

    def dml(self) -> None:
        inserted = self.run(f"INSERT INTO {self.table}_items (name, size) VALUES (?, ?)", ("one", 1))
        expect(inserted.lastrowid, 1)
        self.run(f"INSERT INTO {self.table}_items (name, size) VALUES (?, ?)", ("two", 2))
        updated = self.run(f"UPDATE {self.table}_items SET size = size + 10")
        expect(updated.rowcount, 2)
        self.run(f"DELETE FROM {self.table}_items WHERE name = ?", ("one",))
        expect(rows(self.connection, f"SELECT id, name, size, note FROM {self.table}_items"), [(2, "two", 12, None)])

    def types(self) -> None:
        for n, value in enumerate(VALUES):
            if self.client == "libsql" and isinstance(value, int) and not -(2**31) <= value < 2**31:
                self.run(f"INSERT INTO {self.table}_values VALUES ({n}, {value})")  # as a parameter it sends a float
            else:
                self.run(f"INSERT INTO {self.table}_values VALUES (?, ?)", (n, value))
        found = rows(self.connection, f"SELECT value FROM {self.table}_values ORDER BY n")
        expect([row[0] for row in found], list(VALUES))

    def batch(self) -> None:
        self.connection.executemany(
            f"INSERT INTO {self.table}_items (name, size) VALUES (?, ?)", [(f"batch {n}", n) for n in range(3)]
        )
        self.connection.commit()
        self.connection.executescript(
            f"INSERT INTO {self.table}_items (name) VALUES ('a;b'); UPDATE {self.table}_items SET size = 7"
            f" WHERE name = 'a;b'; DELETE FROM {self.table}_items WHERE name = 'batch 0';"
        )
        self.connection.commit()
        found = rows(self.connection, f"SELECT name, size FROM {self.table}_items WHERE name <> 'two' ORDER BY name")
        expect(found, [("a;b", 7), ("batch 1", 1), ("batch 2", 2)])

    def count(self, connection: Any, name: str) -> Any:
        return rows(connection, f"SELECT count(*) FROM {self.table}_items WHERE name LIKE ?", (name,))[0][0]

    def commit(self) -> None:
        other = connect(self.client, self.url)
        for n in range(2):
            self.connection.execute(f"INSERT INTO {self.table}_items (name) VALUES (?)", (f"commit {n}",))
        expect(self.count(self.connection, "commit %"), 2)
        expect(self.count(other, "commit %"), 0)
        self.connection.commit()
        expect(self.count(other, "commit %"), 2)

    def rollback(self) -> None:
        self.connection.execute(f"INSERT INTO {self.table}_items (name) VALUES ('rollback')")
        expect(self.count(self.connection, "rollback"), 1)
        self.connection.rollback()
        expect(self.count(self.connection, "rollback"), 0)

    def constraint(self) -> None:
        with pytest.raises(unique_error(self.client), match="UNIQUE constraint failed"):
            self.run(f"INSERT INTO {self.table}_items (name) VALUES ('two')")
        self.connection.rollback()
        expect(self.count(self.connection, "two"), 1)

    def big(self) -> None:
        self.run(fill_sql(f"{self.table}_big"))
        found = rows(self.connection, f"SELECT n, label FROM {self.table}_big ORDER BY n")
        expect(found, [(n, f"row {n}") for n in range(1, BIG_ROWS + 1)])

    def concurrent(self) -> None:
        each_in(PROCESSES, work, self.client, self.url, f"{self.table}_work")
        expect(rows(self.connection, f"SELECT count(*) FROM {self.table}_work"), [(WORKERS * ROUNDS,)])

    def hold(self) -> None:
        expect(self.count(self.connection, "two"), 1)

    def idle(self) -> None:
        expect(self.count(self.connection, "two"), 1)
        self.run(f"INSERT INTO {self.table}_items (name) VALUES ('after the pause')")
        expect(self.count(self.connection, "after the pause"), 1)


def work(client: str, url: str, table: str, worker: int) -> None:
    """A worker with a connection of its own: every write read back at once."""
    connection = connect(client, url)
    for n in range(ROUNDS):
        connection.execute(f"INSERT INTO {table} VALUES (?, ?)", (worker, n))
        connection.commit()
        expect(rows(connection, f"SELECT count(*) FROM {table} WHERE worker = ?", (worker,)), [(n + 1,)])


if __name__ == "__main__":
    main(DbApi)
