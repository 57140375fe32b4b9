"""WAL frame numbers for embedded replicas: the pages of the log's frames, counted from a position on (hrana.md 4).

A libSQL embedded replica follows a server by number: frame n is the nth page written since its generation began. The
log holds the same bytes on every node, so every node that still has the log from there on counts the same: each log
frame contributes its pages in the order of its page index, the last one carrying the commit size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

from walship.engine.log import FrameRef, Log, Payload
from walship.errors import LogTruncated
from walship.formats import ltx
from walship.formats.position import Position
from walship.formats.wal import FRAME_HEADER_LAYOUT

__all__ = ["FrameNumbering"]


class FrameNumbering:
    """Numbers the pages of `log` after `start`, up to `limit` positions given later. Blocking; one thread at a time.

    Raises LogTruncated or HistoryMismatch, as the log does, when it does not reach back to `start`.
    """

    def __init__(self, log: Log, start: Position) -> None:
        log.next_after(start)  # raises now rather than later
        self._log = log
        self._end = start
        self._totals = array("Q")  # pages up to and including the log frame of that place
        self._positions: list[Position] = []  # where each of those log frames begins
        self._open: tuple[int, FrameRef, Payload, list[tuple[int, int, int]]] | None = None

    @property
    def end(self) -> Position:
        """How far the log was counted."""
        return self._end

    @property
    def page_count(self) -> int:
        return self._totals[-1] if self._totals else 0

    def extend(self, limit: Position) -> None:
        """Count on, to the last log frame at or before `limit`."""
        while (ref := self._log.next_after(self._end)) is not None:
            position = ref.header.position
            if position.order() > limit.order():
                return
            if not ref.header.is_term_start:
                self._totals.append(self.page_count + len(self._index(ref)[1]))
                self._positions.append(self._end)
            self._end = position

    def frames(self, first: int, count: int) -> bytes:
        """WAL frames first..first+count-1 (from 1), as 24-byte headers and pages; fewer where the count ends.

        Salts and checksums are zero: the client computes its own. Empty when `first` is beyond the end.
        """
        out = bytearray()
        place = bisect_left(self._totals, first)
        while count > 0 and place < len(self._totals):
            before = self._totals[place - 1] if place else 0
            taken = self._append(out, place, first - before - 1, count)
            first, count, place = first + taken, count - taken, place + 1
        return bytes(out)

    def _append(self, out: bytearray, place: int, skip: int, count: int) -> int:
        ref, payload, entries = self._frame(place)
        last = entries[-1][0]
        wanted = entries[skip : skip + count]
        for pgno, offset, size in wanted:
            page = ltx.read_page(payload.read_at, offset, size, ref.header.page_size, expected_pgno=pgno)[1]
            commit = ref.header.commit if pgno == last else 0
            out += FRAME_HEADER_LAYOUT.pack(pgno, commit, 0, 0, 0, 0)
            out += page
        return len(wanted)

    def _frame(self, place: int) -> tuple[FrameRef, Payload, list[tuple[int, int, int]]]:
        """The log frame of that place, opened; the last one is kept open, since clients read on."""
        if self._open is None or self._open[0] != place:
            ref = self._log.next_after(self._positions[place])
            if ref is None:
                raise LogTruncated(f"the log no longer holds what follows {self._positions[place]}")
            payload, index = self._index(ref)
            self._open = (place, ref, payload, list(index))
        return self._open[1:]

    def _index(self, ref: FrameRef) -> tuple[Payload, ltx.PageIndex]:
        payload = self._log.payload(ref)
        return payload, ltx.open_index(payload.read_at, payload.size_bytes)[1]
