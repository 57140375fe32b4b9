"""The wal-index (-shm file): layout, header, checkpoint state, and where frames are indexed.

Pure: it reads bytes that somebody else took from the mapping and never maps anything. The order in which the parts may
be read and written, under which locks, is the business of the engine. Layout: docs/format.md 2, after wal.c. All
integers are in the byte order of the machine, but salts are the raw bytes of the -wal, so they compare with it.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Self

from walship.errors import CorruptWalIndex
from walship.formats.wal_checksum import Buffer, Checksum, checksum_direct

__all__ = [
    "BLOCK_SIZE",
    "CHECKPOINT_LAYOUT",
    "CHECKPOINT_LOCK",
    "CHECKPOINT_OFFSET",
    "COPY_OFFSETS",
    "DMS_LOCK",
    "FRAMES_IN_FIRST_BLOCK",
    "FRAMES_PER_BLOCK",
    "HASH_OFFSET",
    "HASH_SLOTS",
    "INDEX_HEADER_LAYOUT",
    "INDEX_HEADER_SIZE",
    "INDEX_VERSION",
    "LOCKS_OFFSET",
    "N_BACKFILL_ATTEMPTED_OFFSET",
    "N_BACKFILL_OFFSET",
    "PGNO_SIZE",
    "PREFIX_SIZE",
    "READ_LOCKS",
    "READ_MARKS",
    "READ_MARKS_OFFSET",
    "READ_MARK_UNUSED",
    "RECOVER_LOCK",
    "SLOT_SIZE",
    "WRITE_LOCK",
    "CheckpointInfo",
    "WalIndexHeader",
    "block_of",
    "first_frame",
    "pgno_offset",
    "slot_hash",
]

INDEX_VERSION = 3007000

# byte offsets from the start of the -shm
COPY_OFFSETS = (0, 48)  # the header, twice; written second copy first, read first copy first
CHECKPOINT_OFFSET = 96  # N_BACKFILL .. N_BACKFILL_ATTEMPTED
N_BACKFILL_OFFSET = 96
READ_MARKS_OFFSET = 100
LOCKS_OFFSET = 120  # lock bytes: never written, and what they hold means nothing
N_BACKFILL_ATTEMPTED_OFFSET = 128
PREFIX_SIZE = 136  # page numbers of block 0 begin here

READ_MARKS = 5
READ_MARK_UNUSED = 0xFFFFFFFF

# lock bytes, by their offset
WRITE_LOCK = LOCKS_OFFSET
CHECKPOINT_LOCK = LOCKS_OFFSET + 1
RECOVER_LOCK = LOCKS_OFFSET + 2
READ_LOCKS = LOCKS_OFFSET + 3  # + i for READ(i)
DMS_LOCK = 128  # held shared by every process that has the -shm open

# blocks: page numbers of frames, then the hash table over them
BLOCK_SIZE = 32768
HASH_OFFSET = 16384
HASH_SLOTS = 8192
SLOT_SIZE = 2
PGNO_SIZE = 4
FRAMES_PER_BLOCK = 4096
FRAMES_IN_FIRST_BLOCK = FRAMES_PER_BLOCK - PREFIX_SIZE // PGNO_SIZE
_HASH_MULTIPLIER = 383

INDEX_HEADER_LAYOUT = struct.Struct("=IIIBBHIIII8sII")
INDEX_HEADER_SIZE = INDEX_HEADER_LAYOUT.size
CHECKPOINT_LAYOUT = struct.Struct("=I5I8sII")
_SALTS = struct.Struct(">II")
_NATIVE_IS_BIG = sys.byteorder == "big"


def block_of(frame: int) -> int:
    """Number of the 32 KiB block (from 0) that indexes frame number `frame` (from 1)."""
    return (frame + FRAMES_PER_BLOCK - FRAMES_IN_FIRST_BLOCK - 1) // FRAMES_PER_BLOCK


def first_frame(block: int) -> int:
    """Number of the first frame that block `block` indexes."""
    return 1 if block == 0 else FRAMES_IN_FIRST_BLOCK + 1 + (block - 1) * FRAMES_PER_BLOCK


def pgno_offset(frame: int) -> int:
    """Byte offset, inside its block, of the page number of frame `frame`."""
    block = block_of(frame)
    return (PREFIX_SIZE if block == 0 else 0) + PGNO_SIZE * (frame - first_frame(block))


def slot_hash(pgno: int) -> int:
    """First slot to look at for `pgno`; then upward, around, to the first free one.

    A used slot holds the frame's ordinal inside the block, from 1.
    """
    return pgno * _HASH_MULTIPLIER & (HASH_SLOTS - 1)


@dataclass(frozen=True, slots=True)
class WalIndexHeader:
    """One copy of the header: the snapshot that a reader who takes it will see.

    `change` grows with each transaction. Frames 1..`mx_frame` of the -wal with `salts` are committed, the last of them
    has `frame_checksum`, and the database has `commit` pages. `page_size` (bytes) and `commit` are 0 while no frame was
    ever written in this generation.
    """

    change: int
    big_endian: bool
    page_size: int
    mx_frame: int
    commit: int
    frame_checksum: Checksum
    salts: tuple[int, int]

    @classmethod
    def parse(cls, data: Buffer, offset: int = 0) -> Self:
        """Read one copy (48 bytes) at `offset`.

        Raises CorruptWalIndex when it is uninitialised, torn or of another version. A torn copy may be a writer at
        work: read again for a while (engine.md T3) and never repair it.
        """
        if len(data) < offset + INDEX_HEADER_SIZE:
            raise CorruptWalIndex(f"a wal-index header needs {INDEX_HEADER_SIZE} bytes at offset {offset}")
        version, _, change, initialized, big, page_size, mx_frame, commit, f1, f2, salts, sum1, sum2 = (
            INDEX_HEADER_LAYOUT.unpack_from(data, offset)
        )
        if not initialized:
            raise CorruptWalIndex("the wal-index is not initialised; the next SQLite connection will rebuild it")
        if _checksum(data[offset : offset + INDEX_HEADER_SIZE - 8]) != (sum1, sum2):
            raise CorruptWalIndex("the wal-index header is torn; a writer may be at work, read it again")
        if version != INDEX_VERSION:
            raise CorruptWalIndex(f"wal-index version {version} is unknown, expected {INDEX_VERSION}")
        size = (page_size & 0xFE00) | (page_size & 1) << 16
        return cls(change, bool(big), size, mx_frame, commit, (f1, f2), _SALTS.unpack(salts))

    @classmethod
    def read(cls, prefix: Buffer) -> Self:
        """Read both copies from the first 96 bytes of a -shm. Raises CorruptWalIndex unless whole and equal."""
        first, second = COPY_OFFSETS
        if prefix[first:second] != prefix[second : second + INDEX_HEADER_SIZE]:
            raise CorruptWalIndex("the two wal-index headers differ; a writer may be at work, read them again")
        return cls.parse(prefix)

    def to_bytes(self) -> bytes:
        """The 48 bytes of one copy, its checksum computed."""
        body = INDEX_HEADER_LAYOUT.pack(
            INDEX_VERSION,
            0,
            self.change,
            1,
            self.big_endian,
            self.page_size & 0xFE00 | self.page_size >> 16,
            self.mx_frame,
            self.commit,
            *self.frame_checksum,
            _SALTS.pack(*self.salts),
            0,
            0,
        )[:-8]
        return body + struct.pack("=II", *_checksum(body))

    def __str__(self) -> str:
        salts = f"{self.salts[0]:08x}-{self.salts[1]:08x}"
        return f"wal-index at frame {self.mx_frame}, {self.commit} pages, salts {salts}, change {self.change}"


def _checksum(body: Buffer) -> Checksum:
    return checksum_direct(body, (0, 0), big_endian=_NATIVE_IS_BIG)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """How far checkpoints came, and which read marks are set. Not covered by any checksum.

    Frames 1..`n_backfill` are in the database file; `n_backfill_attempted` is where a checkpoint at work wants to get.
    """

    n_backfill: int
    read_marks: tuple[int, ...]
    n_backfill_attempted: int

    @classmethod
    def parse(cls, data: Buffer, offset: int = CHECKPOINT_OFFSET) -> Self:
        """Read 40 bytes at `offset`: the default for a -shm from its start, 0 for the bytes from 96 on."""
        if len(data) < offset + CHECKPOINT_LAYOUT.size:
            raise CorruptWalIndex(f"checkpoint info needs {CHECKPOINT_LAYOUT.size} bytes at offset {offset}")
        n_backfill, *marks, _, attempted, _ = CHECKPOINT_LAYOUT.unpack_from(data, offset)
        return cls(n_backfill, tuple(marks), attempted)
