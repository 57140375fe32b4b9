"""Streams with state: transactions and turns (R21), isolation of clients that share the writer (R20)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import (
    CLOSE,
    Bench,
    batch,
    code_of,
    execute,
    following,
    leading,
    results,
    rows_of,
    steps_of,
)
from tests.waiting import eventually
from walship.engine.writer import WriterLimits
from walship.errors import (
    Draining,
    NotLeader,
    NotReadOnly,
    OutcomeUnknown,
    Overloaded,
    ProtocolViolation,
    StatementFailed,
    TransactionTimeout,
    WriteLost,
)
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


# --- turns that expire, clients that vanish -------------------------------------------------------------------------


async def test_idle_turn_is_lost_when_others_wait(tmp_path: Path) -> None:
    """R21: rolled back, the waiting write goes on, and the next request of the stream is TRANSACTION_TIMEOUT."""
    limits = WriterLimits(turn_idle_seconds=0.1)
    async with leading(tmp_path / "n", Limits(), writer_limits=limits) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
        assert (await bench.run("INSERT INTO t VALUES (2)"))["type"] == "ok"
        with pytest.raises(TransactionTimeout):
            await bench.on(reply.stream, execute("COMMIT"))
        assert await bench.rows("SELECT a FROM t") == [[2]]
        assert bench.service.status().connections == 0


async def test_turn_held_too_long_by_a_running_statement_is_stopped(tmp_path: Path) -> None:
    """R21: 30 s in all; the statement is interrupted and nothing of the transaction is kept."""
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT max(i) FROM n"
    async with leading(tmp_path / "n", Limits(), writer_limits=WriterLimits(turn_seconds=0.2)) as bench:
        await bench.run("CREATE TABLE t (a)")
        with pytest.raises(TransactionTimeout):
            await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"), execute(slow))
        assert await bench.rows("SELECT count(*) FROM t") == [[0]]
        assert bench.service.status().streams == 0


_LONG_READ = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000000) SELECT count(*) FROM n"


@pytest.mark.parametrize(("steps", "kept"), [((_LONG_READ, "COMMIT"), 0), (("COMMIT", _LONG_READ), 1)])
async def test_turn_held_too_long_is_told_as_what_became_of_it(
    tmp_path: Path, steps: tuple[str, ...], kept: int
) -> None:
    """R21: the statement interrupted may be a read, after or before the COMMIT: "nothing was kept" must be true."""
    async with leading(tmp_path / "n", Limits(), writer_limits=WriterLimits(turn_seconds=0.2)) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"))
        if kept:
            await bench.on(reply.stream, batch(*steps))
            await bench.on(reply.stream, execute("SELECT 1"))
        else:
            with pytest.raises(TransactionTimeout):
                await bench.on(reply.stream, batch(*steps))
        assert await bench.rows("SELECT count(*) FROM t") == [[kept]]
        await bench.run("INSERT INTO t VALUES (2)")  # the turn is free, the connection clean


async def test_vanished_client_is_rolled_back_and_its_turn_given_back(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    await bench.run(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 1000) INSERT INTO t SELECT i FROM n"
    )
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (-1)"))
    slow = execute("INSERT INTO t SELECT a.a FROM t a, t b LIMIT 300000")
    task = asyncio.ensure_future(bench.on(reply.stream, slow))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await bench.run("INSERT INTO t VALUES (-2)"))["type"] == "ok"
    await eventually(lambda: bench.service.status().streams == 0)
    assert await bench.rows("SELECT count(*) FROM t WHERE a = -1") == [[0]]


async def test_idle_transaction_expires_and_says_so(tmp_path: Path) -> None:
    """hrana.md 1.4: STREAM_EXPIRED only if a transaction was open; an idle stream without one lives on."""
    now = [0.0]
    async with leading(tmp_path / "n", Limits(), clock=lambda: now[0]) as bench:
        await bench.run("CREATE TABLE t (a)")
        idle, _ = await bench.on(0, execute("SELECT 1"))
        open_, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
        now[0] += 11
        await bench.service.sweep()
        with pytest.raises(StatementFailed) as caught:
            await bench.on(open_.stream, execute("COMMIT"))
        assert caught.value.statement_code == "STREAM_EXPIRED"
        _, answers = await bench.on(idle.stream, execute("SELECT count(*) FROM t"))
        assert rows_of(answers[0]) == [[0]]


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


# --- state of a connection ------------------------------------------------------------------------------------------


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
    await bench.run(PARENTS)
    await bench.run(CHILDREN)
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


# --- bounds, floors, draining ---------------------------------------------------------------------------------------


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


async def test_drain_lets_a_transaction_end_and_refuses_new_work(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    draining = asyncio.ensure_future(bench.service.drain(5.0))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await bench.run("SELECT 1")
    done, _ = await bench.on(reply.stream, execute("COMMIT"), CLOSE)
    await draining
    assert done.autocommit
    assert bench.service.status().streams == 0


async def test_drain_rolls_back_what_does_not_end(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    await bench.service.drain(0.05)
    assert bench.service.status().connections == 0
    assert bench.host.database.connect_reader().execute("SELECT count(*) FROM t").fetchall() == [(0,)]


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


async def test_drain_tells_who_waits_for_acknowledgments_that_the_outcome_is_unknown(tmp_path: Path) -> None:
    """A typed answer, and a stop that does not wait for followers that are away."""
    async with leading(tmp_path / "n", Limits(), acknowledging=False) as bench:
        call = asyncio.ensure_future(bench.run("CREATE TABLE t (a)"))
        await eventually(lambda: bench.host.watermarks.durable != bench.host.watermarks.acked)
        await bench.service.drain(0.1)
        async with asyncio.timeout(5):
            with pytest.raises(OutcomeUnknown):
                await call


async def test_drain_ends_although_a_write_in_the_writer_thread_does_not(bench: Bench) -> None:
    """A stop must end: what is not committed when its time is up is not done, in the shared writer too."""
    await bench.run("CREATE TABLE t (a)")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT max(i) FROM n"
    call = asyncio.ensure_future(bench.run(endless))
    await eventually(lambda: bench.host.writer is not None and bench.host.writer.statistics().queued == 1)
    await bench.service.drain(0.1)
    async with asyncio.timeout(5):
        assert code_of(await call) == "SQLITE_INTERRUPT"


async def test_drain_ends_although_a_statement_does_not(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    endless = asyncio.ensure_future(bench.on(reply.stream, execute(f"INSERT INTO t {ENDLESS}")))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    await bench.service.drain(0.05)
    _, answers = await endless
    assert code_of(answers[0]) == "SQLITE_INTERRUPT"
    assert bench.host.database.connect_reader().execute("SELECT count(*) FROM t").fetchall() == [(0,)]


async def test_nobody_gets_at_a_stream_whose_caller_vanished(bench: Bench) -> None:
    """Its statement still runs; another call must not run beside it on the same connection."""
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    fill = (
        "INSERT INTO t SELECT i FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n)"
    )
    running = asyncio.ensure_future(bench.on(reply.stream, execute(f"{fill} LIMIT 300000")))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    second = asyncio.ensure_future(bench.on(reply.stream, execute("COMMIT")))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(ProtocolViolation):
        await second
    await eventually(lambda: bench.service.status().connections == 0)
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]
