"""Whole answers of an ASGI application, and the headers that let web pages read them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from walship.hrana.http import Failure

__all__ = [
    "CORS",
    "Headers",
    "Message",
    "Receive",
    "Send",
    "send_answer",
    "send_failure",
    "send_preflight",
    "send_head",
    "until_disconnect",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

# Web clients call from anywhere (hrana.md 1.1); `*` in allow-headers does not cover Authorization, so it is named.
CORS: Final[Headers] = ((b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*"))
_PREFLIGHT: Final[Headers] = (
    *CORS,
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"*, Authorization"),
    (b"access-control-max-age", b"86400"),
)


async def send_head(send: Send, status: int, content_type: str, headers: Headers = ()) -> None:
    """Send the head; the body is the caller's."""
    head = [(b"content-type", content_type.encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})


async def send_answer(send: Send, status: int, content_type: str, body: bytes, headers: Headers = ()) -> None:
    """Send head and body."""
    await send_head(send, status, content_type, [*headers, (b"content-length", b"%d" % len(body))])
    await send({"type": "http.response.body", "body": body})


async def send_failure(send: Send, problem: Failure, headers: Headers = CORS) -> None:
    """Answer with a failure of a whole request; one of 401 says how to authenticate."""
    how: Headers = [(b"www-authenticate", b"Bearer")] if problem.status == 401 else ()
    await send_answer(send, problem.status, problem.content_type, problem.body, [*headers, *how])


async def send_preflight(send: Send) -> None:
    """Answer OPTIONS: a web page asks what it may send."""
    await send({"type": "http.response.start", "status": 204, "headers": _PREFLIGHT})
    await send({"type": "http.response.body", "body": b""})


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone away; what it still sends is not looked at."""
    while (await receive())["type"] != "http.disconnect":
        pass
