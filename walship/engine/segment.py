"""One segment of the log: a file of whole frames, and an index of them in memory.

    file     `<sequence, 16 hex digits>.seg`
    content  one SEGMENT record (the head), then frames exactly as they came over the wire

The head says what state the first frame starts from, so that a segment can be judged alone, and which terms began
where before it, so that pruning the log does not forget them. Body of the head, big-endian:

    magic "WSL1" | flags u32 | cluster 16 bytes | sequence u64 | base term u64 | base txid u64 | base checksum u64
    | base commit u32 | created ms i64 | count u32 | count x (term u64, start txid u64)

A segment only becomes visible whole: it is written under another name, fsynced and renamed (R5). So a file with a
damaged head is damaged, not torn. Bytes at an offset never change once a frame there exists; that is what lets
readers in other threads read without a lock.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Self

from walship.engine import failpoints
from walship.engine.files import sync_directory
from walship.errors import CorruptLog, CorruptRecord, StorageFailed
from walship.formats.frame import PART_BYTES, FrameEnd, FrameHeader
from walship.formats.position import Position, Tip
from walship.formats.record import (
    MAX_BODY,
    RECORD_HEADER_SIZE,
    RECORD_OVERHEAD,
    Kind,
    RecordReader,
    encode_record,
)

__all__ = [
    "END_RECORD_BYTES",
    "SEGMENT_LAYOUT",
    "Segment",
    "SegmentFlags",
    "SegmentHead",
    "frame_layout",
    "frame_size",
    "write_all",
]

END_RECORD_BYTES = RECORD_OVERHEAD + len(FrameEnd(0, 0, 0).to_body())
MAX_TERMS = 1024  # the newest are kept; a position of an older term is then judged as unknown, never as covered
SEGMENT_LAYOUT = struct.Struct(">4sI16sQQQQIqI")
_PAIR = struct.Struct(">QQ")
_MAGIC = b"WSL1"


class SegmentFlags(IntFlag):
    """RESET: the log begins here; segments with lower sequence numbers are what an interrupted reset left."""

    RESET = 1


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """The first record of a segment. `base` is the state before its first frame, `terms` the (term, start txid)s."""

    flags: SegmentFlags
    cluster: bytes
    sequence: int
    base: Tip
    created_ms: int
    terms: tuple[tuple[int, int], ...] = ()

    @property
    def file_name(self) -> str:
        return f"{self.sequence:016x}.seg"

    def to_bytes(self) -> bytes:
        """Return the whole SEGMENT record; only the newest MAX_TERMS terms are in it."""
        terms = self.terms[-MAX_TERMS:]
        position = self.base.position
        fixed = SEGMENT_LAYOUT.pack(
            _MAGIC,
            self.flags,
            self.cluster,
            self.sequence,
            position.term,
            position.txid,
            self.base.checksum,
            self.base.commit,
            self.created_ms,
            len(terms),
        )
        return encode_record(Kind.SEGMENT, fixed + b"".join([_PAIR.pack(*pair) for pair in terms]))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the body of a SEGMENT record. Raises CorruptRecord for anything else."""
        if len(body) < SEGMENT_LAYOUT.size or body[:4] != _MAGIC:
            raise CorruptRecord(f"not a segment head: {len(body)} bytes that begin with {body[:4]!r}")
        _, flags, cluster, sequence, term, txid, checksum, commit, created_ms, count = SEGMENT_LAYOUT.unpack_from(body)
        if flags & ~int(SegmentFlags.RESET):
            raise CorruptRecord(f"a segment has unknown flags {flags:#x}; a newer walship wrote it")
        if len(body) != SEGMENT_LAYOUT.size + count * _PAIR.size:
            raise CorruptRecord(f"a segment head with {count} terms has {len(body)} bytes")
        terms = tuple(_PAIR.iter_unpack(body[SEGMENT_LAYOUT.size :]))
        return cls(
            SegmentFlags(flags), cluster, sequence, Tip(Position(term, txid), checksum, commit), created_ms, terms
        )

    def __str__(self) -> str:
        return f"segment {self.file_name} from {self.base}"


