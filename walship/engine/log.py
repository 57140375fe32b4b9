"""The log: every frame of the recent past, on every node, append-only, in segment files.

It is what followers acknowledge, what readers catch up from and what a new leader continues. Plan:

- One thread appends (the leader's writer, or a follower's log thread); `sync` may be called from any one thread at a
  time. Readers in any thread take no lock while they read: the list of segments is replaced, never changed, bytes of
  a whole frame never change, and a file stays open as long as somebody holds its segment.
- A frame counts once its end record is written, and is durable once a `sync` that began later has returned (R5, R6).
- After a failed write the file is cut back to its last whole frame, or left behind for a new segment. After a failed
  fsync nothing may go on: the error is final, and the next start copies the segment that was hit before trusting it.
- At open a torn end is cut away. Damage that a torn write cannot explain is CorruptLog, and nothing is changed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from walship.engine.files import sync_directory
from walship.engine.log_start import FAILED_FSYNC, describe_damage, open_segments
from walship.engine.retention import PIN_SILENCE_SECONDS, LogLimits, Pin, SegmentFacts, plan_prune
from walship.engine.segment import (
    END_RECORD_BYTES,
    Segment,
    SegmentFlags,
    SegmentHead,
    frame_layout,
    write_all,
)
from walship.engine.segment_check import verify
from walship.engine.segment_list import FrameRef, Payload, SegmentList
from walship.engine.tokens import Tokens
from walship.errors import CorruptLog, CorruptRecord, HistoryMismatch, StorageFailed
from walship.formats.frame import FrameHeader
from walship.formats.position import Position, TermHistory, Tip
from walship.formats.record import RECORD_HEADER_SIZE

__all__ = ["FrameAppender", "FrameRef", "Log", "LogLimits", "LogStatistics", "Payload", "Pin"]

_CHUNK_BYTES = 1 << 20
_RECENT_FRAMES = 128  # headers of the newest frames kept decoded: shipping and applying read them right after append


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """What /status and metrics say about the log. Bytes are of whole frames and segment heads."""

    base: Tip
    tip: Tip
    durable: Position
    frames: int
    segments: int
    size_bytes: int
    pins: int
    cut_bytes: int  # torn end cut away at open
    pruned_segments: int
    pruned_past_keep_from: int  # segments dropped although a follower needed them: it is re-seeded (R9)
    pins_dropped: int


class FrameAppender:
    """Writes one large frame piece by piece; nobody sees it before `commit`. As a context manager, aborts if left."""

    __slots__ = ("_done", "_head", "_header", "_log", "_segment", "_tail", "size_bytes")

    def __init__(self, log: Log, segment: Segment, header: FrameHeader) -> None:
        self._log = log
        self._segment = segment
        self._header = header
        self._head = b""
        self._tail = b""
        self._done = False
        self.size_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append more of the frame's records, cut anywhere. Raises StorageFailed; the frame is then aborted."""
        if self._done:
            raise ValueError("this frame was committed or aborted already")
        try:
            self._log._write(self._segment, data, self._segment.end + self.size_bytes)
        except BaseException:
            self._finish()
            raise
        self.size_bytes += len(data)
        if len(self._head) < RECORD_HEADER_SIZE:
            self._head += bytes(data[: RECORD_HEADER_SIZE - len(self._head)])
        self._tail = (self._tail + bytes(data[-END_RECORD_BYTES:]))[-END_RECORD_BYTES:]

    def commit(self) -> FrameRef:
        """The frame is whole: make it the tip. Raises CorruptRecord, and aborts, when its pieces do not add up."""
        if self._done:
            raise ValueError("this frame was committed or aborted already")
        try:
            layout = frame_layout(self._head, self._tail, self.size_bytes)
        except CorruptRecord:
            self.abort()
            raise
        self._finish()
        return self._log._add(self._segment, self._header, *layout, self._segment.end + self.size_bytes)

    def abort(self) -> None:
        """Cut the pieces off again. Idempotent; nothing after `commit`."""
        if not self._done:
            self._finish()
            self._log._cut_back(self._segment)

    def _finish(self) -> None:
        self._done = True
        self._log._appender = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Log:
    """The log of one node. Open it with `Log.open`; see the module for who may call what from where."""

    def __init__(
        self,
        directory: Path,
        segments: SegmentList,
        limits: LogLimits,
        clock: Callable[[], float],
        wall_clock_ms: Callable[[], int],
        tokens: Tokens,
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._wall_clock_ms = wall_clock_ms
        self._segments = segments
        self.tokens = tokens
        self._next_sequence = segments.last.head.sequence + 1
        self._cluster = segments.last.head.cluster
        # The segment that grows (None once closed) and the tip, replaced together so that a sync sees a pair that fits.
        self._head: tuple[Segment | None, Tip] = (segments.last, segments.last.tip)
        self._durable = segments.last.tip
        self._terms = TermHistory(segments.last.terms())
        self._recent: dict[Position, FrameRef] = {}
        self._appender: FrameAppender | None = None
        self._rotate_next = False
        self._failed: str | None = None
        self._pins: list[Pin] = []
        self._lock = threading.Lock()  # the list of segments and the pins; never held across a system call
        self._reshape_lock = threading.Lock()  # one prune, reset or truncation at a time; taken before the others
        self._sync_lock = threading.Lock()  # one fsync at a time: the kernel reports an error to one caller only
        self._cut_bytes = self._pruned = self._pruned_past = self._pins_dropped = 0

    # --- opening ----------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        cluster: bytes,
        base: Tip,
        limits: LogLimits,
        terms: TermHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ms: Callable[[], int] = _wall_clock_ms,
    ) -> Self:
        """Verify the log in `directory`, cut a torn end away and fsync it; or begin one at `base` if there is none.

        `terms` (what is known of term starts up to `base`) counts, like `base`, only for a new log. Reads every byte:
        about 0.3 s for 1 GB and 20 us for each frame. Raises CorruptLog for damage, HistoryMismatch for a log of
        another cluster, StorageFailed.
        """
        tokens = Tokens()
        segments, cut_bytes = open_segments(directory, cluster, tokens.feed)
        if not segments:
            starts = terms.starts() if terms is not None else ()
            head = SegmentHead(SegmentFlags.RESET, cluster, 1, base, wall_clock_ms(), starts)
            try:
                segments = SegmentList([Segment.create(directory, head)])
                sync_directory(directory.parent)
            except OSError as error:
                raise StorageFailed(f"{directory}: no segment can be made: {error.strerror}") from error
        tokens.lose(segments.first.base.position)
        log = cls(directory, segments, limits, clock, wall_clock_ms, tokens)
        log._cut_bytes = cut_bytes
        log._sync_descriptor(segments.last)
        return log

    def close(self) -> None:
        """Let go of the files. Does not sync. Readers that still hold a segment may finish."""
        with self._lock:
            self._segments = SegmentList()
            self._recent = {}
            self._head = (None, self._head[1])

    # --- where it stands --------------------------------------------------------------------------------------

    @property
    def tip(self) -> Tip:
        """The state after the newest whole frame, durable or not."""
        return self._head[1]

    @property
    def durable_tip(self) -> Tip:
        """The newest state that a `sync` covers."""
        return self._durable

    @property
    def base(self) -> Tip:
        """The state before the oldest frame kept."""
        return self._list().first.base

    @property
    def page_size(self) -> int:
        """Bytes of a database page, from the newest frame that knows; 0 while none does."""
        return next((segment.page_size for segment in reversed(self._list()) if segment.page_size), 0)

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def last_time_ms(self) -> int:
        """Time of the newest frame (or of the log's beginning): no later frame may be dated before it (R3)."""
        return max(segment.last_time_ms for segment in self._list()[-2:])

    @property
    def cluster(self) -> bytes:
        return self._cluster

    def terms(self) -> TermHistory:
        """A copy of what this log knows about where terms began."""
        return TermHistory(self._terms.starts())

    def statistics(self) -> LogStatistics:
        segments = self._list()
        return LogStatistics(
            base=segments.first.base,
            tip=self.tip,
            durable=self._durable.position,
            frames=sum(segment.count for segment in segments),
            segments=len(segments),
            size_bytes=sum(segment.end for segment in segments),
            pins=len(self._pins),
            cut_bytes=self._cut_bytes,
            pruned_segments=self._pruned,
            pruned_past_keep_from=self._pruned_past,
            pins_dropped=self._pins_dropped,
        )

    # --- appending (one thread) -------------------------------------------------------------------------------

    def append(self, header: FrameHeader, data: bytes | bytearray | memoryview) -> FrameRef:
        """Append one whole encoded frame that extends the tip.

        Raises HistoryMismatch when it does not extend it, CorruptRecord when `data` is not one whole frame; nothing
        was written then. Raises StorageFailed when the write fails; the log then ends where it did before, and the
        append may be tried again.
        """
        self._check_extends(header)
        header_bytes, payload_bytes = frame_layout(data[:RECORD_HEADER_SIZE], data[-END_RECORD_BYTES:], len(data))
        segment = self._room(len(data))
        self._write(segment, data, segment.end)
        return self._add(segment, header, header_bytes, payload_bytes, segment.end + len(data))

    def begin(self, header: FrameHeader) -> FrameAppender:
        """Begin a frame that comes in pieces. Until its commit or abort no other append is possible.

        Raises HistoryMismatch when it does not extend the tip, StorageFailed when no segment can be made.
        """
        self._check_extends(header)
        self._appender = FrameAppender(self, self._room(0), header)
        return self._appender

    def sync(self) -> Tip:
        """Make all frames so far durable; returns the tip as it was before the call, which is what is durable now.

        Raises StorageFailed, and again at every later call: after a failed fsync the kernel may have dropped the
        data, so the process must end.
        """
        with self._sync_lock:
            segment, tip = self._head
            if segment is None:
                raise ValueError("the log is closed")
            if self._failed is not None:
                raise StorageFailed(self._failed)
            if tip != self._durable:
                self._sync_descriptor(segment)
                self._durable = tip
            return tip

    def _check_extends(self, header: FrameHeader) -> None:
        tip = self.tip
        if self._appender is not None:
            raise ValueError("another frame has begun and was neither committed nor aborted")
        if self._failed is not None:
            raise StorageFailed(self._failed)
        if header.cluster != self._cluster:
            raise HistoryMismatch(
                f"{header} belongs to cluster {header.cluster.hex()}, this log to {self._cluster.hex()}"
            )
        if header.previous != tip.position or header.previous_checksum != tip.checksum:
            raise HistoryMismatch(
                f"{header} (after checksum {header.previous_checksum:016x}) does not follow the log's tip {tip}. "
                "Nothing was written"
            )

    def _growing(self) -> Segment:
        segment = self._head[0]
        if segment is None:
            raise ValueError("the log is closed")
        return segment

    def _room(self, size_bytes: int) -> Segment:
        """The segment for the next frame, a new one when the last is full or was given up."""
        segment = self._growing()
        full = segment.end >= self._limits.segment_bytes or segment.end + size_bytes > self._limits.segment_bytes
        if not self._rotate_next and not (segment.count and full):
            return segment
        # Nothing may exist in a later segment while an earlier one can still lose its end: only the last may be torn.
        self.sync()
        return self._start_segment(SegmentFlags(0), self.tip, self._terms.starts(), keep=self._segments)

    def _start_segment(
        self, flags: SegmentFlags, base: Tip, terms: tuple[tuple[int, int], ...], *, keep: tuple[Segment, ...]
    ) -> Segment:
        head = SegmentHead(flags, self._cluster, self._next_sequence, base, self._wall_clock_ms(), terms)
        self._next_sequence += 1
        try:
            segment = Segment.create(self._directory, head)
        except OSError as error:
            message = f"{self._directory}: no new segment can be made: {error.strerror}. "
            if (self._directory / head.file_name).exists():
                # The next start will find it, or not: what this life would add elsewhere might not fit to it.
                self._failed = message + "Its name may or may not be durable, so the process must end"
                raise StorageFailed(self._failed) from error
            raise StorageFailed(message + f"The log still ends at {self.tip}") from error
        self._rotate_next = False
        with self._lock:
            self._segments = SegmentList([*(old for old in self._segments if old in keep), segment])
        self._head = (segment, base)
        return segment

    def _write(self, segment: Segment, data: bytes | bytearray | memoryview, offset: int) -> None:
        try:
            write_all(segment.descriptor, data, offset)
        except OSError as error:
            self._cut_back(segment)
            raise StorageFailed(
                f"{segment.path} cannot be written: {error.strerror}. The frame is not in the log, "
                f"which still ends at {self.tip}; nothing before it is affected"
            ) from error
        except BaseException:
            self._cut_back(segment)
            raise

    def _cut_back(self, segment: Segment) -> None:
        """Remove what a failed write left behind the last whole frame; or leave the segment for a new one (R5)."""
        try:
            os.ftruncate(segment.descriptor, segment.end)
        except OSError:
            # The next append begins a segment at the same tip, so the remains here are never read as history.
            self._rotate_next = True

    def _add(self, segment: Segment, header: FrameHeader, header_bytes: int, payload_bytes: int, end: int) -> FrameRef:
        offset = segment.end
        segment.add(header, header_bytes, payload_bytes, end)
        if header.term != header.previous.term:
            self._terms.add(header.term, header.previous.txid)
        ref = FrameRef(header, segment.head.sequence, offset, end - offset, payload_bytes, header_bytes)
        recent = self._recent
        recent[header.previous] = ref
        if len(recent) > _RECENT_FRAMES:
            del recent[next(iter(recent))]
        self._head = (segment, header.tip)
        self.tokens.feed(header)
        return ref

    def _sync_descriptor(self, segment: Segment) -> None:
        try:
            os.fdatasync(segment.descriptor)
        except OSError as error:
            self._fail(segment, error)

    def _fail(self, segment: Segment, error: OSError) -> NoReturn:
        self._failed = (
            f"{segment.path} could not be made durable: {error.strerror}. Frames after {self._durable.position} may be "
            "lost here and were not acknowledged by this node; the process must end and check the log at its next start"
        )
        with suppress(OSError):  # best effort: on a disk that fails, this may fail as well
            (self._directory / FAILED_FSYNC).write_text(f"{segment.path.name}: {error}\n")
        raise StorageFailed(self._failed) from error

    # --- reading (any thread) ---------------------------------------------------------------------------------

    def locate(self, position: Position, checksum: int) -> Position:
        """Return `position` iff a frame (or the base) ends exactly there with that checksum (R11).

        Raises LogTruncated when that lies before the base, HistoryMismatch when this history does not have it: either
        way the asker needs a snapshot or a rewind.
        """
        found = self._list().tip_at(position)
        if found.checksum != checksum:
            raise HistoryMismatch(
                f"at {position} this log has checksum {found.checksum:016x}, not {checksum:016x}: "
                "two different databases at one position"
            )
        return position

    def newest_where(self, holds: Callable[[Position], bool]) -> Tip | None:
        """The newest state here for which `holds`, which is true up to some point and false beyond, is true."""
        return self._list().newest_where(holds)

    def next_after(self, position: Position) -> FrameRef | None:
        """The frame that follows `position`, or None while `position` is the tip.

        Raises LogTruncated or HistoryMismatch when `position` is not the end of a frame here.
        """
        segments = self._list()
        recent = self._recent.get(position)
        if recent is not None and recent.segment >= segments.first.head.sequence:
            return recent
        return segments.next_after(position)

    def frames_after(self, position: Position) -> Iterator[FrameRef]:
        """All frames after `position`, in order, to the tip as it is when it is reached.

        Raises at once LogTruncated or HistoryMismatch; and later LogTruncated when the log is pruned past a reader
        that has no pin.
        """
        return self._walk(self.next_after(position))

    def _walk(self, ref: FrameRef | None) -> Iterator[FrameRef]:
        while ref is not None:
            yield ref
            ref = self.next_after(ref.header.position)

    def read(self, ref: FrameRef) -> bytes:
        """All record bytes of a frame, ready for shipping. For frames of at most 16 MiB; above, use `chunks` (R6)."""
        return self._list().holding(ref).read(ref.offset, ref.size_bytes)

    def chunks(self, ref: FrameRef, size_bytes: int = _CHUNK_BYTES) -> Iterator[bytes]:
        """The record bytes of a frame in pieces of `size_bytes`, the last one shorter."""
        segment = self._list().holding(ref)
        end = ref.offset + ref.size_bytes
        return (segment.read(at, min(size_bytes, end - at)) for at in range(ref.offset, end, size_bytes))

    def payload(self, ref: FrameRef) -> Payload:
        """The LTX payload of a frame. It stays readable while held, even if the log is pruned meanwhile."""
        return Payload(self._list().holding(ref), ref.offset + ref.header_bytes, ref.payload_bytes)

    def _list(self) -> SegmentList:
        if not self._segments:
            raise ValueError("the log is closed")
        return self._segments

    # --- retention --------------------------------------------------------------------------------------------

    def pin(self, position: Position) -> Pin:
        """Keep everything after `position` until released. Raises LogTruncated or HistoryMismatch, as `next_after`."""
        pin = Pin(position, clock=self._clock, move=self._move_pin, release=self._release_pin)
        with self._lock:
            self._list().place(position)
            self._pins.append(pin)
        return pin

    def _move_pin(self, pin: Pin, position: Position) -> None:
        with self._lock:
            if pin.dropped:
                self._list().place(position)
                pin.dropped = False
                self._pins.append(pin)
            pin.position = position

    def _release_pin(self, pin: Pin) -> None:
        with self._lock, suppress(ValueError):
            self._pins.remove(pin)

    def prune(self, *, keep_from: int | None, now_ms: int) -> int:
        """Delete the oldest segments that the limits, pins and `keep_from` (a txid) let go; returns bytes freed.

        From any thread. Raises StorageFailed when a file cannot be deleted; it is then deleted after a restart.
        """
        with self._reshape_lock:
            gone = self._let_go(keep_from, now_ms)
            self._delete(gone)
            return sum(segment.end for segment in gone)

    def _let_go(self, keep_from: int | None, now_ms: int) -> tuple[Segment, ...]:
        now = self._clock()
        with self._lock:
            for pin in [pin for pin in self._pins if now - pin.last_heard >= PIN_SILENCE_SECONDS]:
                pin.dropped = True
                self._pins.remove(pin)
                self._pins_dropped += 1
            segments = self._list()
            facts = [SegmentFacts(each.end, each.tip.position, each.last_time_ms) for each in segments]
            pinned = [pin.position for pin in self._pins]
            plan = plan_prune(facts, pinned, self._limits, keep_from=keep_from, now_ms=now_ms)
            self._segments = SegmentList(segments[plan.segments :])
            self._pruned += plan.segments
            self._pruned_past += plan.past_keep_from
        return segments[: plan.segments]

    def _delete(self, segments: tuple[Segment, ...]) -> None:
        """Delete files in the order given, each durably before the next: a crash must leave no gap in the middle."""
        for segment in segments:
            try:
                segment.path.unlink(missing_ok=True)
                sync_directory(self._directory)
            except OSError as error:
                raise StorageFailed(f"{segment.path} cannot be deleted: {error.strerror}") from error

    # --- beginning again --------------------------------------------------------------------------------------

    def reset(self, base: Tip, terms: TermHistory | None = None) -> None:
        """Replace the whole log by an empty one that begins at `base`, durably (after a snapshot install, R9).

        Pins are dropped. A crash in between leaves the old log or the new one. Raises StorageFailed. Appending thread.
        """
        self._check_idle()
        with self._reshape_lock, self._sync_lock:
            old = self._list()
            starts = terms.starts() if terms is not None else ()
            self._start_segment(SegmentFlags.RESET, base, starts, keep=())
            self._durable = base
            self._terms = TermHistory(starts)
            self.tokens.begin(base.position)
            self._forget_readers()
            self._delete(old)

    def truncate_to(self, position: Position) -> None:
        """Remove every frame after `position`, durably (for a rewind, R12). Appending thread.

        Raises LogTruncated or HistoryMismatch, changing nothing, when `position` is not the end of a frame here.
        The next append begins a new segment, so that what a reader holds of a removed frame never turns into other
        bytes.
        """
        self._check_idle()
        with self._reshape_lock, self._sync_lock:
            segments = self._list()
            index, frames = segments.place(position)
            if frames == segments[index].count and index == len(segments) - 1:
                self._sync_descriptor(segments[index])
                self._durable = self.tip
                return
            kept = Segment.open(segments[index].path)
            damage = verify(kept)
            if damage is not None and index < len(segments) - 1 and damage.torn and kept.tip == segments[index].tip:
                damage = None  # remains of a failed append, left behind for the next segment
            if damage is not None:
                raise CorruptLog(describe_damage(kept, damage, self.tip))
            kept.cut(frames)
            with self._lock:
                self._segments = SegmentList([*segments[:index], kept])
            self._forget_readers()
            self._rotate_next = True
            self._head = (kept, kept.tip)
            self._terms = TermHistory(kept.terms())
            self.tokens.cut(kept.tip.position)
            self._delete(tuple(reversed(segments[index + 1 :])))
            try:
                os.ftruncate(kept.descriptor, kept.end)
                os.fsync(kept.descriptor)
            except OSError as error:
                self._fail(kept, error)
            self._durable = kept.tip

    def _check_idle(self) -> None:
        if self._appender is not None:
            raise ValueError("a frame has begun and was neither committed nor aborted")
        if self._failed is not None:
            raise StorageFailed(self._failed)

    def _forget_readers(self) -> None:
        self._recent = {}
        with self._lock:
            for pin in self._pins:
                pin.dropped = True
            self._pins.clear()
