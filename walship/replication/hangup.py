"""Writing to, and closing, a connection whose other end may be gone or may not read any more."""

from __future__ import annotations

import asyncio

__all__ = ["LINGER_SECONDS", "abort", "hang_up", "send"]

LINGER_SECONDS = 2.0
"""How long the last words may take. A close alone would wait for the socket's buffer for as long as TCP is patient."""


def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Queue `data`; nothing is done on a connection that is lost already, as with asyncio's own transports.

    uvloop's raise RuntimeError then: the peer's death between two turns of the loop would end the task group, and the
    node with it. Whoever reads or drains hears of the loss.
    """
    if not writer.transport.is_closing():
        writer.write(data)


def hang_up(writer: asyncio.StreamWriter, *, linger_seconds: float = LINGER_SECONDS) -> None:
    """Close; what waits in the socket's buffer is still sent, for at most `linger_seconds`. Idempotent."""
    writer.close()
    if writer.transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(linger_seconds, abort, writer)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close at once what `close` has not closed because its buffer is not empty. Idempotent."""
    # Without a buffer it is closed, or will be in the next tick. asyncio's own abort fails on a connection it lost.
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
