"""Proof that one node's copy is right: page checksums against the rolling checksum, SQLite's own integrity check.

The array of page checksums was carried along commit by commit from history; scanning the pages again and comparing
finds what a disk, a foreign writer or a bug of ours changed. That the log's frames form one chain is verified by
`Log.open` at every start; here the tip of that chain is what the scan is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import apsw

from walship.engine.database import Database
from walship.engine.snapshot import Snapshot
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.position import Position

__all__ = ["Verification", "differing_pages", "integrity_check", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found. `differing`: page numbers whose content is not what history says."""

    position: Position
    pages: int
    checksum: int
    differing: tuple[int, ...]
    integrity: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.differing and self.integrity == ("ok",)

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "DAMAGED"
        return (
            f"{verdict} at {self.position}: {self.pages} pages, checksum {self.checksum:016x}, "
            f"{len(self.differing)} differing, integrity_check {'; '.join(self.integrity)[:200]}"
        )


def differing_pages(
    snapshot: Snapshot, expected: PageChecksums, pace: Callable[[int], None] | None = None
) -> Iterator[int]:
    """Numbers of the pages of `snapshot` that do not have the checksum `expected` gives; closes nothing.

    `expected` must be of the snapshot's position. `pace` is called with the bytes read so far, to slow a background
    scrub down. Constant memory.
    """
    seen = 0
    for pgno, page in snapshot.pages():
        seen += len(page)
        if page_checksum(pgno, page) != expected.get(pgno):
            yield pgno
        if pace is not None:
            pace(seen)
    if snapshot.commit != expected.commit:
        low, high = sorted((snapshot.commit, expected.commit))
        yield from range(low + 1, high + 1)


def integrity_check(database: Database) -> tuple[str, ...]:
    """SQLite's own verdict, on a connection of its own: ("ok",) or up to 100 problems."""
    connection = database.connect_reader()
    try:
        return tuple(str(row[0]) for row in connection.execute("PRAGMA integrity_check(100)").fetchall())
    except apsw.CorruptError as error:
        return (str(error),)
    finally:
        connection.close(True)


def verify(
    database: Database,
    snapshot: Snapshot,
    expected: PageChecksums,
    position: Position,
    pace: Callable[[int], None] | None = None,
) -> Verification:
    """Scan `snapshot`, which is exactly at `position`, against `expected`, and ask SQLite. Closes the snapshot."""
    try:
        differing = tuple(differing_pages(snapshot, expected, pace))
    finally:
        snapshot.close()
    return Verification(position, snapshot.commit, expected.rolling, differing, integrity_check(database))
