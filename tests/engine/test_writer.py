"""The writer: groups that share one fdatasync, turns first come first served, answers only when they are true."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import HERE, LeaderNode, ask, outside, read
from tests.waiting import eventually
from walship.engine.turn import Turn
from walship.engine.writer import Writer, WriterLimits
from walship.errors import Draining, OutcomeUnknown, Overloaded, StorageFailed, Unavailable
from walship.formats.position import Position

QUICK = WriterLimits(
    admission_wait_seconds=0.1, ack_timeout_seconds=0.3, ack_stall_seconds=0.05, foreign_poll_seconds=0.02
)


@asynccontextmanager
async def writing(
    directory: Path, *, required: int = 0, limits: WriterLimits = WriterLimits()
) -> AsyncIterator[tuple[LeaderNode, Writer]]:
    leader = LeaderNode(directory / "n", setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
    yield leader, leader.start_writer(required=required, limits=limits)
    await leader.stop()


def insert(number: int, body: str = "x") -> Callable[[apsw.Connection], None]:
    def job(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO t VALUES(?, ?)", (number, body))

    return job


def on_own_connection(leader: LeaderNode, *statements: str) -> None:
    connection = leader.database.connect_writer()
    for statement in statements:
        connection.execute(statement).fetchall()
    connection.close()


class TestGroups:
    async def test_each_job_is_a_transaction_of_its_own(self, tmp_path: Path) -> None:
        """R20: one client's failure undoes nothing of another's, and each commit has its own txid."""
        async with writing(tmp_path) as (leader, writer):
            before = leader.tip.position.txid
            jobs = [writer.submit(insert(number)) for number in (1, 2, 2, 3)]
            results = await asyncio.gather(*jobs, return_exceptions=True)
            assert isinstance(results[2], apsw.ConstraintError)
            assert read(leader.database, "SELECT id FROM t") == [(1,), (2,), (3,)]
            assert leader.tip.position.txid == before + 3

    async def test_the_position_covers_also_a_job_that_wrote_nothing(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            first = await writer.submit(insert(1))
            second = await writer.submit(lambda c: c.execute("UPDATE t SET body = 'x' WHERE id = 77").fetchall())
            assert second.position == first.position == leader.tip.position

    async def test_a_job_that_leaves_a_transaction_open_is_rolled_back(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            with pytest.raises(AssertionError, match="rolled back"):
                await writer.submit(lambda c: c.execute("BEGIN; INSERT INTO t VALUES(1, 'x')").fetchall())
            await writer.submit(insert(2))
            assert read(leader.database, "SELECT id FROM t") == [(2,)]

    @pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
    def test_frames_then_fdatasync_then_log_then_answer(self, tmp_path: Path) -> None:
        """engine.md 11.14: the order of system calls of one group commit; nothing is shipped before the fdatasync."""
        trace = tmp_path / "trace"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
        command = ["strace", "-f", "-y", "-s", "24", "-e", "trace=pwrite64,fdatasync,write", "-o", str(trace)]
        done = subprocess.run(
            [*command, sys.executable, str(HERE / "traced_writer.py"), str(tmp_path / "n")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode and "ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
        text = trace.read_text()
        between = text[text.index("begin-group") : text.index("answered")]
        calls = re.findall(r"(pwrite64|fdatasync|write)\(\d+<([^>]*)>", between)
        steps = [
            {"-wal": "wal", ".seg": "log"}[name[-4:]] + " " + call.replace("pwrite64", "write")
            for call, name in calls
            if name[-4:] in ("-wal", ".seg")
        ]
        steps = [step for number, step in enumerate(steps) if number == 0 or steps[number - 1] != step]
        assert steps == ["wal write", "wal fdatasync", "log write"]
        assert len(re.findall(r"-wal>.*\n", between)) > 8  # a real group: several transactions, one fdatasync


class TestAcknowledgments:
    async def test_nothing_is_answered_before_the_rule_is_met(self, tmp_path: Path) -> None:
        async with writing(tmp_path, required=1) as (leader, writer):
            answer = asyncio.ensure_future(writer.submit(insert(1)))
            await eventually(lambda: leader.watermarks.durable.txid > 1)
            await asyncio.sleep(0.02)
            assert not answer.done()
            leader.acks.record("b", leader.watermarks.durable)
            leader.move_acked()
            assert (await answer).position == leader.watermarks.durable

    async def test_zero_asked_for_is_answered_at_once_and_more_is_waited_for(self, tmp_path: Path) -> None:
        async with writing(tmp_path, required=1) as (leader, writer):
            await writer.submit(insert(1), ack=0)
            strict = asyncio.ensure_future(writer.submit(insert(2), ack=2))
            await eventually(lambda: leader.watermarks.durable.txid > 2)
            leader.acks.record("b", leader.watermarks.durable)
            leader.move_acked()
            await asyncio.sleep(0.03)
            assert not strict.done()
            leader.acks.record("c", leader.watermarks.durable)
            await strict

    async def test_without_acknowledgments_the_outcome_is_unknown(self, tmp_path: Path) -> None:
        async with writing(tmp_path, required=1, limits=QUICK) as (leader, writer):
            with pytest.raises(OutcomeUnknown, match="durable on the leader"):
                await writer.submit(insert(1))
            assert read(leader.database, "SELECT id FROM t") == [(1,)]

    async def test_admission_stops_before_begin_while_acknowledgments_stall(self, tmp_path: Path) -> None:
        """R14: typed as not done, and nothing was changed."""
        async with writing(tmp_path, required=1, limits=QUICK) as (leader, writer):
            first = asyncio.ensure_future(writer.submit(insert(1)))
            await eventually(lambda: leader.watermarks.durable.txid > 1)
            await asyncio.sleep(0.08)
            with pytest.raises(Overloaded, match="not begun"):
                await writer.submit(insert(2))
            leader.acks.record("b", leader.watermarks.durable)
            leader.move_acked()
            await first
            leader.acks.record("b", Position(leader.leader.term, 1 << 40))
            await writer.submit(insert(3))
            assert read(leader.database, "SELECT id FROM t") == [(1,), (3,)]

    async def test_a_disk_that_is_nearly_full_stops_admission_before_begin(self, tmp_path: Path) -> None:
        """R5: typed, not done, while a reserve remains. Any disk has less than an exabyte left."""
        node = LeaderNode(tmp_path / "n")
        writer = node.start_writer(limits=WriterLimits(reserve_bytes=1 << 60, admission_wait_seconds=0.1))
        try:
            with pytest.raises(Overloaded, match="nearly full"):
                await writer.submit(lambda connection: connection.execute("CREATE TABLE t(v)").fetchall())
            with pytest.raises(Overloaded, match="nearly full"):
                await writer.turn()
            assert writer.statistics().jobs == 0
        finally:
            await node.stop()

    async def test_admission_stops_at_the_bound_of_unacknowledged_bytes(self, tmp_path: Path) -> None:
        limits = WriterLimits(unacked_bytes=20_000, ack_stall_seconds=60, admission_wait_seconds=0.05)
        async with writing(tmp_path, required=1, limits=limits) as (leader, writer):
            jobs = [asyncio.ensure_future(writer.submit(insert(n, "y" * 9000), ack=None)) for n in range(4)]
            await eventually(lambda: writer.statistics().unacked_bytes > 20_000)
            with pytest.raises(Overloaded, match="bytes"):
                await writer.submit(insert(9))
            leader.acks.record("b", Position(leader.leader.term, 1 << 40))
            leader.move_acked()
            await asyncio.gather(*jobs)


class TestTurns:
    async def test_turns_and_jobs_run_in_the_order_they_were_asked_for(self, tmp_path: Path) -> None:
        """R21: FIFO, never SQLite's busy handler."""
        async with writing(tmp_path) as (leader, writer):
            order: list[str] = []
            first = await writer.turn()

            async def job(name: str) -> None:
                await writer.submit(lambda c: order.append(name))

            async def turn(name: str) -> None:
                mine = await writer.turn()
                order.append(name)
                await mine.release()

            async with asyncio.TaskGroup() as tasks:
                for number in range(4):
                    tasks.create_task(job(f"job {number}"))
                    tasks.create_task(turn(f"turn {number}"))
                await asyncio.sleep(0.02)
                assert order == []
                await first.release()
            assert order == [f"{what} {number}" for number in range(4) for what in ("job", "turn")]
            assert leader.failures == []

    async def test_the_position_of_a_turn_covers_its_commit(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            turn = await writer.turn()
            await asyncio.to_thread(
                on_own_connection, leader, "BEGIN IMMEDIATE", "INSERT INTO t VALUES(1, 'x')", "COMMIT"
            )
            position = await turn.release()
            assert position == leader.tip.position
            assert position.txid == 2

    @pytest.mark.parametrize("others_wait", [True, False])
    async def test_an_idle_turn_ends_only_if_others_wait(self, tmp_path: Path, others_wait: bool) -> None:
        limits = WriterLimits(turn_idle_seconds=0.1, turn_seconds=60)
        async with writing(tmp_path, limits=limits) as (_, writer):
            turn = await writer.turn()
            called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            turn.on_expire = lambda: called.set_result(None)
            if others_wait:
                waiting = asyncio.ensure_future(writer.submit(insert(1)))
                async with asyncio.timeout(3):
                    await called
                await turn.release()
                await waiting
            else:
                await asyncio.sleep(0.3)
                assert not turn.expired
                await turn.release()

    async def test_a_busy_turn_is_not_idle_but_ends_after_its_total(self, tmp_path: Path) -> None:
        limits = WriterLimits(turn_idle_seconds=0.05, turn_seconds=0.3)
        async with writing(tmp_path, limits=limits) as (_, writer):
            turn = await writer.turn()
            turn.begin_statement()
            waiting = asyncio.ensure_future(writer.submit(insert(1)))
            await asyncio.sleep(0.15)
            assert not turn.expired
            await eventually(lambda: turn.expired)
            turn.end_statement()
            await turn.release()
            await waiting

    async def test_a_cancelled_wait_for_the_turn_holds_nobody_up(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (_, writer):
            first = await writer.turn()
            second: asyncio.Task[Turn] = asyncio.ensure_future(writer.turn())
            await asyncio.sleep(0)
            second.cancel()
            await first.release()
            async with asyncio.timeout(3):
                await writer.submit(insert(1))

    async def test_commits_of_others_are_found_while_a_turn_is_held(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            turn = await writer.turn()
            before = leader.watermarks.captured.txid
            await asyncio.to_thread(on_own_connection, leader, "INSERT INTO t VALUES(1, 'foreign')")
            async with asyncio.timeout(2):
                assert (await writer.settle()).txid == before + 1
            await turn.release()


class TestSettle:
    async def test_it_never_returns_less_than_a_reader_saw(self, tmp_path: Path) -> None:
        """R17: what a read on the leader saw is covered by the position in its reply."""
        async with writing(tmp_path) as (leader, writer):
            start = leader.tip.position.txid
            stop = asyncio.Event()
            reader = leader.database.connect_reader()
            slowest, reads = 0.0, 0

            async def write(first: int) -> None:
                for number in range(first, first + 150):
                    await writer.submit(insert(number))
                    await asyncio.sleep(0.001)

            async def read_and_settle() -> None:
                nonlocal slowest, reads
                while not stop.is_set():
                    (count,) = reader.execute("SELECT count(*) FROM t").fetchall()[0]
                    began = asyncio.get_running_loop().time()
                    position = await writer.settle()
                    slowest = max(slowest, asyncio.get_running_loop().time() - began)
                    assert position.txid - start >= count
                    reads += 1
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(read_and_settle())
                async with asyncio.TaskGroup() as writers:
                    for first in (0, 1000, 2000):
                        writers.create_task(write(first))
                stop.set()
                await reading
            reader.close()
            assert reads > 100

    async def test_a_read_during_a_group_does_not_wait_for_the_next_one(self, tmp_path: Path) -> None:
        """The commit it saw is captured by the group in progress; an idle writer looks again only much later."""
        limits = WriterLimits(foreign_poll_seconds=30.0)
        async with writing(tmp_path, limits=limits) as (leader, writer):
            reader = leader.database.connect_reader()
            seen: list[asyncio.Future[Position]] = []
            loop, sync = asyncio.get_running_loop(), leader.database.sync_wal

            def slow_sync() -> None:
                """The group is visible, begun to be captured, and not yet logged."""
                asyncio.run_coroutine_threadsafe(look(), loop).result()
                sync()

            async def look() -> None:
                assert reader.execute("SELECT count(*) FROM t").fetchall() == [(1,)]
                seen.append(asyncio.ensure_future(writer.settle()))
                await asyncio.sleep(0)

            leader.database.sync_wal = slow_sync  # type: ignore[method-assign]
            done = await writer.submit(insert(1))
            leader.database.sync_wal = sync  # type: ignore[method-assign]
            async with asyncio.timeout(2):
                assert await seen[0] == done.position
            reader.close()


class TestForeigners:
    async def test_an_idle_writer_finds_commits_of_other_programs(self, tmp_path: Path) -> None:
        """R10: foreign commits on the leader are history at n = 0."""
        async with writing(tmp_path, limits=QUICK) as (leader, _):
            before = leader.tip.position.txid
            with outside() as other:
                ask(other, "open", str(leader.directory / "data.db"))
                assert ask(other, "run", "INSERT INTO t VALUES(1, 'foreign')") == "[]"
                await eventually(lambda: leader.watermarks.durable.txid == before + 1)
                ask(other, "close")


class TestEnds:
    async def test_a_failed_fdatasync_answers_everybody_and_ends_the_writer(self, tmp_path: Path) -> None:
        """R5: nothing of the group is acknowledged, nobody waits for ever, and the owner hears of it."""
        leader = LeaderNode(tmp_path / "n", setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
        writer = leader.start_writer()
        turn = await writer.turn()
        calls: list[asyncio.Future[object]] = [asyncio.ensure_future(writer.submit(insert(n))) for n in range(3)]
        calls.append(asyncio.ensure_future(writer.run(lambda: None)))
        calls.append(asyncio.ensure_future(writer.turn()))
        await asyncio.sleep(0.01)

        def fail() -> None:
            raise StorageFailed("fdatasync failed")

        leader.database.sync_wal = fail  # type: ignore[method-assign]
        await turn.release()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [OutcomeUnknown] * 3 + [Draining] * 2
        assert [type(error) for error in leader.failures] == [StorageFailed]
        with pytest.raises(Draining):
            await writer.run(lambda: None)
        await writer.stop()
        leader.abandon()

    async def test_a_failed_fdatasync_inside_a_call_is_as_final(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
        writer = leader.start_writer()

        def fail() -> None:
            raise StorageFailed(os.strerror(errno.EIO))

        with pytest.raises(StorageFailed):
            await writer.run(fail)
        await eventually(lambda: leader.failures)
        with pytest.raises(Draining):
            await writer.submit(insert(1))
        await writer.stop()
        leader.abandon()

    async def test_a_call_that_cannot_be_done_now_harms_nobody(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):

            def busy() -> None:
                raise apsw.BusyError("database is locked")

            with pytest.raises(apsw.BusyError):
                await writer.run(busy)
            await writer.submit(insert(1))
            assert leader.failures == []

    async def test_a_pin_while_another_process_holds_write_is_refused_typed(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            leader.database.holder.set_busy_timeout(20)
            with outside() as other:
                ask(other, "open", str(leader.directory / "data.db"))
                ask(other, "run", "BEGIN IMMEDIATE")
                with pytest.raises(Unavailable, match="write lock"):
                    await writer.run(leader.leader.pin_snapshot)
                ask(other, "run", "ROLLBACK")
                ask(other, "close")
            await writer.submit(insert(1))

    async def test_stopping_finishes_what_is_queued_and_refuses_the_rest(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
        writer = leader.start_writer()
        jobs = [asyncio.ensure_future(writer.submit(insert(n))) for n in range(20)]
        await asyncio.sleep(0)
        await writer.stop()
        await asyncio.gather(*jobs)
        for call in (writer.submit(insert(50)), writer.turn(), writer.run(lambda: None)):
            with pytest.raises(Draining):
                await call
        assert read(leader.database, "SELECT count(*) FROM t") == [(20,)]
        leader.close()
