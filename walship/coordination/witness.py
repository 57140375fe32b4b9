"""Who may say that a proxy is dead (R18): names of proxies, and proofs of death without a timer.

A proxy that is taken for dead while it lives could acknowledge a write that another one's `session` reads then miss.
So a record counts as a living proxy's unless there is proof, and the only proof is a lock that the kernel dropped.

  * `HostWitness`, all on one host (`file:///`): the lock has the proxy's name and lies beside the store. A record
    without a held lock is a dead proxy's.
  * `SpreadWitness`, proxies on several machines (etcd): each proxy holds a lock with a random name in a directory of
    its own machine, and its record says which, and under which boot of which kernel. Whoever runs under the same boot,
    finds that file and can lock it has proof, and removes the record. Nobody else has: the record of a proxy whose
    machine was lost, or started anew, stays until a person deletes it. It costs the others a question to the leader
    for `session` reads, and no correctness.

    No etcd lease: it ends by a clock, also under a proxy that is only stopped and may go on to acknowledge writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import msgspec

from walship.coordination.baton_key import BATON_KEY
from walship.coordination.file_store import HeldLock, holder_alive
from walship.coordination.store import Store, Versioned, check_store_url
from walship.errors import CompareFailed, StoreUnavailable, UsageError

__all__ = ["PROXIES", "HostWitness", "ProxyRecord", "SpreadWitness", "Witness", "open_witness"]

PROXIES: Final = "proxies/"
FORMAT = 1
MAX_NAMESAKES = 100
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProxyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a proxy is found. `boot_nonce` differs at each start; `boot_id` is its kernel's, with a SpreadWitness."""

    format: int = FORMAT
    name: str
    url: str
    pid: int = 0
    boot_nonce: str = ""
    boot_id: str = ""


class Witness(Protocol):
    """What `Presence` asks. One object for one proxy."""

    async def register(self, store: Store, name: str, url: str) -> str:
        """Write this proxy's record under `name`, or under `name-2` and so on when that is taken; returns which.

        Raises StoreUnavailable, and UsageError when no name or no lock is to be had.
        """

    async def living(self, store: Store, found: Mapping[str, Versioned]) -> tuple[str, ...]:
        """Those of these proxies, by name, that are not proven dead. Raises StoreUnavailable."""

    def release(self, *, record_gone: bool = False) -> None:
        """Let go of the lock, and remove what only a record needs. Idempotent."""


def open_witness(cluster_url: str) -> Witness:
    """The witness that fits a cluster URL. Raises UsageError."""
    place = check_store_url(cluster_url)
    return HostWitness(place / "proxies") if isinstance(place, Path) else SpreadWitness()


class HostWitness:
    """All proxies on one host: the lock is the proxy's name, and beside the store."""

    def __init__(self, locks: Path) -> None:
        self._locks = locks
        self._lock: HeldLock | None = None

    async def register(self, store: Store, name: str, url: str) -> str:
        self._lock, mine = await asyncio.to_thread(self._hold, name)
        await _write(store, _record(mine, url))
        return mine

    async def living(self, store: Store, found: Mapping[str, Versioned]) -> tuple[str, ...]:
        return tuple(await asyncio.to_thread(self._held, found))

    def release(self, *, record_gone: bool = False) -> None:
        if self._lock is not None:
            self._lock.release()

    def _held(self, names: Mapping[str, Versioned]) -> list[str]:
        try:
            return sorted(name for name in names if holder_alive(self._path(name)))
        except OSError as error:
            raise StoreUnavailable(f"{self._locks} cannot be looked at: {error.strerror}") from error

    def _hold(self, name: str) -> tuple[HeldLock, str]:
        for mine in _names(name):
            path = self._path(mine)
            try:
                if not holder_alive(path):
                    return HeldLock(path), mine
            except UsageError:
                continue  # somebody was quicker
            except OSError as error:
                raise UsageError(
                    f"{path}: {error.strerror}. A proxy needs to write beside the coordination store"
                ) from error
        raise _no_name(name)

    def _path(self, name: str) -> Path:
        return self._locks / f"{name}.lock"


