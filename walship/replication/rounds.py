"""Read index: proof that this node still leads, and a position that covers whatever anybody has read (R18).

A linearizable read must not miss what was acknowledged, or shown to somebody, before it began. Only a leader can name
such a position, and a leader cut off from the others does not know that it is none. So each answer costs one *round*:
a heartbeat with the round's number goes to all followers, and `required` voters must answer that they heard it, in
this term, and hold the position on disk. As many voters again as a promotion needs cannot have sealed before that.

Why the position is the leader's durable one, not the acked one: a voter applies what it has on disk, a moment before
the leader has its ack (R15), so a reader there may have seen it already. Nobody has seen what was not shipped.

Requests that arrive together share one round; those that arrive while one is under way share the next, because a
round begun before a request proves nothing to it. No clock decides anything here, and there is no I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from walship.errors import Behind, Draining, StatementFailed, WalshipError
from walship.formats.position import Position

__all__ = ["NEEDS_ACK", "Rounds"]

NEEDS_ACK = "LINEARIZABLE_NEEDS_ACK"
"""The error code of a linearizable request to a cluster without acknowledgments."""


class Rounds:
    """The rounds of one leader in one term. Belongs to one event loop.

    Args:
        required: acknowledgments the cluster's rule asks for (n).
        durable: the leader's own durable position now.
        announce: sends a heartbeat that carries `number` to the followers, at once. Every later heartbeat carries it
            too, so a follower that was away answers as well.
    """

    def __init__(self, required: int, *, durable: Callable[[], Position], announce: Callable[[], None]) -> None:
        self.number = 0
        self._required, self._durable, self._announce = required, durable, announce
        self._heard: dict[str, tuple[int, Position]] = {}
        self._index: Position | None = None  # of the round under way
        self._current: list[asyncio.Future[Position]] = []
        self._next: list[asyncio.Future[Position]] = []
        self._scheduled = False
        self._ended: WalshipError | None = None

    def require(self, required: int) -> None:
        """The rule has changed; a round under way needs the new number too."""
        self._required = required

    async def index(self, timeout_seconds: float) -> Position:
        """A position that covers everything acknowledged or shown before this call, from a leader proven to lead.

        Raises StatementFailed NEEDS_ACK at n = 0, Behind when too few voters answer in time, Draining at the end.
        """
        if not self._required:
            raise StatementFailed(
                "linearizable needs acknowledgments, and this cluster has ack 0: a write may be lost "
                "after somebody has read it. Nothing was run; use session or any, or a cluster with --ack 1",
                NEEDS_ACK,
            )
        if self._ended is not None:
            raise self._ended
        answer: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        self._next.append(answer)
        self._schedule()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError:
            raise Behind(
                f"the leader could not prove within {timeout_seconds:g} s that it still leads: {self._required} "
                "followers with everything it has must answer. Nothing was run. Try again, or read at session"
            ) from None

    def echoed(self, node_id: str, number: int, durable: Position) -> None:
        """A voter heard round `number` in this term, and holds `durable` on its disk."""
        known = self._heard.get(node_id)
        if known is not None:
            number = max(number, known[0])
        self._heard[node_id] = (number, durable)
        self._look()

    def forget(self, node_id: str) -> None:
        """A voter's connection ended. What it said of rounds stays true, but it says no more."""
        self._heard.pop(node_id, None)

    def end(self) -> None:
        """This node leads no more: whoever waits is told so."""
        self._ended = Draining("this node stops leading; nothing was run. Try again")
        for answer in (*self._current, *self._next):
            if not answer.done():
                answer.set_exception(self._ended)
        self._index, self._current, self._next = None, [], []

    def _schedule(self) -> None:
        """Begin a round in the next tick, so that all requests of this one share it."""
        if not self._scheduled and self._index is None:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._scheduled = False
        self._current = [answer for answer in self._next if not answer.done()]
        self._next = []
        if self._current:
            self.number += 1
            self._index = self._durable()
            self._announce()

    def _look(self) -> None:
        index = self._index
        if index is None:
            return
        proofs = sum(
            number >= self.number and durable.term == index.term and durable.txid >= index.txid
            for number, durable in self._heard.values()
        )
        if proofs < self._required:
            return
        current, self._current, self._index = self._current, [], None
        for answer in current:
            if not answer.done():
                answer.set_result(index)
        if self._next:
            self._schedule()
