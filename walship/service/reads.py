"""Reads that share one snapshot with their neighbours, without a thread hop (R17, perf.md 3).

Read requests that arrive in one tick of the loop run inline on the loop thread, inside one read transaction on the
node's shared read-only connection: first lo = applied, then BEGIN, the statements, COMMIT, then hi = publishing, with
no await in between. lo must cover each member's floor; hi is what the reply names.

A read may cost `inline_steps` VM instructions there. One that costs more is stopped (it has changed nothing), its text
is remembered as slow for a while, and it runs again, whole, on one of a few worker threads at nice 19.

Two traps of the progress handler, found by losing time to them (perf.md 3): SQLite counts steps per prepared
statement and across executions, so we count calls per run, from zero, on our side; and a wall-clock deadline would
banish a text because the thread was descheduled, so steps are counted, not time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import apsw

from walship.errors import Behind, NotReadOnly, Overloaded, WalshipError, WriteLost
from walship.formats.position import Position
from walship.hrana.types import Batch, BatchRequest, DescribeRequest, ExecuteRequest, Level, SequenceRequest
from walship.service.executor import Counters, Executor, Need, drive
from walship.service.limits import Limits, limit_values
from walship.service.plan import Item
from walship.service.request import Host
from walship.sql import guard

__all__ = ["Reads", "acknowledged", "fresh_enough", "seen"]

_NICE = 19


class _TooLarge(Exception):
    """A cursor's rows do not fit in one chunk: it must be streamed instead."""


@dataclass(eq=False, slots=True)
class _Member:
    """One client's list of requests in a read batch. `run` gives its answer; it may run twice, inline and again.

    movable: a worker may run it when it is not short.
    """

    run: Callable[[Executor], list[bytes]]
    floor: Position | None
    movable: bool
    done: asyncio.Future[tuple[list[bytes], Position]]
    loop: asyncio.AbstractEventLoop
    abandoned: bool = field(default=False)


