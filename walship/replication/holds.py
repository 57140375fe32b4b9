"""Who still needs the log, as the leader sees it (R9).

Two means. `keep_from` is the lowest durable txid among the followers known to this leader; retention stays above it
within its byte bound, and all nodes are told. A pin is stronger: retention never passes it. It covers a follower from
the moment its snapshot is taken until it has caught up, because a snapshot whose continuation is gone is worth
nothing; it ends by itself when nothing was heard of that follower for 60 s (engine/retention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from walship.engine.log import Log, Pin
from walship.errors import HistoryMismatch
from walship.formats.position import Position
from walship.replication.messages import Hello

__all__ = ["AWAY_SECONDS", "Holds"]

AWAY_SECONDS = 600.0
"""A non-voter that has been gone this long is no longer waited for. Voters are, until an operator removes them."""


@dataclass(slots=True)
class _Known:
    """What the leader knows of one follower: `txid` it certainly holds, when it left (None: it is here)."""

    txid: int
    voter: bool
    left_at: float | None = None


@dataclass(slots=True)
class _Seed:
    """A pin, and the position that ends it; unknown until the snapshot is installed."""

    pin: Pin
    caught_up_at: Position | None = None


class Holds:
    """What of the log must stay for followers. All of it is called on the loop."""

    def __init__(self, log: Log, durable: Callable[[], Position], clock: Callable[[], float]) -> None:
        self._log = log
        self._durable = durable
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._seeds: dict[str, _Seed] = {}

    def arrived(self, hello: Hello) -> None:
        """A follower was welcomed. One without a tip holds nothing; its snapshot's pin will cover it."""
        former = self._known.pop(hello.node_id, None)
        if hello.tip is not None:
            txid = hello.tip.position.txid if former is None else min(former.txid, hello.tip.position.txid)
            self._known[hello.node_id] = _Known(txid, hello.voter)

    def left(self, node_id: str) -> None:
        """Its connection is gone."""
        known = self._known.get(node_id)
        if known is not None:
            known.left_at = self._clock()

    def forget(self, node_id: str) -> None:
        """The node left the cluster."""
        self._known.pop(node_id, None)
        self._release(node_id)

    def hold(self, hello: Hello, position: Position) -> None:
        """Pin the log at the position of a snapshot that this follower now gets.

        Raises HistoryMismatch when the log does not reach back there; the snapshot would be useless.
        """
        pin = self._log.pin(position)
        self._release(hello.node_id)
        self._seeds[hello.node_id] = _Seed(pin)
        self._known[hello.node_id] = _Known(position.txid, hello.voter)

    def alive(self, node_id: str) -> None:
        """It takes or installs its snapshot."""
        seed = self._seeds.get(node_id)
        if seed is not None:
            self._move(node_id, seed, seed.pin.position)

    def progress(self, node_id: str, durable: Position) -> None:
        """It holds everything up to `durable`."""
        known = self._known.get(node_id)
        if known is not None:
            known.txid = durable.txid
        seed = self._seeds.get(node_id)
        if seed is None:
            return
        if seed.caught_up_at is None:
            seed.caught_up_at = self._durable()
        if durable.txid >= seed.caught_up_at.txid:
            self._release(node_id)
        else:
            self._move(node_id, seed, durable)

    def keep_from(self) -> int:
        """The txid after which the log is still needed; the newest durable one when nobody lacks anything."""
        now = self._clock()
        for node_id, known in tuple(self._known.items()):
            if known.left_at is not None and not known.voter and now - known.left_at > AWAY_SECONDS:
                del self._known[node_id]
        newest = self._durable().txid
        return min((known.txid for known in self._known.values()), default=newest)

    def _move(self, node_id: str, seed: _Seed, position: Position) -> None:
        try:
            seed.pin.move(position)
        except HistoryMismatch:
            # It was silent too long and retention went past it: the next hello of this follower ends in a new seed.
            self._release(node_id)

    def _release(self, node_id: str) -> None:
        seed = self._seeds.pop(node_id, None)
        if seed is not None:
            seed.pin.release()
