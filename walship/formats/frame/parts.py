"""Parts: a long payload as header record, part records and end record (R6).

Frames and snapshots share this shape. Each part has its own checksum, so a reader never holds more than one; the end
record says how many there were, how long together, and a checksum over all their checksums, so that a part that was
lost, repeated or moved is seen. A part has exactly PART_BYTES, only the last may be shorter: the log finds a byte of
the payload by arithmetic.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from fastcrc import crc64

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG
from walship.formats.record import Kind, Record, encode_record

__all__ = ["END_LAYOUT", "PART_BYTES", "End", "Kinds", "Part", "PartsReader", "PartsWriter"]

PART_BYTES = 1 << 20
END_LAYOUT = struct.Struct(">IQQ")
_CHECKSUM_SIZE = 8

Kinds = tuple[Kind, Kind, Kind]
"""The kinds of the header, part and end records."""


@dataclass(frozen=True, slots=True)
class Part:
    """The next piece of the payload."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """What must have been read by the end; `checksum` covers the checksums of all records before it."""

    parts: int
    payload_bytes: int
    checksum: int

    SIZE = END_LAYOUT.size

    def to_body(self) -> bytes:
        """Return the body of the end record."""
        return END_LAYOUT.pack(self.parts, self.payload_bytes, self.checksum)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the body of an end record. Raises CorruptRecord for anything else."""
        if len(body) != END_LAYOUT.size:
            raise CorruptRecord(f"an end record has {len(body)} bytes instead of {END_LAYOUT.size}")
        return cls(*END_LAYOUT.unpack(body))

    def __str__(self) -> str:
        return f"end after {self.payload_bytes} bytes in {self.parts} parts"


class PartsWriter:
    """Header, parts, end, in that order. Holds less than one part."""

    __slots__ = ("_body", "_buffer", "_checksum", "_kinds", "_parts", "_payload_bytes")

    def __init__(self, kinds: Kinds, body: bytes) -> None:
        self._kinds = kinds
        self._body = body
        self._buffer = bytearray()
        self._checksum: int | None = None
        self._parts = 0
        self._payload_bytes = 0

    def header_record(self) -> bytes:
        """Return the first record. To be called once, before any part."""
        return self._seal(encode_record(self._kinds[0], self._body))

    def part(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take any amount of payload; return the part records that it completes, often none."""
        self._buffer += data
        if len(self._buffer) < PART_BYTES:
            return b""
        full = len(self._buffer) // PART_BYTES * PART_BYTES
        with memoryview(self._buffer) as view:
            records = [self._part(view[start : start + PART_BYTES]) for start in range(0, full, PART_BYTES)]
        del self._buffer[:full]
        return b"".join(records)

    def end(self) -> bytes:
        """Return the last, shorter part, if there is one, and the end record."""
        last = self._part(self._buffer) if self._buffer else b""
        self._buffer = bytearray()
        return last + encode_record(self._kinds[2], _end(self._parts, self._payload_bytes, self._checksum).to_body())

    def _part(self, data: bytearray | memoryview) -> bytes:
        self._parts += 1
        self._payload_bytes += len(data)
        return self._seal(encode_record(self._kinds[1], data))

    def _seal(self, record: bytes) -> bytes:
        self._checksum = crc64.go_iso(record[-_CHECKSUM_SIZE:], self._checksum)
        return record


class PartsReader:
    """Checks the records of one payload after another, without keeping any."""

    __slots__ = ("_checksum", "_kinds", "_last_bytes", "_parts", "_payload_bytes")

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._checksum: int | None = None
        self._parts = 0
        self._payload_bytes = 0
        self._last_bytes = PART_BYTES

    def start(self, record: Record) -> bytes:
        """Take the header record and return its body. Raises CorruptRecord for any other kind."""
        if record.kind != self._kinds[0]:
            raise CorruptRecord(f"a {record} came where {self._kinds[0].name.lower()} was due")
        self._checksum = None
        self._parts = self._payload_bytes = 0
        self._last_bytes = PART_BYTES
        self._add(record)
        return record.body

    def feed(self, record: Record) -> Part | End:
        """Take a part or end record. Raises CorruptRecord for another kind, size, number or checksum."""
        if record.kind == self._kinds[1]:
            return self._part(record)
        if record.kind != self._kinds[2]:
            raise CorruptRecord(f"a {record} came in the midst of parts ({self._parts} so far)")
        end = End.parse(record.body)
        if end != (found := _end(self._parts, self._payload_bytes, self._checksum)):
            raise CorruptRecord(f"the end record says {end}, but what came was {found}")
        return end

    def _part(self, record: Record) -> Part:
        size = len(record.body)
        if not 0 < size <= PART_BYTES or self._last_bytes < PART_BYTES:
            raise CorruptRecord(f"a part of {size} bytes came after one of {self._last_bytes}; only the last is short")
        self._last_bytes = size
        self._parts += 1
        self._payload_bytes += size
        self._add(record)
        return Part(record.body)

    def _add(self, record: Record) -> None:
        self._checksum = crc64.go_iso(record.checksum.to_bytes(_CHECKSUM_SIZE, "big"), self._checksum)


def _end(parts: int, payload_bytes: int, checksum: int | None) -> End:
    return End(parts, payload_bytes, FLAG | (checksum or 0))
