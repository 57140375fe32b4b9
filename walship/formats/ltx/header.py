"""The two ends of an LTX file: header and trailer."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from walship.errors import CorruptLtx
from walship.formats.checksum import FLAG, Buffer

__all__ = ["HEADER_LAYOUT", "HEADER_SIZE", "NO_CHECKSUM", "TRAILER_LAYOUT", "TRAILER_SIZE", "LtxHeader", "LtxTrailer"]

MAGIC = b"LTX1"
NO_CHECKSUM = 2

HEADER_LAYOUT = struct.Struct(">4sIIIQQqQqqIIQ20s")
TRAILER_LAYOUT = struct.Struct(">QQ")
HEADER_SIZE = HEADER_LAYOUT.size
TRAILER_SIZE = TRAILER_LAYOUT.size


@dataclass(frozen=True, slots=True)
class LtxHeader:
    """What a file holds: the pages that lead to `commit` pages at `max_txid`.

    `wal_offset`, `wal_size` (bytes) and `wal_salts` say which -wal frames it was made from; Litestream needs an offset
    of at least 32 in the newest file to take over a replica. Raises CorruptLtx when the fields contradict each other.
    """

    page_size: int
    commit: int
    min_txid: int
    max_txid: int
    timestamp_ms: int = 0
    wal_offset: int = 0
    wal_size: int = 0
    wal_salts: tuple[int, int] = (0, 0)
    node_id: int = 0
    flags: int = NO_CHECKSUM
    pre_apply: int = 0

    SIZE: ClassVar[int] = HEADER_SIZE

    def __post_init__(self) -> None:
        size = self.page_size
        if not 512 <= size <= 65536 or size & (size - 1):
            raise CorruptLtx(f"page size {size}; SQLite's are powers of two, 512 to 65536")
        if not self.commit:
            raise CorruptLtx("a database of no pages cannot be restored, so no file may say so")
        if not 1 <= self.min_txid <= self.max_txid:
            raise CorruptLtx(f"txids {self.min_txid} to {self.max_txid} are not a range that begins at 1 or later")
        if self.flags & ~NO_CHECKSUM:
            raise CorruptLtx(f"unknown flags {self.flags:#x}")
        if self.wal_offset < 0 or self.wal_size < 0:
            raise CorruptLtx(f"negative WAL offset or size ({self.wal_offset}, {self.wal_size})")
        if not self.wal_offset and (self.wal_size or any(self.wal_salts)):
            raise CorruptLtx("a WAL size or salts without a WAL offset")
        if self.flags & NO_CHECKSUM or self.min_txid == 1:
            if self.pre_apply:
                raise CorruptLtx("a checksum of the database before, where none may be")
        elif not self.pre_apply & FLAG:
            raise CorruptLtx("no checksum of the database before, but no flag that says so")

    @property
    def is_snapshot(self) -> bool:
        """True when the file holds the whole database: its range begins at TXID 1."""
        return self.min_txid == 1

    @property
    def file_name(self) -> str:
        """The name that Litestream's layout wants for the file."""
        return f"{self.min_txid:016x}-{self.max_txid:016x}.ltx"

    def to_bytes(self) -> bytes:
        return HEADER_LAYOUT.pack(
            MAGIC,
            self.flags,
            self.page_size,
            self.commit,
            self.min_txid,
            self.max_txid,
            self.timestamp_ms,
            self.pre_apply,
            self.wal_offset,
            self.wal_size,
            *self.wal_salts,
            self.node_id,
            b"",
        )

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read the first HEADER_SIZE bytes of a file. Raises CorruptLtx."""
        if len(data) < HEADER_SIZE:
            raise CorruptLtx(f"an LTX header has {HEADER_SIZE} bytes, {len(data)} are there")
        magic, flags, page_size, commit, first, last, time_ms, pre, offset, size, *salts, node, _ = (
            HEADER_LAYOUT.unpack_from(data)
        )
        if magic != MAGIC:
            raise CorruptLtx(f"not an LTX file: it begins with {magic!r}")
        return cls(page_size, commit, first, last, time_ms, offset, size, (salts[0], salts[1]), node, flags, pre)

    def __str__(self) -> str:
        what = "snapshot" if self.is_snapshot else f"txids {self.min_txid} to"
        return f"LTX {what} {self.max_txid}, {self.commit} pages of {self.page_size}"


@dataclass(frozen=True, slots=True)
class LtxTrailer:
    """The last 16 bytes: the database checksum after (0 in our dialect) and the file's own."""

    post_apply: int
    checksum: int

    SIZE: ClassVar[int] = TRAILER_SIZE

    def to_bytes(self) -> bytes:
        return TRAILER_LAYOUT.pack(self.post_apply, self.checksum)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read TRAILER_SIZE bytes. Raises CorruptLtx."""
        if len(data) != TRAILER_SIZE:
            raise CorruptLtx(f"an LTX trailer has {TRAILER_SIZE} bytes, {len(data)} are there")
        return cls(*TRAILER_LAYOUT.unpack(data))

    def __str__(self) -> str:
        return f"file checksum {self.checksum:016x}"
