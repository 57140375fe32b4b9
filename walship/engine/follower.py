"""A node's following side, as the subscriber sees it: frames in, acknowledgments out, seeds when history broke.

Two threads do the work: `Intake` (append to the log, fsync) and `Replayer` (apply to the database). This object lives
on the event loop and joins them. Before the first seed there is no database, and nothing to read from.

What an acknowledgment says: `durable` is fsynced in the log here. A voter whose applying lags too far behind holds
its acknowledgments back, so that a promotion never has to wait for it (R13). With n >= 2, and on every non-voter,
applying waits until the leader's acknowledged position covers the frame, so that no reader sees what may yet be lost
(R15).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from walship.engine.checkpoint import CheckpointTally
from walship.engine.database import Database
from walship.engine.divergence import holds, keep_orphan
from walship.engine.durable_state import StateFile, Truth
from walship.engine.foreign import Foreign, keep, left
from walship.engine.intake import Intake
from walship.engine.lag import LagMeter
from walship.engine.log import Log, LogLimits
from walship.engine.marks import Marks
from walship.engine.orphans import Manifest
from walship.engine.replayer import Replayer
from walship.engine.replica import Replica
from walship.engine.seed import SeedFile, complete_install, finish_install
from walship.engine.sparse import SparseSeedFile
from walship.engine.watermarks import Watermarks
from walship.errors import CorruptData, CorruptDatabase, HistoryMismatch, ProtocolViolation, StorageFailed, Unavailable
from walship.formats.checksum import PageChecksums
from walship.formats.frame import FrameHeader, SnapshotHeader
from walship.formats.position import Position, TermHistory, Tip

__all__ = ["Follower", "FollowerSeed"]

_log = logging.getLogger("walship.engine")

_HELD_ACKS_BYTES = 64 << 20  # R13
_HELD_ACKS_SECONDS = 1.0
_LOOK_SECONDS = 1.0
_FAR = 1 << 64
_MOST_COMPARED_PAGES = 8 << 20  # as many as a leader compares


class Follower:
    """Implements `replication.subscriber.Sink`. Create it on the event loop.

    Args:
        replica: what recovery opened, or None when the node has no database yet (or a broken one).
        acks: acknowledgments the cluster waits for; voter: whether this node's count.
        on_orphan: called in some thread with the manifest of commits that were kept before they were given up.
        on_replica: called on the loop when a seed was installed.
        on_failure: called on the loop with StorageFailed or an unforeseen error: the process must end.
        on_sync: called in some thread with the seconds that each fsync of the log took.
    """

    def __init__(
        self,
        *,
        directory: Path,
        state: StateFile,
        cluster: bytes,
        voter: bool,
        acks: int,
        limits: LogLimits,
        replica: Replica | None,
        marks: Marks,
        watermarks: Watermarks,
        on_replica: Callable[[Replica], None],
        on_failure: Callable[[BaseException], None],
        on_sync: Callable[[float], None] = lambda _seconds: None,
        on_orphan: Callable[[Manifest], None] = lambda _manifest: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.voter = voter
        self.replica = replica
        self.watermarks = watermarks
        self.lag = LagMeter.new()
        self.keep_from = 0
        self.leader_tip: Position | None = None
        self.mismatches = 0
        self.checkpoints = CheckpointTally()
        self._directory = directory
        self._state = state
        self._cluster = cluster
        self._limits = limits
        self._marks = marks
        self._acks = acks
        self._applies_at_once = voter and acks <= 1
        self._on_replica = on_replica
        self._on_failure = on_failure
        self._on_sync = on_sync
        self._on_orphan = on_orphan
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._progressed = asyncio.Event()
        self._installed = asyncio.Event()  # a seed was
        self._needs_seed = replica is None
        self._broken: str | None = None  # why this copy must be replaced, found here and not yet told the subscriber
        self._damaged = False  # the database is not what its page checksums say: a new copy has to be a whole one
        self._history = TermHistory()  # of the leader that was heard last
        self._diverged = False  # our log goes past that leader's history
        self._differs = False  # that leader says that our tip is not in its history
        self._compared: tuple[Tip, PageChecksums] | None = None  # nothing is applied while that state is compared
        self._unapplied = LagMeter.new()
        self._behind = False
        self._logged_bytes = 0  # of log frames, since the present replayer was made
        self._intake: Intake | None = None
        self._replayer: Replayer | None = None
        self._retiring = False
        self._end_notice = watermarks.on_change(self._on_marks)
        if replica is not None:
            replica.unpin()
            if not replica.differing:  # else the log lacks what the file holds; the snapshot makes an end of that
                state.update(truth=Truth.LOG)
            self._start(replica)
            if replica.differing:
                self.replace(f"{len(replica.differing)} pages of the file are not what the log's history gives")
            if replica.foreign is not None:
                self.replace(replica.foreign)

    # --- Sink: what the subscriber asks -----------------------------------------------------------------------

    @property
    def tip(self) -> Tip | None:
        return None if self._needs_seed or self._intake is None else self._intake.tip

    @property
    def promised(self) -> int:
        return self._state.state.promised

    @property
    def page_size(self) -> int:
        return self.replica.database.page_size if self.replica is not None else 0

    @property
    def comparable(self) -> bool:
        replica, replayer = self.replica, self._replayer
        if replica is None or replayer is None:
            return False
        return not self._damaged and not replayer.ended and replica.checksums.commit <= _MOST_COMPARED_PAGES

    async def page_checksums(self) -> bytes:
        replica, replayer = self.replica, self._replayer
        if replica is None or replayer is None:
            raise Unavailable("this node has no database yet, so there are no pages to compare")

        def take() -> bytes:
            self._compared = (replayer.applied, replica.checksums.copy())
            return self._compared[1].to_bytes()

        record: bytes = await self.run_between_batches(take)
        return record

    def promise(self, term: int) -> None:
        if term > self._state.state.promised:
            self._state.update(promised=term)

    async def receive(self, header: FrameHeader, data: bytes) -> None:
        await self._live_intake().receive(header, data)

    async def begin(self, header: FrameHeader) -> None:
        await self._live_intake().begin(header)

    async def part(self, record: bytes) -> None:
        await self._live_intake().part(record)

    async def end(self, record: bytes) -> None:
        await self._live_intake().end(record)

    async def abandon(self) -> None:
        if self._intake is not None:
            await self._intake.abandon()

    def set_rule(self, *, voter: bool, acks: int) -> None:
        """Voters or acks of the cluster have changed. What readers here have seen stays seen."""
        self.voter, self._acks, self._applies_at_once = voter, acks, voter and acks <= 1
        if self._replayer is not None:
            self._replayer.wake()

    def heard(self, *, tip: Position, acked: Position, leader_time_ms: int, keep_from: int) -> None:
        if self._broken is not None:
            raise HistoryMismatch(self._broken)  # ends the connection; the next one asks for a snapshot
        self.leader_tip = tip
        self.lag.heard(tip, self._clock())
        self.keep_from = keep_from
        known = self.watermarks.acked
        if acked.order() > known.order():
            self.watermarks.acked = acked
            if not self._applies_at_once and self._replayer is not None:
                self._replayer.wake()

    async def progress(self, after: tuple[Position, Position] | None) -> tuple[Position, Position]:
        while True:
            now = (self._acknowledged(after[0] if after else None), self.watermarks.applied)
            if now != after:
                return now
            self._progressed.clear()
            # A held-back acknowledgment is looked at again though no mark moves.
            try:
                async with asyncio.timeout(0.05 if self._behind else None):
                    await self._progressed.wait()
            except TimeoutError:
                continue

    async def seed(self, header: SnapshotHeader) -> FollowerSeed:
        """Raises HistoryMismatch when the snapshot would take back what this voter acknowledged (R9).

        What lies beyond the divergence point of a newer term was not (failover.md 3.4); it is kept as an orphan.
        """
        logged, offered = self.watermarks.logged, header.position
        if self.voter and offered.order() < logged.order():
            raise HistoryMismatch(
                f"a snapshot at {offered} was offered, but this voter has acknowledged everything up to {logged}. "
                "It was not taken; the log is kept."
            )
        self._broken = None
        compared = self._compared
        if not header.sparse:
            return FollowerSeed(self, await asyncio.to_thread(SeedFile, self._directory, header))
        if compared is None or compared[1].page_size != header.page_size:
            raise ProtocolViolation(f"a {header} came, but this node's pages were not compared")
        return FollowerSeed(self, await asyncio.to_thread(SparseSeedFile, self._directory, header, *compared))

    def history(self, terms: list[tuple[int, int]], *, differs: bool) -> None:
        self._history = TermHistory(terms)
        self._differs = differs
        self._compared = None
        leader = Position(max((term for term, _ in terms), default=0), _FAR)
        logged = self.watermarks.logged
        self._diverged = differs or (bool(terms) and not holds(self._history, leader, logged))
        for term, start in terms:
            self.watermarks.add_term(term, start)

    def mismatch(self, error: HistoryMismatch) -> None:
        _log.error("history differs from the leader's, asking for a snapshot error=%s", error)
        self.mismatches += 1
        self._broken = None
        self._needs_seed = True

    def replace(self, reason: str) -> None:
        """This copy is damaged: have it replaced by a snapshot. It goes on serving until then."""
        _log.error("copy is damaged, asking for a snapshot reason=%s", reason)
        self._broken = reason
        self._damaged = self._needs_seed = True

    # --- lifetime ---------------------------------------------------------------------------------------------

    @property
    def sound(self) -> bool:
        """True while this copy is one that could lead: nothing calls for its replacement."""
        return self.replica is not None and not self._needs_seed and self._broken is None

    async def retire(self) -> Replica:
        """End following with the whole log applied: what a promotion begins with (R2). The replica stays open.

        Raises CorruptDatabase when that did not come about: this copy cannot lead, `sound` is False.
        """
        replica, replayer = self.replica, self._replayer
        if self._intake is not None:
            await self._intake.stop()
        self._retiring = True
        if replayer is not None:
            await asyncio.to_thread(replayer.finish)
        self._end_notice()
        if replica is None or replayer is None or replayer.applied != replica.log.tip:
            self._broken = self._broken or "the log could not be applied to its end"
            raise CorruptDatabase(f"{self._directory}: {self._broken}; this node does not lead, and re-seeds")
        return replica

    async def stop(self) -> None:
        """Log what was received, save a mark, end both threads. The replica stays open. Idempotent."""
        self._end_notice()
        if self._intake is not None:
            await self._intake.stop()
        if self._replayer is not None:
            await asyncio.to_thread(self._replayer.stop)

    def lag_seconds(self) -> float:
        return self.lag.seconds(self.watermarks.applied, self._clock())

    def lag_bytes(self) -> int:
        """Bytes of log frames that are logged here and not applied."""
        applied = self._replayer.applied_bytes if self._replayer is not None else 0
        return max(0, self._logged_bytes - applied)

    def held_back_seconds(self) -> float:
        """For how long readers have kept the -wal from being emptied; 0 when they do not."""
        return self._replayer.held_back_seconds() if self._replayer is not None else 0.0

    def batches(self) -> int:
        """Commits made by applying, each of one or more frames."""
        return self._replayer.batches if self._replayer is not None else 0

    async def until_acknowledged(self) -> None:
        """Wait until what a restart or a first seed applied is acknowledged: no reader may see it before (R15).

        Both apply all they are given, since a state in the middle would need pages that are not there any more.
        """
        if self.replica is not None and self.replica.foreign is not None:
            await self._installed.wait()  # nobody is shown what was never history
        marks = self.watermarks
        while not self._applies_at_once:
            applied = marks.applied
            if await marks.wait_acked(applied, _LOOK_SECONDS):
                return
            if marks.history.lost(applied):  # then no wait takes any time, and a snapshot is what helps
                await asyncio.sleep(_LOOK_SECONDS)

    async def run_between_batches(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the applying thread, while nothing is applied (to pin a snapshot at an exact position)."""
        replayer = self._replayer
        if replayer is None:
            raise StorageFailed("this node has no database yet; it waits for its first snapshot")
        future: asyncio.Future[Any] = self._loop.create_future()

        def done(value: Any, error: BaseException | None) -> None:
            self._loop.call_soon_threadsafe(_settle, future, value, error)

        replayer.run(function, done)
        return await future

    async def install(self, seed: SeedFile | SparseSeedFile) -> None:
        """Verify `seed` and make it this node's state. The old one stands until then, and what of it is not history is
        kept as an orphan first."""
        header = seed.header
        replica = self.replica
        try:
            await asyncio.to_thread(seed.finish)
            await self.abandon()
            if self._intake is not None:
                await self._intake.stop()
            log = await asyncio.to_thread(self._keep_orphan, header)
        except BaseException as error:
            # What was compared is not what is there: the next copy has to be a whole one.
            self._damaged = self._damaged or (header.sparse and isinstance(error, CorruptData))
            seed.abort()
            raise
        if replica is None:
            await asyncio.to_thread(seed.announce, self._state, self._history)
            seed.close()
            replica = await asyncio.to_thread(self._install_first, header, log)
        elif replica.database.page_size != header.page_size:
            await asyncio.to_thread(seed.announce, self._state, self._history)
            seed.close()
            failure = StorageFailed(
                f"the snapshot has pages of {header.page_size} bytes, this database {replica.database.page_size}: "
                "it is put in place at the next start. Nothing is lost; this node restarts now."
            )
            self._on_failure(failure)
            raise failure
        else:
            await self._revive(replica)
            try:
                await self.run_between_batches(lambda: self._install_live(seed, replica))
            except BaseException:
                seed.close()  # the file stays: if the install was announced, the next start needs it
                raise
            await asyncio.to_thread(seed.abort)
            await asyncio.to_thread(self._replayer_or_fail().stop)
        self._damaged = self._needs_seed = False
        self._compared = None
        self._diverged = self._differs = False
        self._start(replica)
        self._installed.set()
        self._on_replica(replica)

    # --- inside -----------------------------------------------------------------------------------------------

    def _start(self, replica: Replica) -> None:
        self.replica = replica
        marks = self.watermarks
        tip = replica.log.tip.position
        for term, start in replica.log.terms().starts():
            marks.add_term(term, start)
        if self._state.state.truth is Truth.LOG and replica.database.left is None and replica.foreign is None:
            replica.marks.note(**left(replica.database, tip.txid))
        marks.publishing = tip
        marks.applied = tip
        marks.logged = tip
        self._logged_bytes = 0
        self._unapplied = LagMeter.new()
        self._replayer = Replayer(
            replica,
            marks,
            bound=self._bound,
            on_failure=lambda error: self._from_thread(self._thread_failed, error),
            on_foreign=self._keep_foreign,
            checkpoints=self.checkpoints,
        )
        self._intake = Intake(
            replica.log,
            on_logged=self._on_logged,
            on_failure=lambda error: self._from_thread(self._thread_failed, error),
            on_sync=self._on_sync,
        )
        self._replayer.start()

    def _keep_foreign(self, foreign: Foreign) -> None:
        """Replayer thread."""
        assert self.replica is not None
        self._on_orphan(keep(foreign, self._directory, self.replica.log, node=self._state.state.name))

    def _bound(self) -> Position:
        """Replayer thread: how far may be applied. Only what is durable here, so that the log is never behind the
        database."""
        logged = self.watermarks.logged
        if self._retiring:
            return logged
        if self._compared is not None:
            return self._compared[0].position
        if self._applies_at_once:
            return logged
        acked = self.watermarks.acked
        if self._diverged:
            return self.watermarks.applied  # what is not history is shown to nobody
        return min(logged, acked, key=Position.order)

    def _on_logged(self, tip: Tip, size_bytes: int) -> None:
        """Intake thread."""
        self._logged_bytes += size_bytes
        self.watermarks.logged = tip.position
        if self._replayer is not None:
            self._replayer.wake()

    def _acknowledged(self, last: Position | None) -> Position:
        """What may be acknowledged now: everything logged, unless applying lags too far (R13)."""
        marks, now = self.watermarks, self._clock()
        logged, applied = marks.logged, marks.applied
        # What still waits for acknowledgments of others (R15) is no lag of this node's own; holding back for it would
        # be a deadlock.
        self._unapplied.heard(self._bound(), now)
        behind_seconds = self._unapplied.seconds(applied, now)
        self._behind = behind_seconds > 0
        behind_bytes = self.lag_bytes() if self._applies_at_once else 0
        if behind_seconds <= _HELD_ACKS_SECONDS and behind_bytes <= _HELD_ACKS_BYTES:
            return logged
        return max(last or applied, applied, key=Position.order)

    def _on_marks(self) -> None:
        self._progressed.set()

    def _live_intake(self) -> Intake:
        if self._intake is None:
            raise HistoryMismatch("frames arrived before a snapshot; this node has no database yet")
        return self._intake

    def _replayer_or_fail(self) -> Replayer:
        if self._replayer is None:
            raise StorageFailed("this node has no database yet")
        return self._replayer

    async def _revive(self, replica: Replica) -> None:
        """A replayer that ended in a mismatch is gone: start one that is idle, to install a seed in its thread."""
        replayer = self._replayer
        if replayer is not None and not replayer.ended:
            return
        at = self.watermarks.applied
        self._replayer = Replayer(replica, self.watermarks, bound=lambda: at, on_failure=self._on_failure)
        self._replayer.start()

    def _keep_orphan(self, header: SnapshotHeader) -> Log | None:
        """Keep what `header`'s history lacks of this node's log, before it is replaced (R12). Returns the log."""
        log = self.replica.log if self.replica is not None else None
        if log is None and (self._directory / "log").exists():
            log = Log.open(self._directory / "log", cluster=self._cluster, base=header.tip, limits=self._limits)
        if log is None:
            return None
        log.sync()
        state = self._state.state
        manifest = keep_orphan(
            self._directory,
            log,
            self._history,
            header.position,
            differs=self._differs,
            node=state.name,
            led=state.led,
            acks=self._acks,
        )
        if manifest is not None:
            self._on_orphan(manifest)
        return log

    def _install_first(self, header: SnapshotHeader, log: Log | None) -> Replica:
        tip = header.tip
        if log is None:
            log = Log.open(self._directory / "log", cluster=self._cluster, base=tip, limits=self._limits)
        finish_install(self._directory, self._state, self._cluster, log, self._marks)
        log.tokens.adopt(header)
        database = Database.open(Path(self._state.state.database_path))
        database.left = database.index.header()  # the replayer takes the fence, and looks
        checksums = self._marks.load()
        if checksums is None:
            raise CorruptData(f"the page checksums of {tip} cannot be read back")
        self._marks.attach(log)
        return Replica(database, log, checksums, self._marks)

    def _install_live(self, seed: SeedFile | SparseSeedFile, replica: Replica) -> None:
        """Replayer thread: all pages as one batch over the live database. Readers keep what they see."""
        tip = seed.header.tip
        replayer = self._replayer_or_fail()
        # Before the announcement: without the fence nothing has begun.
        if isinstance(seed, SeedFile):
            replayer.applier.adopt()
        else:
            replica.database.fence.require()
            replayer.applier.hold()
            if replayer.applied != seed.base:
                raise Unavailable(f"this node moved on from {seed.base}, which was compared; it compares again")
        seed.announce(self._state, self._history)
        marks = self.watermarks
        floor = marks.applied
        # Readers may have been shown a longer history that is no more (a re-seed); positions never fall in one life.
        shown = tip.position if tip.position.order() >= floor.order() else floor

        def publishing() -> None:
            marks.publishing = shown

        try:
            replayer.applier.apply(seed.batch(), sync=True, publishing=publishing)
        except (Unavailable, CorruptDatabase):
            self._state.update(installing=None)  # nothing was published: the old state stands
            raise
        replica.checksums = seed.checksums
        self._marks.detach()
        replica.log.reset(tip, self._history)
        replica.log.tokens.adopt(seed.header)
        complete_install(self._state, self._marks, tip, seed.checksums)
        self._marks.attach(replica.log)
        replayer.reset(tip)

    def _thread_failed(self, error: BaseException) -> None:
        """On the loop: a broken copy re-seeds, everything else ends the process."""
        if isinstance(error, (CorruptData, HistoryMismatch)):
            self.replace(str(error))
        else:
            self._on_failure(error)

    def _from_thread(self, function: Callable[[BaseException], None], error: BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(function, error)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


class FollowerSeed:
    """Implements `replication.subscriber.Seed` for `Follower.seed`."""

    def __init__(
        self,
        follower: Follower,
        file: SeedFile | SparseSeedFile,
    ) -> None:
        self._follower = follower
        self._file = file

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._file.write, data)

    async def install(self) -> None:
        await self._follower.install(self._file)

    async def abort(self) -> None:
        await asyncio.to_thread(self._file.abort)


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
