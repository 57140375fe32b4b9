"""What a connection remembers: settings, TEMP objects, counters, and whose they are (R21)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import CLOSE, Bench, batch, code_of, execute, leading, results, rows_of
from walship.errors import Overloaded, StatementFailed
from walship.hrana.types import IsOk, Not
from walship.service.limits import Limits


async def test_state_of_a_connection_idles_longer_than_a_transaction_unless_connections_run_out(tmp_path: Path) -> None:
    now = [0.0]
    async with leading(tmp_path / "n", Limits(connections=2), clock=lambda: now[0]) as bench:
        held = [(await bench.on(0, execute("CREATE TEMP TABLE mine (a)")))[0].stream]
        now[0] += 1
        held.append((await bench.on(0, execute("CREATE TEMP TABLE mine (a)")))[0].stream)
        with pytest.raises(Overloaded):
            await bench.on(0, execute("BEGIN"))  # both were used a moment ago
        now[0] += 11
        await bench.service.sweep()
        _, answers = await bench.on(held[0], execute("SELECT count(*) FROM mine"))
        assert rows_of(answers[0]) == [[0]]
        assert (await bench.on(0, execute("BEGIN")))[0].stream
        with pytest.raises(StatementFailed) as caught:
            await bench.on(held[1], execute("SELECT 1"))
        assert caught.value.statement_code == "STREAM_EXPIRED"


async def test_pragma_and_temp_stay_on_their_stream(bench: Bench) -> None:
    """R21: the stream owns its connection from then on."""
    reply, _ = await bench.on(0, execute("PRAGMA foreign_keys = ON"), execute("CREATE TEMP TABLE mine (a)"))
    assert reply.stream
    _, answers = await bench.on(reply.stream, execute("PRAGMA foreign_keys"), execute("INSERT INTO mine VALUES (1)"))
    assert (rows_of(answers[0]), answers[1]["type"]) == ([[1]], "ok")
    await bench.on(reply.stream, CLOSE)
    assert bench.service.status().connections == 0
    assert await bench.rows("PRAGMA foreign_keys") == [[0]]


async def test_settings_hold_no_connection_between_requests_and_are_in_force_in_each(tmp_path: Path) -> None:
    """A hundred clients that set foreign_keys when they start must not use up the connections for good."""
    async with leading(tmp_path / "n", Limits(connections=2)) as bench:
        await bench.run("CREATE TABLE p (id INTEGER PRIMARY KEY)")
        await bench.run("CREATE TABLE c (p REFERENCES p)")
        both = execute("PRAGMA foreign_keys = ON"), execute("PRAGMA recursive_triggers = ON")
        streams = [(await bench.on(0, *both))[0].stream for _ in range(5)]
        assert (len(set(streams)), bench.service.status().connections) == (5, 0)
        for stream in streams:
            reply, answers = await bench.on(stream, execute("INSERT INTO c VALUES (404)"))
            assert (reply.stream, code_of(answers[0])) == (stream, "SQLITE_CONSTRAINT")
        _, answers = await bench.on(streams[0], execute("PRAGMA foreign_keys"), execute("PRAGMA recursive_triggers"))
        assert [rows_of(answer) for answer in answers] == [[[1]], [[1]]]
        for _ in range(3):
            begun, answers = await bench.on(0, execute("BEGIN"), execute("PRAGMA foreign_keys"))
            assert rows_of(answers[1]) == [[0]], "nobody else inherits them"
            await bench.on(begun.stream, CLOSE)


async def test_foreign_keys_set_inside_a_transaction_stay_ignored_after_it(bench: Bench) -> None:
    """As in SQLite, where the PRAGMA is a no-op there."""
    begun, _ = await bench.on(0, execute("PRAGMA recursive_triggers = ON"), execute("BEGIN"))
    await bench.on(begun.stream, execute("PRAGMA foreign_keys = ON"), execute("COMMIT"))
    _, answers = await bench.on(begun.stream, execute("PRAGMA foreign_keys"), execute("PRAGMA recursive_triggers"))
    assert [rows_of(answer) for answer in answers] == [[[0]], [[1]]]


async def test_settings_that_were_forgotten_are_reported(tmp_path: Path) -> None:
    """R21: not silently reset."""
    now = [0.0]
    async with leading(tmp_path / "n", Limits(), clock=lambda: now[0]) as bench:
        reply, _ = await bench.on(0, execute("PRAGMA foreign_keys = ON"))
        now[0] += 601
        await bench.service.sweep()
        with pytest.raises(StatementFailed) as caught:
            await bench.on(reply.stream, execute("SELECT 1"))
        assert caught.value.statement_code == "STREAM_EXPIRED"


async def test_reused_connections_carry_nothing_over(tmp_path: Path) -> None:
    """hrana.md 6, pitfall 11: neither settings, nor TEMP objects, nor an open transaction."""
    async with leading(tmp_path / "n", Limits(stream_threads=1)) as bench:
        await bench.on(0, execute("PRAGMA foreign_keys = ON"), execute("CREATE TEMP TABLE mine (a)"), CLOSE)
        await bench.on(0, execute("BEGIN"), execute("SELECT 1"), CLOSE)  # its tidying is behind the other's
        look = [execute("BEGIN"), execute("PRAGMA foreign_keys"), execute("SELECT * FROM temp.mine")]
        for _ in range(3):
            _, answers = await bench.on(0, *look)
            assert (rows_of(answers[1]), code_of(answers[2])) == ([[0]], "SQLITE_UNKNOWN")


async def test_migration_batch_with_foreign_keys_off_is_one_connection(bench: Bench) -> None:
    """hrana.md 2.4, `migrate`."""
    await bench.run("CREATE TABLE p (id INTEGER PRIMARY KEY)")
    await bench.run("CREATE TABLE c (id INTEGER PRIMARY KEY, p REFERENCES p DEFERRABLE INITIALLY DEFERRED)")
    request = batch(
        "PRAGMA foreign_keys=off",
        ("BEGIN DEFERRED", IsOk(0)),
        ("INSERT INTO c VALUES (1, 42)", IsOk(1)),
        ("COMMIT", IsOk(2)),
        ("ROLLBACK", Not(IsOk(3))),
        "PRAGMA foreign_keys=on",
    )
    result = results(await bench.call(request, CLOSE))[0]["response"]["result"]
    assert [r is not None for r in result["step_results"]] == [True, True, True, True, False, True]
    assert await bench.rows("SELECT count(*) FROM c") == [[1]]


async def test_an_insert_that_adds_nothing_answers_no_rowid_of_another_stream(bench: Bench) -> None:
    """R21: on a shared connection SQLite still knows the rowid that some other client's row got."""
    await bench.run("CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE)")
    await bench.run("INSERT INTO t VALUES (777, 'a')")
    ignored = await bench.run("INSERT OR IGNORE INTO t VALUES (5, 'a')")
    assert ignored["response"]["result"]["last_insert_rowid"] == "0"
    _, answers = await bench.on(
        0, execute("INSERT INTO t VALUES (9, 'b')"), execute("INSERT OR IGNORE INTO t VALUES (6, 'a')")
    )
    assert answers[1]["response"]["result"]["last_insert_rowid"] == "9"


