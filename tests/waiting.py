"""Waiting for a condition, with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], object], timeout_seconds: float = 10.0) -> None:
    """Return once `condition()` holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_seconds):
        while not condition():  # noqa: ASYNC110  the condition is of a part that has no event for it
            await asyncio.sleep(0.002)
