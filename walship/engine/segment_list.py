"""The log's segments as one list, and where a frame lies in it.

The list is immutable: the log replaces it when a segment comes or goes, so a reader in any thread keeps a consistent
one and takes no lock. Positions within one log are in the order of their (term, txid) pairs, because a log holds a
single line of history; that is what makes looking up a bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from walship.engine.segment import Segment, frame_size
from walship.errors import HistoryMismatch, LogTruncated
from walship.formats.frame import PART_BYTES, FrameHeader
from walship.formats.position import Position, Tip
from walship.formats.record import RECORD_HEADER_SIZE, RECORD_OVERHEAD

__all__ = ["FrameRef", "Payload", "SegmentList"]


@dataclass(frozen=True, slots=True)
class FrameRef:
    """Where a whole frame lies: `size_bytes` of records at `offset` of the segment with that sequence number."""

    header: FrameHeader
    segment: int
    offset: int
    size_bytes: int
    payload_bytes: int
    header_bytes: int

    def __str__(self) -> str:
        return f"{self.header} at byte {self.offset} of segment {self.segment:016x}"


class Payload:
    """The LTX payload of a frame in the log, readable anywhere; the record framing is skipped by arithmetic."""

    __slots__ = ("_first", "_segment", "size_bytes")

    def __init__(self, segment: Segment, first_part: int, size_bytes: int) -> None:
        self._segment = segment
        self._first = first_part
        self.size_bytes = size_bytes

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """Return up to `size_bytes` bytes from `offset`: fewer only at the payload's end.

        Raises CorruptLog when the file has shrunk, StorageFailed.
        """
        end = min(offset + size_bytes, self.size_bytes)
        pieces = []
        while offset < end:
            part, within = divmod(offset, PART_BYTES)
            take = min(end - offset, PART_BYTES - within)
            at = self._first + part * (PART_BYTES + RECORD_OVERHEAD) + RECORD_HEADER_SIZE + within
            pieces.append(self._segment.read(at, take))
            offset += take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SegmentList(tuple[Segment, ...]):
    """Segments, oldest first, each beginning where the one before ends."""

    __slots__ = ()

    @property
    def first(self) -> Segment:
        return self[0]

    @property
    def last(self) -> Segment:
        return self[-1]

    def place(self, position: Position) -> tuple[int, int]:
        """(index of a segment, number of its frames up to `position`): where reading on from `position` begins.

        Raises LogTruncated when `position` lies before the base, HistoryMismatch when no frame ends there.
        """
        base = self.first.base.position
        if position == base:
            return 0, 0
        after = bisect_left(self, position.order(), key=_base_order)
        number = self[after - 1].find(position) if after else None
        if number is not None:
            return after - 1, number + 1
        if position.term <= base.term and position.txid <= base.txid:
            raise LogTruncated(f"the log begins at {base}; what follows {position} is no longer in it")
        raise HistoryMismatch(
            f"{position} is not the end of a frame in this log, which goes from {base} to {self.last.tip.position}"
        )

    def tip_at(self, position: Position) -> Tip:
        """The state at `position`. Raises as `place`."""
        index, frames = self.place(position)
        return self[index].tip_after(frames)

    def newest_where(self, holds: Callable[[Position], bool]) -> Tip | None:
        """The newest state for which `holds`, which is true up to some point and false beyond, is true."""
        for segment in reversed(self):
            if holds(segment.base.position):
                low, high = 0, segment.count
                while low < high:
                    middle = (low + high + 1) // 2
                    low, high = (middle, high) if holds(segment.tip_after(middle).position) else (low, middle - 1)
                return segment.tip_after(low)
        return None

    def next_after(self, position: Position) -> FrameRef | None:
        """The frame that follows `position`, None at the tip. Raises as `place`."""
        index, number = self.place(position)
        while number >= self[index].count:
            index, number = index + 1, 0
            if index == len(self):
                return None
        segment = self[index]
        header = segment.header(number)
        offset, header_bytes, payload_bytes = segment.layout(number)
        size_bytes = frame_size(header_bytes, payload_bytes)
        return FrameRef(header, segment.head.sequence, offset, size_bytes, payload_bytes, header_bytes)

    def holding(self, ref: FrameRef) -> Segment:
        """The segment of a frame. Raises LogTruncated when pruned, HistoryMismatch when the frame was removed."""
        for segment in reversed(self):
            if segment.head.sequence == ref.segment:
                if ref.offset + ref.size_bytes <= segment.end:
                    return segment
                raise HistoryMismatch(f"{ref} was removed from the log: it is not part of history any more")
        raise LogTruncated(f"{ref} is no longer in the log, which begins at {self.first.base}")


def _base_order(segment: Segment) -> tuple[int, int]:
    return segment.base.position.term, segment.base.position.txid
