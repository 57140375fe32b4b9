"""One connection to one node: many requests at once, answers in any order (perf.md 4, 9.3).

`LinkConnection` is the asyncio shell around `walship.formats.link`. It opens with an HTTP upgrade, so that a node needs
one port; then requests are appended and written once per loop tick. What the owner must know:

- every request ends: with an answer, or with `LinkLost` when the connection dies, whatever the reason;
- `LinkLost.sent` says whether the request may have reached the node: only then its outcome is unknown;
- one client's cancelled wait never harms the link: its answer is thrown away when it comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import cast

from walship.errors import Overloaded, ProtocolViolation, Unavailable
from walship.formats.link import (
    CURSOR_WINDOW,
    NO_POSITION,
    Chunk,
    CursorEnd,
    CursorHead,
    Grant,
    LinkReader,
    Refusal,
    Reply,
    Request,
    Status,
)

__all__ = ["RELAY_PATH", "Cursor", "LinkConnection", "LinkLost"]

log = logging.getLogger("walship.proxy.link")

UPGRADE_PATH = "/walship/link"
RELAY_PATH = "/walship/relay"
MAX_IN_FLIGHT = 1024
"""Requests under way on one link; more are refused before they are sent. 64 KB bodies make that 64 MB at most."""

WRITE_HIGH_WATER = 8 << 20
MAX_HEAD = 16 << 10
GRANT_BYTES = CURSOR_WINDOW // 4


class LinkLost(Unavailable):
    """Raised for a request whose link broke. `sent`: the node may have got it, so a write's outcome is unknown."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Cursor:
    """The answer to one CURSOR request as it comes in: `chunk()` until `end` is there. `id` is the request's.

    At most `CURSOR_WINDOW` bytes wait here: the node goes on only after what was taken is granted again.
    """

    __slots__ = (
        "_abandoned",
        "_chunks",
        "_connection",
        "_failure",
        "_taken_bytes",
        "_waiter",
        "end",
        "id",
        "position",
    )

    def __init__(self, connection: LinkConnection, id: int) -> None:
        self._connection, self.id = connection, id
        self._chunks: deque[bytes] = deque()
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._taken_bytes = 0
        self._abandoned = False
        self.position = NO_POSITION  # covers the rows; there before the first of them
        self.end: CursorEnd | Refusal | None = None

    async def chunk(self) -> bytes | None:
        """The next bytes, or None when the cursor has ended and `end` says how. Raises LinkLost."""
        while not self._chunks:
            if self._failure is not None:
                raise self._failure
            if self.end is not None:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._chunks.popleft()
        self._taken_bytes += len(data)
        if self._taken_bytes >= GRANT_BYTES and self.end is None:
            self._connection.grant(self.id, self._taken_bytes)
            self._taken_bytes = 0
        return data

    @property
    def ended(self) -> bool:
        """True when the end is here and everything before it was taken."""
        return self.end is not None and not self._chunks

    def abandon(self) -> None:
        """Nobody reads any more: drop the rest as it comes. What the node runs is not cut, it may be a write."""
        self._abandoned = True
        size = self._taken_bytes + sum(map(len, self._chunks))
        self._chunks.clear()
        if size and self.end is None:
            self._connection.grant(self.id, size)

    def feed(self, message: CursorHead | Chunk | CursorEnd | Refusal | Exception) -> None:
        """Called by the connection."""
        if isinstance(message, CursorHead):
            self.position = message.position
            return
        if isinstance(message, Chunk):
            if self._abandoned:
                self._connection.grant(self.id, len(message.data))
            else:
                self._chunks.append(message.data)
        elif isinstance(message, Exception):
            self._failure = message
        else:
            self.end = message
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class LinkConnection(asyncio.Protocol):
    """One connection, from its upgrade to its end.

    Args: `on_status`, called for each STATUS; `on_end`, called once with a sentence when the connection is gone;
    `credential`, what the node asks of whoever links, empty when it asks nothing; `path`, `RELAY_PATH` when the other
    end is a follower that passes everything on to the leader.
    """

    def __init__(
        self,
        *,
        host: str,
        name: str,
        on_status: Callable[[Status], None],
        on_end: Callable[[str], None],
        credential: str = "",
        path: str = UPGRADE_PATH,
    ) -> None:
        self._host, self._name, self._credential, self._path = host, name, credential, path
        self._on_status, self._on_end = on_status, on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._head: bytearray | None = bytearray()
        self._reader = LinkReader()
        self._out: list[bytes] = []
        self._flushing = False
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[Reply | Refusal] | Cursor] = {}
        self._unsent: set[int] = set()
        self._reason: str | None = None
        self._paused = False
        self.upgraded = False
        self.closed = False
        self.statuses = 0  # how many came
        self.last_heard = self._loop.time()

    # --- requests -----------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    @property
    def usable(self) -> bool:
        """Up, and with room for one more request."""
        return self.upgraded and not self.closed and not self._paused and len(self._waiting) < MAX_IN_FLIGHT

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def request(self, request: Request) -> asyncio.Future[Reply | Refusal]:
        """Send a PIPELINE or CLOSE_STREAM whose id came from `next_id`. The future may raise LinkLost.

        Raises Overloaded or LinkLost(sent=False) at once when it cannot be sent.
        """
        future: asyncio.Future[Reply | Refusal] = self._loop.create_future()
        self._send(request, future)
        return future

    def cursor(self, request: Request) -> Cursor:
        """Send a CURSOR. Raises as `request` does."""
        cursor = Cursor(self, request.id)
        self._send(request, cursor)
        return cursor

    def grant(self, id: int, size_bytes: int) -> None:
        if not self.closed and id in self._waiting:
            self._append(Grant(id, size_bytes).to_bytes())

    def _send(self, request: Request, waiter: asyncio.Future[Reply | Refusal] | Cursor) -> None:
        if self.closed or not self.upgraded:
            raise LinkLost(f"no connection to node {self._name}; the request was not sent", sent=False)
        if not self.usable:
            raise Overloaded(
                f"{len(self._waiting)} requests wait for node {self._name} already; this one was not sent. Try again"
            )
        data = request.to_bytes()
        self._waiting[request.id] = waiter
        self._unsent.add(request.id)
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        out, self._out = self._out, []
        transport = self._transport
        if self.closed or transport is None or transport.is_closing() or not out:
            return
        self._unsent.clear()
        transport.write(out[0] if len(out) == 1 else b"".join(out))

    def abort(self, reason: str) -> None:
        """End the connection now; whoever waits gets LinkLost with this reason. Idempotent."""
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        shown = f"authorization: Walship {self._credential}\r\n" if self._credential else ""
        transport.write(
            f"GET {self._path} HTTP/1.1\r\nhost: {self._host}\r\n{shown}"
            "connection: upgrade\r\nupgrade: walship-link\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        if self._head is not None:
            data = self._upgrade(self._head, data)
            if not data:
                return
        try:
            for message in self._reader.receive_data(data):
                self._deliver(message)
        except ProtocolViolation as error:
            log.warning("close link node=%s reason=%s", self._name, error)
            self.abort(f"node {self._name} broke the link protocol: {error}")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        reason = self._reason or f"the connection to node {self._name} was lost" + (f": {error}" if error else "")
        waiting, self._waiting = self._waiting, {}
        for id, waiter in waiting.items():
            lost = LinkLost(reason, sent=id not in self._unsent)
            if isinstance(waiter, Cursor):
                waiter.feed(lost)
            elif not waiter.done():
                waiter.set_exception(lost)
        self._out.clear()
        self._on_end(reason)

    def _upgrade(self, head: bytearray, data: bytes) -> bytes:
        """Read the answer to the upgrade; returns what came after it."""
        head += data
        end = head.find(b"\r\n\r\n")
        if end < 0:
            if len(head) > MAX_HEAD:
                self.abort(f"node {self._name} answered the upgrade with no end")
            return b""
        self._head = None
        first = bytes(head.split(b"\r\n", 1)[0])
        if first.split(b" ")[1:2] != [b"101"]:
            self.abort(f"node {self._name} refused the link: {first[:80].decode('latin-1')}")
            return b""
        self.upgraded = True
        return bytes(head[end + 4 :])

    def _deliver(self, message: object) -> None:
        if isinstance(message, Status):
            self.statuses += 1
            self._on_status(message)
        elif isinstance(message, Reply | Refusal | Chunk | CursorEnd | CursorHead):
            waiter = self._waiting.get(message.id)
            if isinstance(waiter, Cursor):
                if isinstance(message, Reply):
                    raise ProtocolViolation(f"link: a REPLY to cursor {message.id}")
                if not isinstance(message, Chunk | CursorHead):
                    del self._waiting[message.id]
                waiter.feed(message)
            elif waiter is not None:
                if not isinstance(message, Reply | Refusal):
                    raise ProtocolViolation(f"link: cursor bytes for request {message.id}, which is no cursor")
                del self._waiting[message.id]
                if not waiter.done():
                    waiter.set_result(message)
            else:
                raise ProtocolViolation(f"link: an answer to {message.id}, which nobody waits for")
        else:
            raise ProtocolViolation("link: a node sent what only a proxy may send")
