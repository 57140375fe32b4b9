"""Frames and snapshots as records: writing them in pieces, and judging them as they come."""

from __future__ import annotations

from dataclasses import dataclass

from walship.errors import CorruptRecord
from walship.formats.frame.header import FrameHeader
from walship.formats.frame.parts import End, Part, PartsReader, PartsWriter
from walship.formats.frame.snapshot import SnapshotHeader
from walship.formats.record import Kind, Record

__all__ = [
    "FrameAssembler",
    "FrameComplete",
    "FrameEncoder",
    "FrameEnd",
    "FramePart",
    "FrameStarted",
    "SnapshotAssembler",
    "SnapshotComplete",
    "SnapshotEncoder",
    "SnapshotEnd",
    "SnapshotPart",
    "SnapshotStarted",
    "encode_frame",
]

_FRAME_KINDS = (Kind.FRAME_HEADER, Kind.FRAME_PART, Kind.FRAME_END)
_SNAPSHOT_KINDS = (Kind.SNAPSHOT_HEADER, Kind.SNAPSHOT_PART, Kind.SNAPSHOT_END)

FrameEnd = End
SnapshotEnd = End
FramePart = Part
SnapshotPart = Part


class FrameEncoder(PartsWriter):
    """Writes one frame in pieces: `header_record()`, then `part(data)` as often as needed, then `end()`."""

    __slots__ = ()

    def __init__(self, header: FrameHeader) -> None:
        super().__init__(_FRAME_KINDS, header.to_body())


class SnapshotEncoder(PartsWriter):
    """Writes one snapshot in pieces: `header_record()`, then `part(data)` as often as needed, then `end()`."""

    __slots__ = ()

    def __init__(self, header: SnapshotHeader) -> None:
        super().__init__(_SNAPSHOT_KINDS, header.to_body())


def encode_frame(header: FrameHeader, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return all records of a frame that fits in memory (at most 16 MiB, R6; above, use FrameEncoder).

    Raises ValueError when a term-start frame is given a payload or another one none.
    """
    if header.is_term_start == bool(payload):
        raise ValueError(f"{header} with a payload of {len(payload)} bytes: only a term-start frame has none")
    encoder = FrameEncoder(header)
    return b"".join((encoder.header_record(), encoder.part(payload), encoder.end()))


@dataclass(frozen=True, slots=True)
class FrameStarted:
    """A header has come; nothing about the frame holds yet."""

    header: FrameHeader


@dataclass(frozen=True, slots=True)
class FrameComplete:
    """The end has come and agrees with all that was read."""

    header: FrameHeader
    end: FrameEnd


@dataclass(frozen=True, slots=True)
class SnapshotStarted:
    """A header has come; nothing about the snapshot holds yet."""

    header: SnapshotHeader


@dataclass(frozen=True, slots=True)
class SnapshotComplete:
    """The end has come and agrees with all that was read."""

    header: SnapshotHeader
    end: SnapshotEnd


class FrameAssembler:
    """Turns the records of frames, one after another, into events. No I/O; holds no payload.

    Records of other kinds that may come between parts (heartbeats, acks) are the caller's to keep away. After a
    CorruptRecord the frame is lost: drop the assembler. It does not judge that one frame extends another.
    """

    __slots__ = ("_header", "_parts")

    def __init__(self) -> None:
        self._header: FrameHeader | None = None
        self._parts = PartsReader(_FRAME_KINDS)

    @property
    def header(self) -> FrameHeader | None:
        """The frame that has begun and not ended, if there is one."""
        return self._header

    def feed(self, record: Record) -> FrameStarted | FramePart | FrameComplete:
        """Take the next record. Raises CorruptRecord when it may not come now or does not agree with the others."""
        header = self._header
        if header is None:
            header = self._header = FrameHeader.parse(self._parts.start(record))
            return FrameStarted(header)
        event = self._parts.feed(record)
        if isinstance(event, Part):
            if header.is_term_start:
                raise CorruptRecord(f"{header}: a payload came, which a term-start frame never has")
            return event
        if not event.parts and not header.is_term_start:
            raise CorruptRecord(f"{header}: ended without a payload")
        self._header = None
        return FrameComplete(header, event)


class SnapshotAssembler:
    """Turns the records of a snapshot into events, as FrameAssembler does for frames."""

    __slots__ = ("_header", "_parts")

    def __init__(self) -> None:
        self._header: SnapshotHeader | None = None
        self._parts = PartsReader(_SNAPSHOT_KINDS)

    @property
    def header(self) -> SnapshotHeader | None:
        """The snapshot that has begun and not ended, if there is one."""
        return self._header

    def feed(self, record: Record) -> SnapshotStarted | SnapshotPart | SnapshotComplete:
        """Take the next record. Raises CorruptRecord when it may not come now or does not agree with the others."""
        header = self._header
        if header is None:
            header = self._header = SnapshotHeader.parse(self._parts.start(record))
            return SnapshotStarted(header)
        event = self._parts.feed(record)
        if isinstance(event, Part):
            return event
        if not event.parts:
            raise CorruptRecord(f"{header}: ended without a payload")
        self._header = None
        return SnapshotComplete(header, event)
