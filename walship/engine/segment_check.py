"""Checking a segment at start: read every byte, index what is whole, and say where sense ends.

Two causes leave different traces. A write that was cut short (a crash, a full disk) damages the end, and nothing good
follows: torn. Anything else, a flipped bit or a lost block, is damage: acknowledged frames may be affected, so it is
never quietly cut away (R5). The test between them is whether a well-formed record follows the bad one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from walship.engine.segment import END_RECORD_BYTES, Segment, frame_size
from walship.errors import CorruptRecord, StorageFailed
from walship.formats.frame import FrameAssembler, FrameComplete, FrameHeader, FrameStarted
from walship.formats.record import MAX_BODY, RECORD_HEADER_SIZE, RECORD_OVERHEAD, Kind, RecordReader

__all__ = ["Damage", "verify"]

_READ_BYTES = 1 << 20
_RECORD_START = re.compile(rb"[\x01-\x03]\x01\x00\x00(?=\x00[\x00-\x11][\x00-\xff]{2})")  # length <= MAX_BODY


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a segment stops making sense. `torn` = explained by a write cut short: nothing good follows."""

    offset: int
    reason: str
    torn: bool


def verify(segment: Segment, on_frame: Callable[[FrameHeader], None] = lambda _header: None) -> Damage | None:
    """Read the whole file and index its frames. Returns where it stops making sense, None when it never does.

    Frames before the damage are indexed and good: every checksum fits and each frame follows the one before. Each is
    given to `on_frame`.
    """
    reader = RecordReader()
    assembler = FrameAssembler()
    start, offset = segment.end, segment.end
    frame_at, header_bytes = start, 0
    while True:
        record_at = start + reader.consumed_bytes
        try:
            record = reader.next_record()
        except CorruptRecord as error:
            return _damage(segment, record_at, str(error))
        if record is None:
            data = _read_some(segment, offset)
            if data:
                reader.receive_data(data)
                offset += len(data)
                continue
            if reader.pending_bytes:
                return _damage(segment, record_at, "a record is cut short")
            if record_at != segment.end:
                return Damage(segment.end, "the last frame has no end", torn=True)
            return None
        try:
            event = assembler.feed(record)
            if isinstance(event, FrameStarted):
                frame_at, header_bytes = record_at, record.size_bytes
                _check_follows(segment, event.header)
            elif isinstance(event, FrameComplete):
                payload_bytes = event.end.payload_bytes
                if record_at + record.size_bytes - frame_at != frame_size(header_bytes, payload_bytes):
                    raise CorruptRecord("a frame's parts are not of the agreed size")
                segment.add(event.header, header_bytes, payload_bytes, record_at + record.size_bytes)
                on_frame(event.header)
        except CorruptRecord as error:
            return Damage(record_at, str(error), torn=False)


def _read_some(segment: Segment, offset: int) -> bytes:
    try:
        return os.pread(segment.descriptor, _READ_BYTES, offset)
    except OSError as error:
        raise StorageFailed(f"{segment.path} cannot be read at byte {offset}: {error.strerror}") from error


def _check_follows(segment: Segment, header: FrameHeader) -> None:
    tip = segment.tip
    if header.cluster != segment.head.cluster:
        raise CorruptRecord(f"{header} is of another cluster")
    if header.previous != tip.position or header.previous_checksum != tip.checksum:
        raise CorruptRecord(f"{header} does not follow {tip}")


def _damage(segment: Segment, offset: int, reason: str) -> Damage:
    good = next(_good_records(segment, offset + 1), None)
    if good is None:
        return Damage(offset, reason, torn=True)
    return Damage(offset, f"{reason}, but a good record follows at byte {good}", torn=False)


def _good_records(segment: Segment, offset: int) -> Iterator[int]:
    """Offsets of well-formed frame records at or after `offset`, wherever they are.

    Cheap tests come first: random and zero-filled data has many bytes that could begin a record, but hardly any
    that also end where another record, or the file, begins. Only those have their checksum computed.
    """
    size = segment.size_bytes()
    while offset < size:
        window = segment.read(offset, min(4 * _READ_BYTES, size - offset))
        for match in _RECORD_START.finditer(window):
            at = offset + match.start()
            if _is_good_record(segment, at, size):
                yield at
        overlap = RECORD_HEADER_SIZE - 1  # a match needs the whole record header inside one window
        if len(window) <= overlap:
            return
        offset += len(window) - overlap


def _is_good_record(segment: Segment, at: int, size: int) -> bool:
    head = segment.read(at, min(RECORD_HEADER_SIZE + 4, size - at))
    kind = head[0]
    end = at + RECORD_OVERHEAD + int.from_bytes(head[4:8], "big")
    if end > size or end - at > RECORD_OVERHEAD + MAX_BODY:
        return False
    if kind == Kind.FRAME_HEADER and head[8:12] != b"WSF1":
        return False
    if kind == Kind.FRAME_END and end - at != END_RECORD_BYTES:
        return False
    if kind == Kind.FRAME_PART and end < size:
        following = segment.read(end, min(4, size - end))
        if len(following) == 4 and following[1:] != b"\x01\0\0":
            return False
    reader = RecordReader()
    reader.receive_data(segment.read(at, end - at))
    try:
        return reader.next_record() is not None
    except CorruptRecord:
        return False
