"""Frames and snapshots: what is shipped, logged and installed.

A frame says "from exactly that state, these commits lead to exactly this one": its header names the predecessor's
position and rolling checksum and the checksum after, its payload is one LTX file. On disk and on the wire it is a
header record, part records of exactly PART_BYTES (the last may be shorter) and an end record, and it exists once its
end is there (R6). A snapshot has the same shape with one position instead of a range. Layouts in docs/format.md
section 6.

Everything here is strict: a header that contradicts itself cannot be built, neither from values nor from bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Self

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG
from walship.formats.parts import PART_BYTES, End, Part, PartsReader, PartsWriter
from walship.formats.position import Position, Tip
from walship.formats.record import Kind, Record

__all__ = [
    "DATABASE",
    "MAX_FRAME_TOKENS",
    "MAX_SNAPSHOT_TOKENS",
    "PART_BYTES",
    "CommitToken",
    "FrameAssembler",
    "FrameComplete",
    "FrameEncoder",
    "FrameEnd",
    "FrameFlags",
    "FrameHeader",
    "FramePart",
    "FrameStarted",
    "SnapshotAssembler",
    "SnapshotComplete",
    "SnapshotEncoder",
    "SnapshotEnd",
    "SnapshotHeader",
    "SnapshotPart",
    "SnapshotStarted",
    "encode_frame",
]

DATABASE = 1  # the only database id that version 1 knows
MAX_FRAME_TOKENS = 4096
MAX_SNAPSHOT_TOKENS = 16384  # 656 KiB, so the header stays one record; a sender with more raises complete_since_ms

_FRAME_MAGIC = b"WSF1"
_SNAPSHOT_MAGIC = b"WSS1"
_FRAME = struct.Struct(">4sI16sIQQQQQQQIIqQQI")
_SNAPSHOT = struct.Struct(">4s16sIQQQIIqqI")
_TOKEN = struct.Struct(">QQQQqB")
_PAGE_SIZES = frozenset(1 << shift for shift in range(9, 17))


class FrameFlags(IntFlag):
    """REBUILT: made after a crash from the -wal or the file, commit tokens are lost (R2, R7). TERM_START: R11."""

    REBUILT = 1
    TERM_START = 2


_ALL_FLAGS = int(FrameFlags.REBUILT | FrameFlags.TERM_START)


@dataclass(frozen=True, slots=True)
class CommitToken:
    """What a client may ask about a commit after it lost the answer (R19).

    `incarnation` and `seq` name the request, `txid` the commit, `changes` counts rows as sqlite3_changes() does.
    """

    incarnation: int
    seq: int
    txid: int
    changes: int
    last_insert_rowid: int
    had_rows: bool

    SIZE = _TOKEN.size

    def to_bytes(self) -> bytes:
        return _TOKEN.pack(
            self.incarnation, self.seq, self.txid, self.changes, self.last_insert_rowid, int(self.had_rows)
        )

    @classmethod
    def parse(cls, data: bytes, offset: int = 0) -> Self:
        """Read SIZE bytes at `offset`. Raises CorruptRecord when they are not there or not a token."""
        if len(data) < offset + _TOKEN.size:
            raise CorruptRecord(f"a commit token needs {_TOKEN.size} bytes, {max(len(data) - offset, 0)} are there")
        incarnation, seq, txid, changes, rowid, had_rows = _TOKEN.unpack_from(data, offset)
        if had_rows > 1:
            raise CorruptRecord(f"a commit token's had_rows is {had_rows}, neither 0 nor 1")
        return cls(incarnation, seq, txid, changes, rowid, bool(had_rows))

    def __str__(self) -> str:
        return f"{self.incarnation:016x}/{self.seq} at txid {self.txid}"


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """Where a frame starts from, where it leads and what a follower must find afterwards.

    `previous_checksum` and `checksum` are rolling database checksums; `commit` is the database size in pages after
    the frame; `time_ms` never goes back from frame to frame (R3); `acked` is the leader's acknowledged position when
    the header was made. Raises CorruptRecord when the fields contradict each other.
    """

    flags: FrameFlags
    cluster: bytes
    database: int
    term: int
    min_txid: int
    max_txid: int
    previous: Position
    previous_checksum: int
    checksum: int
    commit: int
    page_size: int
    time_ms: int
    acked: Position
    tokens: tuple[CommitToken, ...] = ()

    def __post_init__(self) -> None:
        _check_identity("frame", self.cluster, self.database)
        if int(self.flags) & ~_ALL_FLAGS:
            raise CorruptRecord(f"a frame has unknown flags {int(self.flags):#x}; a newer walship wrote it")
        if self.min_txid != self.previous.txid + 1:
            raise CorruptRecord(f"a frame begins at txid {self.min_txid}, but follows {self.previous}")
        if not (self.previous_checksum & self.checksum & FLAG):
            raise CorruptRecord("a frame carries a database checksum without its flag bit")
        if self.time_ms < 0:
            raise CorruptRecord(f"a frame is dated {self.time_ms} ms, before 1970")
        if self.acked.term > self.term or self.acked.txid > self.max_txid:
            raise CorruptRecord(f"a frame says {self.acked} is acknowledged, beyond itself ({self.position})")
        _check_tokens("frame", self.tokens, MAX_FRAME_TOKENS, self.max_txid)
        if self.flags & FrameFlags.TERM_START:
            self._check_term_start()
        else:
            self._check_commits()

    def _check_term_start(self) -> None:
        if self.flags & FrameFlags.REBUILT or self.tokens:
            raise CorruptRecord("a term-start frame holds no commits, so it has no tokens and is never rebuilt")
        if self.max_txid != self.previous.txid or self.term <= self.previous.term:
            raise CorruptRecord(f"a term-start frame leads from {self.previous} to {self.position}")
        if self.checksum != self.previous_checksum:
            raise CorruptRecord("a term-start frame changes nothing, but its two checksums differ")
        if self.page_size not in _PAGE_SIZES and (self.page_size or self.commit):
            raise CorruptRecord(f"a term-start frame has page size {self.page_size} and {self.commit} pages")

    def _check_commits(self) -> None:
        if self.max_txid < self.min_txid or self.term < self.previous.term or not self.term:
            raise CorruptRecord(f"a frame leads from {self.previous} to {self.position}, which is not forward")
        _check_pages("frame", self.page_size, self.commit)

    @property
    def position(self) -> Position:
        """The position after the frame."""
        return Position(self.term, self.max_txid)

    @property
    def tip(self) -> Tip:
        """The state after the frame."""
        return Tip(Position(self.term, self.max_txid), self.checksum, self.commit)

    @property
    def is_term_start(self) -> bool:
        """True for the frame that opens a term: no payload, no TXID (R11)."""
        return bool(self.flags & FrameFlags.TERM_START)

    def to_body(self) -> bytes:
        """Return the body of the FRAME_HEADER record."""
        fixed = _FRAME.pack(
            _FRAME_MAGIC,
            self.flags,
            self.cluster,
            self.database,
            self.term,
            self.min_txid,
            self.max_txid,
            self.previous.term,
            self.previous.txid,
            self.previous_checksum,
            self.checksum,
            self.commit,
            self.page_size,
            self.time_ms,
            self.acked.term,
            self.acked.txid,
            len(self.tokens),
        )
        return fixed + b"".join([token.to_bytes() for token in self.tokens]) if self.tokens else fixed

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the body of a FRAME_HEADER record. Raises CorruptRecord for anything else."""
        if len(body) < _FRAME.size or body[:4] != _FRAME_MAGIC:
            raise CorruptRecord(f"not a frame header: {len(body)} bytes that begin with {body[:4]!r}")
        (
            _,
            flags,
            cluster,
            database,
            term,
            min_txid,
            max_txid,
            previous_term,
            previous_txid,
            previous_checksum,
            checksum,
            commit,
            page_size,
            time_ms,
            acked_term,
            acked_txid,
            count,
        ) = _FRAME.unpack_from(body)
        if flags & ~_ALL_FLAGS:
            raise CorruptRecord(f"a frame has unknown flags {flags:#x}; a newer walship wrote it")
        return cls(
            FrameFlags(flags),
            cluster,
            database,
            term,
            min_txid,
            max_txid,
            Position(previous_term, previous_txid),
            previous_checksum,
            checksum,
            commit,
            page_size,
            time_ms,
            Position(acked_term, acked_txid),
            _parse_tokens("frame", body, _FRAME.size, count),
        )

    def __str__(self) -> str:
        if self.is_term_start:
            return f"start of term {self.term} after {self.previous}"
        rebuilt = ", rebuilt" if self.flags & FrameFlags.REBUILT else ""
        return f"frame {self.previous} -> {self.position} ({self.commit} pages of {self.page_size}{rebuilt})"


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """The whole database at one position; the payload is one LTX snapshot (minTXID 1).

    `tokens` are the commit tokens still kept (R19), all of those after `complete_since_ms`. Raises CorruptRecord when
    the fields contradict each other.
    """

    cluster: bytes
    database: int
    position: Position
    checksum: int
    commit: int
    page_size: int
    time_ms: int
    complete_since_ms: int
    tokens: tuple[CommitToken, ...] = ()

    def __post_init__(self) -> None:
        _check_identity("snapshot", self.cluster, self.database)
        _check_pages("snapshot", self.page_size, self.commit)
        if not self.checksum & FLAG:
            raise CorruptRecord("a snapshot carries a database checksum without its flag bit")
        if self.time_ms < 0 or self.complete_since_ms < 0:
            raise CorruptRecord("a snapshot is dated before 1970")
        _check_tokens("snapshot", self.tokens, MAX_SNAPSHOT_TOKENS, self.position.txid)

    @property
    def tip(self) -> Tip:
        """The state that the snapshot holds."""
        return Tip(self.position, self.checksum, self.commit)

    def to_body(self) -> bytes:
        """Return the body of the SNAPSHOT_HEADER record."""
        fixed = _SNAPSHOT.pack(
            _SNAPSHOT_MAGIC,
            self.cluster,
            self.database,
            self.position.term,
            self.position.txid,
            self.checksum,
            self.commit,
            self.page_size,
            self.time_ms,
            self.complete_since_ms,
            len(self.tokens),
        )
        return fixed + b"".join([token.to_bytes() for token in self.tokens])

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the body of a SNAPSHOT_HEADER record. Raises CorruptRecord for anything else."""
        if len(body) < _SNAPSHOT.size or body[:4] != _SNAPSHOT_MAGIC:
            raise CorruptRecord(f"not a snapshot header: {len(body)} bytes that begin with {body[:4]!r}")
        _, cluster, database, term, txid, checksum, commit, page_size, time_ms, since_ms, count = _SNAPSHOT.unpack_from(
            body
        )
        tokens = _parse_tokens("snapshot", body, _SNAPSHOT.size, count)
        position = Position(term, txid)
        return cls(cluster, database, position, checksum, commit, page_size, time_ms, since_ms, tokens)

    def __str__(self) -> str:
        return f"snapshot of {self.tip} in pages of {self.page_size}"


def _check_identity(noun: str, cluster: bytes, database: int) -> None:
    if len(cluster) != 16:
        raise CorruptRecord(f"a {noun}'s cluster id has {len(cluster)} bytes instead of 16")
    if database != DATABASE:
        raise CorruptRecord(f"a {noun} is of database {database}; this version knows only database {DATABASE}")


def _check_pages(noun: str, page_size: int, commit: int) -> None:
    if page_size not in _PAGE_SIZES:
        raise CorruptRecord(f"a {noun} has page size {page_size}; SQLite's are powers of two, 512 to 65536")
    if not commit:
        raise CorruptRecord(f"a {noun} leads to a database of no pages; SQLite's have at least one")


def _check_tokens(noun: str, tokens: tuple[CommitToken, ...], most: int, max_txid: int) -> None:
    if len(tokens) > most:
        raise CorruptRecord(f"a {noun} has {len(tokens)} commit tokens; {most} is the bound")
    for token in tokens:
        if token.txid > max_txid:
            raise CorruptRecord(f"a {noun} that ends at txid {max_txid} has the commit token {token}")


def _parse_tokens(noun: str, body: bytes, offset: int, count: int) -> tuple[CommitToken, ...]:
    if len(body) != offset + count * _TOKEN.size:
        raise CorruptRecord(f"a {noun} header with {count} commit tokens has {len(body)} bytes")
    return tuple([CommitToken.parse(body, start) for start in range(offset, len(body), _TOKEN.size)])


# --- writing and reading -----------------------------------------------------------------------------------------

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
