"""Reading the body of a request, within bounds (hrana.md 1.5). How long one may take is `walship.front.protocol`'s."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from walship.errors import Overloaded
from walship.front.answer import Receive, Send
from walship.hrana.http import Failure, body_too_large, failure

__all__ = ["Bodies", "BodyRefused"]

SMALL_BYTES: Final = 64 << 10  # not worth counting
TOTAL_BYTES: Final = 256 << 20
DISCARD_SECONDS: Final = 5.0
DISCARD_BYTES: Final = 64 << 20


class BodyRefused(Exception):
    """The body is not taken: `answer` says so, and the connection ends. `more`: some of it has not come yet."""

    def __init__(self, problem: Failure, *, more: bool) -> None:
        super().__init__(problem)
        self._failure, self._more = problem, more

    async def answer(self, receive: Receive, send: Send, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answer at once, then read on for a while: closing on a client that still sends would reset the connection
        before it has read the answer. One that waits to be asked for its body (`Expect`) is not asked."""
        problem = self._failure
        head = [
            (b"content-type", problem.content_type.encode()),
            (b"content-length", b"%d" % len(problem.body)),
            (b"connection", b"close"),
            *headers,
        ]
        await send({"type": "http.response.start", "status": problem.status, "headers": head})
        await send({"type": "http.response.body", "body": problem.body, "more_body": True})
        if self._more:
            await _discard(receive)
        await send({"type": "http.response.body", "body": b""})


class Bodies:
    """The request bodies of one server.

    Args:
        limit_bytes: of one body.
        total_bytes: of all large ones together, from their first byte until `release`.
    """

    def __init__(self, limit_bytes: int, *, total_bytes: int = TOTAL_BYTES) -> None:
        self.limit_bytes, self.total_bytes = limit_bytes, max(total_bytes, limit_bytes)
        self.held_bytes = 0

    async def read(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
        """The whole body, to be given to `release` afterwards; None when the client went away.

        Raises BodyRefused: too large, which a content-length tells before anything is read, or too much in all.
        """
        for name, value in headers:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self.limit_bytes:
                raise BodyRefused(body_too_large(self.limit_bytes), more=True)
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False) and len(body) <= SMALL_BYTES:
            return body
        return await self._read_on(body, message.get("more_body", False), receive)

    def release(self, body: bytes | None) -> None:
        """The request is done."""
        if body is not None and len(body) > SMALL_BYTES:
            self.held_bytes -= len(body)

    async def _read_on(self, first: bytes, more: bool, receive: Receive) -> bytes | None:
        parts = bytearray(first)
        self.held_bytes += len(first)
        counted = len(first)
        whole: bytes | None = None
        try:
            while True:
                if len(parts) > self.limit_bytes:
                    raise BodyRefused(body_too_large(self.limit_bytes), more=more)
                if self.held_bytes > self.total_bytes:
                    raise BodyRefused(failure(_no_room()), more=more)
                if not more:
                    whole = bytes(parts)
                    return whole
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part, more = message.get("body", b""), message.get("more_body", False)
                parts += part
                counted += len(part)
                self.held_bytes += len(part)
        finally:
            if whole is None or len(whole) <= SMALL_BYTES:
                self.held_bytes -= counted


async def _discard(receive: Receive) -> None:
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


def _no_room() -> Overloaded:
    return Overloaded("large requests of other clients fill the memory kept for them; nothing was run. Try again")
