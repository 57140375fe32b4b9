"""Read batches, the inline budget and its two traps, floors and acknowledgments (R17, perf.md 3), streamed cursors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.service.bench import (
    CLOSE,
    Bench,
    code_of,
    execute,
    following,
    leading,
    results,
    rows_of,
    steps_of,
)
from tests.waiting import eventually
from walship.errors import Behind, Overloaded, StatementFailed, WriteLost
from walship.formats.position import Position
from walship.hrana.types import Level
from walship.service.limits import Limits
from walship.service.request import Call

SCAN = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT count(*) FROM n"


async def fill(bench: Bench, rows: int = 1000) -> None:
    await bench.run("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT)")
    await bench.run(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) "
        "INSERT INTO t SELECT i, 'name ' || i FROM n"
    )


# --- batches --------------------------------------------------------------------------------------------------------


async def test_reads_of_one_tick_share_one_read_transaction(bench: Bench) -> None:
    """R17."""
    await fill(bench)
    before = bench.service.status().read_batches
    answers = await asyncio.gather(*[bench.rows("SELECT name FROM t WHERE id = ?", n) for n in range(1, 65)])
    assert answers == [[[f"name {n}"]] for n in range(1, 65)]
    assert bench.service.status().read_batches == before + 1


async def test_error_of_one_member_leaves_the_others_alone(bench: Bench) -> None:
    await fill(bench)
    good, bad, over, write, last = await asyncio.gather(
        bench.run("SELECT name FROM t WHERE id = 1"),
        bench.run("SELECT nope FROM t"),
        bench.run(SCAN.format(200_000)),
        bench.run("WITH x AS (SELECT 1) DELETE FROM t WHERE id = 2"),
        bench.run("SELECT name FROM t WHERE id = 3"),
    )
    assert (rows_of(good), rows_of(last), rows_of(over)) == ([["name 1"]], [["name 3"]], [[200_000]])
    assert code_of(bad) == "SQL_INPUT_ERROR"
    assert write["response"]["result"]["affected_row_count"] == 1


async def test_sixty_four_mixed_clients_each_get_their_own_rows(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (client INTEGER, n INTEGER, mark TEXT)")

    async def client(number: int) -> None:
        for n in range(6):
            mark = f"client {number} round {n}"
            if number % 3 == 0:
                _, answers = await bench.on(
                    0,
                    execute("BEGIN"),
                    execute("INSERT INTO t VALUES (?, ?, ?)", number, n, mark),
                    execute("COMMIT"),
                    CLOSE,
                )
                assert [answer["type"] for answer in answers] == ["ok"] * 4
            else:
                await bench.run("INSERT INTO t VALUES (?, ?, ?)", number, n, mark)
            assert await bench.rows("SELECT mark FROM t WHERE client = ? AND n = ?", number, n) == [[mark]]
            reply = await bench.service.cursor(
                Call([]), steps_of(f"SELECT max(n), {number} FROM t WHERE client = {number}")
            )
            assert f'"value":"{number}"'.encode() in b"".join([chunk async for chunk in reply.lines])

    await asyncio.gather(*map(client, range(64)))
    assert await bench.rows("SELECT count(*), count(DISTINCT mark) FROM t") == [[384, 384]]


# --- the budget -----------------------------------------------------------------------------------------------------


async def test_long_read_moves_to_a_worker_and_its_text_is_remembered_for_a_while(tmp_path: Path) -> None:
    """perf.md 3, finding 3."""
    now = [0.0]
    async with leading(tmp_path / "n", Limits(), clock=lambda: now[0]) as bench:
        sql = SCAN.format(100_000)
        assert await bench.rows(sql) == [[100_000]]
        assert (bench.service.status().reads_moved, bench.service.status().reads_sent_on) == (1, 1)
        assert await bench.rows(sql) == [[100_000]]
        assert (bench.service.status().reads_moved, bench.service.status().reads_sent_on) == (1, 2)
        now[0] += Limits().slow_seconds + 1
        assert await bench.rows(sql) == [[100_000]]
        assert (bench.service.status().reads_moved, bench.service.status().reads_sent_on) == (2, 3)


async def test_steps_are_counted_per_run_and_not_per_prepared_statement(bench: Bench) -> None:
    """perf.md 3, trap 1: SQLite's own counter survives executions; a cached point read must never be banished."""
    await fill(bench, 10)
    sql = "SELECT name FROM t WHERE id = ?"
    rounds, together = 120, 50
    for _ in range(rounds):
        await asyncio.gather(*[bench.rows(sql, 1 + n % 10) for n in range(together)])
    assert rounds * together * 13 > Limits().inline_steps
    assert bench.service.status().reads_moved == 0