class SpreadWitness:
    """Proxies on several machines: the lock is a random name on the proxy's own machine.

    `locks` is for tests; it must be a directory that only this user can write.
    """

    def __init__(self, locks: Path | None = None) -> None:
        self._locks = locks or Path(tempfile.gettempdir()) / f"walship-proxies-{os.getuid()}"
        self._nonce = secrets.token_hex(16)
        self._lock: HeldLock | None = None
        self._boot_id = ""
        self._recorded = False  # a record that names our lock exists, or may

    async def register(self, store: Store, name: str, url: str) -> str:
        await asyncio.to_thread(self._hold)
        for mine in _names(name):
            key = PROXIES + mine
            found = await store.get(key)
            if found is not None and await self.living(store, {mine: found}):
                continue
            record = _record(mine, url, boot_nonce=self._nonce, boot_id=self._boot_id)
            self._recorded = True
            try:
                await store.put_if(key, msgspec.json.encode(record), version=None)
            except CompareFailed:  # somebody was quicker
                self._recorded = False
                continue
            return mine
        raise _no_name(name)

    async def living(self, store: Store, found: Mapping[str, Versioned]) -> tuple[str, ...]:
        dead = await asyncio.to_thread(self._proven_dead, found)
        for name, path in dead.items():
            with contextlib.suppress(CompareFailed):
                await store.delete(PROXIES + name, version=found[name].version)
            path.unlink(missing_ok=True)  # after its record, which nobody could prove dead without it
        return tuple(sorted(found.keys() - dead.keys()))

    def release(self, *, record_gone: bool = False) -> None:
        if self._lock is not None:
            self._lock.release()
            if record_gone or not self._recorded:  # else the file is the proof that this proxy is dead
                self._lock.path.unlink(missing_ok=True)

    def _hold(self) -> None:
        try:
            self._boot_id = _BOOT_ID.read_text("ascii").strip()
            self._locks.mkdir(0o700, parents=True, exist_ok=True)
            mode = self._locks.lstat()
            if not stat.S_ISDIR(mode.st_mode) or mode.st_uid != os.getuid() or mode.st_mode & 0o022:
                raise UsageError(f"{self._locks} must be a directory that only this user can write; remove it")
            self._lock = HeldLock(self._path(self._nonce))
        except OSError as error:
            raise UsageError(f"{self._locks}: {error.strerror}. A proxy needs to hold a lock there") from error

    def _proven_dead(self, found: Mapping[str, Versioned]) -> dict[str, Path]:
        """name -> the lock that proves it."""
        dead = {}
        for name, state in found.items():
            try:
                record = msgspec.json.decode(state.value, type=ProxyRecord)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # of a later version: some proxy's all the same
            if record.boot_id != self._boot_id or not re.fullmatch("[0-9a-f]{32}", record.boot_nonce):
                continue
            path = self._path(record.boot_nonce)
            with contextlib.suppress(OSError):  # what cannot be looked at proves nothing
                if not holder_alive(path) and path.exists():  # in this order: its owner may be removing it
                    dead[name] = path
        return dead

    def _path(self, nonce: str) -> Path:
        return self._locks / f"{nonce}.lock"


def _record(name: str, url: str, *, boot_nonce: str = "", boot_id: str = "") -> ProxyRecord:
    nonce = boot_nonce or secrets.token_hex(8)
    return ProxyRecord(name=name, url=url, pid=os.getpid(), boot_nonce=nonce, boot_id=boot_id)


def _names(name: str) -> list[str]:
    """`name`, `name-2`, `name-3`, ... Raises UsageError for a name that is another record's."""
    if PROXIES + name == BATON_KEY:
        raise UsageError(f"--name {name}: this name is taken by a record of the cluster; choose another")
    return [name, *(f"{name}-{number}" for number in itertools.islice(itertools.count(2), MAX_NAMESAKES - 1))]


def _no_name(name: str) -> UsageError:
    return UsageError(f"--name {name}: {MAX_NAMESAKES} live proxies have this name; choose another")


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
