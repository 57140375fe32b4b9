"""Where a request goes: a pure decision over what is known of the nodes at this moment (R22; perf.md 9, hrana.md 3.3).

A write, and whatever cannot be decided, goes to the leader. A read goes to a follower whose applied position covers
the floor, the better of two drawn at random by peak-EWMA latency x (requests in flight + 1). When none covers it, the
nearest follower is asked to wait a little; then the leader. The node that gets a request judges freshness again: what
is known here may be milliseconds old, and is only ever too old, never too new.

Which texts are reads is SQLite's verdict on the follower that would run them; `Verdicts` remembers the refusals. A
wrong "write" there is only slower, so an entry needs no schema version, just an end; a "read" is never remembered.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from walship.formats.link import NO_POSITION, Role
from walship.formats.position import Position, TermHistory

__all__ = ["Candidate", "Decision", "Need", "Verdicts", "decide"]

NEAR_TXIDS = 32
"""Followers within so many commits of the best are equally near: else all readers would herd onto one of them."""

NEAR_LAG_MS = 1000
"""A follower that says it lags more than this will not catch up within the short wait; ask the leader at once."""


class Need(Enum):
    """READ: any node may try, and refuse. LEADER: only the leader."""

    READ = "read"
    LEADER = "leader"


class Candidate(Protocol):
    """What the decision sees of a node."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def term(self) -> int: ...
    @property
    def applied(self) -> Position: ...
    @property
    def lag_ms(self) -> int | None: ...
    @property
    def usable(self) -> bool:
        """Connected, heard of lately, not draining, able to take one more request."""

    @property
    def cost(self) -> float:
        """Peak-EWMA latency x (requests in flight + 1)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Send it to `name`, which may wait `wait_ms` to reach the floor. `covered`: it should be there already."""

    name: str
    wait_ms: int
    covered: bool


def decide(
    need: Need,
    floor: Position,
    candidates: Iterable[Candidate],
    history: TermHistory,
    rng: random.Random,
    *,
    wait_ms: int,
    tried: Collection[str] = (),
    may_wait: bool = True,
) -> Decision | None:
    """Choose a node, or None when nobody can take the request now.

    Args: `tried`, names that already refused this request or whose link broke; `may_wait`, whether a follower that
    does not cover `floor` may be asked to wait (not a second time in a row while a leader is there).
    """
    leader: Candidate | None = None
    covering: list[Candidate] = []
    behind: list[Candidate] = []
    for candidate in candidates:
        if not candidate.usable or candidate.name in tried:
            continue
        if candidate.role is Role.LEADER:
            if leader is None or candidate.term > leader.term:
                leader = candidate
        elif need is Need.READ and candidate.role is Role.FOLLOWER:
            fresh = floor == NO_POSITION or history.covers(candidate.applied, floor)
            (covering if fresh else behind).append(candidate)
    if need is Need.READ:
        if covering:
            return Decision(_better_of_two(covering, rng).name, wait_ms, covered=True)
        near = _nearest(behind, patient=leader is None) if may_wait else []
        if near:
            return Decision(_better_of_two(near, rng).name, wait_ms, covered=False)
    return None if leader is None else Decision(leader.name, wait_ms, covered=True)


def _better_of_two(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """Power of two choices; the second draw never repeats the first."""
    count = len(candidates)
    if count == 1:
        return candidates[0]
    first = int(rng.random() * count)
    second = (first + 1 + int(rng.random() * (count - 1))) % count
    one, other = candidates[first], candidates[second]
    return one if one.cost <= other.cost else other


def _nearest(behind: Sequence[Candidate], *, patient: bool) -> list[Candidate]:
    if not patient:
        behind = [candidate for candidate in behind if (candidate.lag_ms or 0) <= NEAR_LAG_MS]
    if not behind:
        return []
    term, txid = max(candidate.applied.order() for candidate in behind)
    return [
        candidate
        for candidate in behind
        if candidate.applied.term == term and txid - candidate.applied.txid <= NEAR_TXIDS
    ]


class Verdicts:
    """Texts (or combinations of texts) that a node answered NOT_READ_ONLY: they go to the leader until they expire.

    Bounded: beyond `limit` entries the oldest goes. Time is the caller's monotonic clock, in seconds.
    """

    __slots__ = ("_until", "expiry_seconds", "limit")

    def __init__(self, limit: int = 4096, expiry_seconds: float = 300.0) -> None:
        self.limit, self.expiry_seconds = limit, expiry_seconds
        self._until: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def note_write(self, texts: tuple[str, ...], now: float) -> None:
        """A node refused a request of these read-looking texts. One text is to blame; of several it is not known which,
        so only that combination is remembered."""
        key = _key(texts)
        self._until.pop(key, None)
        self._until[key] = now + self.expiry_seconds
        while len(self._until) > self.limit:
            del self._until[next(iter(self._until))]

    def is_write(self, texts: tuple[str, ...], now: float) -> bool:
        """True when one of the texts alone, or all of them together, was refused lately."""
        if not self._until:
            return False
        return any(self._holds(text, now) for text in texts) or (len(texts) > 1 and self._holds(_key(texts), now))

    def _holds(self, key: Hashable, now: float) -> bool:
        until = self._until.get(key)
        if until is None:
            return False
        if until > now:
            return True
        del self._until[key]
        return False


def _key(texts: tuple[str, ...]) -> Hashable:
    return texts[0] if len(texts) == 1 else texts
