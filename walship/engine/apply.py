"""Applying pages on a follower: append frames to its own -wal, then publish them in the wal-index (engine.md 2).

Readers keep their snapshot and never wait; the next reader sees all of the batch or nothing. SQLite's own recovery
makes the append crash-safe. After a checkpoint the database file is byte-identical to the leader's.

Plan of one batch:
    1 hold WRITE: the fence, which stays (R10)     2 read the header, check that nobody else wrote
    3 on an empty -wal write its header            4 append the frames, commit size in the last one only
    5 fdatasync, where asked                       6 index the frames (still invisible)
    7 publish the header: copy 1, copy 0

Warnings: any error before step 7 leaves the old state standing. Run in a worker thread, so that neither a keyboard
interrupt nor a cancellation can land between the two copies of step 7.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from walship.engine import failpoints
from walship.engine.database import Database
from walship.errors import CorruptDatabase, StorageFailed
from walship.formats.checksum import lock_pgno
from walship.formats.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE, WalHeader, build_frames, frame_offset
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Applier", "Batch"]

_CHUNK_BYTES = 4 << 20  # frames are built and written in pieces of about this size
_U64 = 1 << 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages to apply as one commit.

    pgnos: ascending, unique, none above `commit`, the lock page left out.
    pages: called once; yields the page images in the order of `pgnos`.
    commit: database size in pages afterwards.
    """

    pgnos: Sequence[int]
    pages: Callable[[], Iterable[bytes | memoryview]]
    commit: int


