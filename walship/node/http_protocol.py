"""The HTTP port of a node: uvicorn's own protocol, with a door for connections that stop being HTTP.

Replication and the proxy link share the node's one port. A connection whose first bytes are `GET /walship/...` with
an Upgrade header is answered `101 Switching Protocols` and handed over, as a pair of asyncio streams, to the handler
registered for its path. Every other connection is plain uvicorn from its first byte on; the price is one look.

Whoever links could write past every token and read all data, so it must show the credential of the cluster
(`Authorization: Walship ...`, ClusterRecord.credential); a stranger is answered 401.

It leans on uvicorn's internals (by `walship.front.protocol`, pinned in pyproject.toml); tests/node holds the contract.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from walship.errors import AuthFailed, WalshipError
from walship.front.protocol import BoundedProtocol, Bounds
from walship.hrana.http import failure

__all__ = ["Handler", "Upgrades"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Owns one upgraded connection; the connection is closed when it returns. Errors of the tree and of the network end
that connection only; any other error is a bug, and ends the process with its traceback."""

log = logging.getLogger("walship.http")

PREFIX: Final = b"GET /walship/"
MAX_HEAD_BYTES: Final = 8 << 10
HEAD_SECONDS: Final = 10.0  # a head that is not whole by then never will be
BUFFER_BYTES: Final = 1 << 20  # of the reader; it pauses the socket at twice this
_REQUEST_LINE: Final = re.compile(rb"GET (/walship/[a-z]+) HTTP/1\.1\r\n")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*?)[ \t]*\r\n")
_UPGRADE_TOKEN: Final = re.compile(r"[A-Za-z0-9./_-]{1,64}")


class Upgrades:
    """The handlers by path, and the owner of every upgraded connection.

    An async context manager: on leaving it, new upgrades are refused with 503, handlers that end by themselves
    (because their server drains) have `end_seconds` for it, and the others are cancelled. Its task group is where an
    unexpected error of a handler surfaces.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        credentials: Mapping[str, str] | None = None,
        bounds: Bounds | None = None,
        end_seconds: float = 5.0,
    ) -> None:
        self._handlers = {path.encode("ascii"): handler for path, handler in handlers.items()}
        self._credentials = {path.encode("ascii"): text.encode() for path, text in (credentials or {}).items() if text}
        self._bounds = bounds or Bounds()
        self._end_seconds = end_seconds
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        group, self._group = self._group, None
        assert group is not None
        if self._tasks and error is None:
            await asyncio.wait(self._tasks, timeout=self._end_seconds)
        for task in tuple(self._tasks):
            task.cancel()
        await group.__aexit__(kind, error, traceback)

    def protocol(self) -> type[BoundedProtocol]:
        """The class for `uvicorn.Config(http=...)`."""
        return type("UpgradingProtocol", (_UpgradingProtocol,), {"upgrades": self, "bounds": self._bounds})

    def admits(self, path: bytes, shown: bytes) -> bool:
        """Is `shown` the credential asked for at `path`? True when none is."""
        credential = self._credentials.get(path)
        return credential is None or hmac.compare_digest(credential, shown)

    def take(self, path: bytes) -> Handler | None:
        """The handler for `path`, or None when there is none."""
        return self._handlers.get(path)

    def start(self, handler: Handler, path: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Run `handler` on the connection from now on. False when no new ones are taken any more."""
        if self._group is None:
            return False
        name = f"{path.decode('ascii')} {writer.get_extra_info('peername')}"
        task = self._group.create_task(self._own(handler, name, reader, writer), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _own(
        self, handler: Handler, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await handler(reader, writer)
        except (WalshipError, OSError, EOFError) as error:
            log.info("close upgraded connection %s reason=%s", name, str(error) or type(error).__name__)
        except BaseExceptionGroup as group:
            expected, rest = group.split((WalshipError, OSError, EOFError))
            if rest is not None:
                raise rest from None
            log.info("close upgraded connection %s reason=%s", name, expected)
        finally:
            writer.close()


class _UpgradingProtocol(BoundedProtocol):
    """Holds the first bytes back while they may still be an upgrade of ours, then decides once."""

    upgrades: Upgrades
    _first: bytearray | None
    _timer: asyncio.TimerHandle | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = bytearray()
        self._timer = None

    def data_received(self, data: bytes) -> None:
        if self._first is None:
            super().data_received(data)
            return
        first = self._first
        first += data
        if not PREFIX.startswith(first[: len(PREFIX)]):
            self._go_on_as_http()
            return
        end = first.find(b"\r\n\r\n") + 4
        if end >= 4:
            self._decide(bytes(first[:end]), bytes(first[end:]))
        elif len(first) > MAX_HEAD_BYTES:
            self._go_on_as_http()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._first is not None:
            self._stop_timer()
        super().shutdown()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on_as_http(self) -> None:
        self._stop_timer()
        data, self._first = bytes(self._first or b""), None
        super().data_received(data)

    def _decide(self, head: bytes, rest: bytes) -> None:
        line = _REQUEST_LINE.match(head)
        handler = self.upgrades.take(line[1]) if line else None
        token, shown = _asked(head, line.end()) if line else (None, b"")
        if line is None or handler is None or token is None:
            self._go_on_as_http()
            return
        self._stop_timer()
        self._first = None
        self.let_go()
        if not self.upgrades.admits(line[1], shown):
            log.warning("refuse upgrade path=%s peer=%s: not of this cluster", line[1].decode("ascii"), self.client)
            self._refuse(failure(AuthFailed(401, "AUTH_CLUSTER", "this port is for processes of this cluster")))
            return
        reader = asyncio.StreamReader(limit=BUFFER_BYTES, loop=self.loop)
        streams = asyncio.StreamReaderProtocol(reader, loop=self.loop)
        # From here on uvicorn does not know the connection: `Upgrades` ends it.
        self.connections.discard(self)
        self.transport.set_protocol(streams)
        streams.connection_made(self.transport)
        writer = asyncio.StreamWriter(self.transport, streams, reader, self.loop)
        if self.upgrades.start(handler, line[1], reader, writer):
            # Written before the handler's first step: the task starts at the next turn of the loop.
            writer.write(
                f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n\r\n".encode("ascii")
            )
            if rest:
                reader.feed_data(rest)
        else:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            writer.close()


def _asked(head: bytes, start: int) -> tuple[str | None, bytes]:
    """What the client asks to upgrade to (None when it does not, or not properly), and the credential it shows."""
    asked: str | None = None
    connection, shown = "", b""
    for name, value in _HEADER.findall(head, start):
        if name.lower() == b"upgrade":
            asked = value.decode("latin-1")
        elif name.lower() == b"connection":
            connection += "," + value.decode("latin-1").lower()
        elif name.lower() == b"authorization":
            shown = value.removeprefix(b"Walship ")
    wants = "upgrade" in [word.strip() for word in connection.split(",")]
    return asked if wants and asked is not None and _UPGRADE_TOKEN.fullmatch(asked) else None, shown
