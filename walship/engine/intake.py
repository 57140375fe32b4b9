"""The receiving half of a follower: frames from the network into the log, durable before they are acknowledged.

One thread appends what has queued and then fsyncs once. The queue is bounded in bytes; the subscriber on the event
loop waits for room, so a slow disk becomes TCP back-pressure and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from walship.engine import failpoints
from walship.engine.log import FrameAppender, Log
from walship.formats.frame import FrameHeader
from walship.formats.position import Tip
from walship.formats.record import Kind, encode_record

__all__ = ["Intake"]

_log = logging.getLogger("walship.engine")

_QUEUE_BYTES = 32 << 20


class _What(Enum):
    FRAME = auto()
    BEGIN = auto()
    PART = auto()
    END = auto()
    ABANDON = auto()


class Intake:
    """Appends frames to `log` in its own thread.

    on_logged: called in that thread with the durable tip after each fsync, and the bytes of frames that it covers.
    on_sync: called in that thread with the seconds that each fsync took. on_failure: called in that thread once,
    with what made it end (StorageFailed, HistoryMismatch, CorruptRecord).
    """

    def __init__(
        self,
        log: Log,
        *,
        on_logged: Callable[[Tip, int], None],
        on_failure: Callable[[BaseException], None],
        on_sync: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._log = log
        self._on_logged = on_logged
        self._on_failure = on_failure
        self._on_sync = on_sync
        self._items: deque[tuple[_What, FrameHeader | None, bytes]] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._appender: FrameAppender | None = None
        self._streaming: FrameHeader | None = None
        self._failed: BaseException | None = None
        self.tip = log.tip
        self._thread = threading.Thread(target=self._main, name="walship-intake", daemon=True)
        self._thread.start()

    async def receive(self, header: FrameHeader, data: bytes) -> None:
        """Take a whole frame. Waits for room. Raises what made the thread end."""
        await self._put(_What.FRAME, header, data)
        self.tip = header.tip

    async def begin(self, header: FrameHeader) -> None:
        self._streaming = header
        await self._put(_What.BEGIN, header, encode_record(Kind.FRAME_HEADER, header.to_body()))

    async def part(self, record: bytes) -> None:
        await self._put(_What.PART, None, record)

    async def end(self, record: bytes) -> None:
        header = self._streaming
        await self._put(_What.END, header, record)
        self._streaming = None  # not before: cancelled while it waits for room, the frame is still to be abandoned
        if header is not None:
            self.tip = header.tip

    async def abandon(self) -> None:
        """Drop a streamed frame whose connection died."""
        if self._streaming is not None:
            self._streaming = None
            await self._put(_What.ABANDON, None, b"")

    async def stop(self) -> None:
        """Append and sync what is queued, then end the thread. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def _put(self, what: _What, header: FrameHeader | None, data: bytes) -> None:
        while self._queued_bytes > _QUEUE_BYTES and self._failed is None:
            self._room.clear()
            await self._room.wait()
        if self._failed is not None:
            raise self._failed
        with self._changed:
            self._items.append((what, header, data))
            self._queued_bytes += len(data)
            self._changed.notify()

    def _main(self) -> None:
        try:
            while self._take_turn():
                pass
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who decides between re-seed and exit
            self._failed = error
            _log.error("intake failed error=%s", error)
            self._on_failure(error)
        finally:
            if self._appender is not None:
                self._appender.abort()
            self._wake_loop()

    def _take_turn(self) -> bool:
        with self._changed:
            while not self._items and not self._stopping:
                self._changed.wait()
            items, self._items = self._items, deque()
            if not items:
                return False
        appended_bytes = 0
        for what, header, data in items:
            appended_bytes += self._append(what, header, data)
            with self._changed:
                self._queued_bytes -= len(data)
        if appended_bytes:
            failpoints.reach("follower.logged")
            started = time.monotonic()
            tip = self._log.sync()
            self._on_sync(time.monotonic() - started)
            failpoints.reach("follower.synced")
            self._on_logged(tip, appended_bytes)
        self._wake_loop()
        return True

    def _append(self, what: _What, header: FrameHeader | None, data: bytes) -> int:
        """Returns the size of a frame that this completed, in bytes."""
        if what is _What.FRAME and header is not None:
            return self._log.append(header, data).size_bytes
        if what is _What.BEGIN and header is not None:
            self._appender = self._log.begin(header)
            self._appender.write(data)
        elif self._appender is None:
            return 0  # the rest of a frame that was abandoned
        elif what is _What.PART:
            self._appender.write(data)
        elif what is _What.END:
            self._appender.write(data)
            appender, self._appender = self._appender, None
            return appender.commit().size_bytes
        else:
            self._appender.abort()
            self._appender = None
        return 0

    def _wake_loop(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._room.set)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
