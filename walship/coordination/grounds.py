"""Whether and when a node has grounds to claim the term after the one in the record (failover.md 3.3), pure.

At once: the holder gave its term up, or its process is proven dead. After the lease: the record did not change for
1.1 T by this node's own clock; then the voters are asked first. Nothing else, and nobody's request, is a ground.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from walship.coordination.ballot import Candidate
from walship.coordination.lease import EXPIRY_FACTOR, Observation
from walship.coordination.record import LeaderRecord, Phase, Seen

__all__ = ["Grounds", "Urge", "who"]

BEHIND_DELAY_SECONDS: Final = (0.02, 0.1)  # lets a voter that holds more claim first
MAX_DEAD: Final = 64
_NEVER: Final = float("-inf")


@dataclass(frozen=True, slots=True)
class Urge:
    """This node may claim from `at` on; with `check`, it asks the others first."""

    at: float
    why: str
    check: bool


class Grounds:
    """What a node knows that bears on a claim. Times are seconds of its own clock.

    behind: a voter is known to hold more than this node. not_before: after a failure of its own it lets the others go
    first. look_at: no check before that.
    """

    def __init__(self, me: Candidate, uniform: Callable[[float, float], float]) -> None:
        self.behind = False
        self.not_before = _NEVER
        self.look_at = _NEVER
        self._me = me
        self._uniform = uniform
        self._observed = Observation()
        self._version: int | None = None
        self._dead: dict[str, None] = {}  # boot nonces, oldest first
        self._asked_until = _NEVER
        self._delay: float | None = None
        self._postponed: float | None = None  # since when

    @property
    def postponed(self) -> bool:
        """Somebody heard the leader although the record stands still."""
        return self._postponed is not None

    def seen(self, now: float, seen: Seen[LeaderRecord]) -> None:
        """The record as it is now. What was known of an older version is void."""
        self._observed.seen(seen.version, now)
        if seen.version != self._version:
            self._version, self._delay, self._postponed = seen.version, None, None

    def died(self, nonce: str) -> None:
        """The process with this boot nonce is proven dead."""
        self._dead[nonce] = None
        if len(self._dead) > MAX_DEAD:
            self._dead.pop(next(iter(self._dead)))

    def asked(self, now: float, lease_seconds: float) -> None:
        """Somebody asks this node to stand: for one lease it does not wait for a better one, and looks at once."""
        self._asked_until = now + lease_seconds
        self.look_at = now

    def postpone(self, now: float, lease_seconds: float) -> bool:
        """A voter hears the leader: leave it time to renew? Not for ever: its lease is over, it acknowledges nothing.

        True for one lease after the first time that this is asked of a version.
        """
        if self._postponed is None:
            self._postponed = now
        return now - self._postponed < lease_seconds

    def names_me(self, record: LeaderRecord) -> bool:
        """Does the record name this very process?"""
        return record.holder == self._me.node_id and record.nonce == self._me.nonce

    def urge(self, now: float, seen: Seen[LeaderRecord], lease_seconds: float) -> Urge:
        """When the term after the one in `seen`, the record last given to `seen()`, may be claimed.

        lease_seconds: this node's own T; the record's holder has its own.
        """
        record = seen.record
        at = max(self._observed.since + self._wait(now), self.not_before)
        if record.phase is Phase.VACANT:
            return Urge(at, f"{record.name} gave term {record.term} up", check=False)
        # A record with our node id and another nonce is our predecessor's: the lock on our directory says it is dead.
        if record.nonce in self._dead or (record.holder == self._me.node_id and not self.names_me(record)):
            return Urge(at, f"the process of {record.name} that held term {record.term} is dead", check=False)
        expires = self._observed.expires_at(record.lease_ms / 1000)
        if self.names_me(record):  # a term of ours that is over, and its release failed: the others go first
            why = f"term {record.term} of this node came to nothing"
            return Urge(max(expires + lease_seconds / 4, self.not_before), why, check=False)
        why = f"{who(record)}, and the record did not change for {record.lease_ms / 1000 * EXPIRY_FACTOR:.1f} s"
        return Urge(max(expires + self._wait(now), self.look_at, self.not_before), why, check=True)

    def _wait(self, now: float) -> float:
        if not self.behind or now <= self._asked_until:
            return 0.0
        if self._delay is None:
            self._delay = self._uniform(*BEHIND_DELAY_SECONDS)
        return self._delay


def who(record: LeaderRecord) -> str:
    """`node1 is serving in term 5`."""
    return f"{record.name} is {record.phase} in term {record.term}"
