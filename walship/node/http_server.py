"""uvicorn as a part of a larger program: one application on one socket, inside a task group of ours.

It installs no signal handlers (the command owns them) and ends in order: no new connections, requests finished or
refused, upgraded connections ended, then the deadline.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from walship.front.listen import BACKLOG, Address
from walship.front.protocol import Bounds
from walship.front.websocket_protocol import websocket_options
from walship.hrana.http import DEFAULT_MAX_BODY_BYTES
from walship.node.http_protocol import Handler, Upgrades

__all__ = ["serving"]

# Longer than the pause of a person between two statements; far shorter than a connection leak takes to hurt.
KEEP_ALIVE_SECONDS = 65


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
    bounds = bounds or Bounds()
    async with Upgrades(upgrades or {}, credentials=credentials, bounds=bounds, end_seconds=drain_seconds) as taken:
        server = uvicorn.Server(_config(app, taken, bounds, drain_seconds, message_max_bytes))
        started = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_run(server, listener, started), name="http server")
            try:
                await started.wait()
                yield Address.of(listener)
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
        "backlog": BACKLOG,
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
