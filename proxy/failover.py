"""What a proxy does when it hears nothing of the leader: it suspects, picks the best follower, asks it to stand, and
measures (failover.md 3.3, 3.9). It decides nothing: nodes elect, and an asked node saves only its random delay.

`Lookout` is the pure core: what is seen of the nodes goes in, the name of whom to ask comes out. `Failover` is the
shell. Phases of each time without a leader, as this proxy saw it:

    detect   last sign of the old leader .. suspicion
    hold     suspicion .. the next leader serves
    drain    that .. no write is held any more
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

from proxy.backends import Backend, Backends
from proxy.link import LinkLost
from walship.errors import Overloaded
from walship.formats.link import NO_POSITION, Request, Role, StatusFlags, Verb
from walship.formats.position import Position
from walship.metrics import ProxyMetrics

__all__ = ["Episode", "Failover", "Lookout", "Seen"]

log = logging.getLogger("walship.proxy.failover")

SILENCE_SECONDS = 0.3
"""A leader tells its status every 100 ms; three missed are a reason to make others ready."""

AGAIN_SECONDS = 0.1
"""How often to ask again while there is no leader."""

PATIENCE_SECONDS = 10.0
SELDOM_SECONDS = 1.0
"""After so long the reason is not a delay that asking could save; then it is asked this seldom."""

HEARD_SECONDS = 1.0
"""Who was silent for longer is not asked."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of one node at a moment. `silent_seconds` is infinite without a link."""

    name: str
    role: Role
    term: int
    durable: Position
    lag_ms: int | None
    silent_seconds: float
    may_lead: bool  # a voter that could stand, as far as is known


@dataclass(frozen=True, slots=True)
class Episode:
    """One time without a leader that ended with another leadership. `at` is the moment of suspicion."""

    at: float
    before: str
    leader: str
    term: int
    detect_seconds: float
    hold_seconds: float
    drain_seconds: float


class Lookout:
    """The pure core. Times are monotonic seconds and never go back."""

    def __init__(self) -> None:
        self.last: Episode | None = None
        self.suspected_at: float | None = None
        self._leader: tuple[str, int] | None = None  # name and term of the last one that was fine
        self._heard_at = 0.0
        self._asked_at = -1.0
        self._before: tuple[str, int] | None = None
        self._suspected = self._detect = self._hold = 0.0
        self._served_at: float | None = None  # a new leader serves, and writes are still held

    def look(self, now: float, nodes: Iterable[Seen], leader: str | None, held: int) -> str | None:
        """Take what is seen; returns the name of a node to ask to stand, or None.

        Args: `leader`, who leads and may be sent writes, if anybody; `held`, writes that wait for one.
        """
        seen = {node.name: node for node in nodes}
        present = None if leader is None else seen.get(leader)
        if present is not None and present.silent_seconds <= SILENCE_SECONDS:
            self._fine(now, present, held)
            return None
        if self.suspected_at is None:
            self.suspected_at = now
            self._before, self._served_at = self._leader, None
            self._detect = now - self._heard_at
        pause = AGAIN_SECONDS if now - self.suspected_at < PATIENCE_SECONDS else SELDOM_SECONDS
        if now - self._asked_at < pause:
            return None
        best = self._best(seen.values(), except_for=leader)
        if best is not None:
            self._asked_at = now
        return best

    def _fine(self, now: float, leader: Seen, held: int) -> None:
        suspected, self.suspected_at = self.suspected_at, None
        self._leader, self._heard_at = (leader.name, leader.term), now - leader.silent_seconds
        if suspected is not None and self._before not in (None, self._leader):
            self._suspected, self._hold, self._served_at = suspected, now - suspected, now
        if self._served_at is not None and self._before is not None and not held:
            self.last = Episode(
                self._suspected,
                self._before[0],
                leader.name,
                leader.term,
                self._detect,
                self._hold,
                now - self._served_at,
            )
            self._served_at = None

    @staticmethod
    def _best(nodes: Iterable[Seen], *, except_for: str | None) -> str | None:
        """The highest durable position, then the least apply lag."""
        able = [
            node
            for node in nodes
            if node.may_lead
            and node.role is Role.FOLLOWER
            and node.silent_seconds <= HEARD_SECONDS
            and node.name != except_for
        ]
        if not able:
            return None
        return max(able, key=lambda node: (node.durable.order(), -(node.lag_ms or 0), node.name)).name