class _Descriptor:
    """An open file that closes when nobody holds it any more: a reader never loses it to a prune in another thread."""

    __slots__ = ("number",)

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Segment:
    """A segment file that is open, and the index of its frames: parallel arrays, about 48 bytes a frame.

    One thread adds frames; any thread may read. `count` is raised last, so what lies below it is complete.
    """

    __slots__ = (
        "_checksums",
        "_commits",
        "_descriptor",
        "_header_bytes",
        "_offsets",
        "_payload_bytes",
        "_terms",
        "_txids",
        "count",
        "end",
        "head",
        "last_time_ms",
        "page_size",
        "path",
    )

    def __init__(self, path: Path, head: SegmentHead, first_offset: int) -> None:
        self.path = path
        self.head = head
        self.end = first_offset  # just behind the last whole frame
        self.count = 0
        self.last_time_ms = head.created_ms
        self.page_size = 0
        self._descriptor = _Descriptor(path, os.O_RDWR)
        self._offsets, self._payload_bytes = array("Q"), array("Q")
        self._terms, self._txids, self._checksums = array("Q"), array("Q"), array("Q")
        self._commits, self._header_bytes = array("I"), array("I")

    # --- the file ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path, head: SegmentHead) -> Self:
        """Make an empty segment that is durable under its name (R5). Raises OSError; a leftover is harmless."""
        path = directory / head.file_name
        temporary = path.with_suffix(".new")
        data = head.to_bytes()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(descriptor, data, 0)
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_directory(directory)
        failpoints.reach("log.segment_created")
        return cls(path, head, len(data))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing segment and read its head, not its frames. Raises CorruptLog, StorageFailed."""
        try:
            with path.open("rb") as file:
                start = file.read(RECORD_OVERHEAD + MAX_BODY)
        except OSError as error:
            raise StorageFailed(f"{path} cannot be read: {error.strerror}. It was not changed") from error
        reader = RecordReader()
        reader.receive_data(start)
        try:
            record = reader.next_record()
            if record is None or record.kind is not Kind.SEGMENT:
                raise CorruptRecord("it does not begin with a whole segment head")
            head = SegmentHead.parse(record.body)
            if head.file_name != path.name:
                raise CorruptRecord(f"its head says it is {head.file_name}")
        except CorruptRecord as error:
            raise CorruptLog(f"{path.name} at byte 0: {error}; all frames in it are affected. {_ADVICE}") from error
        return cls(path, head, record.size_bytes)

    @property
    def descriptor(self) -> int:
        """The file descriptor, valid as long as this segment is held."""
        return self._descriptor.number

    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return exactly that many bytes. Raises CorruptLog when the file is shorter, StorageFailed."""
        pieces = []
        try:
            while size_bytes:
                piece = os.pread(self.descriptor, size_bytes, offset)
                if not piece:
                    raise CorruptLog(f"{self.path.name} ends at byte {offset}, {size_bytes} bytes too early. {_ADVICE}")
                pieces.append(piece)
                offset, size_bytes = offset + len(piece), size_bytes - len(piece)
        except OSError as error:
            raise StorageFailed(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # --- the index --------------------------------------------------------------------------------------------

    @property
    def base(self) -> Tip:
        return self.head.base

    @property
    def tip(self) -> Tip:
        """The state after the last frame."""
        return self.tip_after(self.count)

    def tip_after(self, frames: int) -> Tip:
        """The state after the first `frames` frames."""
        if not frames:
            return self.head.base
        last = frames - 1
        return Tip(Position(self._terms[last], self._txids[last]), self._checksums[last], self._commits[last])

    def add(self, header: FrameHeader, header_bytes: int, payload_bytes: int, end: int) -> int:
        """Index the whole frame that lies between `self.end` and `end`; return its number."""
        self._offsets.append(self.end)
        self._header_bytes.append(header_bytes)
        self._payload_bytes.append(payload_bytes)
        self._terms.append(header.term)
        self._txids.append(header.max_txid)
        self._checksums.append(header.checksum)
        self._commits.append(header.commit)
        self.last_time_ms = header.time_ms
        self.page_size = header.page_size or self.page_size
        self.end = end
        self.count += 1
        return self.count - 1

    def find(self, position: Position) -> int | None:
        """The number of the frame that ends exactly at `position`, or None. Positions of one log are in tuple order."""
        wanted = position.order()
        count = self.count
        number = bisect_left(range(count), wanted, key=lambda n: (self._terms[n], self._txids[n]))
        if number < count and (self._terms[number], self._txids[number]) == wanted:
            return number
        return None

    def layout(self, number: int) -> tuple[int, int, int]:
        """(offset, header record bytes, payload bytes) of a frame."""
        return self._offsets[number], self._header_bytes[number], self._payload_bytes[number]

    def header(self, number: int) -> FrameHeader:
        """Read a frame's header back. Raises CorruptLog when the file no longer says what was indexed."""
        record = self.read(self._offsets[number], self._header_bytes[number])
        try:
            header = FrameHeader.parse(
                record[RECORD_HEADER_SIZE : len(record) - (RECORD_OVERHEAD - RECORD_HEADER_SIZE)]
            )
        except CorruptRecord as error:
            raise CorruptLog(f"{self.path.name} at byte {self._offsets[number]}: {error}. {_ADVICE}") from error
        if header.tip != self.tip_after(number + 1):
            raise CorruptLog(f"{self.path.name} at byte {self._offsets[number]}: the file changed under us. {_ADVICE}")
        return header

    def terms(self, frames: int | None = None) -> tuple[tuple[int, int], ...]:
        """(term, start txid) of all terms known after the first `frames` frames (default: all)."""
        found = list(self.head.terms)
        term, txid = self.base.position.term, self.base.position.txid
        for number in range(self.count if frames is None else frames):
            if self._terms[number] != term:
                term = self._terms[number]
                found.append((term, txid))
            txid = self._txids[number]
        return tuple(found)

    def cut(self, frames: int) -> None:
        """Forget all but the first `frames` frames, in the index only; the caller truncates the file to `end`."""
        if frames < self.count:
            self.end = self._offsets[frames]
            self.count = frames
        for column in (
            self._offsets,
            self._payload_bytes,
            self._terms,
            self._txids,
            self._checksums,
            self._commits,
            self._header_bytes,
        ):
            del column[frames:]


_ADVICE = (
    "Nothing was changed. What the log held before that is still good; this node must be given a new copy: "
    "move its directory away and let it join again"
)


def frame_size(header_bytes: int, payload_bytes: int) -> int:
    """Bytes of a whole frame in the log: header record, part records, end record."""
    parts = -(-payload_bytes // PART_BYTES)
    return header_bytes + payload_bytes + parts * RECORD_OVERHEAD + END_RECORD_BYTES


def frame_layout(
    head: bytes | bytearray | memoryview, tail: bytes | bytearray | memoryview, size_bytes: int
) -> tuple[int, int]:
    """(header record bytes, payload bytes) of a whole frame, by its first and last bytes. Raises CorruptRecord."""
    if size_bytes < RECORD_OVERHEAD + END_RECORD_BYTES or head[0] != Kind.FRAME_HEADER or tail[0] != Kind.FRAME_END:
        raise CorruptRecord(f"{size_bytes} bytes are not one whole frame: it begins with a header and ends with an end")
    header_bytes = RECORD_OVERHEAD + int.from_bytes(head[4:8], "big")
    end = FrameEnd.parse(bytes(tail[RECORD_HEADER_SIZE : END_RECORD_BYTES - (RECORD_OVERHEAD - RECORD_HEADER_SIZE)]))
    expected = frame_size(header_bytes, end.payload_bytes)
    if size_bytes != expected:
        raise CorruptRecord(f"a frame with {end.payload_bytes} bytes of payload has {size_bytes} bytes, not {expected}")
    return header_bytes, end.payload_bytes


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError; any part may then be in the file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
