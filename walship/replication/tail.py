"""The newest frames in memory, so that shipping what was just committed reads no file."""

from __future__ import annotations

from walship.engine.log import FrameRef
from walship.formats.position import Position

__all__ = ["Tail"]


class Tail:
    """Raw frames by the position they follow, the oldest dropped above `max_bytes`.

    May have gaps (large frames are never offered, a restart begins empty): who finds no frame here asks the log.
    """

    __slots__ = ("_frames", "max_bytes", "size_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._frames: dict[Position, tuple[FrameRef, bytes]] = {}

    def offer(self, ref: FrameRef, data: bytes) -> None:
        """Keep `data`, all records of the frame `ref`."""
        if len(data) > self.max_bytes:
            return
        replaced = self._frames.pop(ref.header.previous, None)
        if replaced is not None:
            self.size_bytes -= len(replaced[1])
        self._frames[ref.header.previous] = (ref, data)
        self.size_bytes += len(data)
        while self.size_bytes > self.max_bytes:
            _, dropped = self._frames.pop(next(iter(self._frames)))
            self.size_bytes -= len(dropped)

    def after(self, position: Position) -> tuple[FrameRef, bytes] | None:
        """Return the frame that follows `position`, None when it is not here."""
        return self._frames.get(position)

    def clear(self) -> None:
        self._frames.clear()
        self.size_bytes = 0
