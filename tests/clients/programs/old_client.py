"""PyPI `libsql-client`, the former official client: asyncio, over HTTP (v1) and over WebSocket (hrana2)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import libsql_client
import pytest

from tests.clients.steps import BIG_ROWS, ROUNDS, VALUES, WORKERS, Absent, Program, expect, fill_sql, main


class OldClient(Program):
    def __init__(self, client: str, url: str) -> None:
        super().__init__(client, url.replace("http:", "ws:") if client.endswith("ws") else url)
        self.runner = asyncio.Runner()
        self.db = self.wait(self.opened())

    async def opened(self) -> Any:
        return libsql_client.create_client(self.url)  # its aiohttp session wants a running loop

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def run(self, sql: str, *parameters: object) -> Any:
        return self.wait(self.db.execute(sql, parameters))

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.run(sql, *parameters).rows]

    def ddl(self) -> None:
        self.run(f"CREATE TABLE {self.table}_items (id INTEGER PRIMARY KEY, name TEXT UNIQUE, size INTEGER)")
        self.run(f"ALTER TABLE {self.table}_items ADD COLUMN note TEXT")
        self.run(f"CREATE TABLE {self.table}_values (n INTEGER PRIMARY KEY, value)")
        self.run(f"CREATE TABLE {self.table}_big (n INTEGER PRIMARY KEY, label TEXT)")
        self.run(f"CREATE TABLE {self.table}_work (worker INTEGER, n INTEGER)")
        expect(self.rows(self.made_sql()), [(5,)])

    def dml(self) -> None:
        expect(self.run(f"INSERT INTO {self.table}_items (name, size) VALUES (?, ?)", "one", 1).last_insert_rowid, 1)
        self.wait(self.db.execute(f"INSERT INTO {self.table}_items (name, size) VALUES (:n, :s)", {"n": "two", "s": 2}))
        expect(self.run(f"UPDATE {self.table}_items SET size = size + 10").rows_affected, 2)
        self.run(f"DELETE FROM {self.table}_items WHERE name = ?", "one")
        expect(self.rows(f"SELECT id, name, size, note FROM {self.table}_items"), [(2, "two", 12, None)])

    def types(self) -> None:
        for n, value in enumerate(VALUES):
            self.run(f"INSERT INTO {self.table}_values VALUES (?, ?)", n, value)
        found = self.rows(f"SELECT value FROM {self.table}_values ORDER BY n")
        expect([row[0] for row in found], list(VALUES))

    def batch(self) -> None:
        insert = f"INSERT INTO {self.table}_items (name, size) VALUES (?, ?)"
        count = f"SELECT count(*) FROM {self.table}_items WHERE name LIKE 'batch %'"
        results = self.wait(self.db.batch([*((insert, (f"batch {n}", n)) for n in range(3)), count]))
        expect(tuple(results[-1].rows[0]), (3,))

    def count(self, name: str) -> Any:
        return self.rows(f"SELECT count(*) FROM {self.table}_items WHERE name LIKE ?", name)[0][0]

    async def transaction(self) -> Any:
        try:
            return self.db.transaction()
        except libsql_client.LibsqlError as error:
            if error.code == "TRANSACTIONS_NOT_SUPPORTED":
                raise Absent("it offers no interactive transactions over HTTP, batches only") from error
            raise

    def commit(self) -> None:
        transaction = self.wait(self.transaction())
        for n in range(2):
            self.wait(transaction.execute(f"INSERT INTO {self.table}_items (name) VALUES (?)", (f"commit {n}",)))
        seen = self.wait(transaction.execute(f"SELECT count(*) FROM {self.table}_items WHERE name LIKE 'commit %'"))
        expect(tuple(seen.rows[0]), (2,))
        expect(self.count("commit %"), 0)
        self.wait(transaction.commit())
        expect(self.count("commit %"), 2)

    def rollback(self) -> None:
        transaction = self.wait(self.transaction())
        self.wait(transaction.execute(f"INSERT INTO {self.table}_items (name) VALUES ('rollback')"))
        self.wait(transaction.rollback())
        expect(self.count("rollback"), 0)

    def constraint(self) -> None:
        with pytest.raises(libsql_client.LibsqlError, match="UNIQUE constraint failed") as raised:
            self.run(f"INSERT INTO {self.table}_items (name) VALUES ('two')")
        expect(raised.value.code, "SQLITE_CONSTRAINT")
        expect(self.count("two"), 1)

    def big(self) -> None:
        self.run(fill_sql(f"{self.table}_big"))
        found = self.rows(f"SELECT n, label FROM {self.table}_big ORDER BY n")
        expect(found, [(n, f"row {n}") for n in range(1, BIG_ROWS + 1)])

    def concurrent(self) -> None:
        async def work(worker: int) -> None:
            """On a client of its own, or all on one: by turns, so that both are seen."""
            own = await self.opened() if worker % 2 else self.db
            table = f"{self.table}_work"
            for n in range(ROUNDS):
                await own.execute(f"INSERT INTO {table} VALUES (?, ?)", (worker, n))
                found = await own.execute(f"SELECT count(*) FROM {table} WHERE worker = ?", (worker,))
                expect(tuple(found.rows[0]), (n + 1,))
            if own is not self.db:
                await own.close()

        async def all_workers() -> None:
            async with asyncio.TaskGroup() as group:
                for worker in range(WORKERS):
                    group.create_task(work(worker))

        self.wait(all_workers())
        expect(self.rows(f"SELECT count(*) FROM {self.table}_work"), [(WORKERS * ROUNDS,)])

    def hold(self) -> None:
        expect(self.count("two"), 1)

    def idle(self) -> None:
        expect(self.count("two"), 1)
        self.run(f"INSERT INTO {self.table}_items (name) VALUES ('after the pause')")
        expect(self.count("after the pause"), 1)
        self.wait(self.db.close())


if __name__ == "__main__":
    main(OldClient)