class Reads:
    """The read side of one node. Belongs to one event loop; `close` after the last call has ended."""

    def __init__(self, host: Host, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._limits = limits
        self._clock = clock
        self._pending: list[_Member] = []
        self._scheduled = False
        self._slow: dict[str, float] = {}
        self._hits = 0
        self._counting = False
        self._budget_hits = max(1, limits.inline_steps // limits.step_stride)
        self._connection = host.database.connect_reader()
        self._executor = _reader(self._connection, limits, value_bytes=limits.inline_value_bytes)
        self._executor.budgeted = True
        self._connection.set_progress_handler(self._over_budget, limits.step_stride)
        self._queue: SimpleQueue[_Member | None] = SimpleQueue()
        self._closing = False
        self._workers = [
            threading.Thread(target=self._work, name=f"walship-read-{number}", daemon=True)
            for number in range(limits.read_workers)
        ]
        for worker in self._workers:
            worker.start()
        self.batches = self.inline = self.moved = self.sent_on = 0

    async def run(
        self,
        items: Sequence[Item],
        counters: Counters,
        *,
        floor: Position | None,
        wait_seconds: float,
        level: Level,
    ) -> tuple[list[bytes], Position]:
        """Run a list that only reads; answers in order, and the position they show.

        Raises NotReadOnly when SQLite says that a statement would write: nothing has changed then. Behind, WriteLost,
        Overloaded.
        """

        def run(executor: Executor) -> list[bytes]:
            executor.start(counters, virtual=True)
            return [item if isinstance(item, bytes) else drive(executor.perform(item)) for item in items]

        texts = _texts(items) if self._slow else ()
        return await self._member(run, texts, floor, wait_seconds, level)

    async def lines(
        self, batch: Batch, counters: Counters, *, floor: Position | None, wait_seconds: float, level: Level
    ) -> tuple[bytes | None, Position]:
        """The cursor entries of a batch that only reads, when they fit in one chunk; else None: stream it.

        Raises as `run` does.
        """

        def run(executor: Executor) -> list[bytes]:
            executor.start(counters, virtual=True)
            chunks = executor.lines(batch)
            try:
                first = next(chunks, b"")
                if isinstance(first, Need):
                    raise NotReadOnly("the batch writes, and it was sent where only reads run. Nothing was changed.")
                if len(first) >= self._limits.chunk_bytes:
                    raise _TooLarge
                return [first]
            finally:
                chunks.close()

        texts = [step.stmt.sql or "" for step in batch.steps]
        if any(self._is_slow(text) for text in texts):
            return None, self._lowest()
        try:
            answers, position = await self._member(run, texts, floor, wait_seconds, level, workers=False)
        except (_TooLarge, apsw.InterruptError, apsw.TooBigError):
            return None, self._lowest()
        return answers[0], position

    def close(self) -> None:
        """End the workers and close the connections. Reads still running are interrupted."""
        self._closing = True
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()
        self._connection.close(True)

    # --- admission ----------------------------------------------------------------------------------------------

    async def _member(
        self,
        run: Callable[[Executor], list[bytes]],
        texts: Sequence[str],
        floor: Position | None,
        wait_seconds: float,
        level: Level,
        *,
        workers: bool = True,
    ) -> tuple[list[bytes], Position]:
        if floor is not None:
            await fresh_enough(self._host, floor, wait_seconds)
        if self._queue.qsize() + len(self._pending) >= self._limits.read_queue:
            raise Overloaded(
                f"{self._limits.read_queue} reads wait on this node already, as many as it allows. "
                "Nothing was changed. Try again, or at another node."
            )
        loop = asyncio.get_running_loop()
        member = _Member(run, floor, workers, loop.create_future(), loop)
        if workers and any(self._is_slow(text) for text in texts):
            self._send_on(member)
        else:
            self._enlist(member)
        try:
            answers, position = await member.done
        except asyncio.CancelledError:
            member.abandoned = True
            raise
        if level is not Level.ANY:
            position = await acknowledged(self._host, position, self._limits.ack_seconds)
        return answers, position

    def _enlist(self, member: _Member) -> None:
        self._pending.append(member)
        if not self._scheduled:
            self._scheduled = True
            member.loop.call_soon(self._tick)

    def _send_on(self, member: _Member) -> None:
        self.sent_on += 1
        self._queue.put(member)

    def _lowest(self) -> Position:
        return self._host.watermarks.captured if self._host.writer is not None else self._host.watermarks.applied

    # --- inline -------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """One read batch. No await in here: that is what makes lo and hi bounds of what it saw (R17)."""
        self._scheduled = False
        members, self._pending = self._pending, []
        self.batches += 1
        lo = self._lowest()
        try:
            self._connection.execute("BEGIN")
            try:
                settled = self._run_batch(members, lo)
            finally:
                self._connection.execute("COMMIT")
            if self._connection.txn_state() != apsw.SQLITE_TXN_NONE:
                raise AssertionError("a read of this batch was left open, and keeps the snapshot")
        except BaseException as error:
            for member in members:
                _settle(member, error)
            if not isinstance(error, apsw.Error):
                raise
            return
        hi = seen(self._host)
        for member, answer in settled:
            _settle(member, answer if isinstance(answer, BaseException) else (answer, hi))

    def _run_batch(self, members: Sequence[_Member], lo: Position) -> list[tuple[_Member, list[bytes] | BaseException]]:
        settled: list[tuple[_Member, list[bytes] | BaseException]] = []
        spent = 0
        for member in members:
            if member.done.done():
                continue
            if spent * self._limits.step_stride >= self._limits.tick_steps:
                # The rest waits for the next tick: many middling reads together must not hold the loop either.
                self._enlist(member)
                continue
            if member.floor is not None and not self._host.watermarks.history.covers(lo, member.floor):
                settled.append((member, _behind(member.floor, lo)))
                continue
            answer = self._run_inline(member)
            spent += self._hits
            if answer is not None:
                settled.append((member, answer))
        return settled

    def _run_inline(self, member: _Member) -> list[bytes] | BaseException | None:
        """The member's answer or its error; None when it moved to a worker."""
        self._hits = 0
        self._counting = True
        try:
            answer = member.run(self._executor)
            self.inline += 1
            return answer
        except (apsw.InterruptError, apsw.TooBigError) as error:
            self._remember_slow(self._executor.text)
            if not member.movable:
                return error
            self.moved += 1
            self._send_on(member)
            return None
        except (WalshipError, _TooLarge, apsw.Error) as error:
            return error
        finally:
            self._counting = False

    def _over_budget(self) -> bool:
        # SQLite counts steps per prepared statement, across runs: our own BEGIN and COMMIT get here too, now and then,
        # and must not pay for the member before them.
        self._hits += 1
        return self._counting and self._hits > self._budget_hits

    def _is_slow(self, text: str) -> bool:
        until = self._slow.get(text)
        if until is None:
            return False
        if self._clock() < until:
            return True
        del self._slow[text]
        return False

    def _remember_slow(self, text: str) -> None:
        if len(self._slow) >= self._limits.slow_texts:
            self._slow.pop(next(iter(self._slow)))
        if len(text) <= self._limits.stored_bytes * 2:
            self._slow[text] = self._clock() + self._limits.slow_seconds

    # --- workers ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        connection = self._host.database.connect_reader()
        deadline = [math.inf]  # inf between reads: our own BEGIN and ROLLBACK are never interrupted
        connection.set_progress_handler(
            lambda: deadline[0] < math.inf and (self._closing or self._clock() > deadline[0]),
            self._limits.worker_stride,
        )
        executor = _reader(connection, self._limits, value_bytes=self._limits.value_bytes)
        try:
            while (member := self._queue.get()) is not None:
                if member.abandoned:
                    continue
                answer = self._run_apart(connection, executor, member, deadline)
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    member.loop.call_soon_threadsafe(_settle, member, answer)
        finally:
            connection.close(True)

    def _run_apart(
        self, connection: apsw.Connection, executor: Executor, member: _Member, deadline: list[float]
    ) -> tuple[list[bytes], Position] | BaseException:
        try:
            connection.execute("BEGIN")
            # Take the snapshot now, so that hi is not put off until the end of a long read.
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            hi = seen(self._host)
            deadline[0] = self._clock() + self._limits.read_seconds
            return member.run(executor), hi
        except BaseException as error:  # noqa: BLE001  not swallowed: it is raised where the client waits
            return error
        finally:
            deadline[0] = math.inf
            if not connection.get_autocommit():
                connection.execute("ROLLBACK")


def _settle(member: _Member, answer: tuple[list[bytes], Position] | BaseException) -> None:
    if member.done.done():
        return
    if isinstance(answer, BaseException):
        member.done.set_exception(answer)
    else:
        member.done.set_result(answer)


def _reader(connection: apsw.Connection, limits: Limits, *, value_bytes: int) -> Executor:
    guard.install(connection, follower=True, shared=True)
    limit_values(connection, value_bytes)
    return Executor(connection, limits)


def _texts(items: Sequence[Item]) -> list[str]:
    texts: list[str] = []
    for item in items:
        if isinstance(item, ExecuteRequest):
            texts.append(item.stmt.sql or "")
        elif isinstance(item, BatchRequest):
            texts.extend([step.stmt.sql or "" for step in item.batch.steps])
        elif isinstance(item, SequenceRequest | DescribeRequest):
            texts.append(item.sql or "")
    return texts


# --- positions --------------------------------------------------------------------------------------------------


def seen(host: Host) -> Position:
    """A position that covers everything a read that just ran can have seen, from any thread (R17).

    On a leader it may be short of the commits of the group in progress; `acknowledged` makes up for that.
    """
    marks = host.watermarks
    return marks.captured if host.writer is not None else marks.publishing


async def acknowledged(host: Host, position: Position, timeout_seconds: float) -> Position:
    """Wait, on a leader, until what a read saw is acknowledged; the position to reply with (R17).

    A commit can be seen a moment before it is captured, so this first waits for the end of the group in progress.

    Raises Behind when that takes too long: nothing was changed, and the read may be tried again.
    """
    writer = host.writer
    if writer is None:
        return position
    marks = host.watermarks
    position = await writer.settle()
    if not marks.history.covers(marks.acked, position) and not await marks.wait_acked(position, timeout_seconds):
        raise Behind(
            f"this read saw {position}, and followers have acknowledged {marks.acked} only, for {timeout_seconds} s. "
            "Nothing was changed. Try again, or read at level `any`."
        )
    return position


async def fresh_enough(host: Host, floor: Position, wait_seconds: float) -> None:
    """Wait until this node shows `floor`. Raises Behind after `wait_seconds`, WriteLost if no history has it."""
    marks = host.watermarks
    if host.writer is not None:
        if marks.history.covers(marks.captured, floor):
            return
        have = marks.captured
    else:
        if marks.history.covers(marks.applied, floor):
            return
        if await marks.wait_applied(floor, wait_seconds):
            return
        have = marks.applied
    if marks.history.lost(floor):
        raise WriteLost(
            f"the position {floor} is in no surviving history: a write acknowledged there was lost in a failover. "
            "Look at what the database holds now, and at the orphan files of the node that led then."
        )
    raise _behind(floor, have)


def _behind(floor: Position, have: Position) -> Behind:
    return Behind(
        f"this node shows {have}, and {floor} was asked for. Nothing was changed. Try again, or at another node."
    )
