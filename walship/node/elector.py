"""The election of one node: feeds the pure core with what happens, and carries out what it asks for.

One task takes events in order and carries out the quick actions (a promise, a change of side) before the next event;
what waits for others (the store, voters) runs beside it and comes back as an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from walship.coordination.ballot import (
    LOST,
    UNKNOWN,
    Action,
    Announce,
    Candidate,
    Check,
    Checked,
    Claim,
    Eligible,
    Event,
    HandOver,
    HolderDied,
    Outcome,
    Promise,
    Promised,
    Promote,
    Promoted,
    PromotionFailed,
    Read,
    RecordSeen,
    Release,
    Seal,
    SealAnswer,
    SealAnswered,
    Sealed,
    SealFailed,
    SealRefused,
    Serve,
    Stand,
    StepDown,
    Swap,
    SwapDone,
    Tick,
    Won,
)
from walship.coordination.chronicle import Chronicle
from walship.coordination.election import Election
from walship.coordination.follow import follow
from walship.coordination.record import (
    LEADER,
    NODES,
    LeaderRecord,
    NodeRecord,
    Phase,
    Seen,
    announce_leader,
    claim_next_term,
    decode,
    hand_over,
    read_leader,
    release,
)
from walship.coordination.store import Change
from walship.engine import failpoints
from walship.errors import CompareFailed, CorruptState, Fenced, StoreUnavailable, UsageError, WalshipError
from walship.node.deathwatch import Deathwatch
from walship.node.leading import boottime
from walship.replication import peer

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Elector"]

_log = logging.getLogger("walship.election")

_LOOK_SECONDS = 0.25  # how often what is known of this node's own copy and stream is told to the core
_WATCH_RETRY_SECONDS = 0.2
_ASK_FRACTION = 0.25  # of a lease: how long a peer or the store may take to answer


class Elector:
    """The shell around `Election`. `run` must be alive for elections to happen; `serve` answers other nodes."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._urls: dict[str, str] = {}
        self._dead: set[str] = set()
        self._began = 0.0  # when the first compare-and-swap that announces `_announced` was begun
        self._announced = 0
        self._seen: Seen[LeaderRecord] | None = None
        self.core = Election(
            Candidate(node.node_id, node.name, node.url, node.boot_nonce),
            voters=node.member.record.voters,
            acks=node.acks_required,
            lease_seconds=node.config.lease_seconds,
            uniform=random.uniform,
            promised=node.member.state.state.promised,
        )
        self.chronicle = Chronicle(node.report.observe_election_phase, node.report.count_election)
        self._deathwatch = Deathwatch(node.config.cluster_url, self._died)
        self._credential = node.member.record.credential("peer")
        self._server = peer.PeerServer(node.name, self._answer)
        self._handlers: dict[type, Callable[[Any], Awaitable[None]]] = {
            Read: self._on_read,
            Check: self._on_check,
            Claim: self._on_claim,
            Promise: self._on_promise,
            Seal: self._on_seal,
            HandOver: self._on_hand_over,
            Promote: self._on_promote,
            Announce: self._on_announce,
            Serve: self._on_serve,
            StepDown: self._on_step_down,
            Release: self._on_release,
        }

    # --- from outside -----------------------------------------------------------------------------------------

    def stand(self, why: str = "asked by a proxy") -> None:
        """Somebody asks this node to stand: it saves the random delay, nothing more."""
        self._events.put_nowait(Stand(boottime(), why))

    def lost(self, seen: Seen[LeaderRecord] | None) -> None:
        """The renewal found a record that is not ours any more."""
        self._events.put_nowait(RecordSeen(boottime(), seen))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a peer: the handler for `GET /walship/peer`."""
        await self._server.serve(reader, writer)

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take part in elections until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for prefix, apply in ((LEADER, self._leader_changed), (NODES, self._node_changed)):
                watch = follow(self._node.store, prefix, apply, retry_seconds=_WATCH_RETRY_SECONDS)
                tasks.create_task(watch, name=f"watch {prefix}")
            while True:
                for event in await self._next():
                    await self._take(event)

    async def _next(self) -> list[Event]:
        """The next event; without one, what has become of this node, and a tick when the core asked for it."""
        wake_at = self.core.wake_at
        seconds = _LOOK_SECONDS if wake_at is None else min(max(wake_at - boottime(), 0.0), _LOOK_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                event = await self._events.get()
        except TimeoutError:
            event = Tick(boottime())
        return [*self._own_state(), event]

    def _own_state(self) -> list[Event]:
        node, now = self._node, boottime()
        tip = node.sides.eligible()
        behind = tip is not None and node.watermarks.acked.order() > tip.position.order()
        return [Eligible(now, tip, behind)]

    async def _take(self, event: Event) -> None:
        before, why = self.core.state, self.core.why
        actions = self.core.handle(event)
        self.chronicle.observe(event, self.core)
        if self.core.state is not before or self.core.why != why:
            _log.info("election state=%s why=%s", self.core.state, self.core.why)
        for action in actions:
            await self._do(action)

    async def _do(self, action: Action) -> None:
        await self._handlers[type(action)](action)

    # --- actions ----------------------------------------------------------------------------------------------

    async def _on_read(self, _action: Read) -> None:
        self._spawn(self._read())

    async def _on_check(self, action: Check) -> None:
        for name in action.voters:
            self._spawn(self._check(name, action.term))

    async def _on_claim(self, action: Claim) -> None:
        self._spawn(self._swap(Swap.CLAIM, lambda: self.claim(action.seen)))

    async def _on_seal(self, action: Seal) -> None:
        for name in action.voters:
            self._spawn(self._seal(name, action.term))

    async def _on_hand_over(self, action: HandOver) -> None:
        store = self._node.store
        self._spawn(self._swap(Swap.HAND, lambda: hand_over(store, action.claim, to=action.to, phase=Phase.CLAIMING)))

    async def _on_announce(self, action: Announce) -> None:
        store, term = self._node.store, action.claim.record.term
        if term != self._announced:  # of several tries any may be the one that landed: the lease counts from the first
            self._announced, self._began = term, boottime()
        self._spawn(self._swap(Swap.ANNOUNCE, lambda: announce_leader(store, action.claim, start=action.start)))

    async def _on_serve(self, _action: Serve) -> None:
        assert self._seen is not None
        await self._node.sides.serve_term(self._seen, self._began)

    async def _on_step_down(self, action: StepDown) -> None:
        await self._node.sides.step_down(action.term, action.why)

    async def _on_release(self, action: Release) -> None:
        self._spawn(self._release(action))

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._patience):
                seen = await read_leader(self._node.store)
        except (StoreUnavailable, CorruptState, UsageError, TimeoutError) as error:
            _log.warning("cannot read the leader record: %s", error or "no answer in time")
            return
        self._saw(seen)

    async def claim(self, seen: Seen[LeaderRecord] | None) -> Seen[LeaderRecord]:
        """The compare-and-swap to the term after `seen` for this process. Raises as `claim_next_term`."""
        node = self._node
        claim = await claim_next_term(
            node.store,
            seen,
            holder=node.node_id,
            name=node.name,
            url=node.url,
            nonce=node.boot_nonce,
            promised=node.member.state.state.promised,
            lease_ms=node.lease_ms,
        )
        failpoints.reach("leader.claimed")
        return claim

    async def _swap(self, kind: Swap, swap: Callable[[], Awaitable[Seen[LeaderRecord]]]) -> None:
        outcome: Outcome
        try:
            async with asyncio.timeout(self._patience):
                seen = await swap()
        except (CompareFailed, Fenced) as error:
            _log.info("%s lost: %s", kind, error)
            outcome = LOST
        except (StoreUnavailable, CorruptState, UsageError, TimeoutError) as error:
            _log.warning("%s: outcome unknown: %s", kind, error or "no answer in time")
            outcome = UNKNOWN
        else:
            self._seen = seen
            outcome = Won(seen)
        self._events.put_nowait(SwapDone(boottime(), kind, outcome))

    async def _release(self, action: Release) -> None:
        with contextlib.suppress(CompareFailed, StoreUnavailable, TimeoutError):
            async with asyncio.timeout(self._patience):
                await release(self._node.store, action.claim)

    async def _on_promise(self, action: Promise) -> None:
        node, term = self._node, action.term
        try:
            await node.sides.promise(term)
            # Before any voter is asked: by whom, and by how many, is this same record's to say (model m8, MARK).
            async with asyncio.timeout(self._patience):
                await node.voters.mark(term)
        except Fenced:
            self._events.put_nowait(Sealed(boottime(), max(node.member.state.state.promised, term + 1)))
            return
        except (WalshipError, TimeoutError) as error:
            _log.warning("the voters cannot be read, term=%d is given up: %s", term, error or "no answer in time")
            self._events.put_nowait(PromotionFailed(boottime(), term, f"the voters cannot be read ({error})"))
            return
        tip = node.sides.eligible()
        lag = max(0, tip.position.txid - node.report.applied().txid) if tip is not None else 0
        self._events.put_nowait(Promised(boottime(), term, tip, lag))

    async def _on_promote(self, action: Promote) -> None:
        term = action.term
        try:
            start = await self._node.sides.begin_term(term)
        except WalshipError as error:
            _log.error("promotion failed term=%d error=%s", term, error)
            self._events.put_nowait(PromotionFailed(boottime(), term, str(error)))
        else:
            self._events.put_nowait(Promoted(boottime(), term, start))

    async def _seal(self, name: str, term: int) -> None:
        node = self._node
        question = peer.Seal(node.cluster.hex(), term, node.node_id, node.name)
        given = await self._ask(name, question)
        answer: SealAnswer | SealRefused | SealFailed = SealFailed(name)
        if isinstance(given, peer.Sealed):
            answer = SealAnswer(name, given.node_id, given.url, given.nonce, given.tip, given.lag_txids)
        elif isinstance(given, peer.Refused) and given.promised > term:
            answer = SealRefused(name, given.promised)
        self._events.put_nowait(SealAnswered(boottime(), term, answer))

    async def _check(self, name: str, term: int) -> None:
        given = await self._ask(name, peer.Check(self._node.cluster.hex(), term))
        heard_ms = given.heard_ms if isinstance(given, peer.Checked) else None
        heard = heard_ms is not None and heard_ms < self._node.lease_ms / 2
        self._events.put_nowait(Checked(boottime(), name, heard))

    async def _ask(self, name: str, question: peer.Question) -> peer.Answer | None:
        url = self._urls.get(name)
        if url is None:
            return None
        try:
            return await peer.ask(url, question, timeout_seconds=self._patience, credential=self._credential)
        except WalshipError as error:
            _log.info("no answer from voter=%s: %s", name, error)
            return None

    # --- answering others -------------------------------------------------------------------------------------

    async def _answer(self, question: peer.Question) -> peer.Answer:
        node = self._node
        if question.cluster != node.cluster.hex():
            return peer.Refused(node.name, 0, "this node is of another cluster")
        if isinstance(question, peer.Check):
            return peer.Checked(node.name, self._heard_ms(question.term))
        return await self._answer_seal(question)

    async def _answer_seal(self, question: peer.Seal) -> peer.Answer:
        node = self._node
        if not node.voter:
            return peer.Refused(node.name, 0, f"{node.name} is no voter")
        promised = node.member.state.state.promised
        if question.term < promised or question.term == node.term:
            return peer.Refused(node.name, max(promised, question.term + 1), f"term {promised} is promised")
        for action in self.core.handle(Sealed(boottime(), question.term)):
            await self._do(action)
        tip = await node.sides.seal(question.term)
        if tip is None:
            return peer.Refused(node.name, 0, f"{node.name} has no whole copy to answer for")
        lag = max(0, tip.position.txid - node.report.applied().txid)
        _log.info("sealed term=%d for=%s tip=%s", question.term, question.name, tip)
        return peer.Sealed.of(node.name, node.node_id, node.url, node.boot_nonce, tip, lag)

    def _heard_ms(self, term: int) -> int | None:
        """Only a leader with a live lease says that it was heard: a record that was not renewed for longer than a
        lease, as the store itself just said, belongs to a leader that may acknowledge nothing any more, and that its
        followers still hear it changes nothing."""
        node = self._node
        return 0 if node.term >= term and node.led is not None and node.led.live() else None

    # --- watching ---------------------------------------------------------------------------------------------

    def _saw(self, seen: Seen[LeaderRecord] | None) -> None:
        if seen is not None:
            self._deathwatch.watch(seen.record.nonce if seen.record.nonce != self._node.boot_nonce else "")
            if self._seen is None or seen.version > self._seen.version:
                self._seen = seen
            self._node.sides.learn_leader(seen.record)
        self._events.put_nowait(RecordSeen(boottime(), seen))
        if seen is not None and seen.record.nonce in self._dead:
            self._events.put_nowait(HolderDied(boottime(), seen.record.nonce))

    def _died(self, nonce: str) -> None:
        self._dead.add(nonce)
        self._events.put_nowait(HolderDied(boottime(), nonce))

    def _leader_changed(self, change: Change) -> None:
        if change.key == LEADER and change.state is not None:
            self._saw(Seen(decode(LeaderRecord, LEADER, change.state.value), change.state.version))

    def _node_changed(self, change: Change) -> None:
        if change.state is not None:
            record = decode(NodeRecord, change.key, change.state.value)
            self._urls[record.name] = record.url

    @property
    def _patience(self) -> float:
        return self._node.config.lease_seconds * _ASK_FRACTION

    def _spawn(self, work: Any) -> None:
        self._tasks.create_task(work)
