"""Following records for ever: what a process knows of the store, and what it does while the store is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NoReturn

from walship.coordination.store import Change, Store
from walship.errors import CorruptState, StoreUnavailable, UsageError

__all__ = ["follow"]

log = logging.getLogger("walship.store")


async def follow(
    store: Store,
    prefix: str,
    apply: Callable[[Change], None],
    *,
    retry_seconds: float,
    problem: Callable[[str | None], None] = lambda _why: None,
) -> NoReturn:
    """Give every change under `prefix` to `apply`, until cancelled: a store that is away is waited for, and what was
    known stays known; a record that cannot be read (`apply` raises CorruptState or UsageError) is skipped.

    problem: hears why the store is away, and with None that it is not.
    """
    while True:
        try:
            async with contextlib.aclosing(store.watch(prefix)) as changes:
                async for change in changes:
                    problem(None)
                    try:
                        apply(change)
                    except (CorruptState, UsageError) as error:
                        log.error("skip record key=%s reason=%s", change.key, error)
        except StoreUnavailable as error:
            problem(str(error))
            log.warning("watch %s failed: %s; what is known stays in use", prefix, error)
        await asyncio.sleep(retry_seconds)