async def test_a_read_over_its_budget_does_not_cost_the_next_batch_its_begin(tmp_path: Path) -> None:
    """SQLite calls the progress handler for our own BEGIN, COMMIT and ROLLBACK as well, now and then; with a stride of
    one step always. Interrupted there, a batch failed as a whole, and a worker died with everything queued for it."""
    limits = Limits(step_stride=1, worker_stride=1, inline_steps=500, read_seconds=0.05, read_workers=1)
    async with leading(tmp_path / "n", limits) as bench:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        for _ in range(3):
            assert code_of(await bench.run(endless)) == "SQLITE_INTERRUPT"
            assert await bench.rows("SELECT 1") == [[1]]


async def test_a_clock_that_jumps_banishes_nobody(tmp_path: Path) -> None:
    """perf.md 3, trap 2: the budget is steps, not time, so a descheduled thread changes nothing."""
    now = [0.0]

    def clock() -> float:
        now[0] += 10.0
        return now[0]

    async with leading(tmp_path / "n", Limits(), clock=clock) as bench:
        await bench.run("CREATE TABLE t (a)")
        for _ in range(20):
            assert await bench.rows("SELECT count(*) FROM t") == [[0]]
        assert bench.service.status().reads_moved == 0


async def test_point_reads_go_on_beside_scans(bench: Bench) -> None:
    """perf.md 3: while scans run on the workers, the loop thread serves point reads; by count, not by time."""
    await fill(bench)
    scan = SCAN.format(3_000_000)
    scans = [asyncio.ensure_future(bench.rows(scan)) for _ in range(2)]
    await eventually(lambda: bench.service.status().reads_moved == 2)
    served = 0
    while not all(task.done() for task in scans) and served < 2_000:
        assert await bench.rows("SELECT name FROM t WHERE id = ?", 7) == [["name 7"]]
        served += 1
    assert await asyncio.gather(*scans) == [[[3_000_000]]] * 2
    assert served >= 100


async def test_read_that_never_ends_is_interrupted(tmp_path: Path) -> None:
    """Never a hang: a read on a worker has a deadline, and its error is one of its own statement."""
    async with leading(tmp_path / "n", Limits(read_seconds=0.1)) as bench:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        assert code_of(await bench.run(endless)) == "SQLITE_INTERRUPT"
        assert await bench.rows("SELECT 1") == [[1]]


async def test_reads_that_wait_are_bounded(tmp_path: Path) -> None:
    async with leading(tmp_path / "n", Limits(read_queue=8)) as bench:
        answers = await asyncio.gather(*[bench.rows("SELECT 1") for _ in range(20)], return_exceptions=True)
        assert [type(answer) for answer in answers] == [list] * 8 + [Overloaded] * 12


async def test_abandoned_reads_do_not_stop_the_rest(bench: Bench) -> None:
    await fill(bench)
    tasks = [asyncio.ensure_future(bench.rows("SELECT count(*) FROM t")) for _ in range(6)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer for answer in answers if isinstance(answer, list)] == [[[1000]]] * 3


# --- positions ------------------------------------------------------------------------------------------------------


async def test_reply_names_the_position_that_covers_what_was_seen(bench: Bench) -> None:
    """R17: hi = publishing on a follower, lo = applied must cover the floor."""
    at = bench.host.watermarks.captured
    async with following(bench, at) as follower:
        marks = follower.host.watermarks
        reply = await follower.call(execute("SELECT 1"), CLOSE, floor=at)
        assert reply.position == at
        marks.publishing = Position(at.term, at.txid + 1)
        reply = await follower.call(execute("SELECT 1"), CLOSE, floor=at)
        assert reply.position == marks.publishing
        with pytest.raises(Behind):
            await follower.call(execute("SELECT 1"), CLOSE, floor=marks.publishing, wait_seconds=0.01)


