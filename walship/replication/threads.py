"""Small things about cancellation: calls that must come to their end, and a cancel that a task group swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["in_thread", "raise_if_cancelled", "to_its_end"]

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


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; when cancelled, let it finish first. Raises its error then, else the cancellation."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        task.result()
        raise


def raise_if_cancelled() -> None:
    """Raise CancelledError if the running task was cancelled and that got lost.

    A TaskGroup that is cancelled while a child fails raises the child's error alone; a loop that takes such an error
    for the end of one try would go on for ever. To be called where it is caught. Only right when the group's body
    waits inside the `async with` to the end: in Python 3.11 a child that fails while the group is already closing
    leaves its parent marked as cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
