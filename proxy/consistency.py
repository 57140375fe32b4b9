"""How fresh a read must be: the proxy's floor, the history of terms, and what one request asks for (R17, R18). Pure.

The promise of `session` is that a read never misses a write acknowledged through this proxy and never goes back. One
floor for the whole proxy keeps it for every client, also for those that open a new stream per statement (hrana.md
6.10): each acknowledged write and each `session` read raises it, and a read begun later asks for at least that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

from walship.errors import CorruptRecord, ProtocolViolation, WriteLost
from walship.formats.link import NO_POSITION, Status, StatusFlags
from walship.formats.link import Role as NodeRole
from walship.formats.position import Position, TermHistory
from walship.hrana.types import Level

__all__ = ["Floors", "Settings", "parse_ack", "parse_level", "parse_token"]

LEVEL_NAMES = {"any": Level.ANY, "session": Level.SESSION, "global": Level.SESSION, "linearizable": Level.LINEARIZABLE}
MAX_ACK = 30  # as many as a baton can carry, and more voters than anybody has
_LEVEL_BITS = {Level.ANY: 1, Level.SESSION: 2, Level.LINEARIZABLE: 3}
_LEVEL_OF_BITS = {bits: level for level, bits in _LEVEL_BITS.items()}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stream or one request asked for. `floor` is an explicit token; `ack` None is the cluster's default."""

    level: Level = Level.SESSION
    ack: int | None = None
    floor: Position | None = None

    def overridden(self, *, consistency: str | None, min_position: str | None) -> Settings:
        """These settings with the request headers `walship-consistency` and `walship-min-position` applied.

        Raises ProtocolViolation when a header cannot be read.
        """
        if consistency is None and min_position is None:
            return self
        level = self.level if consistency is None else parse_level(consistency)
        floor = self.floor if min_position is None else parse_token(min_position)
        return replace(self, level=level, floor=floor)

    def packed(self, default: Settings) -> int:
        """What a baton carries of these settings, below 128: level and ack, 0 for what is `default`.

        A token is not carried: a proxy that starts is behind nobody (R18).
        """
        level = 0 if self.level is default.level else _LEVEL_BITS[self.level]
        return level | (0 if self.ack is None else self.ack + 1) << 2

    @classmethod
    def unpacked(cls, number: int, default: Settings) -> Settings:
        """The settings of a revived stream."""
        ack = (number >> 2) - 1
        return cls(_LEVEL_OF_BITS.get(number & 3, default.level), ack if ack >= 0 else default.ack)


def parse_level(text: str) -> Level:
    """Read a consistency level; `global` means `session`. Raises ProtocolViolation for any other word."""
    level = LEVEL_NAMES.get(text.strip().lower())
    if level is None:
        raise ProtocolViolation(f"no consistency level is called {text[:40]!r}; choose any, session or linearizable")
    return level


def parse_ack(text: str, most: int | None = None) -> int:
    """Read a number of followers to wait for, of `most` there are. Raises ProtocolViolation when it is none.

    `all` is as many as vote now beside the leader; it is refused while that is not known.
    """
    known, text = most is not None, text.strip()
    most = MAX_ACK if most is None else min(most, MAX_ACK)
    if known and text.lower() == "all":
        return most
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and int(text) <= most):
        raise ProtocolViolation(f"walship_ack is a number of followers, here 0 to {most}, or all, not {text[:40]!r}")
    return int(text)


def parse_token(text: str) -> Position:
    """Read a position token. Raises ProtocolViolation when it is none."""
    try:
        return Position.parse_text(text.strip())
    except CorruptRecord as error:
        raise ProtocolViolation(f"{error}; tokens come from the reply header walship-position") from error


class Floors:
    """The proxy's own floor and the terms it knows of. Grows only: `position` never goes back in history.

    Until `ready`, a starting proxy does not know what an earlier one acknowledged, and must not serve `session` reads
    (R18): the first status of a leader gives that floor.
    """

    __slots__ = ("_position", "history", "ready", "term")

    def __init__(self) -> None:
        self.history = TermHistory()
        self.ready = False
        self.term = 0
        self._position = NO_POSITION

    @property
    def position(self) -> Position:
        return self._position

    def learn(self, status: Status) -> None:
        """Take what a node says: merge its history; a leader's word makes the floor ready, and ends an old term. Only
        of one whose lease lives: a deposed one that does not know it gives a floor too low (docs/model.md, m6 LEASE).

        On a new term the own floor becomes (term, start): what lay beyond that start is in no surviving history, and
        only an explicit token beyond it gives WriteLost (R18).
        """
        known = dict(self.history.starts())
        for term, start in status.history:
            if known.get(term) != start:
                self.history.add(term, start)
        if status.role is not NodeRole.LEADER or StatusFlags.LED not in status.flags or status.term < self.term:
            return
        self.term = status.term
        if self._position.term and self._position.term < status.term:
            began = dict(self.history.starts()).get(status.term)
            if began is not None:
                self._position = Position(status.term, began)
        if not self.ready:
            # Its whole position, not what it counts as acknowledged: a leader counts later than it acknowledged
            # (docs/model.md, m6).
            self.raise_to(status.durable)
            self.ready = True

    def start_without_leader(self, durable: Iterable[Position]) -> None:
        """Become ready from what |V| - n voters hold durably: each acknowledged write is on n + 1 of |V|, so the newest
        position among them is at or past all of them (R18). For the caller to make sure they are so many."""
        for position in durable:
            self.raise_to(position)
        self.ready = True

    def raise_to(self, position: Position) -> None:
        """Raise the floor to a position a node answered with; one that history already contains changes nothing."""
        self._position = self._later(self._position, position)

    def latest(self, positions: Iterable[Position]) -> Position:
        """The one of these that contains the others, `NO_POSITION` of none."""
        return reduce(self._later, positions, NO_POSITION)

    def needed(self, settings: Settings, *, at_least: Position = NO_POSITION) -> Position:
        """The position a read with these settings must be served at, `NO_POSITION` when any will do.

        `at_least` is what a leader said, for a level that needs its word.
        Raises WriteLost when an explicit token lies in no surviving history.
        """
        token = settings.floor
        if token is not None and self.history.lost(token):
            raise WriteLost(
                f"the position {token} is in no surviving history: its term ended at txid "
                f"{self.history.end(token.term)}. What it names was never acknowledged by enough nodes; "
                "look for it in `walship orphans`"
            )
        if settings.level is Level.ANY:
            return token or NO_POSITION
        floor = self._later(self._position, at_least)
        return floor if token is None else self._later(floor, token)

    def _later(self, ours: Position, theirs: Position) -> Position:
        """The one that contains the other. Terms whose start is not known yet: the newer term, it began after ours."""
        if theirs.term == ours.term:
            return theirs if theirs.txid > ours.txid else ours
        return theirs if theirs.term > ours.term else ours