async def test_read_waits_for_its_floor(bench: Bench) -> None:
    at = bench.host.watermarks.captured
    later = Position(at.term, at.txid + 1)
    async with following(bench, at) as follower:
        read = asyncio.ensure_future(follower.call(execute("SELECT 1"), CLOSE, floor=later, wait_seconds=5.0))
        await asyncio.sleep(0.02)
        assert not read.done()
        follower.host.watermarks.publishing = later
        follower.host.watermarks.applied = later
        assert (await read).position == later


async def test_floor_that_no_history_has_is_write_lost(bench: Bench) -> None:
    """R18."""
    at = bench.host.watermarks.captured
    async with following(bench, at) as follower:
        follower.host.watermarks.add_term(at.term + 1, at.txid)
        with pytest.raises(WriteLost):
            await follower.call(execute("SELECT 1"), CLOSE, floor=Position(at.term, at.txid + 5))


async def test_read_on_the_leader_waits_until_what_it_saw_is_acknowledged(tmp_path: Path) -> None:
    """R17: at `session` no reply leaves before acked covers it; `any` does not wait."""
    async with leading(tmp_path / "n", Limits(ack_seconds=0.05), acknowledging=False) as bench:
        marks = bench.host.watermarks
        marks.acked = marks.captured
        await bench.run("CREATE TABLE t (a)", ack=0)
        assert await bench.rows("SELECT count(*) FROM t", level=Level.ANY) == [[0]]
        with pytest.raises(Behind):
            await bench.rows("SELECT count(*) FROM t")
        read = asyncio.ensure_future(bench.call(execute("SELECT count(*) FROM t"), CLOSE))
        await asyncio.sleep(0.01)
        marks.acked = marks.captured
        assert (await read).position == marks.acked


