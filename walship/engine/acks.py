"""The acknowledgment rule, pure: which position is covered by n voters (design.md 4, R3).

Acks count per voter id: a voter that connects twice counts once, a follower that is no voter never counts. Ranks are
taken inside the leader's present term only, because a txid without its term names nothing (R11): an ack of an older
term says nothing about a frame of this one.
"""

from __future__ import annotations

from walship.formats.position import Position

__all__ = ["AckTracker"]


class AckTracker:
    """Durable positions of the voters, and what they cover.

    required: acknowledgments a commit needs beside the leader's own fdatasync (`--ack`).
    """

    def __init__(self, term: int, required: int, start: Position) -> None:
        self.term = term
        self.required = required
        self._start = start
        self._durable: dict[str, Position] = {}

    def record(self, node_id: str, durable: Position) -> None:
        """A voter says that everything up to `durable` is on its disk. Never goes back."""
        known = self._durable.get(node_id)
        if known is None or durable.order() > known.order():
            self._durable[node_id] = durable

    def forget(self, node_id: str) -> None:
        """A voter left the cluster. What it acknowledged stays acknowledged: positions already given out stand."""
        self._durable.pop(node_id, None)

    def covered(self, leader_durable: Position, required: int | None = None) -> Position:
        """The newest position that `required` voters (default: the cluster's rule) and the leader have on disk.

        The start of the term when too few have spoken in it.
        """
        needed = self.required if required is None else required
        if needed == 0:
            return leader_durable
        txids = sorted((p.txid for p in self._durable.values() if p.term == self.term), reverse=True)
        if len(txids) < needed:
            return self._start
        return Position(self.term, min(txids[needed - 1], leader_durable.txid))
