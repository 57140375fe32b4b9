"""What unmodified clients do, each in a process of its own: `python clients.py NAME URL`.

Apart, because PyPI `libsql` holds the interpreter's lock while it waits for the server.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable


def fails(run: Callable[[], object], *words: str) -> None:
    try:
        run()
    except Exception as error:  # noqa: BLE001  each client has its own tree
        said = str(error)
    else:
        said = "nothing: it did not fail"
    assert all(word in said for word in words), said


def libsql_everyday(url: str) -> None:
    import libsql

    connection = libsql.connect(database=url, auth_token="")
    connection.execute("create table t(id integer primary key, name text, data blob, score real)")
    connection.execute("insert into t values(?, ?, ?, ?)", (1, "é'\n", b"\x00\xff", 1.5))
    connection.commit()
    assert connection.execute("select * from t where id = ?", (1,)).fetchall() == [(1, "é'\n", b"\x00\xff", 1.5)]
    connection.execute("insert into t(id) values(2)")
    connection.rollback()
    assert connection.execute("select count(*) from t").fetchone() == (1,)
    connection.executemany("insert into t(name) values(?)", [("a",), ("b",)])
    connection.commit()
    assert connection.execute("select max(id) from t").fetchone() == (3,)
    connection.executescript("create table u(a); insert into u values(1); insert into u values(2);")
    assert connection.execute("select sum(a) from u").fetchone() == (3,)
    fails(lambda: connection.execute("select * from nowhere").fetchall(), "no such table")
    connection.close()


def libsql_idle(url: str) -> None:
    """Between the two statements the server forgets the stream."""
    import libsql

    connection = libsql.connect(database=url, auth_token="")
    assert connection.execute("select 1").fetchone() == (1,)
    sys.stdout.write("idle\n")
    sys.stdout.flush()
    sys.stdin.readline()
    assert connection.execute("select 2").fetchone() == (2,)


def libsql_on_follower(url: str) -> None:
    import libsql

    connection = libsql.connect(database=url, auth_token="")
    assert connection.execute("select 1").fetchone() == (1,)
    fails(lambda: connection.execute("create table t(a)"), "WALSHIP_NOT_LEADER", "the leader is n1 at http://n1:1")


def turso_everyday(url: str) -> None:
    import turso_serverless

    connection = turso_serverless.connect(url)
    cursor = connection.cursor()
    cursor.execute("create table t(id integer primary key, name text)")
    cursor.execute("insert into t(name) values(?)", ("one",))
    assert cursor.lastrowid == 1
    connection.commit()
    cursor.execute("insert into t(name) values(:name)", {"name": "two"})
    connection.rollback()
    cursor.execute("select id, name from t")
    assert [tuple(row) for row in cursor.fetchall()] == [(1, "one")]
    fails(lambda: cursor.execute("insert into t values(1, 'again')"), "UNIQUE")
    connection.close()


def libsql_client_http(url: str) -> None:
    """HTTP v1: statements and batches; it has no interactive transactions."""
    import asyncio

    asyncio.run(_libsql_client(url))


def libsql_client_ws(url: str) -> None:
    import asyncio

    asyncio.run(_libsql_client(url.replace("http", "ws", 1)))


async def _libsql_client(url: str) -> None:
    import libsql_client

    async with libsql_client.create_client(url) as client:
        await client.execute("create table t(id integer primary key, name text, data blob, score real)")
        done = await client.execute("insert into t values(?, ?, ?, ?)", [7, "é'\n", b"\x00\xff", 1.5])
        assert (done.last_insert_rowid, done.rows_affected) == (7, 1)
        found = await client.execute("select * from t where id = :id", {"id": 7})
        assert [tuple(row) for row in found.rows] == [(7, "é'\n", b"\x00\xff", 1.5)]
        results = await client.batch(["insert into t(name) values('a')", "select count(*) from t"])
        assert results[1].rows[0][0] == 2
        assert await _code(client.execute("selec 1")) == "SQL_PARSE_ERROR"
        assert await _code(client.execute("insert into t(id) values(7)")) == "SQLITE_CONSTRAINT"
        twice = client.batch(["insert into t(name) values('b')", "insert into t(id) values(7)"])
        assert await _code(twice) == "SQLITE_CONSTRAINT"
        assert (await client.execute("select count(*) from t")).rows[0][0] == 2
        if url.startswith("ws"):
            for ends, count in (("rollback", 2), ("commit", 3)):
                transaction = client.transaction()
                await transaction.execute("insert into t(name) values('x')")
                await getattr(transaction, ends)()
                assert (await client.execute("select count(*) from t")).rows[0][0] == count


async def _code(work: Awaitable[object]) -> str:
    """What the client is told by an operation that fails."""
    import libsql_client

    try:
        await work
    except libsql_client.LibsqlError as error:
        return str(error.code)
    return "it did not fail"


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
