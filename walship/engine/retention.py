"""Retention: which segments of the log may go, and who holds them back (R9).

The rules, strongest first:

1. The last segment stays.
2. Nothing a live pin still needs goes. A pin is somebody reading along (a seed, a catch-up); one that has been silent
   for PIN_SILENCE_SECONDS is dropped, because its owner is gone.
3. A log above `max_bytes` loses its oldest segments, even those a follower still needs. That follower must be
   re-seeded, so such losses are counted.
4. Otherwise a segment goes when nobody needs it (`keep_from`) and it is older than `keep_seconds`.

Pure decisions: sizes, ages and positions in, a number of segments out. `Pin` only holds what its owner told it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from walship.errors import UsageError
from walship.formats.position import Position

__all__ = ["PIN_SILENCE_SECONDS", "LogLimits", "Pin", "PrunePlan", "SegmentFacts", "plan_prune"]

PIN_SILENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How much log is kept. `segment_bytes`: a segment this large gets no more frames; one frame may exceed it.

    `max_bytes` bounds the whole log (the last segment and pinned ones excepted); within it, segments nobody needs are
    still kept for `keep_seconds`, so that a node that was away for a while catches up without a snapshot.
    """

    max_bytes: int
    segment_bytes: int = 64 << 20
    keep_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.max_bytes <= 0 or self.segment_bytes <= 0 or self.keep_seconds < 0:
            raise UsageError(f"log limits must be positive: {self}")


class Pin:
    """Keeps the log from a position on, for somebody who reads it. A context manager; `move` as the reading goes on.

    Does not last forever: silent for 60 s, it is dropped (`dropped` is then True), and what it kept may be gone.
    """

    __slots__ = ("_clock", "_move", "_release", "dropped", "last_heard", "position")

    def __init__(
        self,
        position: Position,
        *,
        clock: Callable[[], float],
        move: Callable[[Pin, Position], None],
        release: Callable[[Pin], None],
    ) -> None:
        self.position = position
        self.dropped = False
        self.last_heard = clock()
        self._clock = clock
        self._move = move
        self._release = release

    def move(self, position: Position) -> None:
        """Say that everything up to `position` is no longer needed. A dropped pin holds again from there.

        Raises LogTruncated when the pin was dropped and the log no longer reaches back to `position`.
        """
        self._move(self, position)
        self.last_heard = self._clock()

    def touch(self) -> None:
        """Say that the reader is alive, though it has not moved."""
        self.move(self.position)

    def release(self) -> None:
        """Let go. Idempotent."""
        self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """What retention must know of one segment: its size, its last position, the time of its last frame."""

    size_bytes: int
    last: Position
    last_time_ms: int


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """The oldest `segments` segments go; `past_keep_from` of them hold frames that a follower still needs."""

    segments: int
    past_keep_from: int


def plan_prune(
    segments: Sequence[SegmentFacts],
    pinned: Iterable[Position],
    limits: LogLimits,
    *,
    keep_from: int | None,
    now_ms: int,
) -> PrunePlan:
    """Decide, oldest first, by the rules above.

    `pinned` are the positions of live pins: the frames after them stay. `keep_from` is the txid up to which every
    known follower has everything (None: nobody is known to need anything).
    """
    floor = min((pin.order() for pin in pinned), default=None)
    total = sum(segment.size_bytes for segment in segments)
    gone = past = 0
    for segment in segments[:-1]:
        if floor is not None and segment.last.order() > floor:
            break
        needed = keep_from is not None and segment.last.txid > keep_from
        if total <= limits.max_bytes:
            young = now_ms - segment.last_time_ms < limits.keep_seconds * 1000
            if needed or young:
                break
        gone += 1
        past += needed
        total -= segment.size_bytes
    return PrunePlan(gone, past)
