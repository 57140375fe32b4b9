"""One hop to a worker thread for a call that blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Run `function(*args)` in a worker thread and return what it returns.

    Cancellation: unlike `asyncio.to_thread`, the cancelled caller goes on only after the call has come to its end.
    So whoever owns the file or iterator it works on may close it then, and a durable step is never half known.
    """
    future = asyncio.get_running_loop().run_in_executor(None, function, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not future.done():
            await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at, or asyncio reports it as never retrieved
        raise
