"""Frame headers: from which state a frame starts and to which it leads."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Self

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG
from walship.formats.frame.token import CommitToken, check_tokens, parse_tokens
from walship.formats.position import Position, Tip

__all__ = [
    "DATABASE",
    "FRAME_LAYOUT",
    "MAX_FRAME_TOKENS",
    "FrameFlags",
    "FrameHeader",
    "check_identity",
    "check_pages",
]

DATABASE = 1  # the only database id that version 1 knows
MAX_FRAME_TOKENS = 4096
PAGE_SIZES = frozenset(1 << shift for shift in range(9, 17))

FRAME_LAYOUT = struct.Struct(">4sI16sIQQQQQQQIIqQQI")
_FRAME_MAGIC = b"WSF1"


class FrameFlags(IntFlag):
    """REBUILT: made after a crash from the -wal or the file, commit tokens are lost (R2, R7). TERM_START: R11."""

    REBUILT = 1
    TERM_START = 2


_ALL_FLAGS = int(FrameFlags.REBUILT | FrameFlags.TERM_START)


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
        check_identity("frame", self.cluster, self.database)
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
        check_tokens("frame", self.tokens, MAX_FRAME_TOKENS, self.max_txid)
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
        if self.page_size not in PAGE_SIZES and (self.page_size or self.commit):
            raise CorruptRecord(f"a term-start frame has page size {self.page_size} and {self.commit} pages")

    def _check_commits(self) -> None:
        if self.max_txid < self.min_txid or self.term < self.previous.term or not self.term:
            raise CorruptRecord(f"a frame leads from {self.previous} to {self.position}, which is not forward")
        check_pages("frame", self.page_size, self.commit)

    @classmethod
    def start_of_term(cls, after: Tip, term: int, *, cluster: bytes, page_size: int, time_ms: int) -> Self:
        """The frame that opens `term` on a history that ends at `after`: it changes nothing but the term."""
        return cls(
            flags=FrameFlags.TERM_START,
            cluster=cluster,
            database=DATABASE,
            term=term,
            min_txid=after.position.txid + 1,
            max_txid=after.position.txid,
            previous=after.position,
            previous_checksum=after.checksum,
            checksum=after.checksum,
            commit=after.commit,
            page_size=page_size,
            time_ms=time_ms,
            acked=Position(0, 0),
        )

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
        fixed = FRAME_LAYOUT.pack(
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
        if len(body) < FRAME_LAYOUT.size or body[:4] != _FRAME_MAGIC:
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
        ) = FRAME_LAYOUT.unpack_from(body)
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
            parse_tokens("frame", body, FRAME_LAYOUT.size, count),
        )

    def __str__(self) -> str:
        if self.is_term_start:
            return f"start of term {self.term} after {self.previous}"
        rebuilt = ", rebuilt" if self.flags & FrameFlags.REBUILT else ""
        return f"frame {self.previous} -> {self.position} ({self.commit} pages of {self.page_size}{rebuilt})"


def check_identity(noun: str, cluster: bytes, database: int) -> None:
    """Raise CorruptRecord unless the cluster id has 16 bytes and the database is the one there is."""
    if len(cluster) != 16:
        raise CorruptRecord(f"a {noun}'s cluster id has {len(cluster)} bytes instead of 16")
    if database != DATABASE:
        raise CorruptRecord(f"a {noun} is of database {database}; this version knows only database {DATABASE}")


def check_pages(noun: str, page_size: int, commit: int) -> None:
    """Raise CorruptRecord unless SQLite could have a database of `commit` pages of that size."""
    if page_size not in PAGE_SIZES:
        raise CorruptRecord(f"a {noun} has page size {page_size}; SQLite's are powers of two, 512 to 65536")
    if not commit:
        raise CorruptRecord(f"a {noun} leads to a database of no pages; SQLite's have at least one")
