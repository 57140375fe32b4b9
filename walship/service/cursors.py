"""A reading that does not fit in one chunk: streamed from a read-only connection of its own, at the client's pace.

The rows are pulled: a thread of the pool makes the next chunk only when the client has taken the one before, so a
slow client costs a read transaction but neither memory nor a thread; and one that stops altogether is closed by the
service's sweep.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator

from walship.errors import NotReadOnly, StatementFailed
from walship.formats.position import Position
from walship.hrana import json as hrana
from walship.hrana.baton import STREAM_EXPIRED
from walship.hrana.types import Batch, ErrorBody
from walship.service.connections import Connections, Lane
from walship.service.executor import Counters, Lines, Need

__all__ = ["Chunks", "LaneCursor"]

Chunks = Generator[Need | bytes, None, None] | Generator[bytes, None, None]


class LaneCursor:
    """One streamed batch of reads, or dump. Owns `lane` and gives it back when closed; `on_close` is told."""

    def __init__(
        self,
        connections: Connections,
        lane: Lane,
        on_close: Callable[[LaneCursor], None],
        clock: Callable[[], float],
    ) -> None:
        self._connections = connections
        self._lane = lane
        self._on_close = on_close
        self._clock = clock
        self._chunks: Chunks | None = None
        self._first: bytes | Need | None = None
        self._closed = False
        self.used_at = clock()

    async def begin(self, batch: Batch, counters: Counters, seen: Callable[[], Position]) -> Position:
        """Take the snapshot and make the first chunk. Returns the position that `seen` gives right after (R17).

        Raises NotReadOnly when the batch writes; nothing has changed then.
        """
        executor = self._lane.executor

        def lines() -> Lines:
            executor.start(counters, virtual=True)
            return executor.lines(batch)

        position = await self.begin_with(lines, seen)
        if isinstance(self._first, Need):
            raise NotReadOnly("the batch writes, and it was sent where only reads run. Nothing was changed.")
        return position

    async def begin_with(self, make: Callable[[], Chunks], seen: Callable[[], Position]) -> Position:
        """As `begin`, for chunks that `make` makes; it is called inside the snapshot, on a thread of the pool."""
        connection = self._lane.connection

        def start() -> Position:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            position = seen()
            self._chunks = make()
            self._first = self._next()
            return position

        position = await self._connections.run(self._lane, start)
        self.used_at = self._clock()
        return position

    async def lines(self) -> AsyncIterator[bytes]:
        """The chunks. Close the iterator to stop early. Raises StatementFailed STREAM_EXPIRED after a long stop."""
        try:
            chunk = self._first
            while chunk is not None:
                if isinstance(chunk, Need):
                    # Rows are out already, so the batch cannot move to the writer any more.
                    error = ErrorBody("A step after the first rows writes; send it apart", NotReadOnly.code)
                    yield hrana.cursor_error(error)
                    return
                self.used_at = self._clock()
                yield chunk
                self.used_at = self._clock()
                if self._closed:
                    raise StatementFailed("The cursor has expired due to inactivity", STREAM_EXPIRED)
                chunk = await self._connections.run(self._lane, self._next)
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._connections.give_back(self._lane, clean=True, first=self._stop)
        self._on_close(self)

    def _next(self) -> bytes | Need | None:
        return None if self._chunks is None else next(self._chunks, None)

    def _stop(self) -> None:
        if self._chunks is not None:
            self._chunks.close()


async def once(chunk: bytes) -> AsyncIterator[bytes]:
    """The lines of a cursor that are all here already."""
    if chunk:
        yield chunk
