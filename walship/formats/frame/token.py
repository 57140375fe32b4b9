"""Commit tokens: how a client that lost an answer learns what became of its write (R19)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from walship.errors import CorruptRecord

__all__ = ["TOKEN_LAYOUT", "CommitToken", "check_tokens", "parse_tokens"]

TOKEN_LAYOUT = struct.Struct(">QQQQqB")
_HAD_ROWS, _INSERTED, _PART = 1, 2, 4
_ALL_FLAGS = _HAD_ROWS | _INSERTED | _PART


@dataclass(frozen=True, slots=True)
class CommitToken:
    """What a client may ask about a commit after it lost the answer (R19).

    `incarnation` and `seq` name the request, `txid` its last commit, `changes` counts rows as sqlite3_changes() does.
    `last_insert_rowid` is None when its last statement was no INSERT. `part`: more of the request was to follow when
    this was logged; a later token of the same name says how it ended, and without one nobody knows.
    """

    incarnation: int
    seq: int
    txid: int
    changes: int
    last_insert_rowid: int | None
    had_rows: bool
    part: bool = False

    SIZE = TOKEN_LAYOUT.size

    def to_bytes(self) -> bytes:
        rowid = self.last_insert_rowid
        flags = self.had_rows * _HAD_ROWS | (rowid is not None) * _INSERTED | self.part * _PART
        return TOKEN_LAYOUT.pack(self.incarnation, self.seq, self.txid, self.changes, rowid or 0, flags)

    @classmethod
    def parse(cls, data: bytes, offset: int = 0) -> Self:
        """Read SIZE bytes at `offset`. Raises CorruptRecord when they are not there or not a token."""
        if len(data) < offset + TOKEN_LAYOUT.size:
            raise CorruptRecord(
                f"a commit token needs {TOKEN_LAYOUT.size} bytes, {max(len(data) - offset, 0)} are there"
            )
        incarnation, seq, txid, changes, rowid, flags = TOKEN_LAYOUT.unpack_from(data, offset)
        if flags & ~_ALL_FLAGS or (rowid and not flags & _INSERTED):
            raise CorruptRecord(f"a commit token has flags {flags:#x} and rowid {rowid}, which do not fit")
        inserted = rowid if flags & _INSERTED else None
        return cls(incarnation, seq, txid, changes, inserted, bool(flags & _HAD_ROWS), bool(flags & _PART))

    def __str__(self) -> str:
        return f"{self.incarnation:016x}/{self.seq} at txid {self.txid}"


def check_tokens(noun: str, tokens: tuple[CommitToken, ...], most: int, max_txid: int) -> None:
    """Raise CorruptRecord when there are more than `most` tokens, or one is of a later commit."""
    if len(tokens) > most:
        raise CorruptRecord(f"a {noun} has {len(tokens)} commit tokens; {most} is the bound")
    for token in tokens:
        if token.txid > max_txid:
            raise CorruptRecord(f"a {noun} that ends at txid {max_txid} has the commit token {token}")


def parse_tokens(noun: str, body: bytes, offset: int, count: int) -> tuple[CommitToken, ...]:
    """Read `count` tokens from `offset` to the end of `body`. Raises CorruptRecord when it is not that long."""
    if len(body) != offset + count * TOKEN_LAYOUT.size:
        raise CorruptRecord(f"a {noun} header with {count} commit tokens has {len(body)} bytes")
    return tuple([CommitToken.parse(body, start) for start in range(offset, len(body), TOKEN_LAYOUT.size)])
