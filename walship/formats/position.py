"""Positions in history: where a database, a log or a reader stands.

A position is a pair (term, txid). TXID is the ordinal of a SQLite commit that produced WAL frames, counted since
the cluster began; term is the number of the leadership that wrote it. Positions are never compared as plain
tuples (design.md 2): a deposed leader's (3, 120) is not in the history of a leader that began term 4 at txid 100.
`TermHistory` knows where each term began and answers `covers`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from walship.errors import CorruptRecord

__all__ = ["Position", "TermHistory", "Tip"]

_PAIR = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Position:
    """(term, txid). As text `term.txid`, both decimal; as bytes two big-endian u64.

    Across histories it has no order: ask a `TermHistory`.
    """

    term: int
    txid: int

    SIZE = _PAIR.size

    @classmethod
    def parse_text(cls, text: str) -> Self:
        """Read `term.txid`. Raises CorruptRecord when the text is anything else."""
        term, dot, txid = text.partition(".")
        if not (dot and term.isdecimal() and txid.isdecimal() and text.isascii() and len(text) <= 41):
            raise CorruptRecord(f"not a position: {text[:60]!r}; expected TERM.TXID, two decimal numbers")
        position = cls(int(term), int(txid))
        if position.term >= 1 << 64 or position.txid >= 1 << 64:
            raise CorruptRecord(f"not a position: {text[:60]!r}; both numbers must fit in 64 bits")
        return position

    @classmethod
    def parse(cls, data: bytes, offset: int = 0) -> Self:
        """Read 16 bytes at `offset`. Raises CorruptRecord when they are not there."""
        if len(data) < offset + _PAIR.size:
            raise CorruptRecord(f"a position needs 16 bytes at offset {offset}, {len(data) - offset} are there")
        return cls(*_PAIR.unpack_from(data, offset))

    def to_bytes(self) -> bytes:
        return _PAIR.pack(self.term, self.txid)

    def order(self) -> tuple[int, int]:
        """For comparing positions of one history, along which both numbers only grow."""
        return self.term, self.txid

    def __str__(self) -> str:
        return f"{self.term}.{self.txid}"


@dataclass(frozen=True, slots=True)
class Tip:
    """A position and the rolling database checksum there: what a log ends with and a hello offers (R11).

    `commit` is the database size in pages at that position.
    """

    position: Position
    checksum: int
    commit: int

    def __str__(self) -> str:
        return f"{self.position} (checksum {self.checksum:016x}, {self.commit} pages)"


class TermHistory:
    """Where each known term began: term t+1 began at txid `start`, so `end(t)` is that start.

    Terms may be skipped: a claim that never served, or a leader none of whose commits anybody else took. Nothing of a
    skipped term survives beyond its start; only `prev_term` of the term that skipped it says so.
    """

    __slots__ = ("_before", "_starts")

    def __init__(self, starts: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: dict[int, int] = dict(sorted(starts))
        self._before: dict[int, int] = {}

    def add(self, term: int, start_txid: int, prev_term: int | None = None) -> None:
        """Record that `term` began after `start_txid` of `prev_term` (None: not known). Idempotent.

        Other threads may be asking meanwhile.
        """
        if prev_term is not None and prev_term < term - 1:
            self._before = {**self._before, term: prev_term}
        self._starts = dict(sorted({**self._starts, term: start_txid}.items()))  # replaced, never changed in place

    def starts(self) -> tuple[tuple[int, int], ...]:
        """All known (term, start txid) pairs, ascending."""
        return tuple(self._starts.items())

    def end(self, term: int) -> int | None:
        """Last txid of `term` that is history, or None while no later term is known."""
        for later, start in self._starts.items():
            if later > term:
                return start
        return None

    def covers(self, have: Position, want: Position) -> bool:
        """True iff a state at `have` contains everything `want` contains (design.md 2).

        The smallest start of any later term bounds what of `want`'s term survived: a later term that rewound
        further (start below an earlier start) takes the difference away.
        """
        if have.term == want.term:
            return have.txid >= want.txid
        if have.term < want.term or have.txid < want.txid or self._skipped(want, have.term):
            return False
        bounds = self._bounds(want.term, have.term)
        return bool(bounds) and want.txid <= min(bounds)

    def lost(self, want: Position) -> bool:
        """True iff `want` lies past the end of its term: no surviving history contains it."""
        if not self._starts:
            return False
        newest = max(self._starts)
        bounds = self._bounds(want.term, newest)
        return bool(bounds) and (want.txid > min(bounds) or self._skipped(want, newest))

    def _bounds(self, after: int, upto: int) -> list[int]:
        """Starts of the terms in (after, upto] that are in the history of `upto`."""
        return [
            start for term, start in self._starts.items() if after < term <= upto and not self._is_skipped(term, upto)
        ]

    def _skipped(self, want: Position, newest: int) -> bool:
        """True iff `want` is a commit of a term that is not in the history of `newest`."""
        return self._is_skipped(want.term, newest) and want.txid > self._starts.get(want.term, -1)

    def _is_skipped(self, term: int, newest: int) -> bool:
        return any(
            before < term < later <= newest and not self._is_skipped(later, newest)
            for later, before in self._before.items()
        )
