"""Closing a connection whose other end may not read any more."""

from __future__ import annotations

import asyncio

__all__ = ["LINGER_SECONDS", "abort", "hang_up"]

LINGER_SECONDS = 2.0
"""How long the last words may take. A close alone would wait for the socket's buffer for as long as TCP is patient."""


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
