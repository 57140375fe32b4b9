"""uvicorn's HTTP protocol with bounds: what a client sends slowly, endlessly or never costs a little, for a while.

uvicorn bounds none of these by itself: the size of a head, the time for a head or a body to arrive, how long an answer
waits for a client that does not read, the number of connections. Here each has a bound, one answer in HTTP where one
can still be sent, and a closed connection. A request that arrives whole in one piece pays for none of it.

It leans on uvicorn's internals (`HttpToolsProtocol`, pinned in pyproject.toml); tests/front holds the contract.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from walship.errors import Overloaded
from walship.hrana.http import Failure, failure, head_too_large, request_too_slow

__all__ = ["Bounds", "BoundedProtocol", "most_connections"]

MAX_HEAD_BYTES: Final = 64 << 10  # room for a long token and many cookies; a client needs a few hundred bytes
FIRST_BYTE_SECONDS: Final = 75.0  # a pool may connect ahead of need; as long as a kept connection may be idle
HEAD_SECONDS: Final = 10.0
BODY_PAUSE_SECONDS: Final = 10.0  # without a byte of a body that has begun
BODY_SECONDS: Final = 60.0  # for all of a body: 16 MiB at 2 Mbit/s
STALL_SECONDS: Final = 60.0  # without the client taking a byte of its answer
UNSENT_BYTES: Final = 256 << 20  # of answers that wait for slow clients, all together
RESERVED_FILES: Final = 512  # databases, logs and links of the process itself


def most_connections() -> int:
    """How many clients may be connected: what the process may open, less what it needs itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 16_384 if soft == resource.RLIM_INFINITY else max(64, min(16_384, soft - RESERVED_FILES))


class Unread(Protocol):
    """A connection whose client may not read."""

    transport: asyncio.Transport


class Bounds:
    """The bounds of one server, and what its connections know together."""

    def __init__(
        self,
        *,
        max_connections: int | None = None,
        unsent_bytes: int = UNSENT_BYTES,
        head_seconds: float = HEAD_SECONDS,
        body_pause_seconds: float = BODY_PAUSE_SECONDS,
        body_seconds: float = BODY_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.max_connections = max_connections or most_connections()
        self.unsent_bytes = unsent_bytes
        self.head_seconds, self.stall_seconds = head_seconds, stall_seconds
        self.body_pause_seconds, self.body_seconds = body_pause_seconds, body_seconds
        self._unread: dict[Unread, None] = {}  # connections whose answer waits, oldest first

    def protocol(self) -> type[BoundedProtocol]:
        """The class for `uvicorn.Config(http=...)`."""
        return type("BoundedProtocol", (BoundedProtocol,), {"bounds": self})

    def wait_for_reader(self, connection: Unread) -> None:
        """An answer waits for its client. When all that wait are too much, the one that waits longest goes."""
        self._unread[connection] = None
        unsent = sum(each.transport.get_write_buffer_size() for each in self._unread)
        while unsent > self.unsent_bytes:
            oldest = next(iter(self._unread))
            del self._unread[oldest]
            unsent -= oldest.transport.get_write_buffer_size()
            oldest.transport.abort()

    def forget(self, connection: Unread) -> None:
        self._unread.pop(connection, None)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. One timer at a time watches what it waits for: a first byte, a head, a body, or a reader."""

    bounds: Bounds
    _watch: asyncio.TimerHandle | None
    _reader_watch: asyncio.TimerHandle | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = self._reader_watch = None
        self._refused = self._in_head = self._head_too_large = False
        self._head_bytes = 0
        self._head_until = self._body_until = 0.0
        self._body_cycle: object = None  # the request whose body `_body_until` is about

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_connections:
            what = f"{self.bounds.max_connections} clients are connected already, as many as this server allows"
            self._refuse(failure(Overloaded(f"{what}. Nothing was run. Try again, or at another server")))
        else:
            self._watch = self.loop.call_later(FIRST_BYTE_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        self._stop_watch()
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._in_head:
            self._await_head(data)
        elif self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self._await_body()

    def connection_lost(self, exc: Exception | None) -> None:
        self.let_go()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()
        self.bounds.wait_for_reader(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_watch()

    # --- heads --------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        # What follows in the connection cannot be told apart from the rest any more.
        self._refused = True
        self._stop_watch()
        super().send_400_response(msg)

    def _await_head(self, data: bytes) -> None:
        if not self._head_bytes:
            self._head_bytes = len(data)
            self._head_until = self.loop.time() + self.bounds.head_seconds
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(head_too_large(MAX_HEAD_BYTES))
        else:
            self._watch = self.loop.call_at(self._head_until, self._refuse, request_too_slow())

    # --- bodies -------------------------------------------------------------------------------------------------

    def _await_body(self) -> None:
        now = self.loop.time()
        if self._body_cycle is not self.cycle:
            self._body_cycle, self._body_until = self.cycle, now + self.bounds.body_seconds
        until = min(self._body_until, now + self.bounds.body_pause_seconds)
        self._watch = self.loop.call_at(until, self._body_late)

    def _body_late(self) -> None:
        cycle = self.cycle
        if cycle.response_complete or not cycle.more_body:
            return
        if self.flow.read_paused:  # the request waits for us, not for its client
            self._body_until = self.loop.time() + self.bounds.body_seconds
            self._await_body()
        elif cycle.response_started:
            self.transport.abort()
        else:
            self._refuse(request_too_slow())

    # --- readers ------------------------------------------------------------------------------------------------

    def _watch_reader(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._reader_watch = self.loop.call_later(self.bounds.stall_seconds, self._reader_late, size)

    def _reader_late(self, size_before: int) -> None:
        if self.transport.get_write_buffer_size() >= size_before:
            self.transport.abort()
        else:
            self._watch_reader()

    # --- endings ------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Watch no longer: the connection is lost, or has become something else than HTTP."""
        self._stop_watch()
        self._stop_reader_watch()

    def handle_websocket_upgrade(self) -> None:
        self.let_go()
        super().handle_websocket_upgrade()

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _stop_reader_watch(self) -> None:
        if self._reader_watch is not None:
            self._reader_watch.cancel()
            self._reader_watch = None
            self.bounds.forget(self)

    def _refuse(self, problem: Failure) -> None:
        """Answer in place of the application, and close. An answer that is under way is cut."""
        self._refused = True
        if not self.transport.is_closing():
            self.transport.write(problem.to_http())
            self.transport.close()
