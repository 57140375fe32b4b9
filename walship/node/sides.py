"""Leading and following: which of the two this node does, and how it goes from one to the other.

Every change is whole: it happens under one lock, and a SEAL that comes in the middle of a promotion waits for its end
and is answered after this node has stepped down (R2). Whoever asked for a change and is cancelled meanwhile (a stop, a
time-out) waits for its end all the same. Who leads is the elector's to say; here it is carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from walship.coordination.lease import Lease
from walship.coordination.record import LeaderRecord, Phase, Seen, TermStart
from walship.engine.leader import Leader
from walship.engine.retention import LogLimits
from walship.errors import CorruptData, CorruptDatabase, Fenced, StorageFailed, WalshipError
from walship.formats.position import Tip
from walship.node.following import Following
from walship.node.leading import Leading
from walship.node.promote import promote
from walship.node.role import Event, Role

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Sides"]

_log = logging.getLogger("walship.node")
_LOCATE_SECONDS = 1.0
_WHOLE_SECONDS = 10.0  # a change that takes longer than that is stuck; the process ends then

DECIDE_SECONDS = 1.0

T = TypeVar("T")


async def _whole(change: Coroutine[Any, Any, T]) -> T:
    """Carry `change` out to its end, also when the caller is cancelled: the cancellation counts afterwards."""
    task = asyncio.ensure_future(change)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=_WHOLE_SECONDS)
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a change ended after nobody waited for it error=%s", error)
        raise


class Sides:
    """The two sides of one node: at most one of `led` and `following` is set.

    Neither is while it starts and nobody knows yet who leads (the -wal may be the truth), and amid a change.
    """

    def __init__(self, node: Node, limits: LogLimits) -> None:
        self.led: Leading | None = None
        self.following: Following | None = None
        self.leader_record: LeaderRecord | None = node.member.leader.record if node.member.leader else None
        self._node = node
        self._limits = limits
        self._opened: Leader | None = None  # a term that is durable here and not announced yet
        self._decided = asyncio.Event()  # not set while a term is open here that is neither served nor over
        self._decided.set()
        self._changing = asyncio.Lock()
        self._leader_changed = asyncio.Event()

    @property
    def joined(self) -> bool:
        """False while this node may show what is no history: it led or started, and has not followed since (I21)."""
        if self.led is not None:
            return True
        return self.following is not None and self.following.joined

    async def promise(self, term: int) -> None:
        """Make it durable that lower terms are refused here. Raises Fenced when more is promised already."""
        state = self._node.member.state
        if term > state.state.promised:
            with self._disk():
                await asyncio.to_thread(state.update, promised=term)

    def eligible(self) -> Tip | None:
        """What this node could lead with; None when its copy is missing, in doubt or being replaced."""
        node = self._node
        if not node.voter or node.replica is None or node.role in (Role.STARTING, Role.STOPPING):
            return None
        if self.following is not None and not self.following.follower.sound:
            return None
        return node.replica.log.tip

    async def begin_term(self, term: int) -> TermStart:
        """Open `term` on this node in R2's order. Nobody is told yet. Raises what prevents it; this node then follows
        again, or the process ends (StorageFailed)."""
        return await _whole(self._begin_term(term))

    async def _begin_term(self, term: int) -> TermStart:
        node = self._node
        async with self._changing:
            promised = node.member.state.state.promised
            if promised > term:
                raise Fenced(f"term {promised} was promised; term {term} is not begun here")
            node.become(Event.CLAIM_WON)
            try:
                with self._disk():
                    return await self._open_term(term)
            except StorageFailed:
                raise
            except CorruptData as error:
                _log.error("cannot lead term=%d error=%s", term, error)
                self._deposed()
                self.follow(str(error))
                raise
            except WalshipError:
                self._deposed()
                self.follow()
                raise

    async def _open_term(self, term: int) -> TermStart:
        node = self._node
        replica = node.replica
        if self.following is not None:
            following, self.following = self.following, None
            try:
                replica = await following.retire()
            except BaseException:
                await following.stop()
                raise
        if replica is None:
            raise CorruptDatabase(f"{node.config.data_dir}: there is no database to lead with")
        previous = replica.log.tip
        self._decided.clear()
        try:
            self._opened = await asyncio.to_thread(
                promote,
                replica,
                node.member.state,
                node.watermarks,
                cluster=node.cluster,
                term=term,
                now_ms=node.now_ms,
                on_frame=node.on_frame,
                on_group=node.report.observe_group,
            )
        except BaseException:
            self._decided.set()
            raise
        return TermStart(previous.position.term, previous.position.txid, previous.checksum)

    async def serve_term(self, seen: Seen[LeaderRecord], began: float) -> None:
        """The record says that this node serves the term it has opened; the compare-and-swap was begun at `began`.

        Does nothing when that is over: `step_down` ends what was opened, or `close` does when the process stops."""
        await _whole(self._serve_term(seen, began))

    async def _serve_term(self, seen: Seen[LeaderRecord], began: float) -> None:
        node = self._node
        async with self._changing:
            opened = self._opened
            if opened is None or opened.term != seen.record.term or node.role is Role.STOPPING:
                return
            self._opened = None
            self.leader_record = seen.record
            lease = Lease(seen.record.lease_ms / 1000)
            lease.extend(began)
            self.led = Leading(node, opened, seen, lease, node.elector.lost)
            if node.service is not None:
                node.service.may_lead()
            self.led.start()
            self._decided.set()
            node.become(Event.TERM_STARTED)
        node.spawn(node.embedded.begin_term(opened.tip.position), "embedded generation")

    async def decided(self) -> None:
        """Wait, up to DECIDE_SECONDS, until a term that is open here is served or over. Followers see the record that
        announces it a moment before this node knows that it succeeded; sent away, they would pause before they come
        again, and nothing is acknowledged until they do."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DECIDE_SECONDS):
                await self._decided.wait()

    async def step_down(self, term: int, why: str) -> None:
        """End leading `term`, or having opened it, and follow. Does nothing when that is over already."""
        await _whole(self._step_down_from(term, why))

    async def _step_down_from(self, term: int, why: str) -> None:
        async with self._changing:
            current = self.led.term if self.led is not None else self._opened.term if self._opened is not None else 0
            if current == term:
                await self._step_down(why)

    async def _step_down(self, why: str) -> None:
        """`_changing` is held. Raises StorageFailed: the process must end."""
        node = self._node
        _log.warning("step down reason=%s", why)
        led, opened, self._opened = self.led, self._opened, None
        try:
            if led is not None:
                if node.service is not None:
                    node.service.stop_leading()
                await led.step_down()
            elif opened is not None:
                await asyncio.to_thread(opened.step_down)
        except BaseException as error:
            node.fail(error)
            raise
        self.led = None
        self._decided.set()
        self._deposed()
        self.follow()

    def _deposed(self) -> None:
        if self._node.role is not Role.STOPPING:
            self._node.become(Event.DEPOSED)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Whoever waits for it, a disk that failed ends the process (R5)."""
        try:
            yield
        except StorageFailed as error:
            self._node.fail(error)
            raise

    async def seal(self, term: int) -> Tip | None:
        """Promise `term` to a candidate: step down from any lower one, then say what is durable here; None when this
        copy stands for nothing. Raises Fenced when more is promised, or this node leads in that term."""
        return await _whole(self._seal(term))

    async def _seal(self, term: int) -> Tip | None:
        node = self._node
        async with self._changing:
            promised = node.member.state.state.promised
            if term < promised or term == node.term:
                raise Fenced(f"term {promised} is promised here")
            if self.led is not None or self._opened is not None:
                await self._step_down(f"sealed for term {term}")
            elif self.following is None:
                self.follow()
            await self.promise(term)
            if self.eligible() is None or node.replica is None:
                return None
            with self._disk():
                return await asyncio.to_thread(node.replica.log.sync)

    def follow(self, broken: str | None = None) -> None:
        """Follow whoever leads. `broken`: why this copy has to be replaced first."""
        node = self._node
        self.following = Following(
            node,
            node.replica,
            limits=self._limits,
            locate_leader=self._locate_leader,
            on_replica=node.on_replica,
        )
        if broken is not None:
            self.following.follower.replace(broken)

    def learn_leader(self, record: LeaderRecord) -> None:
        """The store's leader record changed, or was read."""
        if self.leader_record is None or record.term >= self.leader_record.term:
            self.leader_record = record
            self._leader_changed.set()
            if self.following is not None:
                self.following.subscriber.wake(record.url if record.phase is Phase.SERVING else None)
        elsewhere = record.phase is Phase.SERVING and record.nonce != self._node.boot_nonce
        waits = self.led is None and self._opened is None and self.following is None
        if elsewhere and waits and not self._changing.locked() and self._node.role is Role.FOLLOWER:
            self.follow()

    async def close(self) -> None:
        """End either side in order, for a process that ends."""
        async with self._changing:
            if self.led is not None:
                await self.led.close()
                self._node.embedded.close()
            if self._opened is not None:
                opened, self._opened = self._opened, None
                self._decided.set()
                await asyncio.to_thread(opened.step_down)
            if self.following is not None:
                await self.following.stop()

    async def _locate_leader(self) -> tuple[str, int] | None:
        record = self._serving_elsewhere()
        if record is None:
            self._leader_changed.clear()
            try:
                async with asyncio.timeout(_LOCATE_SECONDS):
                    await self._leader_changed.wait()
            except TimeoutError:
                return None
            record = self._serving_elsewhere()
        return None if record is None else (record.url, record.term)

    def _serving_elsewhere(self) -> LeaderRecord | None:
        record = self.leader_record
        if record is None or record.phase is not Phase.SERVING or record.holder == self._node.node_id:
            return None
        return record