async def test_counters_are_those_of_the_stream(bench: Bench) -> None:
    """R21: changes(), total_changes(), last_insert_rowid() though all streams share the writer's connection."""
    await bench.run("CREATE TABLE t (id INTEGER PRIMARY KEY, a)")
    ask = execute("SELECT changes(), total_changes(), last_insert_rowid()")
    one, _ = await bench.on(0, execute("INSERT INTO t VALUES (10, 'a')"))
    two, _ = await bench.on(0, execute("INSERT INTO t VALUES (20, 'b'), (21, 'c')"))
    await bench.run("DELETE FROM t WHERE id = 10")
    assert rows_of((await bench.on(one.stream, ask))[1][0]) == [[1, 1, 10]]
    assert rows_of((await bench.on(two.stream, ask))[1][0]) == [[2, 2, 21]]
    assert await bench.rows("SELECT changes(), total_changes(), last_insert_rowid()") == [[0, 0, 0]]
    _, answers = await bench.on(
        one.stream, execute("INSERT INTO t (a) SELECT 'row ' || last_insert_rowid() || ' ' || changes()")
    )
    assert await bench.rows("SELECT a FROM t ORDER BY id DESC LIMIT 1") == [["row 10 1"]]
    _, answers = await bench.on(two.stream, execute("BEGIN"), ask, execute("INSERT INTO t VALUES (30, 'd')"), ask)
    assert (rows_of(answers[1]), rows_of(answers[3])) == ([[2, 2, 21]], [[1, 3, 30]])


async def test_triggers_see_sqlites_own_counters(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    await bench.run("CREATE TABLE log (id)")
    await bench.run("CREATE TRIGGER tr AFTER INSERT ON t BEGIN INSERT INTO log VALUES (last_insert_rowid()); END")
    await asyncio.gather(*[bench.run("INSERT INTO t VALUES (?)", n * 7) for n in range(1, 20)])
    assert await bench.rows("SELECT count(*) FROM t JOIN log USING (id)") == [[19]]
