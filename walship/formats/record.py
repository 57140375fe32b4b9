"""Records: the one framing of the log, of snapshots and of the replication wire.

A record says what it is, how long it is and whether it is whole, so that a torn file end, a cut connection and a
flipped bit all look the same to a reader: the record is not there. Layout in docs/format.md section 5.

    kind u8 | version u8 | reserved u16 | length u32 | body | checksum u64          (big-endian)

The checksum covers the eight bytes before the body as well: a damaged length must not make a reader wait for a
gigabyte. Bodies are bounded (MAX_BODY), and a length above the bound is refused as soon as it is seen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from fastcrc import crc64

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG

__all__ = [
    "MAX_BODY",
    "RECORD_HEADER_SIZE",
    "RECORD_LAYOUT",
    "RECORD_OVERHEAD",
    "RECORD_VERSION",
    "Kind",
    "Record",
    "RecordReader",
    "encode_record",
]


RECORD_VERSION = 1
MAX_BODY = (1 << 20) + (64 << 10)  # a frame part of 1 MiB, with room for whatever a later version puts around it

RECORD_LAYOUT = struct.Struct(">BBHI")  # what comes before the body
_CHECKSUM = struct.Struct(">Q")
RECORD_HEADER_SIZE = RECORD_LAYOUT.size
RECORD_OVERHEAD = RECORD_LAYOUT.size + _CHECKSUM.size
_COMPACT_BYTES = 4 << 20  # consumed bytes a reader keeps before it moves the rest to the front of its buffer


class Kind(IntEnum):
    """What a record holds. 1 to 15 are stored (log, snapshots), 16 and above only travel."""

    FRAME_HEADER = 1
    FRAME_PART = 2
    FRAME_END = 3
    SNAPSHOT_HEADER = 4
    SNAPSHOT_PART = 5
    SNAPSHOT_END = 6
    SEGMENT = 7
    HELLO = 16
    WELCOME = 17
    REFUSAL = 18
    HEARTBEAT = 19
    ACK = 20
    GOODBYE = 21
    PAGE_CHECKSUMS = 22


_KINDS: dict[int, Kind] = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Record:
    """One record without its framing. `checksum` is the stored one, computed when not given."""

    kind: Kind
    body: bytes
    checksum: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if not self.checksum:
            object.__setattr__(self, "checksum", _checksum(_header(self.kind, self.body), self.body))

    @property
    def size_bytes(self) -> int:
        """Bytes of the encoded record."""
        return RECORD_OVERHEAD + len(self.body)

    def to_bytes(self) -> bytes:
        return encode_record(self.kind, self.body)

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} record of {len(self.body)} bytes"


def encode_record(kind: Kind, body: bytes | bytearray | memoryview) -> bytes:
    """Return the record's bytes, RECORD_OVERHEAD more than the body. Raises ValueError above MAX_BODY."""
    header = _header(kind, body)
    return b"".join((header, body, _CHECKSUM.pack(_checksum(header, body))))


def _header(kind: Kind, body: bytes | bytearray | memoryview) -> bytes:
    if len(body) > MAX_BODY:
        raise ValueError(f"a record body of {len(body)} bytes is above the bound of {MAX_BODY}")
    return RECORD_LAYOUT.pack(kind, RECORD_VERSION, 0, len(body))


def _checksum(header: bytes, body: bytes | bytearray | memoryview) -> int:
    return FLAG | crc64.go_iso(body, crc64.go_iso(header))


class RecordReader:
    """Turns bytes, cut anywhere, into records. No I/O.

    After a CorruptRecord nothing behind it can be trusted: every later call raises the same error again.
    `consumed_bytes` is then, and always, the offset just after the last good record.
    """

    __slots__ = ("_buffer", "_failed", "_start", "consumed_bytes")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0
        self._failed: str | None = None
        self.consumed_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes received that belong to no record yet: zero at a clean end of input."""
        return len(self._buffer) - self._start

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        if self._start == len(self._buffer) or self._start > _COMPACT_BYTES:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_record(self) -> Record | None:
        """Return the next whole record, or None until more bytes come.

        Raises CorruptRecord for an unknown kind or version, a length above MAX_BODY or a wrong checksum.
        """
        if self._failed is not None:
            raise CorruptRecord(self._failed)
        available = len(self._buffer) - self._start
        if available < RECORD_HEADER_SIZE:
            return None
        code, version, reserved, length = RECORD_LAYOUT.unpack_from(self._buffer, self._start)
        kind = _KINDS.get(code)
        if kind is None or version != RECORD_VERSION or reserved or length > MAX_BODY:
            raise self._fail(f"no record begins there (kind {code}, version {version}, {length} bytes)")
        if available < RECORD_OVERHEAD + length:
            return None
        body_start = self._start + RECORD_HEADER_SIZE
        body_end = body_start + length
        header = bytes(self._buffer[self._start : body_start])
        with memoryview(self._buffer) as view:
            body = bytes(view[body_start:body_end])
        (stored,) = _CHECKSUM.unpack_from(self._buffer, body_end)
        computed = _checksum(header, body)
        if stored != computed:
            raise self._fail(f"{kind.name.lower()}: checksum {stored:016x} is stored, {computed:016x} is right")
        self._start = body_end + _CHECKSUM.size
        self.consumed_bytes += RECORD_OVERHEAD + length
        return Record(kind, body, stored)

    def _fail(self, reason: str) -> CorruptRecord:
        self._failed = f"at byte {self.consumed_bytes}: {reason}"
        return CorruptRecord(self._failed)
