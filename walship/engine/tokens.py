"""The commit tokens of the recent past (R19): what became of a write whose answer was lost.

Every frame that a log takes is fed here, on every node, and the log feeds what it holds when it is opened; so whoever
is elected can answer for its predecessors. In memory alone: after a start it covers what the log covers.

Kept for 120 s by frame time, and bounded. What is forgotten moves `complete_since`, and so does a rebuilt frame, which
has lost its tokens: of commits up to there an absent token says nothing. It is a position, not a time, so that no
clocks are compared: an attempt names the position that its proxy knew when it sent it, and is bound to that term, so
if it was committed, then behind that position.

Positions are compared along one history: that of this log, and of a leader whose log it is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from walship.formats.frame import CommitToken, FrameFlags, FrameHeader, SnapshotHeader
from walship.formats.frame.snapshot import MAX_SNAPSHOT_TOKENS
from walship.formats.position import Position

__all__ = ["KEEP_MS", "MOST_TOKENS", "Found", "Name", "Tokens"]

KEEP_MS = 120_000
MOST_TOKENS = 100_000

Name = tuple[int, int]
"""(incarnation, seq): what an attempt is called."""


@dataclass(frozen=True, slots=True)
class Found:
    """A token and where its commit is: (term of its frame, txid). `first`: where the first token of its name was."""

    token: CommitToken
    position: Position
    time_ms: int
    first: Position


class Tokens:
    """Tokens by name, oldest commit first. Any thread may ask; one thread at a time feeds."""

    def __init__(self, since: Position = Position(0, 0), *, keep_ms: int = KEEP_MS, most: int = MOST_TOKENS) -> None:
        self._keep_ms = keep_ms
        self._most = most
        self._found: OrderedDict[Name, Found] = OrderedDict()
        self._since = since
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    @property
    def complete_since(self) -> Position:
        """Of every commit after this position the token, if it had one, is here."""
        return self._since

    def feed(self, header: FrameHeader) -> None:
        """A frame is in the log."""
        with self._lock:
            if header.flags & FrameFlags.REBUILT:
                self._raise(header.position)
            for token in header.tokens:
                self._put(token, header.term, header.time_ms)
            self._forget(header.time_ms)

    def lookup(self, name: Name) -> Found | None:
        """The newest token of that name; its `part` says that the attempt's end is not known from it."""
        with self._lock:
            return self._found.get(name)

    def complete(self, end: CommitToken) -> None:
        """An attempt of which a part is known has ended without another frame: `end`, but for its txid."""
        name = (end.incarnation, end.seq)
        with self._lock:
            found = self._found.get(name)
            if found is not None and found.token.part:
                self._found[name] = replace(found, token=replace(end, txid=found.token.txid))

    def covers(self, sent_after: Position) -> bool:
        """Would the token of an attempt be here, had it been committed in term `sent_after.term`, after that position?

        If not, that it is absent says nothing.
        """
        since = self._since
        return sent_after.order() >= since.order()

    def begin(self, at: Position) -> None:
        """The log begins anew at `at`."""
        with self._lock:
            self._found.clear()
            self._since = at

    def lose(self, until: Position) -> None:
        """Tokens of commits up to `until` are not known here, except those that are."""
        with self._lock:
            self._raise(until)

    def cut(self, to: Position) -> None:
        """Frames after `to` are no longer in the log. What was lost of older ones stays lost."""
        with self._lock:
            for name, found in list(self._found.items()):
                if found.position.order() <= to.order():
                    continue
                if found.first.order() <= to.order():  # a part of it is still there, and its end is not
                    part = replace(found.token, txid=found.first.txid, part=True)
                    self._found[name] = replace(found, token=part, position=found.first)
                else:
                    del self._found[name]

    def export(self) -> tuple[Position, tuple[CommitToken, ...]]:
        """`complete_since` and the tokens, for a snapshot; only the newest when there are more than one may carry."""
        with self._lock:
            found = list(self._found.values())
            since = self._since
        dropped = len(found) - MAX_SNAPSHOT_TOKENS
        if dropped > 0:
            since = max(since, *(each.position for each in found[:dropped]), key=Position.order)
        return since, tuple(each.token for each in found[max(dropped, 0) :])

    def adopt(self, header: SnapshotHeader) -> None:
        """The log begins at a snapshot: what it carried is what is known.

        A token's own term is not in it, so it counts as one of the snapshot's term: acknowledged later, never sooner.
        """
        with self._lock:
            self._found.clear()
            self._since = header.complete_since
            for token in header.tokens:
                self._put(token, header.position.term, header.time_ms)
            self._forget(header.time_ms)

    def _put(self, token: CommitToken, term: int, time_ms: int) -> None:
        name, position = (token.incarnation, token.seq), Position(term, token.txid)
        part = self._found.pop(name, None)  # its end takes its place, as the newest
        self._found[name] = Found(token, position, time_ms, position if part is None else part.first)

    def _forget(self, now_ms: int) -> None:
        while self._found:
            oldest = next(iter(self._found.values()))
            if oldest.time_ms > now_ms - self._keep_ms and len(self._found) <= self._most:
                return
            self._found.popitem(last=False)
            self._raise(oldest.position)

    def _raise(self, position: Position) -> None:
        if position.order() > self._since.order():
            self._since = position
