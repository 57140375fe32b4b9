"""uvicorn as a part of a larger program: one application on one socket, inside a task group of ours.

It installs no signal handlers (the command owns them), binds before it starts (so a busy port is an error of ours and
port 0 is known at once), and ends in order: no new connections, requests finished or refused, upgraded connections
ended, then the deadline.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from walship.errors import UsageError
from walship.front.protocol import Bounds
from walship.front.websocket_protocol import websocket_options
from walship.hrana.http import DEFAULT_MAX_BODY_BYTES
from walship.node.http_protocol import Handler, Upgrades

__all__ = ["Address", "bind", "serving"]

# Longer than the pause of a person between two statements; far shorter than a connection leak takes to hurt.
KEEP_ALIVE_SECONDS = 65
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket really listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError when the address is busy, not ours or not allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"{host} is not an address to listen on: {error}. Choose another with --listen") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        what = "is in use by another process" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
        raise UsageError(f"{host}:{port} {what}. Nothing was started. Choose another with --listen") from error
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(
    app: Callable[..., Awaitable[None]],
    listener: socket.socket,
    *,
    upgrades: Mapping[str, Handler] | None = None,
    credentials: Mapping[str, str] | None = None,
    bounds: Bounds | None = None,
    drain_seconds: float = 10.0,
    message_max_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> AsyncIterator[Address]:
    """Serve `app` on `listener` while inside; the socket is closed at the end.

    Args:
        app: an ASGI application.
        upgrades: handlers of upgraded connections by path; they should end by themselves soon after leaving begins,
            else they are cancelled after `drain_seconds`.
        credentials: what whoever upgrades must show, by path; an empty one is not asked for.
        drain_seconds: how long requests that are running may take to finish.
        message_max_bytes: of a WebSocket message.
    """
    host, port = listener.getsockname()[:2]
    bounds = bounds or Bounds()
    async with Upgrades(upgrades or {}, credentials=credentials, bounds=bounds, end_seconds=drain_seconds) as taken:
        server = uvicorn.Server(_config(app, taken, bounds, drain_seconds, message_max_bytes))
        started = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_run(server, listener, started), name="http server")
            try:
                await started.wait()
                yield Address(host, port)
            finally:
                server.should_exit = True
                await asyncio.wait({task})


def _config(
    app: Callable[..., Awaitable[None]],
    upgrades: Upgrades,
    bounds: Bounds,
    drain_seconds: float,
    message_max_bytes: int,
) -> uvicorn.Config:
    options: dict[str, Any] = {
        "http": upgrades.protocol(),
        **websocket_options(message_max_bytes, bounds),
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": max(1, round(drain_seconds)),
    }
    return uvicorn.Config(app, **options)


async def _run(server: uvicorn.Server, listener: socket.socket, started: asyncio.Event) -> None:
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listener])
    started.set()
    await server.main_loop()
    await server.shutdown(sockets=[listener])
