"""The acknowledgment rule, pure: which position is covered by n voters (design.md 4, R3).

Acks count per voter: a voter that connects twice counts once, a follower that is no voter never counts, and a voter
that comes back with another node id (its disk was lost) counts for what it has now. Ranks are taken inside the
leader's present term only, because a txid without its term names nothing (R11): an ack of an older term says nothing
about a frame of this one.

While voters or acks change two rules are in force, and a position is covered when both cover it: whichever of the two
the record says at the moment of an election, nothing acknowledged is missed (model m8, BOTH).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from walship.formats.position import Position

__all__ = ["AckRule", "AckTracker"]


@dataclass(frozen=True, slots=True)
class AckRule:
    """So many acknowledgments beside the leader's own fdatasync, of these voters by name; None: of whoever speaks."""

    required: int
    voters: frozenset[str] | None = None


class AckTracker:
    """Durable positions of the voters, and what they cover.

    required: the rule; as a number: so many acknowledgments (`--ack`), of whoever speaks.
    """

    def __init__(self, term: int, required: int | AckRule, start: Position) -> None:
        self.term = term
        self.rule = required if isinstance(required, AckRule) else AckRule(required)
        self.coming: AckRule | None = None  # of a change under way: in force beside `rule`
        self._start = start
        self._durable: dict[str, tuple[str, Position]] = {}  # by voter: its node id and position

    @property
    def required(self) -> int:
        """Acknowledgments that the cluster's rule asks for now: of a change under way the larger number."""
        return max(rule.required for rule in self._rules())

    def record(self, node_id: str, durable: Position, name: str | None = None) -> None:
        """A node says that everything up to `durable` is on its disk. Never goes back, but for another disk."""
        voter = name or node_id
        known = self._durable.get(voter)
        if known is None or known[0] != node_id or durable.order() > known[1].order():
            self._durable[voter] = node_id, durable

    def forget(self, voter: str) -> None:
        """A voter left the cluster. What it acknowledged stays acknowledged: positions already given out stand."""
        self._durable.pop(voter, None)

    def propose(self, rule: AckRule) -> None:
        """From now on a position needs both rules."""
        self.coming = rule

    def settle(self, rule: AckRule) -> None:
        """The record says `rule`, and no other can come any more."""
        self.rule, self.coming = rule, None

    def covered(self, leader_durable: Position, required: int | None = None) -> Position:
        """The newest position that `required` voters (default: the cluster's rule) and the leader have on disk.

        The start of the term when too few have spoken in it.
        """
        if required is not None:
            return self.covered_by(AckRule(required, self.rule.voters), leader_durable)
        return min((self.covered_by(rule, leader_durable) for rule in self._rules()), key=Position.order)

    def covered_by(self, rule: AckRule, leader_durable: Position) -> Position:
        """The same for any rule."""
        if rule.required == 0:
            return leader_durable
        txids = sorted(self._txids(rule.voters), reverse=True)
        if len(txids) < rule.required:
            return self._start
        return Position(self.term, min(txids[rule.required - 1], leader_durable.txid))

    def _txids(self, voters: frozenset[str] | None) -> Iterable[int]:
        for voter, (_, durable) in self._durable.items():
            if durable.term == self.term and (voters is None or voter in voters):
                yield durable.txid

    def _rules(self) -> tuple[AckRule, ...]:
        return (self.rule,) if self.coming is None else (self.rule, self.coming)