class Applier:
    """Appends batches to one follower's -wal. Used from one thread only.

    on_foreign: called with the wal-index as we left it and as it is, when they say that somebody wrote; False when that
    changed nothing, True to have CorruptDatabase raised.
    on_generation: called when a generation of the -wal begins, its header being durable, before its first frame.
    """

    def __init__(
        self,
        database: Database,
        on_foreign: Callable[[WalIndexHeader, WalIndexHeader], bool] = lambda _left, _found: True,
        on_generation: Callable[[WalHeader], None] = lambda _header: None,
    ) -> None:
        self._database = database
        self._on_foreign = on_foreign
        self._on_generation = on_generation
        self._left: WalIndexHeader = database.left or database.index.header()

    def hold(self) -> bool:
        """Hold the fence from here on, having checked that nobody wrote while it was not held (R10). False when
        somebody has WRITE right now. Raises CorruptDatabase."""
        database = self._database
        if database.fence.held and database.left is None:
            return True
        database.left = self._left
        if not database.fence.take():
            return False
        self._check_nobody_wrote(database.index.header())
        database.left = None
        return True

    def apply(self, batch: Batch, *, sync: bool, publishing: Callable[[], None]) -> None:
        """Apply `batch` as one commit; `publishing` is called right before it can become visible (R17).

        Raises:
            CorruptDatabase: somebody else wrote to this file, or the batch would leave a hole (engine.md T10).
            StorageFailed: writing failed; nothing was published.
            Unavailable: another process held the write lock for seconds; nothing was published.
        """
        database = self._database
        if not self.hold():
            database.fence.require()
            self.hold()
        header = database.index.header()
        self._check_nobody_wrote(header)
        self._check_growth(header, batch)
        header = self._begin_generation(header)
        published = self._append(header, batch)
        if sync:
            database.sync_wal()
        publishing()
        database.index.publish(published)
        self._left = published

    def adopt(self) -> None:
        """Take the file as it is, whoever wrote it: it is about to be replaced whole (a re-seed).

        Raises Unavailable when the fence cannot be had."""
        self._database.fence.require()
        self._database.left = None
        self._left = self._database.index.header()
        self._database.index.forget_slots()

    def accept_emptied(self) -> None:
        """Our own TRUNCATE emptied the -wal. Content and change counter stand, or somebody else wrote meanwhile,
        which the next `apply` then finds."""
        header = self._database.index.header()
        if header.change == self._left.change:
            self._left = header
        self._database.index.forget_slots()

    def mx_frame(self) -> int:
        """Frames in the present generation of the -wal."""
        return self._left.mx_frame

    def _check_nobody_wrote(self, header: WalIndexHeader) -> None:
        left = self._left
        if header == left:
            return
        # Our own TRUNCATE or a checkpoint of anybody changes salts and mxFrame but never content or iChange;
        # SQLite's recovery sets iChange to 0 and keeps the frames (engine.md T8).
        emptied = header.change == left.change and header.mx_frame == 0
        recovered = header == dataclasses.replace(left, change=0)
        if not emptied and not recovered and self._on_foreign(left, header):
            self._database.left = None  # found; what comes next replaces the copy
            raise CorruptDatabase(
                f"{self._database.path}: somebody else wrote to this follower's file "
                f"(wal-index change counter {header.change}, ours was {left.change}). "
                "Replicated history is intact; the node re-seeds its file from the leader."
            )
        self._left = header
        self._database.index.forget_slots()

    def _check_growth(self, header: WalIndexHeader, batch: Batch) -> None:
        """A hole between the old and the new size would fail every later checkpoint (engine.md T10)."""
        before = header.commit or os.fstat(self._database.file_fd).st_size // self._database.page_size
        if batch.commit <= before:
            return
        never_carried = before < lock_pgno(self._database.page_size) <= batch.commit
        grown = sum(1 for pgno in batch.pgnos if pgno > before)
        if grown != batch.commit - before - never_carried:
            raise CorruptDatabase(
                f"{self._database.path}: a commit that grows the database from {before} to {batch.commit} pages "
                f"carries only {grown} of the new ones. It was not applied; the node re-seeds from the leader."
            )

    def _begin_generation(self, header: WalIndexHeader) -> WalIndexHeader:
        """The header to append after; on an empty -wal its 32-byte header is written first."""
        if header.mx_frame:
            return header
        salts = header.salts
        if salts == (0, 0):
            salts = struct.unpack(">II", os.urandom(8))
        fd = self._database.wal_fd
        old = os.pread(fd, WAL_HEADER_SIZE, 0)
        sequence = WalHeader.parse(old).checkpoint_sequence + 1 if len(old) == WAL_HEADER_SIZE else 0
        wal_header = WalHeader.new(self._database.page_size, sequence & 0xFFFFFFFF, salts)
        _write(fd, wal_header.to_bytes(), 0, self._database)
        # SQLite syncs here too: a header that is lost after its frames were backfilled would hide them (engine.md 9).
        self._database.sync_wal()
        self._on_generation(wal_header)
        return dataclasses.replace(
            header,
            salts=salts,
            big_endian=False,
            page_size=self._database.page_size,
            frame_checksum=wal_header.checksum,
        )

    def _append(self, header: WalIndexHeader, batch: Batch) -> WalIndexHeader:
        """Steps 4 and 6; returns the header to publish."""
        database = self._database
        page_size = database.page_size
        first = header.mx_frame + 1
        offset = frame_offset(first, page_size)
        seed = header.frame_checksum
        for pages, is_last in _chunks(batch, max(1, _CHUNK_BYTES // (page_size + FRAME_HEADER_SIZE))):
            frames, seed = build_frames(
                pages, batch.commit if is_last else 0, page_size=page_size, salts=header.salts, seed=seed
            )
            _write(database.wal_fd, frames, offset, database)
            offset += len(frames)
        failpoints.reach("apply.frames_written")
        database.index.insert(first, batch.pgnos)
        failpoints.reach("apply.index_written")
        # Made directly: dataclasses.replace costs several times as much, and this runs for every batch.
        return WalIndexHeader(
            change=(header.change + 1) & 0xFFFFFFFF,
            big_endian=header.big_endian,
            page_size=header.page_size,
            mx_frame=header.mx_frame + len(batch.pgnos),
            commit=batch.commit,
            frame_checksum=seed,
            salts=header.salts,
        )


def _chunks(batch: Batch, size: int) -> Iterator[tuple[list[tuple[int, bytes | memoryview]], bool]]:
    chunk: list[tuple[int, bytes | memoryview]] = []
    last = len(batch.pgnos)
    for count, (pgno, page) in enumerate(zip(batch.pgnos, batch.pages(), strict=True), start=1):
        chunk.append((pgno, page))
        if len(chunk) == size or count == last:
            yield chunk, count == last
            chunk = []


def _write(fd: int, data: bytes | bytearray, offset: int, database: Database) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise StorageFailed(
            f"{database.wal_path}: write failed ({error.strerror}). Nothing of this batch was published, "
            "what the log holds is kept; free disk space or replace the disk."
        ) from error
