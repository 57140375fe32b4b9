"""Streams with state: transactions (R21), isolation of clients that share the writer (R20), bounds and floors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import CLOSE, Bench, batch, code_of, execute, following, leading, results, rows_of, steps_of
from walship.errors import NotLeader, NotReadOnly, Overloaded, ProtocolViolation, WriteLost
from walship.formats.position import Position
from walship.hrana.types import And, GetAutocommitRequest, IsOk, Level, Not, SequenceRequest
from walship.service.limits import Limits
from walship.service.request import Call
from walship.service.session import State

PARENTS = "CREATE TABLE p (id INTEGER PRIMARY KEY)"
CHILDREN = "CREATE TABLE c (id INTEGER PRIMARY KEY, p REFERENCES p DEFERRABLE INITIALLY DEFERRED)"


def state_of(bench: Bench, stream: int) -> State:
    return bench.service._streams[stream].state


# --- R20: one client's failure is its own ---------------------------------------------------------------------------


async def test_insert_or_rollback_of_one_client_spares_the_others(bench: Bench) -> None:
    """R20: jobs of one group are separate transactions."""
    await bench.run(PARENTS)
    await bench.run("INSERT INTO p VALUES (0)")
    answers = await asyncio.gather(
        *[bench.run("INSERT OR ROLLBACK INTO p VALUES (?)", 0 if n % 2 else n + 1) for n in range(20)]
    )
    assert [answer["type"] for answer in answers] == ["ok", "error"] * 10
    assert await bench.rows("SELECT count(*) FROM p") == [[11]]


async def test_deferred_foreign_key_failure_of_one_client_spares_the_others(bench: Bench) -> None:
    """R20: a deferred violation surfaces at its own COMMIT, and the closing stream rolls it back."""
    await bench.run(PARENTS)
    await bench.run(CHILDREN)

    async def orphan() -> str:
        request = batch("PRAGMA foreign_keys = ON", "BEGIN", "INSERT INTO c VALUES (NULL, 99)", ("COMMIT", IsOk(2)))
        outcome = results(await bench.call(request, CLOSE))[0]["response"]["result"]
        return str(outcome["step_errors"][3]["code"])

    answers = await asyncio.gather(orphan(), *[bench.run("INSERT INTO p VALUES (?)", n) for n in range(10)], orphan())
    assert (answers[0], answers[-1]) == ("SQLITE_CONSTRAINT", "SQLITE_CONSTRAINT")
    assert await bench.rows("SELECT (SELECT count(*) FROM p), (SELECT count(*) FROM c)") == [[10, 0]]


async def test_transaction_left_open_by_a_closing_call_is_rolled_back(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply = await bench.call(execute("BEGIN"), execute("INSERT INTO t VALUES (1)"), GetAutocommitRequest(), CLOSE)
    assert [answer["type"] for answer in results(reply)] == ["ok"] * 4
    assert results(reply)[2]["response"]["is_autocommit"] is False
    assert (reply.stream, reply.autocommit) == (0, True)
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]


async def test_the_batch_shape_of_all_clients_needs_no_connection_of_its_own(bench: Bench) -> None:
    """hrana.md 2.4: BEGIN, steps, COMMIT, ROLLBACK if not ok: one job of the writer, kept stream or not."""
    await bench.run("CREATE TABLE t (a UNIQUE)")
    shape = batch(
        "BEGIN IMMEDIATE",
        ("INSERT INTO t VALUES (1)", IsOk(0)),
        ("INSERT INTO t VALUES (2)", IsOk(1)),
        ("COMMIT", IsOk(2)),
        ("ROLLBACK", And([IsOk(0), Not(IsOk(3))])),
    )
    turns = bench.host.writer.statistics().turns
    reply, answers = await bench.on(0, shape)
    assert [r is not None for r in answers[0]["response"]["result"]["step_results"]] == [True] * 4 + [False]
    reply, answers = await bench.on(reply.stream, shape)
    assert [r is not None for r in answers[0]["response"]["result"]["step_results"]] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert bench.host.writer.statistics().turns == turns
    assert bench.service.status().connections == 0
    assert await bench.rows("SELECT count(*) FROM t") == [[2]]


# --- R21: the states ------------------------------------------------------------------------------------------------


async def test_begin_takes_nothing(bench: Bench) -> None:
    """R21: a deferred BEGIN holds neither snapshot nor turn, so others write on and are seen."""
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"))
    assert state_of(bench, reply.stream) is State.DEFERRED
    await bench.run("INSERT INTO t VALUES (1)")
    _, answers = await bench.on(reply.stream, execute("SELECT count(*) FROM t"))
    assert rows_of(answers[0]) == [[1]]


async def test_first_statement_a_read_holds_a_snapshot_and_no_turn(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("SELECT count(*) FROM t"))
    assert state_of(bench, reply.stream) is State.READING
    await bench.run("INSERT INTO t VALUES (1)")
    _, answers = await bench.on(reply.stream, execute("SELECT count(*) FROM t"))
    assert rows_of(answers[0]) == [[0]]


async def test_first_statement_a_write_takes_the_turn_until_the_end(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    assert state_of(bench, reply.stream) is State.WRITING
    other = asyncio.ensure_future(bench.run("INSERT INTO t VALUES (2)"))
    await asyncio.sleep(0.05)
    assert not other.done()
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]
    done, _ = await bench.on(reply.stream, execute("COMMIT"))
    assert (done.autocommit, (await other)["type"]) == (True, "ok")
    assert await bench.rows("SELECT a FROM t ORDER BY rowid") == [[1], [2]]


async def test_upgrade_after_a_foreign_commit_is_busy(bench: Bench) -> None:
    """R21: SQLITE_BUSY_SNAPSHOT, and the transaction may still end; the turn is not kept."""
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("SELECT count(*) FROM t"))
    await bench.run("INSERT INTO t VALUES (1)")
    _, answers = await bench.on(reply.stream, execute("INSERT INTO t VALUES (2)"))
    assert code_of(answers[0]) == "SQLITE_BUSY"
    assert (await bench.run("INSERT INTO t VALUES (3)"))["type"] == "ok"
    _, answers = await bench.on(reply.stream, execute("ROLLBACK"), execute("INSERT INTO t VALUES (4)"))
    assert [answer["type"] for answer in answers] == ["ok", "ok"]
    assert await bench.rows("SELECT a FROM t ORDER BY rowid") == [[1], [3], [4]]


async def test_upgrade_without_a_foreign_commit_writes(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, answers = await bench.on(
        0, execute("BEGIN"), execute("SELECT count(*) FROM t"), execute("INSERT INTO t VALUES (1)"), execute("COMMIT")
    )
    assert [answer["type"] for answer in answers] == ["ok"] * 4
    assert (state_of(bench, reply.stream), reply.autocommit) == (State.AUTOCOMMIT, True)
    assert await bench.rows("SELECT count(*) FROM t") == [[1]]


async def test_commit_replies_with_a_position_that_covers_it(bench: Bench) -> None:
    """R17, R21: the reply to COMMIT waits for the acknowledged position."""
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"))
    before = bench.host.watermarks.captured
    done, _ = await bench.on(reply.stream, execute("COMMIT"))
    assert done.position.txid == before.txid + 1
    assert bench.host.watermarks.acked == done.position


@pytest.mark.parametrize("begin", ["BEGIN TRANSACTION READONLY", "BEGIN READONLY"])
async def test_readonly_transaction_runs_on_a_follower_and_refuses_writes(bench: Bench, begin: str) -> None:
    """R21: READONLY goes to a follower; stock SQLite would take the word for a name (hrana.md 3.1)."""
    await bench.run("CREATE TABLE t (a)")
    for host in ("leader", "follower"):
        async with following(bench, bench.host.watermarks.captured) as follower:
            node = bench if host == "leader" else follower
            reply, answers = await node.on(
                0, execute(begin), execute("SELECT count(*) FROM t"), execute("DELETE FROM t")
            )
            assert (rows_of(answers[1]), code_of(answers[2])) == ([[0]], "SQLITE_READONLY")
            assert state_of(node, reply.stream) is State.READONLY
            reply, answers = await node.on(reply.stream, execute("COMMIT"))
            assert reply.autocommit
            assert node.service.status().connections == 0


async def test_readonly_batch_of_a_closing_stream_is_a_plain_read(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    shape = batch("BEGIN TRANSACTION READONLY", ("SELECT 1", IsOk(0)), ("COMMIT", IsOk(1)), ("ROLLBACK", Not(IsOk(2))))
    async with following(bench, bench.host.watermarks.captured) as follower:
        result = results(await follower.call(shape, CLOSE))[0]["response"]["result"]
        assert [r is not None for r in result["step_results"]] == [True, True, True, False]
        assert follower.service.status().reads_inline == 1


async def test_write_in_a_transaction_on_a_follower_is_refused(bench: Bench) -> None:
    async with following(bench, bench.host.watermarks.captured) as follower:
        with pytest.raises(NotLeader):
            await follower.on(0, execute("BEGIN IMMEDIATE"))
        with pytest.raises(NotReadOnly):
            await follower.on(0, execute("BEGIN"), read_only=True)
        assert follower.service.status().streams == 0


async def test_savepoints_and_autocommit_of_a_stream_are_sqlites_own(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, answers = await bench.on(
        0, execute("SAVEPOINT s"), execute("INSERT INTO t VALUES (1)"), GetAutocommitRequest()
    )
    assert answers[2]["response"]["is_autocommit"] is False
    reply, _ = await bench.on(
        reply.stream, execute("INSERT INTO t VALUES (2)"), execute("ROLLBACK TO s"), execute("RELEASE s")
    )
    assert reply.autocommit
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]


async def test_insert_or_rollback_ends_the_transaction_and_gives_the_turn_back(bench: Bench) -> None:
    """hrana.md 6, pitfall 7."""
    await bench.run("CREATE TABLE t (a UNIQUE)")
    reply, answers = await bench.on(
        0,
        execute("BEGIN"),
        execute("INSERT INTO t VALUES (1)"),
        execute("INSERT OR ROLLBACK INTO t VALUES (1)"),
        execute("INSERT INTO t VALUES (2)"),
        execute("COMMIT"),
    )
    assert [answer["type"] for answer in answers] == ["ok", "ok", "error", "ok", "error"]
    assert reply.autocommit
    assert await bench.rows("SELECT a FROM t") == [[2]]


# --- bounds, floors -------------------------------------------------------------------------------------------------


async def test_connections_are_bounded_and_the_refusal_changes_nothing(tmp_path: Path) -> None:
    async with leading(tmp_path / "n", Limits(connections=2)) as bench:
        open_ = [(await bench.on(0, execute("BEGIN")))[0].stream for _ in range(2)]
        with pytest.raises(Overloaded):
            await bench.on(0, execute("BEGIN"))
        await bench.on(open_[0], execute("COMMIT"))
        assert (await bench.on(0, execute("BEGIN")))[0].stream
        assert bench.service.status().streams == 3


async def test_unknown_stream_is_a_protocol_error_but_closing_it_is_calm(bench: Bench) -> None:
    """hrana.md 2.1: clients close batons that are long dead."""
    with pytest.raises(ProtocolViolation):
        await bench.on(12345, execute("SELECT 1"))
    reply, answers = await bench.on(12345, CLOSE)
    assert (reply.stream, answers[0]["type"]) == (0, "ok")


async def test_refusal_before_a_call_begins_leaves_the_transaction_as_it_was(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"))
    bench.host.watermarks.add_term(2, 10_000)
    with pytest.raises(WriteLost):
        await bench.on(reply.stream, execute("SELECT 1"), floor=Position(1, 20_000))
    assert state_of(bench, reply.stream) is State.DEFERRED


async def test_requests_of_one_stream_run_in_order(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"))
    await asyncio.gather(*[bench.on(reply.stream, execute("INSERT INTO t VALUES (?)", n)) for n in range(20)])
    await bench.on(reply.stream, execute("COMMIT"))
    assert await bench.rows("SELECT a FROM t ORDER BY rowid") == [[n] for n in range(20)]


async def test_sequence_with_a_transaction_of_its_own_stays_open_only_on_a_kept_stream(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    sql = "BEGIN; INSERT INTO t VALUES (1); SELECT nope"
    reply, answers = await bench.on(0, SequenceRequest(sql=sql))
    assert (answers[0]["type"], reply.autocommit) == ("error", False)
    reply, _ = await bench.on(reply.stream, execute("COMMIT"))
    assert await bench.rows("SELECT count(*) FROM t") == [[1]]


async def test_cursor_inside_a_transaction_sees_its_writes(bench: Bench) -> None:
    """hrana.md 2.2: the serverless clients run everything through cursors."""
    await bench.run("CREATE TABLE t (a)")
    call = Call([], keep=True)
    begin = await bench.service.cursor(call, steps_of("BEGIN"))
    assert (begin.stream != 0, begin.autocommit) == (True, False)
    call = Call([], keep=True, stream=begin.stream, level=Level.SESSION)
    await bench.service.cursor(call, steps_of("INSERT INTO t VALUES (7)"))
    read = await bench.service.cursor(call, steps_of("SELECT a FROM t"))
    assert b'"value":"7"' in b"".join([chunk async for chunk in read.lines])
    end = await bench.service.cursor(call, steps_of("COMMIT"))
    assert end.autocommit
    assert await bench.rows("SELECT a FROM t") == [[7]]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


async def test_endless_read_of_a_stream_is_interrupted_and_the_stream_lives_on(tmp_path: Path) -> None:
    """Never a hang: what only reads has a deadline everywhere."""
    async with leading(tmp_path / "n", Limits(read_seconds=0.1)) as bench:
        reply, answers = await bench.on(0, execute("BEGIN"), execute(ENDLESS), execute("SELECT 1"))
        assert [code_of(answers[1]), rows_of(answers[2])] == ["SQLITE_INTERRUPT", [[1]]]
        assert state_of(bench, reply.stream) is not State.AUTOCOMMIT
