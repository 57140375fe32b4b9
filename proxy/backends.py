"""The nodes as the proxy knows them: records from the coordination store, one link each, what their statuses say.

`Backends.run` owns everything that lives: two watches of the store and one task per node that keeps its link up.
The store may be away: the nodes known stay known, and requests go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from proxy.consistency import Floors
from proxy.link import RELAY_PATH, UPGRADE_PATH, LinkConnection
from walship.coordination.follow import follow
from walship.coordination.record import (
    CLUSTER,
    LEADER,
    NODES,
    TERMS,
    ClusterRecord,
    LeaderRecord,
    NodeRecord,
    TermRecord,
    decode,
)
from walship.coordination.store import Change, Store
from walship.formats.link import NO_POSITION, Role, Status, StatusFlags
from walship.formats.position import Position

__all__ = ["Backend", "Backends", "PeakEwma"]

log = logging.getLogger("walship.proxy.backends")

QUIET_SECONDS = 1.5
"""A node tells its status every 100 ms; one quiet for so long gets no new requests."""

DEAD_SECONDS = 5.0
"""A link silent for so long is cut: reads go elsewhere, writes are answered "outcome unknown"."""

LEADER_DEAD_SECONDS = 2.5
"""The same for a leader that other nodes are heard beside: it may be this proxy alone that hears nothing of it, and a
relay through one of them is better than to wait for the rest."""

CONNECT_SECONDS = 3.0
RELAY_CONNECT_SECONDS = 1.5
RELAY_AFTER_FAILURES = 2
"""After so many vain attempts to connect to the leader it is tried through followers, in turn with the direct way."""

DIRECT_AGAIN_SECONDS = 1.0
"""How often the direct way is tried while the leader is reached through a follower."""

CLUSTER_SECONDS = 1.0
BACKOFF_SECONDS = (0.02, 1.0)
WATCH_RETRY_SECONDS = 1.0


class PeakEwma:
    """A latency estimate that jumps to each peak at once and comes down slowly: a slow node is left alone at once.

    It also decays while nothing is measured, so that a node left alone is tried again.
    """

    __slots__ = ("_at", "_seconds", "decay_seconds")

    def __init__(self, decay_seconds: float = 2.0) -> None:
        self.decay_seconds = decay_seconds
        self._seconds, self._at = 0.0, 0.0

    def observe(self, seconds: float, now: float) -> None:
        current = self.at(now)
        if seconds >= current:
            self._seconds = seconds
        else:
            weight = math.exp(-max(now - self._at, 0.0) / self.decay_seconds)
            self._seconds = self._seconds * weight + seconds * (1.0 - weight)
        self._at = now

    def at(self, now: float) -> float:
        """The estimate in seconds."""
        return self._seconds * math.exp(-max(now - self._at, 0.0) / self.decay_seconds)


class Backend:
    """One node. A `router.Candidate`."""

    def __init__(self, record: NodeRecord, clock: Callable[[], float]) -> None:
        self.record = record
        self.connection: LinkConnection | None = None
        self.generation = 0
        self.status: Status | None = None
        self.latency = PeakEwma()
        self.reads = 0
        self.last_failure: str | None = None
        self.failures = 0  # attempts to connect without success since the last one that had it
        self.via: str | None = None  # the follower that relays the present connection
        self.since = clock()
        self._clock = clock
        self._applied: Position = NO_POSITION
        self._serving = False  # what the last status says; asked several times for each request

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def role(self) -> Role:
        return Role.STARTING if self.status is None else self.status.role

    @property
    def term(self) -> int:
        return 0 if self.status is None else self.status.term

    @property
    def applied(self) -> Position:
        return self._applied

    @property
    def lag_ms(self) -> int | None:
        return None if self.status is None else self.status.lag_ms

    @property
    def leads(self) -> bool:
        """Its last status says that it leads in earnest: its term-start is acknowledged, its lease lives."""
        status = self.status
        return status is not None and status.role is Role.LEADER and StatusFlags.LED in status.flags

    @property
    def silent_seconds(self) -> float:
        """Since anything was heard over the present link; infinite without one."""
        connection = self.connection
        return math.inf if connection is None else self._clock() - connection.last_heard

    @property
    def usable(self) -> bool:
        connection = self.connection
        return (
            self._serving
            and connection is not None
            and connection.usable
            and self._clock() - connection.last_heard < QUIET_SECONDS
        )

    @property
    def cost(self) -> float:
        connection = self.connection
        in_flight = 0 if connection is None else connection.in_flight
        return (self.latency.at(self._clock()) + 1e-6) * (in_flight + 1)

    def saw(self, position: Position) -> None:
        """A reply shows that the node has at least this position: often fresher than its last status."""
        if position.term == self._applied.term and position.txid > self._applied.txid:
            self._applied = position

    def take_status(self, status: Status) -> bool:
        """Take a status; True when it changes what may be decided, so that whoever waits should look again."""
        previous, self.status = self.status, status
        self._serving = StatusFlags.SERVING in status.flags and StatusFlags.DRAINING not in status.flags
        if previous is None or previous.role is not status.role:
            self.since = self._clock()
        applied = status.applied
        if applied.term != self._applied.term or applied.txid > self._applied.txid:
            self._applied = applied
        return previous is None or (previous.role, previous.term, previous.flags, previous.applied) != (
            status.role,
            status.term,
            status.flags,
            applied,
        )

    def forget_connection(self) -> None:
        self.connection, self.status, self._applied, self._serving = None, None, NO_POSITION, False
        self.via = None
        self.since = self._clock()


class Backends:
    """All nodes, and whoever waits for something about them to change."""

    def __init__(
        self,
        store: Store,
        floors: Floors,
        *,
        rng: random.Random,
        clock: Callable[[], float],
        on_lost: Callable[[str, int], None],
    ) -> None:
        self._store, self._floors, self._rng, self._clock = store, floors, rng, clock
        self._on_lost = on_lost
        self._nodes: dict[str, Backend] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self.leader_record: LeaderRecord | None = None
        self.cluster_record: ClusterRecord | None = None
        self.store_problem: str | None = None
        self.highest_term = 0  # of any record, status or refusal; a leader below it gets nothing (I18)
        self.on_news: list[Callable[[], None]] = []  # called whenever `changed` ends
        self._cluster_known = asyncio.Event()

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._nodes.values())

    def get(self, name: str) -> Backend | None:
        return self._nodes.get(name)

    @property
    def leader(self) -> Backend | None:
        """The usable node that says it leads, in the newest term heard of by any way (I18)."""
        for node in self._nodes.values():
            if node.leads and node.term >= self.highest_term and node.usable:
                return node
        return None

    def learn_term(self, term: int) -> None:
        """A term was heard of; leaders of older ones count no more."""
        self.highest_term = max(self.highest_term, term)

    async def changed(self, timeout_seconds: float) -> bool:
        """Wait until any node's status, link or record changes; False when nothing did in time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_seconds):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    async def run(self) -> None:
        """Follow the store and keep the links; ends only by cancellation."""
        async with asyncio.TaskGroup() as tasks:

            def node_changed(change: Change) -> None:
                self._node_changed(change, tasks)

            for prefix, apply in (
                (NODES, node_changed),
                (LEADER, self._leader_changed),
                (CLUSTER, self._cluster_changed),
                (TERMS, self._term_changed),
            ):
                watch = follow(self._store, prefix, apply, retry_seconds=WATCH_RETRY_SECONDS, problem=self._store_is)
                tasks.create_task(watch, name=f"watch {prefix}")

    def _store_is(self, problem: str | None) -> None:
        self.store_problem = problem

    # --- the store ----------------------------------------------------------------------------------------------

    def _cluster_changed(self, change: Change) -> None:
        if change.key == CLUSTER and change.state is not None:
            self.cluster_record = decode(ClusterRecord, change.key, change.state.value)
            self._cluster_known.set()

    def _term_changed(self, change: Change) -> None:
        """Statuses tell of the newest terms only; an old token is judged by all of them (R18)."""
        if change.state is not None:
            record = decode(TermRecord, change.key, change.state.value)
            start = record.start
            self._floors.history.add(record.term, start.prev_txid, start.prev_term)

    def _leader_changed(self, change: Change) -> None:
        if change.key == LEADER:
            state = change.state
            self.leader_record = None if state is None else decode(LeaderRecord, change.key, state.value)
            if self.leader_record is not None:
                self.learn_term(self.leader_record.term)
            self.notify()

    def _node_changed(self, change: Change, tasks: asyncio.TaskGroup) -> None:
        name = change.key.removeprefix(NODES)
        record = None if change.state is None else decode(NodeRecord, change.key, change.state.value)
        known = self._nodes.get(name)
        if known is not None and record is not None and known.record.url == record.url:
            known.record = record
            return
        keeper = self._keepers.pop(name, None)
        if keeper is not None:
            keeper.cancel()
        self._nodes.pop(name, None)
        if record is not None:
            log.info("found node name=%s url=%s", name, record.url)
            backend = self._nodes[name] = Backend(record, self._clock)
            self._keepers[name] = tasks.create_task(self._keep(backend), name=f"link {name}")
        self.notify()

    # --- links --------------------------------------------------------------------------------------------------

    async def _keep(self, backend: Backend) -> None:
        """Keep one node's link up: connect, watch it, begin again with growing pauses."""
        low, high = BACKOFF_SECONDS
        pause = low
        while True:
            heard = await self._one_connection(backend)
            pause = low if heard else min(pause * 2, high)
            await asyncio.sleep(pause * (0.5 + self._rng.random() / 2))

    async def _one_connection(self, backend: Backend) -> bool:
        """One connection from its start to its end; True when the node sent a status."""
        relay = self._relay_for(backend)
        parts = urlsplit((backend if relay is None else relay).record.url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        backend.generation += 1
        generation = backend.generation

        def on_status(status: Status) -> None:
            if status.name != backend.name:  # a relay to a leader that has just changed
                connection.abort(f"{status.name} answered in the place of {backend.name}")
                return
            news = backend.take_status(status)
            self.learn_term(status.term)
            self._floors.learn(status)
            if not self._floors.ready:
                self._start_without_leader()
            if news:
                self.notify()

        def on_end(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)
            if backend.generation == generation:
                backend.forget_connection()
            self._on_lost(backend.name, generation)
            self.notify()

        cluster = await self._cluster()
        connection = LinkConnection(
            host=parts.netloc,
            name=backend.name,
            on_status=on_status,
            on_end=on_end,
            credential="" if cluster is None else cluster.credential("link" if relay is None else "relay"),
            path=UPGRADE_PATH if relay is None else RELAY_PATH,
        )
        try:
            async with asyncio.timeout(CONNECT_SECONDS if relay is None else RELAY_CONNECT_SECONDS):
                await loop.create_connection(lambda: connection, host, port)
        except (OSError, TimeoutError) as error:
            backend.failures += 1
            self._failed(backend, f"cannot connect to {backend.record.url}: {error or 'no answer in time'}")
            connection.abort("never connected")
            return False
        backend.connection, backend.via = connection, None if relay is None else relay.name
        if relay is not None:
            log.warning("reach leader %s through %s: %s", backend.name, relay.name, backend.last_failure)
        try:
            await self._watch(backend, connection, ended, direct=relay is None)
        finally:
            connection.abort("the proxy closed the link")
        reason = await ended
        heard = connection.upgraded and connection.statuses > 0
        backend.failures = 0 if heard and relay is None else backend.failures + 1
        self._failed(backend, reason)
        return heard

    async def _watch(
        self, backend: Backend, connection: LinkConnection, ended: asyncio.Future[str], *, direct: bool
    ) -> None:
        """Until the connection has ended, or the node was silent for too long, or a relay is no longer needed."""
        loop = asyncio.get_running_loop()
        looked = loop.time()
        while not ended.done():
            await asyncio.wait([ended], timeout=DEAD_SECONDS / 16)
            if ended.done():
                return
            now = loop.time()
            bound = self._dead_seconds(backend)
            if now - connection.last_heard > bound:
                connection.abort(f"node {backend.name} was silent for {bound:g} s")
                if bound < DEAD_SECONDS:
                    backend.failures = RELAY_AFTER_FAILURES
            elif not direct and now - looked > DIRECT_AGAIN_SECONDS and not connection.in_flight:
                looked = now
                if await _answers(backend.record.url):
                    backend.failures = 0
                    connection.abort(f"node {backend.name} can be reached again without a relay")

    def _dead_seconds(self, backend: Backend) -> float:
        if backend is not self.leader_by_record:
            return DEAD_SECONDS
        others = any(node.silent_seconds < QUIET_SECONDS / 3 for node in self._nodes.values() if node is not backend)
        return LEADER_DEAD_SECONDS if others else DEAD_SECONDS

    @property
    def leader_by_record(self) -> Backend | None:
        """The node that the coordination store says leads, reachable or not."""
        record = self.leader_record
        return None if record is None else self._nodes.get(record.name)

    def _relay_for(self, backend: Backend) -> Backend | None:
        """A follower to reach the leader through, when that cannot be reached; every second attempt is direct."""
        if backend.failures < RELAY_AFTER_FAILURES or backend.failures % 2 or backend is not self.leader_by_record:
            return None
        followers = [node for node in self._nodes.values() if node.role is Role.FOLLOWER and node.usable]
        return self._rng.choice(followers) if followers else None

    async def _cluster(self) -> ClusterRecord | None:
        """The cluster's record, which says what to show a node; it may come in a moment after the node's own."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLUSTER_SECONDS):
                await self._cluster_known.wait()
        return self.cluster_record

    def _start_without_leader(self) -> None:
        """Reads go on without a leader, also behind a proxy that just started, once enough voters were heard."""
        cluster = self.cluster_record
        if cluster is None:
            return
        heard = [node.status.durable for node in self._nodes.values() if node.status and node.name in cluster.voters]
        if len(heard) >= len(cluster.voters) - cluster.acks:
            self._floors.start_without_leader(heard)

    def _failed(self, backend: Backend, reason: str) -> None:
        if backend.last_failure != reason:
            backend.last_failure = reason
            log.warning("lost link node=%s reason=%s", backend.name, reason)

    def notify(self) -> None:
        """Something may be decided otherwise now: wake whoever waits."""
        for listener in self.on_news:
            listener()
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


async def _answers(url: str) -> bool:
    """Can `url` be connected to?"""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(DIRECT_AGAIN_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 80)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
