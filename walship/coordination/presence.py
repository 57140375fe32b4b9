"""Which proxies live, and is this one alone? (R18: several proxies share their floor through the leader.)

Each proxy has a record `proxies/<name>` and holds an flock beside the store for as long as its process lives; the
kernel drops that however the process ends, so a record without its lock is a dead proxy's (failover.md 3.3).

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
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from walship.coordination.baton_key import BATON_KEY
from walship.coordination.file_store import HeldLock, holder_alive
from walship.coordination.store import Store, check_store_url
from walship.errors import CompareFailed, StoreUnavailable, UsageError

__all__ = ["JOIN_SECONDS", "PROXIES", "TRUST_SECONDS", "Presence", "ProxyRecord"]

PROXIES = "proxies/"
FORMAT = 1

LOOK_SECONDS = 0.25
TRUST_SECONDS = 1.0
JOIN_SECONDS = 1.2
MAX_NAMESAKES = 100

log = logging.getLogger("walship.presence")


class ProxyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a proxy is found. `boot_nonce` differs at each start."""

    format: int = FORMAT
    name: str
    url: str
    pid: int = 0
    boot_nonce: str = ""


class Presence:
    """This proxy among the proxies of its cluster. Make it with `join`; `run` must run while the proxy serves."""

    def __init__(self, store: Store, locks: Path, lock: HeldLock, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.others: tuple[str, ...] = ()
        self.doubt = 1
        self._store, self._locks, self._lock, self._clock = store, locks, lock, clock
        self._looked: float | None = None

    @classmethod
    async def join(
        cls, store: Store, cluster_url: str, name: str, url: str, *, clock: Callable[[], float] = time.monotonic
    ) -> Presence:
        """Register this process; a name that a live proxy has gets a number. Waits when others are alive.

        Raises StoreUnavailable, and UsageError when the lock cannot be made.
        """
        locks = check_store_url(cluster_url) / "proxies"
        lock, name = await asyncio.to_thread(_hold, locks, name)
        try:
            record = ProxyRecord(name=name, url=url, pid=os.getpid(), boot_nonce=secrets.token_hex(8))
            await _write(store, record)
            presence = cls(store, locks, lock, name, clock)
            await presence.look()
        except BaseException:
            lock.release()
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
        others = {key.removeprefix(PROXIES) for key in found if key != BATON_KEY} - {self.name}
        self.others = tuple(await asyncio.to_thread(self._living, others))
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
        with contextlib.suppress(StoreUnavailable, CompareFailed):
            found = await self._store.get(key)
            if found is not None:
                await self._store.delete(key, version=found.version)
        self._lock.release()

    def _living(self, names: set[str]) -> list[str]:
        try:
            return sorted(name for name in names if holder_alive(_lock_path(self._locks, name)))
        except OSError as error:
            raise StoreUnavailable(f"{self._locks} cannot be looked at: {error.strerror}") from error


def _hold(locks: Path, name: str) -> tuple[HeldLock, str]:
    if PROXIES + name == BATON_KEY:
        raise UsageError(f"--name {name}: this name is taken by a record of the cluster; choose another")
    for number in itertools.count(2):
        mine = name if number == 2 else f"{name}-{number - 1}"
        path = _lock_path(locks, mine)
        try:
            if not holder_alive(path):
                return HeldLock(path), mine
        except UsageError:
            continue  # somebody was quicker
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}. A proxy needs to write beside the coordination store"
            ) from error
        if number > MAX_NAMESAKES:
            break
    raise UsageError(f"--name {name}: {MAX_NAMESAKES} live proxies have this name; choose another")


def _lock_path(locks: Path, name: str) -> Path:
    return locks / f"{name}.lock"


async def _write(store: Store, record: ProxyRecord) -> None:
    """The name is ours by its lock, so a record there is of a dead proxy, or ours from an attempt that seemed lost."""
    for _ in range(3):
        found = await store.get(PROXIES + record.name)
        with contextlib.suppress(CompareFailed):
            await store.put_if(
                PROXIES + record.name, msgspec.json.encode(record), version=None if found is None else found.version
            )
            return
    raise StoreUnavailable(f"the record of proxy {record.name} keeps changing while it is written; start it again")
