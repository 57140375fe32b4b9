"""Orphans: commits that never became history, kept as files before anything takes their place (R12, failover.md 3.6).

An orphan is two files in `orphans/` of the node's directory: `NAME.ltx`, a valid LTX file with the newest image of
each page that the lost commits wrote, and `NAME.json`, a manifest that says what they were. The manifest is written
last, so an orphan exists once its manifest does. Both are fsynced; the same commits always give the same bytes, so a
crash in between is mended by doing it again.

Nothing here is ever merged into the database again by itself: only a person can say what those commits meant.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from walship.engine import failpoints
from walship.engine.files import sync_directory
from walship.errors import StorageFailed
from walship.formats.ltx import LtxEncoder, LtxHeader
from walship.formats.position import Tip

__all__ = [
    "KEEP_BYTES",
    "KEEP_SECONDS",
    "ORPHANS",
    "Manifest",
    "Reason",
    "list_orphans",
    "prune_orphans",
    "write_orphan",
]

_log = logging.getLogger("walship.engine")

ORPHANS = "orphans"
KEEP_SECONDS = 7 * 86400.0  # a weekend and the week in which somebody looks
KEEP_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_writing = threading.Lock()  # temporary files have fixed names; a node has few orphans


class Reason(StrEnum):
    """Why commits became an orphan."""

    DEPOSED = "deposed leader"
    DIVERGED = "diverged follower"
    FOREIGN = "foreign commit"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an orphan is. Positions are text, `term.txid`; checksums are 16 hex digits.

    base: the newest state common to this node and history; the file's pages, put over exactly that state, give `tip`.
    transactions: commits in it; 0 when nobody can count them (a foreign program's).
    acks_wanted: acknowledgments that the cluster waits for. may_be_acknowledged: a client may have been told that it
        is committed. With acks_wanted > 0 that can only be a client that asked for 0 itself.
    size_bytes, sha256: of the LTX file. Times are those of the frames, milliseconds since 1970.
    """

    name: str
    cluster: str
    node: str
    reason: Reason
    base: str
    base_checksum: str
    tip: str
    tip_checksum: str
    transactions: int
    first_time_ms: int
    last_time_ms: int
    acks_wanted: int
    may_be_acknowledged: bool
    page_size: int
    commit: int
    pages: int
    size_bytes: int
    sha256: str

    def to_bytes(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def __str__(self) -> str:
        lost = f"{self.transactions} transactions" if self.transactions else "transactions of another program"
        maybe = ", maybe acknowledged" if self.may_be_acknowledged else ", never acknowledged by the cluster's rule"
        return f"orphan {self.name}: {lost} after {self.base} ({self.reason}{maybe}), {self.pages} pages"


def write_orphan(
    directory: Path,
    pages: Iterable[tuple[int, bytes | memoryview]],
    *,
    cluster: bytes,
    node: str,
    reason: Reason,
    base: Tip,
    tip: Tip,
    page_size: int,
    acks_wanted: int,
    first_time_ms: int,
    last_time_ms: int,
) -> Manifest:
    """Keep `pages` (number, image; ascending, at least one), which lead from `base` to `tip`, as an orphan of the node
    whose directory this is. Durable on return; may be repeated. Blocks, in any thread.

    For commits that no txid was given to (a foreign program's) `tip` has the position of `base`.

    Raises StorageFailed: then nothing may be replaced that the orphan was to keep. CorruptLtx for pages out of order.
    """
    place = directory / ORPHANS
    counted = tip.position.txid > base.position.txid
    last_txid = max(tip.position.txid, base.position.txid + 1)
    header = LtxHeader(
        page_size=page_size,
        commit=tip.commit,
        min_txid=base.position.txid + 1,
        max_txid=last_txid,
        timestamp_ms=last_time_ms,
    )
    temporary = place / "orphan.tmp"
    with _writing:
        try:
            if not place.exists():
                place.mkdir()
                sync_directory(directory)
            count, size_bytes, digest = _write_ltx(temporary, header, pages, base.commit)
            name = f"{tip.position.term}-{header.min_txid}-{last_txid}" + ("" if counted else f"-foreign-{digest[:8]}")
            manifest = Manifest(
                name=name,
                cluster=cluster.hex(),
                node=node,
                reason=reason,
                base=str(base.position),
                base_checksum=f"{base.checksum:016x}",
                tip=str(tip.position),
                tip_checksum=f"{tip.checksum:016x}",
                transactions=tip.position.txid - base.position.txid if counted else 0,
                first_time_ms=first_time_ms,
                last_time_ms=last_time_ms,
                acks_wanted=acks_wanted,
                may_be_acknowledged=acks_wanted == 0,
                page_size=page_size,
                commit=tip.commit,
                pages=count,
                size_bytes=size_bytes,
                sha256=digest,
            )
            temporary.rename(place / f"{name}.ltx")
            sync_directory(place)
            failpoints.reach("orphan.pages_kept")
            _write_durably(place / f"{name}.json", manifest.to_bytes())
            failpoints.reach("orphan.kept")
        except OSError as error:
            raise StorageFailed(
                f"{place}: commits that are not history cannot be kept ({error.strerror}). Nothing was replaced; "
                "free disk space, the node tries again."
            ) from error
    _log.warning("kept as an orphan name=%s: %s", name, manifest)
    return manifest


def list_orphans(directory: Path) -> list[Manifest]:
    """The orphans in a node's directory, oldest file first. What cannot be read is passed over with a warning."""
    found: list[tuple[int, Manifest]] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in (directory / ORPHANS).glob("*.json"):
            try:
                manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
                written = path.stat().st_mtime_ns
            except (OSError, msgspec.MsgspecError) as error:
                _log.warning("not an orphan's manifest path=%s error=%s", path, error)
                continue
            if manifest.name == path.stem:
                found.append((written, manifest))
    return [manifest for _, manifest in sorted(found, key=lambda pair: (pair[0], pair[1].name))]


def prune_orphans(directory: Path, *, keep_seconds: float, keep_bytes: int, now_seconds: float) -> list[str]:
    """Delete orphans older than `keep_seconds`, then the oldest until all have `keep_bytes` at most; the newest stays
    in any case. Returns the names of those deleted. A file that cannot be deleted stays, with a warning."""
    place = directory / ORPHANS
    manifests = list_orphans(directory)
    total_bytes = sum(manifest.size_bytes for manifest in manifests)
    gone: list[str] = []
    for manifest in manifests[:-1]:
        path = place / f"{manifest.name}.json"
        try:
            old = now_seconds - path.stat().st_mtime > keep_seconds
            if not old and total_bytes <= keep_bytes:
                break
            path.unlink()
            (place / f"{manifest.name}.ltx").unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot delete orphan path=%s error=%s", path, error)
            continue
        total_bytes -= manifest.size_bytes
        gone.append(manifest.name)
        _log.warning("deleted orphan name=%s reason=%s", manifest.name, "age" if old else "size")
    return gone


def _write_ltx(
    path: Path, header: LtxHeader, pages: Iterable[tuple[int, bytes | memoryview]], previous_commit: int
) -> tuple[int, int, str]:
    """Returns (pages, bytes, SHA-256 in hex). Memory: one chunk and the page index."""
    encoder = LtxEncoder(header, previous_commit=previous_commit)
    digest = hashlib.sha256()
    count = size_bytes = 0
    with path.open("wb", buffering=0) as file:
        chunk = bytearray(encoder.header_bytes())

        def flush() -> None:
            nonlocal size_bytes
            data = memoryview(bytes(chunk))
            chunk.clear()
            digest.update(data)
            size_bytes += len(data)
            while data:
                data = data[file.write(data) :]

        for pgno, page in pages:
            chunk += encoder.page(pgno, page)
            count += 1
            if len(chunk) >= _CHUNK_BYTES:
                flush()
        chunk += encoder.finish()
        flush()
        os.fsync(file.fileno())
    return count, size_bytes, digest.hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)
