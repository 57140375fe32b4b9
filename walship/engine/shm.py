"""The mapped wal-index (-shm) of one database: read the header, find pages, publish frames of our own.

Why it exists: a follower makes new frames visible by writing the wal-index itself, so that readers never wait
(engine.md 2). SQLite's rule for every reader is: header copy 0, then copy 1, equal, checksum right. A writer
therefore writes copy 1 first and copy 0 last.

Warnings (engine.md 3, design.md R25):
* Closing ANY descriptor of the -shm drops every POSIX lock this process holds on it. Python's mmap duplicates the
  descriptor, so a mapping may neither be closed nor collected before the last SQLite connection is gone.
  `WalIndex.close` is called by `Database.close` alone, after the connections.
* `insert`, `publish` and `restart` need SQLite's WRITE lock (`engine.fence`).
* `lock` takes open file description locks. Never POSIX ones: to the kernel they would be SQLite's own.
* Stores must become visible in order: index entries, copy 1, copy 0; `barrier` sees to it (R4).
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from walship.engine import failpoints
from walship.errors import CorruptWalIndex, StorageFailed
from walship.formats.wal_index import (
    BLOCK_SIZE,
    CHECKPOINT_LOCK,
    COPY_OFFSETS,
    HASH_OFFSET,
    HASH_SLOTS,
    INDEX_HEADER_SIZE,
    N_BACKFILL_ATTEMPTED_OFFSET,
    N_BACKFILL_OFFSET,
    PREFIX_SIZE,
    READ_MARK_UNUSED,
    READ_MARKS,
    READ_MARKS_OFFSET,
    CheckpointInfo,
    WalIndexHeader,
    block_of,
    first_frame,
    pgno_offset,
    slot_hash,
)

__all__ = ["WalIndex"]

# A writer can lose the CPU between the two copies for milliseconds (engine.md T3): spin, then sleep, then give up.
_HEADER_SPINS = 20
_HEADER_PAUSE_SECONDS = 0.0001
_HEADER_DEADLINE_SECONDS = 5.0
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_COPIES_SIZE = COPY_OFFSETS[1] + INDEX_HEADER_SIZE


class WalIndex:
    """One -shm, mapped for as long as this process has the database open.

    Raises StorageFailed when the file cannot be opened or grown, CorruptWalIndex when the header stays torn.
    """

    def __init__(self, path: Path, barrier: Callable[[], None]) -> None:
        self._path = path
        self._barrier = barrier
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._maps: list[mmap.mmap] = []
        self._blocks: list[memoryview] = []
        self._last_slots: dict[int, int] = {}  # pgno -> slot of its newest entry in the block written last
        self._last_frame_indexed = 0
        self._map_more()
        self._head = self._blocks[0]

    @property
    def fd(self) -> int:
        """The one descriptor; for fstat and F_GETLK only."""
        return self._fd

    @property
    def path(self) -> Path:
        return self._path

    def lock(self, offset: int, count: int) -> bool:
        """An exclusive open file description lock on lock bytes; False when a connection, of whatever process, holds
        one of them. Never waits. It stands until `unlock`, or until the process ends."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, count, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StorageFailed(f"{self._path}: cannot be locked ({error.strerror})") from error
            return False
        return True

    def unlock(self, offset: int, count: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, count, 0))

    def whole(self) -> bool:
        """True iff the header is not torn right now."""
        try:
            WalIndexHeader.read(bytes(self._head[:_COPIES_SIZE]))
        except CorruptWalIndex:
            return False
        return True

    def header(self) -> WalIndexHeader:
        """A consistent header. Raises CorruptWalIndex if the copies disagree for seconds."""
        head = self._head
        spins, deadline = 0, 0.0
        while True:
            try:
                return WalIndexHeader.read(bytes(head[:_COPIES_SIZE]))
            except CorruptWalIndex as error:
                torn = error
            spins += 1
            if spins < _HEADER_SPINS:
                continue
            now = time.monotonic()
            deadline = deadline or now + _HEADER_DEADLINE_SECONDS
            if now > deadline:
                raise CorruptWalIndex(
                    f"{self._path}: no whole header for {_HEADER_DEADLINE_SECONDS:g} s ({torn}). "
                    "The database is intact; the next read by any SQLite connection repairs the index."
                ) from torn
            time.sleep(_HEADER_PAUSE_SECONDS)

    def checkpoint_info(self) -> CheckpointInfo:
        return CheckpointInfo.parse(bytes(self._head[:PREFIX_SIZE]))

    def others_checkpoint(self) -> bool:
        """True iff another process holds the checkpoint lock. Only asks (F_GETLK): we never lock here (T1)."""
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, CHECKPOINT_LOCK, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, query))
        return bool(kind != fcntl.F_UNLCK)

    def newest_frames(self, mx_frame: int) -> dict[int, int]:
        """Map pgno -> newest frame number <= mx_frame, from the index pages. 1..mx_frame must be published."""
        newest: dict[int, int] = {}
        if not mx_frame:
            return newest
        for block in range(block_of(mx_frame) + 1):
            start = first_frame(block)
            numbers = self._page_numbers(block)
            count = min(len(numbers), mx_frame - start + 1)
            newest.update(zip(numbers[:count].tolist(), range(start, start + count), strict=True))
        return newest

    def insert(self, first: int, pgnos: Sequence[int]) -> None:
        """Index frames first, first+1, ... for these page numbers. Invisible until `publish`. Needs WRITE.

        Raises StorageFailed when the -shm cannot grow; nothing is visible then.
        """
        if first != self._last_frame_indexed + 1:
            self._last_slots = {}
        frame = first
        position, total = 0, len(pgnos)
        needed = block_of(first + total - 1) + 1
        if needed > len(self._blocks):
            self._grow(max(needed, 2 * len(self._blocks)) * BLOCK_SIZE)
        while position < total:
            block = block_of(frame)
            start = first_frame(block)
            numbers = self._page_numbers(block)
            index = frame - start  # 0-based inside the block
            if index == 0:
                self._zero_block(block)
                self._last_slots = {}
            elif numbers[index]:
                self._drop_residue(block, index)
                self._last_slots = {}
            count = min(total - position, len(numbers) - index)
            self._insert_in_block(block, numbers, index, pgnos[position : position + count])
            position += count
            frame += count
        self._last_frame_indexed = frame - 1

    def publish(self, header: WalIndexHeader) -> None:
        """Make everything up to header.mx_frame visible: copy 1, then copy 0. Needs WRITE."""
        data = header.to_bytes()
        self._barrier()
        first, second = COPY_OFFSETS
        self._head[second : second + INDEX_HEADER_SIZE] = data
        failpoints.reach("apply.header_copy1")
        self._barrier()
        self._head[first : first + INDEX_HEADER_SIZE] = data
        failpoints.reach("apply.header_copy0")

    def restart(self, salts: tuple[int, int]) -> WalIndexHeader:
        """Begin a new, empty generation, as SQLite's walRestartHdr does: everything is in the database file, WRITE is
        held, and no reader needs the -wal (READ(1..4) held too). Returns the header now published."""
        header = dataclasses.replace(self.header(), mx_frame=0, salts=salts)
        self.publish(header)
        # After the header: a reader that has the old one and lands on READ(0) looks at the header again (wal.c).
        with self._head[:PREFIX_SIZE].cast("I") as words:
            words[N_BACKFILL_OFFSET // 4] = 0
            words[N_BACKFILL_ATTEMPTED_OFFSET // 4] = 0
            first = READ_MARKS_OFFSET // 4
            words[first + 1] = 0
            for mark in range(2, READ_MARKS):
                words[first + mark] = READ_MARK_UNUSED
        self.forget_slots()
        return header

    def forget_slots(self) -> None:
        """Drop the memory of hash slots: somebody else (recovery, a foreign writer) may have written the index."""
        self._last_slots = {}
        self._last_frame_indexed = 0

    def close(self) -> None:
        """Unmap and close. Only after every SQLite connection of this process on the database is closed."""
        self._head.release()
        for block in self._blocks:
            block.release()
        self._blocks.clear()
        for mapping in self._maps:
            mapping.close()
        self._maps.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _insert_in_block(self, block: int, numbers: memoryview, index: int, pgnos: Sequence[int]) -> None:
        with self._blocks[block][HASH_OFFSET:].cast("H") as slots:
            last = self._last_slots
            for entry, pgno in enumerate(pgnos, start=index + 1):
                numbers[entry - 1] = pgno
                # Probing from the hash key is O(versions of the page); every slot up to the page's newest entry
                # is taken, so starting there gives the same place (engine.md T4).
                slot = last.get(pgno)
                slot = slot_hash(pgno) if slot is None else (slot + 1) & (HASH_SLOTS - 1)
                while slots[slot]:
                    slot = (slot + 1) & (HASH_SLOTS - 1)
                slots[slot] = entry
                last[pgno] = slot

    def _zero_block(self, block: int) -> None:
        start = pgno_offset(first_frame(block))
        self._blocks[block][start:] = bytes(BLOCK_SIZE - start)

    def _drop_residue(self, block: int, limit: int) -> None:
        """A writer died after indexing frames it never published: clear what lies above `limit` entries."""
        with self._blocks[block][HASH_OFFSET:].cast("H") as slots:
            for slot in range(HASH_SLOTS):
                if slots[slot] > limit:
                    slots[slot] = 0
        numbers = self._page_numbers(block)
        numbers[limit:] = array("I", bytes(4 * (len(numbers) - limit)))

    def _page_numbers(self, block: int) -> memoryview:
        while block >= len(self._blocks):
            self._map_more()
        return self._blocks[block][pgno_offset(first_frame(block)) : HASH_OFFSET].cast("I")

    def _map_more(self) -> None:
        """Map the next blocks, in runs that double: a mapping costs a descriptor that must live as long as we do.

        Only blocks that exist: growing needs WRITE, and a page of the file that somebody else just added must not
        be touched.
        """
        block = len(self._blocks)
        count = min(max(1, block), os.fstat(self._fd).st_size // BLOCK_SIZE - block)
        if count < 1:
            raise CorruptWalIndex(
                f"{self._path}: the header counts frames that block {block} should index; it is missing"
            )
        mapping = mmap.mmap(self._fd, count * BLOCK_SIZE, offset=block * BLOCK_SIZE)
        self._maps.append(mapping)
        view = memoryview(mapping)
        self._blocks.extend(view[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(count))

    def _grow(self, size_bytes: int) -> None:
        """Extend the file as SQLite does: a byte at the end of each 4096-byte page, so that a full disk is an error
        here and not a SIGBUS later."""
        have = os.fstat(self._fd).st_size
        try:
            for end in range(have - have % 4096 + 4096, size_bytes + 1, 4096):
                os.pwrite(self._fd, b"\0", end - 1)
        except OSError as error:
            raise StorageFailed(
                f"{self._path}: cannot grow the wal-index to {size_bytes} bytes ({error.strerror}). "
                "Nothing was published; free disk space."
            ) from error
