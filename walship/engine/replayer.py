"""The applying half of a follower: durable frames of the log into its -wal, in its own thread (engine.md 2).

What has queued is merged into one commit, so a follower that lags catches up faster than it fell behind. Each batch
is checked before anything is published: the page checksums after it must give the frame's rolling checksum.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from walship.engine.apply import Applier
from walship.engine.checkpoint import CheckpointPolicy, CheckpointTally, Step, empty, passive
from walship.engine.durable_state import FileStamp, WalBase
from walship.engine.foreign import Foreign, found_live, left
from walship.engine.log import FrameRef
from walship.engine.replay import merge_frames
from walship.engine.replica import Replica
from walship.engine.watermarks import Watermarks
from walship.errors import CorruptDatabase, Draining, Unavailable
from walship.formats.checksum import page_checksum
from walship.formats.position import Position, Tip
from walship.formats.wal import FRAME_HEADER_SIZE, WalHeader
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Replayer"]

_log = logging.getLogger("walship.engine")

_MERGED_FRAMES = 512
_MERGED_BYTES = 16 << 20
_FENCE_SECONDS = 0.05  # how often the fence is tried again while a foreign transaction has WRITE
_EMPTY_SECONDS = 0.02
_LAST_EMPTY_SECONDS = 0.1
_PATIENT_EMPTY_SECONDS = 1.0


class Replayer:
    """Applies frames of `replica.log` up to `bound()`; used by `Follower`.

    on_failure: called once, with what made the thread end. checkpoints: where attempts to empty the -wal are counted.
    on_foreign: called in the thread with commits of other programs, before they are that failure; raises StorageFailed.
    """

    def __init__(
        self,
        replica: Replica,
        watermarks: Watermarks,
        *,
        bound: Callable[[], Position],
        on_failure: Callable[[BaseException], None],
        on_foreign: Callable[[Foreign], None] = lambda _foreign: None,
        checkpoints: CheckpointTally | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica = replica
        self._watermarks = watermarks
        self._bound = bound
        self._on_failure = on_failure
        self._clock = clock
        self._on_foreign = on_foreign
        self._applier = Applier(replica.database, self._find_foreign, self._generation_begins)
        self._checkpointer = replica.database.connect_writer()
        self._policy = CheckpointPolicy()
        self._checkpoints = checkpoints or CheckpointTally()
        self._tasks: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self._changed = threading.Condition()
        self._woken = True
        self._stopping = False
        self._finishing = False
        self._ended: BaseException | None = None
        self._blocked = False
        self.applied: Tip = replica.log.tip
        self.batches = 0
        self.applied_bytes = 0  # of log frames, since this replayer was made
        self._held_back_since: float | None = None
        self._thread = threading.Thread(target=self._main, name="walship-replayer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be more to apply. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def run(self, function: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `function` in the thread, between two batches; `done` gets its value or error, in some thread."""
        with self._changed:
            ended = self._ended
            if ended is None:
                self._tasks.append((function, done))
                self._changed.notify()
        if ended is not None:
            done(None, ended)

    def stop(self) -> None:
        """Apply nothing more, save a mark, end the thread. Blocks until it has ended; idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def finish(self) -> None:
        """Apply the log to its end (as far as `bound` allows), then end the thread, without a mark: a promotion waits.
        Blocks until it has ended; whether it got there is to be seen in `applied`."""
        with self._changed:
            self._finishing = self._woken = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def held_back_seconds(self) -> float:
        """For how long readers have kept the -wal from being emptied; 0 when they do not. From any thread."""
        since = self._held_back_since
        return 0.0 if since is None else self._clock() - since

    @property
    def ended(self) -> bool:
        """True once it applies nothing any more, because it failed or was stopped."""
        return self._ended is not None

    @property
    def applier(self) -> Applier:
        """For a seed that is installed under live readers, inside `run`."""
        return self._applier

    def reset(self, tip: Tip) -> None:
        """The database was replaced by the state at `tip` and the log begins there. Inside `run`."""
        self._replica.foreign = None
        self.applied = tip

    def mark(self) -> None:
        """Make everything applied durable in the database and its -wal, and remember it (R8)."""
        self._replica.database.sync_wal()
        self._replica.marks.note(**left(self._replica.database, self.applied.position.txid))
        self._replica.marks.save(self.applied, self._replica.checksums)

    def _main(self) -> None:
        try:
            while self._turn():
                pass
            if not self._finishing and self._replica.foreign is None:
                self._empty(_LAST_EMPTY_SECONDS)
                self.mark()
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who decides between re-seed and exit
            _log.error("replayer failed at=%s error=%s", self.applied.position, error)
            self._end(error)
            self._on_failure(error)
        else:
            self._end(Draining("this node no longer applies frames: it is shutting down. Nothing was run."))
        finally:
            self._checkpointer.close(True)

    def _end(self, error: BaseException) -> None:
        """Nothing is run from here on: whoever waits for a task, or brings one later, gets `error`."""
        with self._changed:
            self._ended = error
            tasks, self._tasks = self._tasks, deque()
        for _, done in tasks:
            done(None, error)

    def _turn(self) -> bool:
        with self._changed:
            while not (self._woken or self._tasks or self._stopping):
                if not self._changed.wait(None if self._replica.database.fence.held else _FENCE_SECONDS):
                    break
            self._woken = False
            tasks, self._tasks = self._tasks, deque()
            if self._stopping and not tasks:
                return False
        for function, done in tasks:
            try:
                value = function()
            except BaseException as error:  # noqa: BLE001 - delivered to the caller
                done(None, error)
            else:
                done(value, None)
        self._applier.hold()
        while not (self._stopping or self._tasks) and (refs := self._next_frames()):
            try:
                self._apply(refs)
            except Unavailable as error:
                # Nothing was published. Somebody's checkpoint may hold WRITE while it waits for readers: try again.
                if not self._blocked:
                    _log.warning("applying waits at=%s reason=%s", self.applied.position, error)
                self._blocked = self._woken = True
                return True
            self._blocked = False
            self._checkpoint()
        if self._tasks:
            self._woken = True  # what is left to apply comes after them
        return not self._finishing or self._woken or bool(self._tasks)

    def _next_frames(self) -> list[FrameRef]:
        bound = self._bound()
        limit = bound.order()
        refs: list[FrameRef] = []
        size_bytes = 0
        for ref in itertools.islice(self._replica.log.frames_after(self.applied.position), _MERGED_FRAMES):
            position = ref.header.position
            size_bytes += ref.payload_bytes
            if position.order() > limit or (refs and size_bytes > _MERGED_BYTES):
                break
            refs.append(ref)
        return refs

    def _apply(self, refs: list[FrameRef]) -> None:
        last = refs[-1].header
        batch = merge_frames(self._replica.log, refs)
        for ref in refs:
            if ref.header.is_term_start:
                self._watermarks.add_term(ref.header.term, ref.header.previous.txid)
        if batch is not None:
            sums = {pgno: page_checksum(pgno, page) for pgno, page in zip(batch.pgnos, batch.pages(), strict=True)}
            rolling = self._replica.checksums.preview_many(sums, batch.commit)
            if rolling != last.checksum:
                raise CorruptDatabase(
                    f"applying up to {last.position} would give checksum {rolling:016x}, the leader has "
                    f"{last.checksum:016x}: this copy differs from the leader's. Nothing was published; it re-seeds."
                )
        if batch is not None and batch.pgnos:
            self._applier.apply(batch, sync=False, publishing=lambda: self._publishing(last.position))
        else:
            self._publishing(last.position)
        if batch is not None:
            self._replica.checksums.set_many(sums, batch.commit)
        self.applied = last.tip
        self.batches += 1
        self._watermarks.applied = last.position
        size_bytes = sum(ref.size_bytes for ref in refs)
        self.applied_bytes += size_bytes
        self._replica.marks.appended(size_bytes)
        if self._replica.marks.due():
            self.mark()

    def _publishing(self, position: Position) -> None:
        self._watermarks.publishing = position

    def _checkpoint(self) -> None:
        frame_bytes = FRAME_HEADER_SIZE + self._replica.database.page_size
        step = self._policy.decide(self._applier.mx_frame() * frame_bytes, self._clock())
        if step is Step.NOTHING:
            return
        if step is Step.PASSIVE:
            passive(self._checkpointer)
            return
        emptied = self._empty(_EMPTY_SECONDS if step is Step.TRUNCATE else _PATIENT_EMPTY_SECONDS)
        self._checkpoints.count(done=emptied)
        if emptied:
            self._policy.emptied()
            self._held_back_since = None
        else:
            self._held_back_since = self._held_back_since or self._clock()

    def _empty(self, wait_seconds: float) -> bool:
        database = self._replica.database
        if not database.fence.take():
            return False
        emptied = empty(database, self._checkpointer, wait_seconds, self._let_go)
        if emptied:
            self._applier.accept_emptied()
        return emptied

    def _let_go(self) -> None:
        """Everything is in the database file: what it looks like, should nobody write to it any more."""
        stamp = FileStamp.of(self._replica.database.file_fd)
        self._replica.marks.note(next_base=self.applied.position.txid, next_base_file=stamp)

    def _generation_begins(self, header: WalHeader) -> None:
        base = WalBase(self.applied.position.txid, header.salts, 0, header.checksum)
        self._replica.marks.note(base=base, next_base=None, next_base_file=None)

    def _find_foreign(self, before: WalIndexHeader, header: WalIndexHeader) -> bool:
        replica = self._replica
        foreign = found_live(replica.database, before, header, replica.checksums, self.applied)
        if foreign is None:
            return False
        self._on_foreign(foreign)
        replica.checksums = foreign.checksums
        replica.foreign = f"other programs committed to {replica.database.path}"
        return True
