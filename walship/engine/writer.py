"""The writer: one thread that runs every write of the leader, in groups that share one fdatasync.

Each job is its own SQLite transaction with synchronous=NORMAL (R20); the group is made durable and logged together,
and only then is anybody answered, after the acknowledgment rule (design.md 4). A group is whatever has queued when
the thread comes back; there is no timer, so a single client pays no delay.

An interactive transaction takes the write turn in the same queue, FIFO, and runs on its own connection while the
thread waits for its end (R21). So SQLite's busy handler never decides who is next.

Warnings: a job is never cancelled once it is queued; a caller that goes away just does not hear the answer. After
StorageFailed or CorruptWal the thread ends and `failed` is set: the process must end and recount (R2, R5).
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import apsw

from walship.engine import failpoints
from walship.engine.acks import AckTracker
from walship.engine.attempts import Attempt, Attempts
from walship.engine.jobs import Call, Group, Job, answer, fail, nothing, reached, resolve, run_job
from walship.engine.leader import Leader
from walship.engine.turn import Done, Turn
from walship.engine.writer_limits import WriterLimits, WriterStatistics
from walship.errors import (
    CorruptWal,
    Draining,
    OutcomeUnknown,
    Overloaded,
    StorageFailed,
    Unavailable,
    WalshipError,
)
from walship.formats.position import Position, Tip

__all__ = ["Writer", "WriterLimits", "WriterStatistics"]

_log = logging.getLogger("walship.engine")

T = TypeVar("T")

_DISK_LOOK_SECONDS = 0.1  # the reserve is far more than is written meanwhile

_LEASE_OVER = "this node no longer leads, or cannot renew its lease. This request was not run; send it to the leader."
_ANSWER_TOO_LATE = (
    "the write is durable here, but this node's lease ended before it could be answered: the next leader decides "
    "whether it is history. Look before sending it again."
)

_BUSY_SECONDS = 2.0  # how long a job waits for a foreign writer


@dataclass(slots=True)
class _Counters:
    jobs: int = 0
    groups: int = 0
    turns: int = 0
    turns_expired: int = 0
    captures_begun: int = 0
    captures_done: int = 0
    settling: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)


class Writer:
    """The leader's writer. Create and `start` it on the event loop; `stop` drains it.

    on_failure: called on the loop when the thread had to end; nothing more will be acknowledged.
    live: whether this leader's lease lasts, from any thread: asked before a write is admitted, before it runs, and
        before it is answered (failover.md 3.2).
    """

    def __init__(
        self,
        leader: Leader,
        acks: AckTracker,
        *,
        limits: WriterLimits = WriterLimits(),
        on_failure: Callable[[BaseException], None],
        live: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leader = leader
        self._acks = acks
        self._limits = limits
        self._on_failure = on_failure
        self._live = live
        self._clock = clock
        self._free_bytes, self._free_until = 0, -math.inf
        self._queue: queue.SimpleQueue[Job | Turn | Call | None] = queue.SimpleQueue()
        self._queued = 0
        self._unacked: deque[Group] = deque()
        self._unacked_bytes = 0
        self._acked_at = 0.0
        self._room = asyncio.Event()
        self._counters = _Counters()
        self._attempt: Attempt | None = None  # of the job that runs
        self._draining = False
        self._retiring = self._paused = False
        self._lapsed = False  # the lease had ended when the writer thread looked last
        self._ended = False
        self._busy_until = self._pause_seconds = 0.0
        self._broken: BaseException | None = None
        self._alone: Turn | Call | None = None  # taken from the queue, not yet at its end
        self.failed: BaseException | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._main, name="walship-writer", daemon=True)
        self.loop: asyncio.AbstractEventLoop
        self.attempts = Attempts(leader.term, leader.log.tokens, self._acked_by)
        leader.pending.present = self._present

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopped = self.loop.create_future()
        self._unsubscribe = self._leader.watermarks.on_change(self._on_acked)
        self._thread.start()

    async def submit(
        self, job: Callable[[apsw.Connection], T], *, ack: int | None = None, attempt: Attempt | None = None
    ) -> Done[T]:
        """Run `job` on the writer's connection, in autocommit; return after durability and the acknowledgment rule.

        `ack` overrides the cluster's number of acknowledgments for this answer. Raises what the job raised;
        Overloaded or Draining before it ran; OutcomeUnknown when it is durable here but not acknowledged in time, or
        when the node failed meanwhile. What it commits is logged under the token of `attempt`, whose result `job` fills
        in; see `Attempts.begin` for what that raises.
        """
        await self._admit()
        if attempt is not None:
            self._check_running()
            self.attempts.begin(attempt)
        item = Job(job, self.loop.create_future(), ack, attempt)
        self._put(item)
        return await item.future

    async def turn(self) -> Turn:
        """Wait for the write turn, first come first served. Raises Overloaded or Draining without one."""
        await self._admit()
        turn = Turn(self.loop, self.call_soon)
        self._put(turn)
        try:
            await turn.granted
        except asyncio.CancelledError:
            turn.withdraw()
            raise
        return turn

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` in the writer thread between two groups (to pin a snapshot, to checkpoint).

        Raises what it raised; Draining when the writer has stopped.
        """
        future: asyncio.Future[T] = self.loop.create_future()
        self._put(Call(function, future))
        return await future

    async def settle(self) -> Position:
        """The position that covers everything a reader has been able to see so far (R17).

        A commit is visible as soon as SQLite wrote it, a moment before it is captured; this waits for that moment.
        Raises Draining when it does not come any more: what was seen may not be durable.
        """
        if self._leader.settled():
            return self._leader.watermarks.captured
        if self._ended:
            raise Draining(f"the writer has stopped ({self.failed}). This read was not answered; send it again later.")
        ticket = self._counters.captures_begun
        future: asyncio.Future[None] = self.loop.create_future()
        self._counters.settling.append((ticket, future))
        await future
        return self._leader.watermarks.captured

    def give_up(self) -> None:
        """On the loop, before a stop: whoever still waits for acknowledgments is told that the outcome is unknown."""
        for group in self._unacked:
            self._ack_timed_out(group, "before this node had to stop")

    async def hold_still(self, patience_seconds: float) -> Tip:
        """Let no new write begin, wait until what runs has ended, keep foreign writers out; returns the tip, which
        stays what it is until `go_on` or `retire` (failover.md 3.7, S3 and S4). What comes meanwhile waits.

        A transaction that holds the turn is taken it away after `patience_seconds`. Raises Unavailable when it does not
        come to rest all the same; writes go on then.
        """
        self._paused = True
        rest = self.loop.create_task(self.run(self._leader.hold_still))
        try:
            for last in (False, True):
                await asyncio.wait({rest}, timeout=patience_seconds)
                if rest.done():
                    return rest.result()
                if isinstance(self._alone, Turn) and not last:
                    self._alone.call_in()
            raise Unavailable(f"writes did not come to rest within {2 * patience_seconds:g} s; they go on")
        except BaseException:
            self.go_on()
            raise

    def go_on(self) -> None:
        """Undo `hold_still`."""
        self._paused = False
        if self._ended:
            return
        self._put(Call(self._leader.unfence, self.loop.create_future()))
        self._room.set()

    async def retire(self) -> None:
        """End at once, because this node no longer leads: what has not begun is refused as not done, a turn is taken
        away, what was committed is logged and its outcome is unknown here, as the next leader decides it (R2)."""
        self._draining = self._retiring = True
        if isinstance(self._alone, Turn):
            self._alone.call_in()
        await self.stop()
        for group in self._unacked:
            self._ack_timed_out(group, "before another node took over")

    async def stop(self) -> None:
        """Refuse new work, finish what is queued, end the thread. Idempotent."""
        self._draining = True
        self._room.set()
        if self._stopped is None:
            return
        if self._thread.is_alive():
            self._queue.put(None)
        await asyncio.shield(self._stopped)
        self._unsubscribe()

    @property
    def serving(self) -> bool:
        """Does this leader still run and answer writes?"""
        return not self._ended and not self._retiring and self._live()

    def statistics(self) -> WriterStatistics:
        c = self._counters
        failed = str(self.failed) if self.failed else None
        return WriterStatistics(c.jobs, c.groups, self._queued, self._unacked_bytes, c.turns, c.turns_expired, failed)

    def call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """From the writer thread: call on the loop, unless it is gone."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    # --- on the loop ------------------------------------------------------------------------------------------

    def _put(self, item: Job | Turn | Call) -> None:
        self._check_running()
        self._queued += 1
        self._queue.put(item)

    def _check_running(self) -> None:
        if self._ended:
            raise Draining(f"the writer has stopped ({self.failed}). This request was not run; send it again later.")

    async def _admit(self) -> None:
        """R14: refuse before BEGIN, typed as not done, when the followers or the queue cannot keep up."""
        deadline: float | None = None
        while not self._draining:
            if not self._live():
                raise Draining(_LEASE_OVER)
            reason = self._full()
            if reason is None:
                return
            now = self._clock()
            deadline = deadline or now + self._limits.admission_wait_seconds
            if now >= deadline:
                raise Overloaded(f"{reason}. This write was not begun and changed nothing; send it again later.")
            self._room.clear()
            try:
                async with asyncio.timeout(min(0.05, deadline - now)):
                    await self._room.wait()
            except TimeoutError:
                continue
        raise Draining("this node is shutting down. This request was not run; send it again.")

    def _full(self) -> str | None:
        if self._paused:
            return "the lead is being handed over"
        limits = self._limits
        now = self._clock()
        if now >= self._free_until:  # the question lets go of the GIL, which is dear beside the writer thread
            self._free_bytes, self._free_until = self._leader.free_bytes(), now + _DISK_LOOK_SECONDS
        if self._free_bytes < limits.reserve_bytes:
            return f"the leader's disk is nearly full: {self._free_bytes >> 20} MiB are left (R5)"
        if self._queued >= limits.queued_jobs:
            return f"{self._queued} writes are queued already"
        if self._unacked_bytes > limits.unacked_bytes or len(self._unacked) > limits.unacked_groups:
            return f"{self._unacked_bytes} bytes in {len(self._unacked)} groups wait for acknowledgments of followers"
        if self._unacked and self._clock() - self._acked_at > limits.ack_stall_seconds:
            return f"no follower has acknowledged anything for {self._clock() - self._acked_at:.2f} s"
        return None

    def _group_done(self, position: Position, size_bytes: int, jobs: list[Job], taken: int) -> None:
        self._queued -= taken
        self._settle_waiters()
        needs_ack = [job for job in jobs if job.ack != 0]
        for job in jobs:
            self.attempts.end(job.attempt)
            if job.ack == 0 and self._live():
                answer(job, position)
            elif job.ack == 0:
                fail(job.future, OutcomeUnknown(_ANSWER_TOO_LATE))
        if not self._unacked:
            self._acked_at = self._clock()
        group = Group(position, size_bytes, needs_ack)
        self._unacked.append(group)
        self._unacked_bytes += size_bytes
        self._on_acked()
        if group.jobs:
            limits = self._limits
            seconds = limits.ack_timeout_seconds + size_bytes / limits.ack_bytes_per_second
            group.timer = self.loop.call_later(seconds, self._ack_timed_out, group, f"within {seconds:g} s")

    def _on_acked(self) -> None:
        """Answer every group that the acknowledgment rule covers now."""
        acked = self._leader.watermarks.acked
        durable = self._leader.watermarks.durable
        progressed = False
        while self._unacked and reached(acked, self._unacked[0].position):
            group = self._unacked.popleft()
            self._unacked_bytes -= group.size_bytes
            progressed = True
            stricter = []
            for job in group.jobs:
                if not self._live():
                    fail(job.future, OutcomeUnknown(_ANSWER_TOO_LATE))
                elif job.ack is None or reached(self._acks.covered(durable, job.ack), group.position):
                    answer(job, group.position)
                else:
                    stricter.append(job)
            group.jobs = stricter
            if stricter:
                self._await_stricter(group)
            elif group.timer is not None:
                group.timer.cancel()
        if progressed:
            failpoints.reach("writer.acked")
            self._acked_at = self._clock()
            self._room.set()
            self.attempts.changed.set()

    def _acked_by(self, ack: int | None) -> Position:
        """What the cluster's rule covers, and `ack` followers too if more are asked for."""
        marks = self._leader.watermarks
        acked = marks.acked
        return acked if ack is None else min(acked, self._acks.covered(marks.durable, ack), key=Position.order)

    def _await_stricter(self, group: Group) -> None:
        """Jobs that asked for more acknowledgments than the cluster's rule: look again until they have them."""
        durable = self._leader.watermarks.durable
        remaining = []
        for job in group.jobs:
            if job.ack is not None and reached(self._acks.covered(durable, job.ack), group.position):
                answer(job, group.position)
            elif not job.future.done():
                remaining.append(job)
        group.jobs = remaining
        if remaining:
            self.loop.call_later(0.005, self._await_stricter, group)

    def _ack_timed_out(self, group: Group, when: str) -> None:
        for job in group.jobs:
            fail(
                job.future,
                OutcomeUnknown(
                    f"the write is durable on the leader at {group.position}, but not enough followers confirmed it "
                    f"{when}. It is not lost while the leader's disk lives; look before sending it again."
                ),
            )
        group.jobs = []

    def _settle_waiters(self) -> None:
        waiting, self._counters.settling = self._counters.settling, []
        for ticket, future in waiting:
            if self._counters.captures_done > ticket or self._leader.settled():
                resolve(future, None)
            else:
                self._counters.settling.append((ticket, future))

    def _end(self, error: BaseException | None, lost: list[Job]) -> None:
        """The thread has ended: nobody may wait for it any longer."""
        unknown = OutcomeUnknown(
            "the node stopped while the write was being made durable. It may or may not have happened; "
            "look before sending it again."
        )
        for job in lost:
            fail(job.future, unknown)
        if isinstance(self._alone, Turn):
            if self._alone.granted.done():
                fail(self._alone.finished, unknown)
                if self._alone.so_far is not None:
                    fail(self._alone.so_far, unknown)
            else:
                fail(self._alone.granted, Draining(f"the node stopped ({error}). The transaction was not begun."))
        elif self._alone is not None:
            fail(self._alone.future, Draining(f"the node stopped ({error})."))
        self._ended = True
        if error is not None:
            self.failed = error
            self._on_failure(error)
        refused = Draining(f"the node stopped ({error or 'as asked'}). This request was not run; send it again later.")
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, Turn):
                fail(item.granted, refused)
            elif item is not None:
                fail(item.future, refused)
        for _, future in self._counters.settling:
            fail(future, refused)
        self._counters.settling.clear()
        if self._stopped is not None:
            resolve(self._stopped, None)

    # --- in the writer thread ---------------------------------------------------------------------------------

    def _main(self) -> None:
        connection: apsw.Connection | None = None
        running: list[Job] = []
        try:
            connection = self._leader.database.connect_writer()
            connection.set_busy_handler(self._wait_for_write)
            connection.set_wal_hook(self._on_commit)
            self._leads()
            while self._step(connection, running):
                running.clear()
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who ends the process
            _log.error("writer failed error=%r", error)
            self.call_soon(self._end, error, list(running))
        else:
            self.call_soon(self._end, None, [])
        finally:
            if connection is not None:
                connection.close(True)

    def _wait_for_write(self, tries: int) -> bool:
        """SQLite calls this while another process holds WRITE; False gives up (SQLITE_BUSY).

        It may be a checkpoint that waits for our own read transaction, so the guard moves on meanwhile.
        """
        now = self._clock()
        if tries == 0:
            self._busy_until, self._pause_seconds = now + _BUSY_SECONDS, 0.0
        try:
            moved = self._leader.make_way()
        except BaseException as error:  # noqa: BLE001 - not the job's error: raised again once SQLite has returned
            self._broken = error
            return False
        # A program that checkpoints again and again leaves only short moments in between: look closely after each.
        self._pause_seconds = 0.0002 if moved else min(2 * self._pause_seconds + 0.0002, 0.002)
        time.sleep(self._pause_seconds)
        return now < self._busy_until

    def _on_commit(self, _connection: apsw.Connection, name: str, frames: int) -> int:
        """SQLite says that a commit of this very connection ends at frame `frames` of the -wal."""
        attempt = self._attempt
        if attempt is not None and name == "main":
            attempt.frame = frames
            self._leader.pending.add(attempt)
        return apsw.SQLITE_OK

    def _present(self) -> Attempt | None:
        """The attempt that another thread may be committing now, in its turn."""
        return self._alone.attempt if isinstance(self._alone, Turn) else None

    def _step(self, connection: apsw.Connection, running: list[Job]) -> bool:
        """One group, one turn, or one look for foreign commits. False when the thread shall end."""
        try:
            item = self._queue.get(timeout=self._limits.foreign_poll_seconds)
        except queue.Empty:
            self._look()
            return True
        taken = 0
        while True:
            if item is None:
                self._finish(running, taken)
                return False
            taken += 1
            if not isinstance(item, Call) and (self._retiring or not self._leads()):
                self._refuse(item)
            elif isinstance(item, Job):
                running.append(item)
                self._attempt = item.attempt
                run_job(item, connection)
                self._attempt = None
                if item.attempt is not None and item.attempt.frame:
                    self._leader.pending.add(item.attempt)  # its end, if only a part was logged meanwhile
                if self._broken is not None:
                    raise self._broken
            else:
                self._alone = item
                self._finish(running, taken - 1)
                running.clear()
                taken = 0
                self._run_alone(item)
                self._alone = None
            if len(running) >= self._limits.group_jobs:
                break
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        self._finish(running, taken)
        return True

    def _leads(self) -> bool:
        """Whether the lease lasts. While it does not, foreign programs are kept out too (R10)."""
        live = self._live()
        if live == self._lapsed and not self._retiring:
            self._lapsed = not live
            _log.warning(
                "lease %s term=%d", "lives again" if live else "ended: nothing is acknowledged", self._leader.term
            )
        if not live:
            self._leader.fence()
        elif not self._paused:
            self._leader.unfence()
        return live

    def _refuse(self, item: Job | Turn) -> None:
        refused = Draining(_LEASE_OVER)
        if isinstance(item, Job):
            self.call_soon(self.attempts.end, item.attempt)
        self.call_soon(fail, item.granted if isinstance(item, Turn) else item.future, refused)

    def _run_alone(self, item: Turn | Call) -> None:
        if not isinstance(item, Turn):
            self._call(item)
            self.call_soon(self._group_done, self._leader.tip.position, 0, [], 1)
            return
        self._counters.turns += 1
        self.call_soon(resolve, item.granted, None)
        limits = self._limits
        item.hold(
            idle_seconds=limits.turn_idle_seconds,
            total_seconds=limits.turn_seconds,
            look_seconds=min(0.05, limits.foreign_poll_seconds),
            waiting=lambda: not self._queue.empty(),
            look=self._look,
            acknowledge=lambda so_far: self._log_so_far(item, so_far),
            ending=lambda: self._retiring,
        )
        self._counters.turns_expired += item.expired
        if item.attempt is not None and item.attempt.frame:
            self._leader.pending.add(item.attempt)
        self._finish([Job(nothing, item.finished, item.ack)], 1)

    def _log_so_far(self, turn: Turn, so_far: asyncio.Future[Done[Any]]) -> None:
        if turn.attempt is not None and turn.attempt.frame:
            self._leader.pending.add(turn.attempt)
        self._finish([Job(nothing, so_far, turn.ack)], 0)

    def _look(self) -> None:
        if self._present() is not None and not self._leader.database.index.others_checkpoint():
            return  # its commit and the end of its turn go into one frame, with a whole token
        self._finish([], 0)
        self._leader.make_way()
        self._leads()

    def _call(self, call: Call) -> None:
        try:
            value = call.run()
        except BaseException as error:
            self.call_soon(fail, call.future, error)
            # An fsync that failed inside it is as final as in a group; anything unforeseen is too.
            if isinstance(error, (StorageFailed, CorruptWal)) or not isinstance(error, (WalshipError, apsw.Error)):
                raise
        else:
            self.call_soon(resolve, call.future, value)

    def _finish(self, jobs: list[Job], taken: int) -> None:
        """Make the group durable and hand it to the loop."""
        before = self._leader.tip
        self._counters.captures_begun += 1
        tip = self._leader.commit_group()
        self._counters.captures_done = self._counters.captures_begun
        if not jobs and not taken and tip == before and not self._counters.settling:
            return
        self._counters.jobs += len(jobs)
        self._counters.groups += bool(jobs)
        size_bytes = 0
        if tip != before:
            size_bytes = self._leader.group_frames * (self._leader.database.page_size + 24)
        self.call_soon(self._group_done, tip.position, size_bytes, list(jobs), taken)
        self._leader.checkpoint_if_due()
