"""Streaming a snapshot while another process writes, against reading the same file from end to end.

Three sides, all under the same load of small transactions: `pread` of the file in pieces of 1 MiB, which is not a
snapshot of anything; the pinned image page by page (what a scan costs); and the pinned image as an LTX stream with
LZ4 and all checksums, which is what a follower is seeded with. The stream ends only if the checksums of its pages add
up to those of a scan of the same pin, taken before: two passes, the same image, whatever was written meanwhile.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from bench.harness import Figure, Report, Sample, alternate, compare
from bench.processes import module
from walship.engine.database import Database
from walship.engine.snapshot import Snapshot, ltx_chunks, scan
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position

TRANSACTIONS_PER_SECOND = 500
MEMORY_MIB = 64


def run(directory: Path, *, quick: bool) -> Report:
    rounds, size_mib = (3, 128) if quick else (7, 384)
    report = Report(f"snapshot of {size_mib} MiB while {TRANSACTIONS_PER_SECOND} transactions/s are written")
    path = directory / "data.db"
    _make(path, size_mib)
    database = Database.open(path)
    with module("bench.baselines.writing", str(path), str(TRANSACTIONS_PER_SECOND)):
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        samples = alternate(
            {
                "read": lambda: _timed(lambda: _read(database)),
                "pages": lambda: _pinned(database, _pages),
                "ltx": lambda: _pinned(database, _ltx),
            },
            rounds=rounds,
            baseline="read",
        )
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    database.close()
    report.check(grown_mib < MEMORY_MIB, f"memory grew by {grown_mib:.0f} MiB while streaming")
    words = {"read": "reading the file", "pages": "pinned image, pages", "ltx": "pinned image, LTX stream"}
    report.figures += [Figure.of(label, "MB/s", samples[side]) for side, label in words.items()]
    report.ratios += [
        compare("snapshot pages / reading the file", samples, "pages", "read", goal=0.3),
        compare("snapshot as LTX / reading the file", samples, "ltx", "read", goal=0.05),
    ]
    return report


def _make(path: Path, size_mib: int) -> None:
    """Rows of one page each, half of it random: LZ4 has about as much to do as with text."""
    pick = random.Random(5)
    blobs = [pick.randbytes(1500) + bytes(1500) for _ in range(256)]
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, value BLOB)").fetchall()
    connection.execute("PRAGMA synchronous=OFF")
    with connection:
        rows = ((pick.choice(blobs),) for _ in range(size_mib * 256))
        connection.executemany("INSERT INTO t(value) VALUES (?)", rows)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def _pinned(database: Database, stream: Callable[[Snapshot], Callable[[], int]]) -> Sample:
    snapshot = Snapshot.pin(database)
    try:
        return _timed(stream(snapshot))
    finally:
        snapshot.close()


def _timed(stream: Callable[[], int]) -> Sample:
    started = time.perf_counter()
    size_bytes = stream()
    return Sample(size_bytes / 1e6 / (time.perf_counter() - started))


def _read(database: Database) -> int:
    """Through the descriptor that is open: closing another one would drop SQLite's locks (R25)."""
    size = os.fstat(database.file_fd).st_size
    return sum(len(os.pread(database.file_fd, 1 << 20, offset)) for offset in range(0, size, 1 << 20))


def _pages(snapshot: Snapshot) -> Callable[[], int]:
    return lambda: sum(len(page) for _, page in snapshot.pages())


def _ltx(snapshot: Snapshot) -> Callable[[], int]:
    header = SnapshotHeader(
        cluster=bytes(16),
        database=1,
        position=Position(1, 1),
        checksum=scan(snapshot).rolling,
        commit=snapshot.commit,
        page_size=snapshot.page_size,
        time_ms=0,
        complete_since=Position(0, 0),
    )

    def stream() -> int:
        for _ in ltx_chunks(snapshot, header):
            pass
        return snapshot.commit * snapshot.page_size

    return stream
