"""The coordination store: a few small records, changed only by compare-and-swap.

Who is in the cluster, who leads it and in which term lives here and nowhere else. The interface is the six calls
that every store we mean to support can give (failover.md 6): get, compare-and-swap, delete, list, watch, close.
A store gives no lock and no lease: safety comes from terms (design.md R1, R2), the store only orders the claims.

What a store promises:
  * a `version` is never used twice for a key, also after a delete, so a compare cannot be fooled by A-B-A;
  * every call ends within a deadline, with a result or `StoreUnavailable`;
  * after `StoreUnavailable` a change may or may not have happened: read again before acting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from walship.coordination.etcd_url import EtcdAddress, hide_password, parse_etcd_url
from walship.errors import UsageError

__all__ = ["Change", "Store", "Versioned", "check_store_url", "open_store"]


@dataclasses.dataclass(frozen=True, slots=True)
class Versioned:
    """A value and the version a compare-and-swap has to name to replace it."""

    value: bytes
    version: int


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What a watch reports: the key, and its new state or None when it was deleted."""

    key: str
    state: Versioned | None


class Store(Protocol):
    """Six calls, all with a deadline. Keys are short ASCII paths such as `nodes/node1`."""

    async def get(self, key: str) -> Versioned | None:
        """The record at `key`, or None. Raises StoreUnavailable."""

    async def put_if(self, key: str, value: bytes, *, version: int | None) -> int:
        """Write `value` iff the key is at `version` (None: iff it does not exist); returns the new version.

        Raises CompareFailed when it is not, StoreUnavailable when nobody can say what happened.
        """

    async def delete(self, key: str, *, version: int) -> None:
        """Delete the key iff it is at `version`. Raises CompareFailed, StoreUnavailable."""

    async def list(self, prefix: str) -> dict[str, Versioned]:
        """All records whose key starts with `prefix`, by key. Raises StoreUnavailable."""

    def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """First each present record under `prefix`, then changes as they come, until `close`.

        It resumes by itself when the store was away. Values between two looks may be skipped; the last one never is.
        """

    async def close(self) -> None:
        """End every watch and let go of files and threads. Idempotent."""


def check_store_url(url: str) -> Path | EtcdAddress:
    """The directory a `file:///dir` URL names, or the etcd. Raises UsageError, naming what is allowed, for all else."""
    parts = _split(url)
    if parts.scheme in ("etcd", "etcds"):
        return parse_etcd_url(url)
    example = "write file:// and an absolute path, such as file:///var/lib/walship/store, or etcd://HOST:2379/NAME"
    if parts.scheme != "file":
        raise UsageError(f"cluster = {hide_password(url)!r}: not a cluster URL; {example}")
    if parts.netloc:
        raise UsageError(
            f"cluster = {url!r}: {parts.netloc!r} stands where a host would; relative paths are not taken; {example}"
        )
    if parts.query or parts.fragment:
        raise UsageError(f"cluster = {url!r}: a file URL takes no ? or # part; {example}")
    path = unquote(parts.path)
    if path[2:3] == ":" or "\\" in path:
        raise UsageError(f"cluster = {url!r}: this looks like a Windows path; walship runs on Linux; {example}")
    if not path.startswith("/") or path == "/" or "\0" in path:
        raise UsageError(f"cluster = {url!r}: names no directory; {example}")
    return Path(path)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # such as half of an IPv6 address
        raise UsageError(f"cluster = {hide_password(url)!r}: not a cluster URL: {error}") from error


def open_store(url: str) -> Store:
    """The store behind a cluster URL; nothing is connected or opened before the first call.

    Raises UsageError for a URL that cannot be one, or whose certificates cannot be read.
    """
    # Imported here, so that nobody loads SQLite for an etcd, or an HTTP client for a file.
    place = check_store_url(url)
    if isinstance(place, Path):
        from walship.coordination.file_store import FileStore

        return FileStore(place)
    from walship.coordination.etcd_store import EtcdStore

    return EtcdStore(place)
