"""Which proxies live, and is this one alone? (R18: several proxies share their floor through the leader.)

Each proxy has a record `proxies/<name>` and holds an flock for as long as its process lives; the kernel drops that
however the process ends (failover.md 3.3). Whoever has a record and is not proven dead by such a lock counts as alive
(`witness.py`).

A proxy that is alone answers `session` reads from what it knows itself. That must end before another one
acknowledges its first write, and a notice can come late or not at all. So nobody relies on notices:

  * knowing that one is alone lasts TRUST_SECONDS from the moment the look at the store began, on the own monotonic
    clock; a proxy that was stopped for longer, or whose store is away, is not alone as far as it knows;
  * a proxy that finds another one alive after it has registered serves nobody for JOIN_SECONDS, which is longer.

After any time in which there was, or may have been, another one, what that one acknowledged has to be learned once
more before the own knowledge counts again: `doubt` grows with each such look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import NoReturn

from walship.coordination.baton_key import BATON_KEY
from walship.coordination.store import Store
from walship.coordination.witness import PROXIES, Witness, open_witness
from walship.errors import CompareFailed, StoreUnavailable

__all__ = ["JOIN_SECONDS", "PROXIES", "TRUST_SECONDS", "Presence"]

LOOK_SECONDS = 0.25
TRUST_SECONDS = 1.0
JOIN_SECONDS = 1.2

log = logging.getLogger("walship.presence")


class Presence:
    """This proxy among the proxies of its cluster. Make it with `join`; `run` must run while the proxy serves."""

    def __init__(self, store: Store, witness: Witness, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.others: tuple[str, ...] = ()
        self.doubt = 1
        self._store, self._witness, self._clock = store, witness, clock
        self._looked: float | None = None

    @classmethod
    async def join(
        cls, store: Store, cluster_url: str, name: str, url: str, *, clock: Callable[[], float] = time.monotonic
    ) -> Presence:
        """Register this process; a name that a live proxy has gets a number. Waits when others are alive.

        Raises StoreUnavailable, and UsageError when the lock cannot be made.
        """
        witness = open_witness(cluster_url)
        try:
            presence = cls(store, witness, await witness.register(store, name, url), clock)
            await presence.look()
        except BaseException:
            witness.release()
            raise
        if presence.others:
            log.info("join proxies=%s", ",".join(presence.others))
            await asyncio.sleep(JOIN_SECONDS)
        return presence

    @property
    def alone(self) -> bool:
        """True only while no other proxy can have acknowledged anything since the last look."""
        return not self.others and self._looked is not None and self._clock() - self._looked < TRUST_SECONDS

    async def look(self) -> None:
        """See who else is alive. Raises StoreUnavailable; then what was known runs out by itself."""
        began = self._clock()
        found = await self._store.list(PROXIES)
        # The key says who: a record that this version cannot read is some proxy's all the same.
        others = {key.removeprefix(PROXIES): state for key, state in found.items() if key != BATON_KEY}
        others.pop(self.name, None)
        self.others = await self._witness.living(self._store, others)
        if self.others or self._looked is None or began - self._looked >= TRUST_SECONDS:
            self.doubt += 1
        self._looked = began

    async def run(self) -> NoReturn:
        """Look again and again; ends only by cancellation."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("cannot look for other proxies: %s; reads ask the leader meanwhile", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def leave(self) -> None:
        """Take the record away, and let go of the lock. Idempotent; a store that is away leaves a dead record."""
        key = PROXIES + self.name
        gone = False
        with contextlib.suppress(StoreUnavailable, CompareFailed):
            found = await self._store.get(key)
            if found is not None:
                await self._store.delete(key, version=found.version)
            gone = True
        self._witness.release(record_gone=gone)
