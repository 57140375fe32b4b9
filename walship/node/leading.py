"""What a node runs while it leads one term: the engine's leader, the writer, the publisher, acknowledgments, the lease.

Everything here begins after the term is announced by compare-and-swap and ends with `step_down` (another node will
lead: the process goes on as a follower) or `close` (the process ends).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from walship.coordination.lease import Lease
from walship.coordination.record import LeaderRecord, Seen
from walship.engine.acks import AckRule, AckTracker
from walship.engine.leader import Leader
from walship.engine.writer import Writer
from walship.formats.position import Position, Tip
from walship.node.renewal import Renewal
from walship.replication.publisher import Publisher

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Leading", "boottime"]

_log = logging.getLogger("walship.node")
_NOWHERE = Position(0, 0)


def boottime() -> float:
    """Seconds of the one clock that leases use: it is never set, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leading:
    """One term's leadership. Make it on the loop, `start` it; `lease` has been extended by the announcement already.

    on_lost: called on the loop when the record no longer says that this node leads; the node steps down then.
    """

    def __init__(
        self,
        node: Node,
        engine: Leader,
        seen: Seen[LeaderRecord],
        lease: Lease,
        on_lost: Callable[[Seen[LeaderRecord] | None], None],
    ) -> None:
        acks = node.acks_required
        self.engine = engine
        self.term = engine.term
        self.start_txid = engine.tip.position.txid
        self.lease = lease
        self.giving_up = asyncio.Lock()  # a switchover, or a release after complaints: one at a time
        self.ack_heard = asyncio.Event()  # set at each acknowledgment of a follower
        voters = frozenset(node.member.record.voters)
        self.acks: AckTracker | None = AckTracker(engine.term, AckRule(acks, voters), _NOWHERE)
        self.writer = Writer(engine, self.acks, on_failure=node.fail, live=self.live)
        self.publisher = Publisher(node, prompt_acked=acks >= 2, acks=acks, voters=voters)
        self._make_renewal = partial(
            Renewal, node.config.cluster_url, lease=lease, clock=boottime, on_lost=on_lost, on_failure=node.fail
        )
        self._renewal = self._make_renewal(seen)
        self._marks = node.watermarks
        self._end_notices: list[Callable[[], None]] = []
        self._closing: asyncio.Task[None] | None = None

    @property
    def seen(self) -> Seen[LeaderRecord]:
        """The record as last written by this leader."""
        return self._renewal.seen

    def live(self) -> bool:
        """May anything be admitted or answered now? From any thread."""
        return self.lease.valid(boottime())

    @property
    def established(self) -> bool:
        """True while this leader serves in the sense of R19: its term-start is acknowledged and its lease lasts."""
        acked = self._marks.acked
        return self.acks is not None and acked.term == self.term and acked.txid >= self.start_txid and self.live()

    def start(self) -> None:
        self._end_notices = [
            self._marks.on_change(self.move_acked),
            self._marks.on_change(self.publisher.wake),
        ]
        self.writer.start()
        self._renewal.start()
        self.move_acked()

    def record_ack(self, node_id: str, durable: Position) -> None:
        name = self.publisher.name_of(node_id)
        if self.acks is not None and name is not None:
            self.acks.record(node_id, durable, name)
            self.ack_heard.set()
            self.move_acked()

    def move_acked(self) -> None:
        """Count again how far the acknowledgment rule reaches."""
        if self.acks is None:
            return
        acked = self.acks.covered(self._marks.durable)
        if acked.order() > self._marks.acked.order():
            self._marks.acked = acked

    async def pause_renewal(self) -> Seen[LeaderRecord]:
        """End the renewals, so that another compare-and-swap of this node's can name the version (a handoff)."""
        await asyncio.to_thread(self._renewal.stop)
        return self._renewal.seen

    def resume_renewal(self) -> None:
        """Renew again after a handoff that did not happen, or may not have (`Lease.demand_renewal`, R12a)."""
        before = self._renewal
        self._renewal = self._make_renewal(before.seen, unknown_since=before.unknown_since)
        self._renewal.start()

    async def step_down(self) -> Tip:
        """End leading (R2, demote). From the first line on nothing is acknowledged any more; afterwards the log is the
        truth and durable through everything that was committed here. Returns its tip. Raises StorageFailed."""
        self.acks = None
        self.lease.end()
        self._stop_notices()
        await self.writer.retire()
        self._closing = asyncio.get_running_loop().create_task(self.publisher.close(), name="close publisher")
        tip = await asyncio.to_thread(self.engine.step_down)
        await asyncio.to_thread(self._renewal.stop)
        _log.warning("stepped down term=%d tip=%s", self.term, tip)
        return tip

    async def close(self) -> None:
        """Finish what is queued, copy the -wal back and let go, for a process that ends in order."""
        await self.writer.stop()
        self._stop_notices()
        await asyncio.to_thread(self._renewal.stop)
        await asyncio.to_thread(self.engine.close)

    def _stop_notices(self) -> None:
        for end in self._end_notices:
            end()
        self._end_notices = []
