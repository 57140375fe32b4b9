"""The key that all proxies and nodes of a cluster sign batons with: batons outlive the process (hrana.md 1.4)."""

from __future__ import annotations

import contextlib
import secrets
from typing import Final

from walship.coordination.store import Store
from walship.errors import CompareFailed, StoreUnavailable

__all__ = ["BATON_KEY", "baton_key"]

BATON_KEY: Final = "proxies/baton-key"  # lies among the proxies' records and is none
_MIN_BYTES: Final = 32
_ATTEMPTS: Final = 3


async def baton_key(store: Store) -> bytes:
    """The cluster's key, made by whoever asks first. Raises StoreUnavailable."""
    for _ in range(_ATTEMPTS):
        found = await store.get(BATON_KEY)
        if found is not None and len(found.value) >= _MIN_BYTES:
            return found.value
        with contextlib.suppress(CompareFailed):
            key = secrets.token_bytes(_MIN_BYTES)
            await store.put_if(BATON_KEY, key, version=None if found is None else found.version)
            return key
    raise StoreUnavailable(f"the record {BATON_KEY} keeps changing while it is read; start this process again")
