"""uvicorn's WebSocket protocol with what our doors need besides: a polite stop, bounds, and no noise.

It leans on uvicorn's internals (`WebSocketsSansIOProtocol`; uvicorn is pinned in pyproject.toml). What differs:

- when the server stops, the application is told (`DRAIN`) and closes the connection itself when its work is done;
- a connection whose application has ended is gone soon after, whether or not the client reads what is left for it;
- a client that sends pings and does not read the pongs, or a message in endless empty pieces, costs bounded memory;
- text that is not UTF-8 closes with 1007, without a traceback in the log; addresses and paths are not logged.

Compression is off: rows are JSON that is read once, and a compressor per connection costs 64 KB and a core. Pings keep
middleboxes from forgetting an idle connection; a pong that does not come ends nothing, TCP notices who is gone.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from walship.front.protocol import Bounds
from walship.front.websocket import ABORT, DRAIN

__all__ = ["WebSocketProtocol", "websocket_options"]

PING_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 15.0  # uvicorn waits 10 s for the answer to a close
MAX_PIECES: Final = 1024

_log = logging.getLogger("walship.front.uvicorn")
_log.setLevel(logging.WARNING)


def websocket_options(message_max_bytes: int, bounds: Bounds) -> dict[str, Any]:
    """What to give `uvicorn.Config`; `bounds` are those of the server's HTTP protocol."""
    return {
        "ws": type("BoundedWebSocketProtocol", (WebSocketProtocol,), {"bounds": bounds}),
        "ws_max_size": message_max_bytes,
        "ws_per_message_deflate": False,
        "ws_ping_interval": PING_SECONDS,
        "ws_ping_timeout": None,
    }


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection."""

    bounds: Bounds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = self.conn.logger = _log
        self.conn.debug = False  # it would write whole messages to the log, tokens included

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and not self.transport.is_closing():
            cast("Any", self.queue).put_nowait({"type": DRAIN})
        else:
            super().shutdown()

    async def send(self, message: Any) -> None:
        if message["type"] == ABORT:
            self.transport.abort()
        else:
            await super().send(message)

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_PIECES:
            self.frames = [b"".join(self.frames)]
        super().handle_cont(event)

    def handle_ping(self) -> None:
        super().handle_ping()
        if not self.writable.is_set():
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.bounds.wait_for_reader(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.forget(self)
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.bounds.forget(self)
        if not self.read_paused:
            self.transport.resume_reading()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
            self.frames = [data]
            try:
                bytes(data).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(1007, "Text must be UTF-8")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()