async def test_own_write_is_seen_by_the_next_read(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    for n in range(50):
        reply = await bench.call(execute("INSERT INTO t VALUES (?)", n), CLOSE)
        assert await bench.rows("SELECT count(*) FROM t", floor=reply.position) == [[n + 1]]


async def test_pipeline_of_a_write_and_a_read_sees_the_write(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply = await bench.call(
        execute("SELECT count(*) FROM t"), execute("INSERT INTO t VALUES (1)"), execute("SELECT count(*) FROM t"), CLOSE
    )
    answers = results(reply)
    assert (rows_of(answers[0]), rows_of(answers[2])) == ([[0]], [[1]])


# --- cursors --------------------------------------------------------------------------------------------------------

WIDE = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT i, hex(zeroblob(50)) FROM n"
)


async def test_large_cursor_comes_in_bounded_chunks_and_whole(bench: Bench) -> None:
    reply = await bench.service.cursor(Call([]), steps_of(WIDE))
    chunks = [chunk async for chunk in reply.lines]
    assert len(chunks) > 10
    # A chunk ends at the first list of rows past its size.
    assert max(map(len, chunks)) < 8 * Limits().chunk_bytes
    lines = [msgspec.json.decode(line) for line in b"".join(chunks).splitlines()]
    assert [int(line["row"][0]["value"]) for line in lines if line["type"] == "row"] == list(range(1, 20_001))
    assert [line["type"] for line in lines[:1] + lines[-1:]] == ["step_begin", "step_end"]
    assert (bench.service.status().cursors, bench.service.status().connections) == (0, 0)


async def test_cursor_shows_one_snapshot_while_writes_go_on(bench: Bench) -> None:
    await fill(bench, 20_000)
    reply = await bench.service.cursor(Call([]), steps_of("SELECT id, name FROM t"))
    first = await anext(reply.lines)
    await bench.run("DELETE FROM t")
    rest = b"".join([chunk async for chunk in reply.lines])
    assert (first + rest).count(b'"row"') == 2 * 20_000  # the type and the key


async def test_cursor_stopped_early_gives_its_connection_back(bench: Bench) -> None:
    reply = await bench.service.cursor(Call([]), steps_of(WIDE))
    await anext(reply.lines)
    assert bench.service.status().connections == 1
    await reply.lines.aclose()  # type: ignore[attr-defined]
    assert (bench.service.status().cursors, bench.service.status().connections) == (0, 0)


async def test_cursor_that_nobody_reads_is_closed_and_says_so(tmp_path: Path) -> None:
    now = [0.0]
    async with leading(tmp_path / "n", Limits(), clock=lambda: now[0]) as bench:
        reply = await bench.service.cursor(Call([]), steps_of(WIDE))
        await anext(reply.lines)
        now[0] += Limits().read_seconds + 1
        await bench.service.sweep()
        assert bench.service.status().connections == 0
        with pytest.raises(StatementFailed) as caught:
            await anext(reply.lines)
        assert caught.value.statement_code == "STREAM_EXPIRED"


async def test_cursor_on_a_follower_reads_only(bench: Bench) -> None:
    await fill(bench, 10)
    async with following(bench, bench.host.watermarks.captured) as follower:
        reply = await follower.service.cursor(Call([], read_only=True), steps_of("SELECT count(*) FROM t", "SELECT 2"))
        assert b"".join([chunk async for chunk in reply.lines]).count(b"step_end") == 2


async def test_floor_is_asked_again_when_the_batch_begins(bench: Bench) -> None:
    """R17: lo must cover the floor of each member at BEGIN, whatever was true when it was admitted."""
    at = bench.host.watermarks.captured
    async with following(bench, at) as follower:
        read = asyncio.ensure_future(follower.call(execute("SELECT 1"), CLOSE, floor=at))
        await asyncio.sleep(0)  # admitted; its batch begins at the next turn of the loop
        follower.host.watermarks.add_term(at.term + 1, at.txid - 1)
        follower.host.watermarks.publishing = Position(at.term + 1, at.txid)
        follower.host.watermarks.applied = Position(at.term + 1, at.txid)
        with pytest.raises(Behind):
            await read


async def test_linearizable_reads_are_refused_on_a_follower(bench: Bench) -> None:
    """R18: never a silent downgrade."""
    async with following(bench, bench.host.watermarks.captured) as follower:
        with pytest.raises(Behind):
            await follower.rows("SELECT 1", level=Level.LINEARIZABLE)
    assert await bench.rows("SELECT 1", level=Level.LINEARIZABLE) == [[1]]


async def test_no_read_leaves_its_snapshot_behind(bench: Bench) -> None:
    """A statement given up between two rows must not keep the shared connection's snapshot for later reads."""
    await bench.run("CREATE TABLE t (a)")
    some = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 800) "
    given_up = [
        some + "SELECT i, hex(zeroblob(100)), (SELECT count(*) FROM t) FROM n",  # too large for one chunk
        some + "SELECT CAST(x'ff' AS TEXT), (SELECT count(*) FROM t) FROM n",  # fails when fetched
        some + "SELECT 9e999, (SELECT count(*) FROM t) FROM n",  # fails when encoded
    ]
    for number, sql in enumerate(given_up):
        reply = await bench.service.cursor(Call([]), steps_of(sql))
        await bench.run("INSERT INTO t VALUES (?)", number)
        assert await bench.rows("SELECT count(*) FROM t") == [[number * 2 + 1]]
        await bench.run(sql)
        await bench.run("INSERT INTO t VALUES (?)", number)
        assert await bench.rows("SELECT count(*) FROM t") == [[number * 2 + 2]]
        await reply.lines.aclose()  # type: ignore[attr-defined]


async def test_cursor_stopped_early_leaves_no_snapshot_on_the_connection(tmp_path: Path) -> None:
    async with leading(tmp_path / "n", Limits(stream_threads=1)) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply = await bench.service.cursor(Call([]), steps_of(WIDE + ", (SELECT count(*) FROM t)"))
        await anext(reply.lines)
        await reply.lines.aclose()  # type: ignore[attr-defined]
        del reply
        for count in (1, 2):
            await bench.run("INSERT INTO t VALUES (1)")
            again = await bench.service.cursor(
                Call([]), steps_of(WIDE.replace("hex(", "(SELECT count(*) FROM t), hex("))
            )
            assert f'"value":"{count}"}},{{"type":"text"'.encode() in await anext(again.lines)
            await again.lines.aclose()  # type: ignore[attr-defined]
