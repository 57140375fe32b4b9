"""The follower's end of replication: finds the leader, stays connected, hands over what comes.

One connection at a time, each a `Receiver`. Whatever goes wrong ends the connection, is counted, and is tried again
after a random pause; only a failed disk (StorageFailed) and cancellation end `run`.

A mismatch of history is loud (`Sink.mismatch`) and makes the next hello ask for a snapshot. Nothing is given up for
that: the sink keeps its state until the snapshot is verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

from walship.errors import Fenced, HistoryMismatch, StorageFailed, Unavailable, WalshipError
from walship.replication.hangup import hang_up
from walship.replication.messages import AckFlags
from walship.replication.receiver import Identity, Receiver, Seed, Sink, SubscriberLimits, Tally
from walship.replication.upgrade import connect

__all__ = ["Identity", "Link", "Seed", "Sink", "Subscriber", "SubscriberLimits", "SubscriberStatistics"]

_log = logging.getLogger("walship.subscriber")


class Link(StrEnum):
    """What the connection to the leader is doing."""

    SEARCHING = "searching"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    SEEDING = "seeding"


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """`connections` counts welcomes; `failures` the connections (or tries) that ended in an error."""

    link: Link
    leader_url: str | None
    leader_name: str | None
    term: int
    connections: int
    failures: int
    seeds: int
    mismatches: int
    frames: int
    received_bytes: int
    last_error: str | None


class Subscriber:
    """Follows whoever leads. `flags` is sent with each ack; the node sets it (disk short, apply lags).

    Args:
        locate_leader: returns (url, term) of the leader, or None; may wait for a change, with a bound.
        credential: what the leader asks of those who connect; empty when it asks nothing.
    """

    def __init__(
        self,
        sink: Sink,
        locate_leader: Callable[[], Awaitable[tuple[str, int] | None]],
        identity: Identity,
        *,
        credential: str = "",
        limits: SubscriberLimits | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.flags = AckFlags(0)
        self._sink = sink
        self._locate_leader = locate_leader
        self._identity = identity
        self._credential = credential
        self._limits = limits or SubscriberLimits()
        self._uniform = uniform
        self._reseed: str | None = None
        self._connecting: asyncio.Timeout | None = None
        self._receiver: Receiver | None = None
        self._woken = asyncio.Event()
        self._elsewhere = False  # another leader became known while this attempt or connection lasted
        self._tally = Tally()
        self._url: str | None = None
        self._last_error: str | None = None

    @property
    def link(self) -> Link:
        receiver = self._receiver
        if receiver is not None and (receiver.is_streaming or receiver.is_seeding):
            return Link.STREAMING if receiver.is_streaming else Link.SEEDING
        return Link.CONNECTING if self._connecting is not None else Link.SEARCHING

    def statistics(self) -> SubscriberStatistics:
        tally = self._tally
        return SubscriberStatistics(
            link=self.link,
            leader_url=self._url,
            leader_name=tally.leader_name,
            term=tally.term,
            connections=tally.connections,
            failures=tally.failures,
            seeds=tally.seeds,
            mismatches=tally.mismatches,
            frames=tally.frames,
            received_bytes=tally.received_bytes,
            last_error=self._last_error,
        )

    def wake(self, leader_url: str | None = None) -> None:
        """There is news of the leader: do not wait for the end of a pause, nor for an answer from anywhere but
        `leader_url`, where it serves now (None: not known). The old one may be stopped, its port still open."""
        self._woken.set()
        self._elsewhere = leader_url not in (None, self._url)
        attempt = self._connecting
        if attempt is not None and not attempt.expired() and self._elsewhere:
            attempt.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> NoReturn:
        """Follow until cancelled. Raises StorageFailed when this node's disk fails; everything else is tried again."""
        tries = 0
        while True:
            welcomes = self._tally.connections
            tries += 1
            try:
                await self._follow_once()
            except StorageFailed:
                raise
            except HistoryMismatch as error:
                self._on_mismatch(error)
            except (WalshipError, OSError) as error:
                self._count(error)
                _log.warning("lose leader url=%s: %s", self._url, self._last_error)
                # A connection that was good and broke is tried again at once. One that ends in a refusal or in bad
                # data would end so again, maybe after a whole snapshot.
                if self._tally.connections > welcomes and isinstance(error, Unavailable | OSError):
                    tries = 0
            if not self._elsewhere:
                await self._pause(self._pause_seconds(tries))

    async def _pause(self, seconds: float) -> None:
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()

    def _pause_seconds(self, tries: int) -> float:
        """Full jitter: a whole cluster that lost its leader must not come back in step."""
        limits = self._limits
        doublings = min(max(tries - 1, 0), 16)
        return self._uniform(0, min(limits.backoff_most_seconds, limits.backoff_first_seconds * 2**doublings))

    def _count(self, error: Exception) -> None:
        self._tally.failures += 1
        self._last_error = f"{type(error).__name__}: {error}"

    def _on_mismatch(self, error: HistoryMismatch) -> None:
        self._count(error)
        self._tally.mismatches += 1
        self._reseed = str(error)[:1000]
        _log.error("stop following leader=%s: %s", self._url, error)
        self._sink.mismatch(error)

    async def _follow_once(self) -> None:
        self._elsewhere = False
        leader = await self._locate_leader()
        if leader is None:
            return
        self._url, term = leader
        self._elsewhere = False  # what was heard until here is what was located
        if term < self._sink.promised:
            raise Fenced(f"the record names a leader of term {term}, but term {self._sink.promised} is promised here")
        reader, writer = await self._connect(self._url)
        self._receiver = receiver = Receiver(
            self._sink,
            self._identity,
            reader,
            writer,
            limits=self._limits,
            tally=self._tally,
            flags=lambda: self.flags,
            reseed=self._reseed,
        )
        try:
            await receiver.run()
        finally:
            if receiver.seeded:
                self._reseed = None
            self._receiver = None
            hang_up(writer)

    async def _connect(self, url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises Unavailable also when `wake` named another leader meanwhile."""
        try:
            async with asyncio.timeout(None) as self._connecting:
                return await connect(url, timeout_seconds=self._limits.connect_seconds, credential=self._credential)
        except TimeoutError as error:
            raise Unavailable(f"{url} did not answer before another node was known to lead") from error
        finally:
            self._connecting = None