class Failover:
    """The shell: looks whenever it matters, and sends what is to be sent. `run` must be running."""

    def __init__(
        self,
        backends: Backends,
        *,
        held: Callable[[], int],
        clock: Callable[[], float],
        metrics: ProxyMetrics,
    ) -> None:
        self.lookout = Lookout()
        self._backends, self._held, self._clock, self._metrics = backends, held, clock, metrics
        self._wake = asyncio.Event()
        self._leader: Backend | None = None
        backends.on_news.append(self._news)

    async def run(self) -> NoReturn:
        """Look at every change of the leader, and each 100 ms; ends only by cancellation."""
        while True:
            self._wake.clear()
            self._look()
            try:
                async with asyncio.timeout(AGAIN_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def wake(self) -> None:
        """Something that is measured has happened: look now."""
        self._wake.set()

    def _news(self) -> None:
        leader = self._backends.leader
        if leader is not self._leader or self.lookout.suspected_at is not None:
            self._leader = leader
            self.wake()

    def _look(self) -> None:
        backends, now = self._backends, self._clock()
        leader = backends.leader
        before = self.lookout.last
        name = self.lookout.look(
            now, (self._seen(node) for node in backends), None if leader is None else leader.name, self._held()
        )
        episode = self.lookout.last
        if episode is not None and episode is not before:
            self._ended(episode)
        if name is not None and (node := backends.get(name)) is not None:
            self._ask(node)
        if leader is not None:
            self._cut_deposed(leader)

    def _seen(self, node: Backend) -> Seen:
        cluster, status = self._backends.cluster_record, node.status
        voters = () if cluster is None else cluster.voters
        return Seen(
            node.name,
            node.role,
            node.term,
            NO_POSITION if status is None else status.durable,
            node.lag_ms,
            node.silent_seconds,
            node.name in voters and status is not None and StatusFlags.CANDIDATE in status.flags,
        )

    def _ask(self, node: Backend) -> None:
        connection = node.connection
        if connection is None:
            return
        try:
            answer = connection.request(Request(connection.next_id(), Verb.STAND, b""))
        except (LinkLost, Overloaded):
            return
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # what it says changes nothing
        self._metrics.stands.labels(node.name).inc()
        log.info("ask to stand node=%s held=%d", node.name, self._held())

    def _cut_deposed(self, leader: Backend) -> None:
        """A node that led before and is silent holds requests that the new leader can tell the outcome of."""
        for node in self._backends:
            if node.role is Role.LEADER and node.term < leader.term and node.silent_seconds > SILENCE_SECONDS:
                connection = node.connection
                if connection is not None:
                    connection.abort(f"{node.name} is silent, and {leader.name} leads in term {leader.term}")

    def _ended(self, episode: Episode) -> None:
        seconds = self._metrics.failover_seconds
        seconds.labels("detect").observe(episode.detect_seconds)
        seconds.labels("hold").observe(episode.hold_seconds)
        seconds.labels("drain").observe(episode.drain_seconds)
        log.warning(
            "leader changed from=%s to=%s term=%d detect=%.3fs hold=%.3fs drain=%.3fs",
            episode.before,
            episode.leader,
            episode.term,
            episode.detect_seconds,
            episode.hold_seconds,
            episode.drain_seconds,
        )

    def status(self) -> dict[str, object]:
        """For `/status`: is a leader missed now, and how the last failover went."""
        now, lookout = self._clock(), self.lookout
        missed = lookout.suspected_at
        last = lookout.last
        return {
            "leader_missed_seconds": None if missed is None else round(now - missed, 3),
            "held": self._held(),
            "last": None
            if last is None
            else {
                "seconds_ago": round(now - last.at, 3),
                "from": last.before,
                "to": last.leader,
                "term": last.term,
                "detect_seconds": round(last.detect_seconds, 4),
                "hold_seconds": round(last.hold_seconds, 4),
                "drain_seconds": round(last.drain_seconds, 4),
            },
        }
