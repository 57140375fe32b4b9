"""The whole database at one position, streamed in constant memory while commits go on (engine.md 10).

A pin is a read transaction whose mxFrame M is known exactly. While it lives no frame up to M is reused, so page p is
the newest frame <= M that holds it, else the page of the database file. When everything up to M was already
backfilled at the pin, the file alone is enough: the WAL may be reset under us, but nothing past M can be copied
into the file while the reader holds READ(0).

Memory: the map page -> frame of the pinned WAL, and one run of pages.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import apsw

from walship.engine.database import Database
from walship.errors import CorruptDatabase, Unavailable
from walship.formats.checksum import FLAG, PageChecksums, lock_pgno, page_checksum
from walship.formats.frame import SnapshotHeader
from walship.formats.ltx import LtxEncoder, LtxHeader
from walship.formats.wal import FRAME_HEADER_SIZE, frame_offset
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Snapshot", "ltx_chunks", "scan"]

_PIN_TRIES = 50  # one or two are enough under a saturating writer (engine.md 10)
_SCAN_PAGES = 4096
_RUN_BYTES = 1 << 20  # neighbouring pages of the file are read together


class Snapshot:
    """A pinned image. Create with `pin`, iterate `pages()`, then `close()`."""

    def __init__(self, database: Database, reader: apsw.Connection, header: WalIndexHeader, frames: dict[int, int]):
        self._database = database
        self._reader = reader
        self._frames = frames
        self.header = header
        self.page_size = database.page_size
        self.commit = header.commit or os.fstat(database.file_fd).st_size // database.page_size

    @classmethod
    def pin(cls, database: Database) -> Snapshot:
        """Pin the newest commit. Raises Unavailable if writers outran every try (nothing was pinned)."""
        reader = database.connect_reader()
        try:
            for _ in range(_PIN_TRIES):
                before = database.index.header()
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
                backfilled = database.index.checkpoint_info().n_backfill
                if database.index.header() == before:
                    in_file = backfilled >= before.mx_frame
                    frames = {} if in_file else database.index.newest_frames(before.mx_frame)
                    return cls(database, reader, before, frames)
                reader.execute("COMMIT")
        except BaseException:
            reader.close(True)
            raise
        reader.close(True)
        raise Unavailable(
            "could not pin a snapshot: commits arrived faster than it was tried. Nothing was sent; try again."
        )

    def pages(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """(pgno, image) for 1..commit, ascending, the lock page left out. A view is valid until the next step.

        Raises CorruptDatabase when a file is shorter than the pinned commit says.
        """
        lock = lock_pgno(self.page_size)
        frames = self._frames
        pgno = 1
        while pgno <= self.commit:
            if pgno == lock:
                pgno += 1
                continue
            frame = frames.get(pgno)
            if frame is not None:
                yield pgno, self._page_of_wal(pgno, frame)
                pgno += 1
                continue
            end = pgno + 1
            most = min(self.commit + 1, pgno + max(1, _RUN_BYTES // self.page_size))
            while end < most and end not in frames and end != lock:
                end += 1
            yield from self._pages_of_file(pgno, end)
            pgno = end

    def pages_of(self, pgnos: Iterable[int]) -> Iterator[tuple[int, bytes | memoryview]]:
        """(pgno, image) of some pages, each from 1 to `commit` and not the lock page; as `pages` otherwise."""
        for pgno in pgnos:
            frame = self._frames.get(pgno)
            if frame is None:
                yield from self._pages_of_file(pgno, pgno + 1)
            else:
                yield pgno, self._page_of_wal(pgno, frame)

    def close(self) -> None:
        """Let go of the pin. Idempotent."""
        self._reader.close(True)

    def _page_of_wal(self, pgno: int, frame: int) -> bytes:
        offset = frame_offset(frame, self.page_size) + FRAME_HEADER_SIZE
        page = os.pread(self._database.wal_fd, self.page_size, offset)
        if len(page) != self.page_size:
            raise CorruptDatabase(f"{self._database.wal_path}: frame {frame} (page {pgno}) is cut short")
        return page

    def _pages_of_file(self, first: int, end: int) -> Iterator[tuple[int, memoryview]]:
        size = self.page_size
        run = memoryview(os.pread(self._database.file_fd, (end - first) * size, (first - 1) * size))
        if len(run) != (end - first) * size:
            raise CorruptDatabase(
                f"{self._database.path}: the file ends before page {end - 1}, the commit counts {self.commit} pages"
            )
        for pgno in range(first, end):
            yield pgno, run[(pgno - first) * size : (pgno - first + 1) * size]


def scan(snapshot: Snapshot) -> PageChecksums:
    """The page checksums of everything in `snapshot`: about 1 us a 4 KiB page plus reading."""
    checksums = PageChecksums(snapshot.page_size)
    pages = snapshot.pages()
    while run := {pgno: page_checksum(pgno, page) for pgno, page in itertools.islice(pages, _SCAN_PAGES)}:
        checksums.set_many(run, max(run))
    checksums.set_many({}, snapshot.commit)  # the lock page may be the last
    return checksums


def ltx_chunks(snapshot: Snapshot, header: SnapshotHeader, *, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    """`snapshot` as one LTX snapshot (transactions 1..txid), in pieces of about `chunk_bytes`.

    The page checksums are taken while streaming; the last piece is withheld and CorruptDatabase raised when they
    do not add up to `header.checksum`, so a receiver can never complete a wrong image.
    """
    encoder = LtxEncoder(
        LtxHeader(
            page_size=snapshot.page_size,
            commit=snapshot.commit,
            min_txid=1,
            max_txid=header.position.txid,
            timestamp_ms=header.time_ms,
        )
    )
    chunk = bytearray(encoder.header_bytes())
    rolling = FLAG
    for pgno, page in snapshot.pages():
        rolling ^= page_checksum(pgno, page) ^ FLAG
        chunk += encoder.page(pgno, page)
        if len(chunk) >= chunk_bytes:
            yield bytes(chunk)
            chunk.clear()
    chunk.extend(encoder.finish())
    if rolling != header.checksum:
        raise CorruptDatabase(
            f"the pages at {header.position} have checksum {rolling:016x}, history says "
            f"{header.checksum:016x}. The snapshot was not completed; run `walship status` and re-seed this node."
        )
    yield bytes(chunk)
