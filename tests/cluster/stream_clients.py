"""Unmodified clients that pause in the middle: `python stream_clients.py NAME URL TABLE`.

Each is a process of its own, says a line when it pauses and goes on at a line from its test. One connection object for
the whole run and no retries: what a program does that opens its connection once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LOST = ("STREAM_EXPIRED", "expired due to inactivity", "TRANSACTION_TIMEOUT", "WALSHIP_TRANSACTION_TIMEOUT")


def pause() -> None:
    sys.stdout.write("paused\n")
    sys.stdout.flush()
    if not sys.stdin.readline():
        sys.exit("the test is gone")


def connect_libsql(url: str) -> Any:
    import libsql

    return libsql.connect(database=url, auth_token="")


def connect_turso(url: str) -> Any:
    import turso_serverless

    return turso_serverless.connect(url)


def rows(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    cursor = connection.cursor()
    cursor.execute(sql)
    return [tuple(row) for row in cursor.fetchall()]


def run(connection: Any, sql: str) -> None:
    connection.cursor().execute(sql)


def failure(work: Callable[..., object]) -> str:
    """What `work` fails with, or nothing."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  each client has its own tree
        return repr(error)
    return ""


def autocommit(connection: Any, table: str) -> None:
    """A read, a committed write, a pause; again and again."""
    run(connection, f"CREATE TABLE {table} (n INTEGER PRIMARY KEY)")
    connection.commit()
    for count in range(4):
        assert rows(connection, f"SELECT count(*) FROM {table}") == [(count,)]
        run(connection, f"INSERT INTO {table} VALUES ({count + 1})")
        connection.commit()
        assert rows(connection, f"SELECT max(n) FROM {table}") == [(count + 1,)]
        pause()
    assert rows(connection, f"SELECT count(*) FROM {table}") == [(4,)]


def transaction(connection: Any, table: str) -> None:
    """A write whose transaction is interrupted by the pause: told once, and the next request works."""
    run(connection, f"CREATE TABLE {table} (n INTEGER PRIMARY KEY)")
    connection.commit()
    for count in range(3):
        run(connection, f"INSERT INTO {table} VALUES ({count})")
        pause()
        said = failure(lambda number=100 + count: run(connection, f"INSERT INTO {table} VALUES ({number})"))
        assert any(word in said for word in LOST), f"round {count}: {said or 'nobody said that it was lost'}"
        said = failure(connection.rollback)
        assert not said or "no transaction is active" in said, f"round {count}: {said}"
        assert rows(connection, f"SELECT count(*) FROM {table}") == [(0,)], f"round {count}"
    run(connection, f"INSERT INTO {table} VALUES (7)")
    connection.commit()
    assert rows(connection, f"SELECT * FROM {table}") == [(7,)]


CLIENTS: dict[str, Callable[[str], Any]] = {"libsql": connect_libsql, "turso": connect_turso}
WORK = {"autocommit": autocommit, "transaction": transaction}

if __name__ == "__main__":
    name, url, table = sys.argv[1:]
    client, _, work = name.partition("_")
    WORK[work](CLIENTS[client](url), table)
