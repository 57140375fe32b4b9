"""Snapshot headers: which state of the database a snapshot is."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG
from walship.formats.frame.header import check_identity, check_pages
from walship.formats.frame.token import CommitToken, check_tokens, parse_tokens
from walship.formats.position import Position, Tip

__all__ = ["MAX_SNAPSHOT_TOKENS", "SNAPSHOT_LAYOUT", "SnapshotHeader"]

MAX_SNAPSHOT_TOKENS = 16384  # 656 KiB, so the header stays one record; a sender with more raises complete_since

SNAPSHOT_LAYOUT = struct.Struct(">4s16sIQQQIIqQQI")
_WHOLE_MAGIC = b"WSS2"
_SPARSE_MAGIC = b"WSP2"


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """The database at one position. The payload is one LTX snapshot (minTXID 1); of a `sparse` one it is an LTX file
    with only those pages that the receiver has not, for the very state whose page checksums it sent.

    `tokens` are the commit tokens still kept (R19), all of those of commits after `complete_since`. Raises
    CorruptRecord when the fields contradict each other.
    """

    cluster: bytes
    database: int
    position: Position
    checksum: int
    commit: int
    page_size: int
    time_ms: int
    complete_since: Position
    tokens: tuple[CommitToken, ...] = ()
    sparse: bool = False

    def __post_init__(self) -> None:
        check_identity("snapshot", self.cluster, self.database)
        check_pages("snapshot", self.page_size, self.commit)
        if not self.checksum & FLAG:
            raise CorruptRecord("a snapshot carries a database checksum without its flag bit")
        if self.time_ms < 0:
            raise CorruptRecord("a snapshot is dated before 1970")
        check_tokens("snapshot", self.tokens, MAX_SNAPSHOT_TOKENS, self.position.txid)

    @property
    def tip(self) -> Tip:
        """The state that the snapshot holds."""
        return Tip(self.position, self.checksum, self.commit)

    def to_body(self) -> bytes:
        """Return the body of the SNAPSHOT_HEADER record."""
        fixed = SNAPSHOT_LAYOUT.pack(
            _SPARSE_MAGIC if self.sparse else _WHOLE_MAGIC,
            self.cluster,
            self.database,
            self.position.term,
            self.position.txid,
            self.checksum,
            self.commit,
            self.page_size,
            self.time_ms,
            self.complete_since.term,
            self.complete_since.txid,
            len(self.tokens),
        )
        return fixed + b"".join([token.to_bytes() for token in self.tokens])

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the body of a SNAPSHOT_HEADER record. Raises CorruptRecord for anything else."""
        if len(body) < SNAPSHOT_LAYOUT.size or body[:4] not in (_WHOLE_MAGIC, _SPARSE_MAGIC):
            raise CorruptRecord(f"not a snapshot header: {len(body)} bytes that begin with {body[:4]!r}")
        (magic, cluster, database, term, txid, checksum, commit, page_size, time_ms, since_term, since_txid, count) = (
            SNAPSHOT_LAYOUT.unpack_from(body)
        )
        tokens = parse_tokens("snapshot", body, SNAPSHOT_LAYOUT.size, count)
        position, since = Position(term, txid), Position(since_term, since_txid)
        return cls(
            cluster, database, position, checksum, commit, page_size, time_ms, since, tokens, magic == _SPARSE_MAGIC
        )

    def __str__(self) -> str:
        return f"{'sparse ' if self.sparse else ''}snapshot of {self.tip} in pages of {self.page_size}"
