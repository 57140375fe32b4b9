"""The leader's end of replication: greets followers, serves each by a `Feed`, keeps the log for those who need it.

Nothing is shipped before the leader's own fdatasync: feeds go as far as `watermarks.durable` and no further. The
engine offers each frame after it appended it to the log; a feed that keeps up ships those very bytes.

Resource handling: `serve` owns the connection it is given and closes it. `run` must be alive for feeds to wake up;
`close` ends all connections and waits for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from walship.engine.log import FrameRef
from walship.errors import CorruptData, ProtocolViolation, StorageFailed, Unavailable, WalshipError
from walship.formats.position import Position
from walship.replication.catchup import FromLog, FromSnapshot, LeaderView, plan
from walship.replication.feed import (
    BATCH_BYTES,
    Ended,
    Feed,
    FeedLimits,
    FollowerStatistics,
    SnapshotStream,
    Source,
)
from walship.replication.hangup import LINGER_SECONDS, hang_up, send
from walship.replication.holds import Holds
from walship.replication.messages import GoodbyeReason, Hello, Refusal, RefusalReason
from walship.replication.protocol import LeaderProtocol
from walship.replication.rounds import Rounds
from walship.replication.tail import Tail
from walship.replication.threads import raise_if_cancelled

__all__ = [
    "FeedLimits",
    "FollowerStatistics",
    "Publisher",
    "PublisherStatistics",
    "SnapshotStream",
    "Source",
    "turn_away",
]

TAIL_BYTES = 8 << 20  # newest frames kept in memory: several group commits for a follower that is a moment behind
MAX_FOLLOWERS = 64
_log = logging.getLogger("walship.publisher")


@dataclass(frozen=True, slots=True)
class PublisherStatistics:
    """`refusals` counts refused hellos by reason; `ended` the connections that ended, by how."""

    followers: tuple[FollowerStatistics, ...]
    keep_from: int
    tail_bytes: int
    seeds: int
    refusals: dict[str, int]
    ended: dict[str, int]


class Publisher:
    """Serves the followers of one leader.

    Args:
        prompt_acked: set when followers wait for the acked position before they apply (n >= 2, R15). Non-voters
            always do.
        acks: acknowledgments that the cluster's rule asks for; so many voters must prove a read index.
        voters: their names; None: whoever says so in its hello.
    """

    def __init__(
        self,
        source: Source,
        *,
        limits: FeedLimits | None = None,
        max_followers: int = MAX_FOLLOWERS,
        tail_bytes: int = TAIL_BYTES,
        prompt_acked: bool = False,
        acks: int = 0,
        voters: frozenset[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        self._limits = limits or FeedLimits()
        self._max_followers = max_followers
        self._tail = Tail(tail_bytes)
        self._prompt_acked = prompt_acked
        self._voters = voters
        self._clock = clock
        self._wall_clock = wall_clock
        self._holds = Holds(source.log, lambda: source.watermarks.durable, clock)
        self._feeds: dict[str, Feed] = {}
        self._rounds = Rounds(acks, durable=lambda: source.watermarks.durable, announce=self._announce)
        self._draining = False
        self._open = 0  # connections in `serve`, greeted or not
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._seeds = 0
        self._refusals: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()

    # called by the engine and the node, on the loop

    def offer(self, ref: FrameRef, data: bytes) -> None:
        """Keep a frame that was just appended to the log: `data` is all its records, as encoded.

        Only frames up to the batch bound are worth the memory; larger ones need not be offered.
        """
        if len(data) <= BATCH_BYTES:
            self._tail.offer(ref, data)

    def wake(self) -> None:
        """Marks have moved. To be given to `Watermarks.on_change`; cheap, and safe to call for nothing."""
        for feed in self._feeds.values():
            feed.wake()

    def require(self, acks: int) -> None:
        """So many voters must prove a read index, and with 2 or more followers wait for the acked position (R15)."""
        self._rounds.require(acks)
        self._prompt_acked = acks >= 2

    def set_rule(self, acks: int, voters: frozenset[str]) -> None:
        """Voters or acks have changed. Who counts otherwise than before is asked to connect again."""
        prompt = self._prompt_acked
        self.require(acks)
        self._voters = voters
        for feed in tuple(self._feeds.values()):
            if prompt != self._prompt_acked or feed.hello.voter != (feed.hello.name in voters):
                feed.stop(GoodbyeReason.REPLACED, "the voters of the cluster have changed")

    def name_of(self, node_id: str) -> str | None:
        """The name of a follower that is connected now."""
        feed = self._feeds.get(node_id)
        return None if feed is None else feed.hello.name

    async def read_index(self, timeout_seconds: float) -> Position:
        """A position for linearizable reads, from a leader proven to lead (R18). Raises as `Rounds.index`."""
        return await self._rounds.index(timeout_seconds)

    def _announce(self) -> None:
        for feed in self._feeds.values():
            feed.beat()

    async def run(self) -> None:
        """Wake the feeds whenever the watermarks move, until cancelled; then close all connections."""
        end = self._source.watermarks.on_change(self.wake)
        try:
            await asyncio.Event().wait()
        finally:
            end()
            await self.close()

    def keep_from(self) -> int:
        """The txid after which the log must be kept for the slowest known follower (R9)."""
        return self._holds.keep_from()

    def forget(self, node_id: str) -> None:
        """Stop keeping the log for a node that left the cluster."""
        self._holds.forget(node_id)

    def durable(self, node_id: str) -> Position | None:
        """What a connected follower has acknowledged as durable; None when it is not connected."""
        feed = self._feeds.get(node_id)
        return None if feed is None else feed.durable

    def statistics(self) -> PublisherStatistics:
        return PublisherStatistics(
            followers=tuple(feed.statistics() for feed in self._feeds.values()),
            keep_from=self.keep_from(),
            tail_bytes=self._tail.size_bytes,
            seeds=self._seeds,
            refusals=dict(self._refusals),
            ended=dict(self._ended),
        )

    async def close(self, *, timeout_seconds: float = LINGER_SECONDS) -> None:
        """Refuse new followers, say goodbye to all, and wait for their connections to end. Idempotent."""
        self._draining = True
        self._rounds.end()
        for feed in tuple(self._feeds.values()):
            feed.stop(GoodbyeReason.STOPPING, f"{self._source.name} is shutting down")
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._all_closed.wait()
        except TimeoutError:
            for feed in tuple(self._feeds.values()):
                _log.warning("close aborts connection follower=%s: it did not end in time", feed.hello.name)
                feed.abort()

    # one connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one follower, from its hello on, until the connection ends; then close it.

        Returns normally however the connection ends; only cancellation goes to the caller.
        """
        self._open += 1
        self._all_closed.clear()
        try:
            await self._serve(reader, writer)
        finally:
            hang_up(writer)
            self._open -= 1
            if not self._open:
                self._all_closed.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = LeaderProtocol()
        try:
            hello = await self._hello(reader, protocol)
            answer = plan(hello, self._view())
            if isinstance(answer, Refusal):
                self._refusals[answer.reason.value] += 1
                _log.warning("refuse follower=%s reason=%s: %s", hello.name, answer.reason.value, answer.message)
                await self._say_no(writer, protocol, answer)
                return
        except (WalshipError, OSError, Ended) as error:
            self._ended["before hello"] += 1
            _log.info("drop connection before a hello was understood: %s", error)
            return
        await self._feed(hello, answer, protocol, reader, writer)

    async def _hello(self, reader: asyncio.StreamReader, protocol: LeaderProtocol) -> Hello:
        try:
            async with asyncio.timeout(self._limits.hello_seconds):
                while data := await reader.read(64 << 10):
                    for event in protocol.receive_data(data):
                        if isinstance(event, Hello):
                            return event
                        raise ProtocolViolation(f"{event} came before a hello")
        except TimeoutError as error:
            raise Unavailable(f"no hello in {self._limits.hello_seconds:g} s") from error
        raise Ended("closed before a hello")

    async def _say_no(self, writer: asyncio.StreamWriter, protocol: LeaderProtocol, refusal: Refusal) -> None:
        send(writer, protocol.send_refusal(refusal))
        async with asyncio.timeout(self._limits.hello_seconds):
            await writer.drain()

    def _view(self) -> LeaderView:
        source = self._source
        return LeaderView(
            cluster=source.cluster.hex(),
            term=source.term,
            log=source.log,
            page_size=source.log.page_size,
            leader_url=source.leader_url,
            connected={node_id: feed.hello.boot_nonce for node_id, feed in self._feeds.items()},
            room=len(self._feeds) < self._max_followers,
            draining=self._draining,
        )

    async def _feed(
        self,
        hello: Hello,
        answer: FromLog | FromSnapshot,
        protocol: LeaderProtocol,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self._voters is not None:  # a follower may not have heard of a change yet
            hello = dataclasses.replace(hello, voter=hello.name in self._voters)
        feed = Feed(
            self._source,
            hello,
            protocol,
            writer,
            tail=self._tail,
            holds=self._holds,
            rounds=self._rounds,
            limits=self._limits,
            prompt_acked=self._prompt_acked or not hello.voter,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )
        former = self._feeds.get(hello.node_id)
        if former is not None:  # the same process, so the former connection is one that only we believe in
            former.stop(GoodbyeReason.REPLACED, "the follower connected again")
        self._feeds[hello.node_id] = feed
        self._holds.arrived(hello)
        self._seeds += isinstance(answer, FromSnapshot)
        _log.info("attach follower=%s voter=%s: %s; %s", hello.name, hello.voter, hello, answer)
        try:
            try:
                await feed.run(reader, answer)
            except BaseExceptionGroup as group:
                self._judge(feed, group)
                raise_if_cancelled()
        except asyncio.CancelledError:
            feed.stop(GoodbyeReason.STOPPING, f"{self._source.name} is shutting down")
            raise
        finally:
            if self._feeds.get(hello.node_id) is feed:
                del self._feeds[hello.node_id]
                self._holds.left(hello.node_id)
                self._rounds.forget(hello.node_id)
                self._source.forget(hello.node_id)

    def _judge(self, feed: Feed, group: BaseExceptionGroup[BaseException]) -> None:
        """Log how a connection ended. Raises the group when it holds an error that is not ours to expect."""
        if group.subgroup(lambda error: not isinstance(error, Ended | WalshipError | OSError | BaseExceptionGroup)):
            raise group
        errors = [error for error in group.exceptions if not isinstance(error, Ended)]
        if not errors or feed.stopped_by_us:
            self._ended["closed"] += 1
            _log.info("detach follower=%s durable=%s: %s", feed.hello.name, feed.durable, group.exceptions[0])
            return
        self._ended["failed"] += 1
        ours = isinstance(errors[0], CorruptData | StorageFailed | ProtocolViolation)
        _log.log(
            logging.ERROR if ours else logging.WARNING,
            "detach follower=%s durable=%s: %s: %s",
            feed.hello.name,
            feed.durable,
            type(errors[0]).__name__,
            errors[0],
        )


async def turn_away(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: str, leader_url: str | None
) -> None:
    """Answer a follower's hello on a node that does not lead: it learns who does, if that is known here."""
    protocol = LeaderProtocol()
    try:
        async with asyncio.timeout(FeedLimits().hello_seconds):
            while data := await reader.read(64 << 10):
                if any(isinstance(event, Hello) for event in protocol.receive_data(data)):
                    send(writer, protocol.send_refusal(Refusal(RefusalReason.NOT_LEADER, message, leader_url)))
                    await writer.drain()
                    return
    except (WalshipError, OSError) as error:  # TimeoutError is one
        _log.info("drop connection before a hello was understood: %s", error)
    finally:
        hang_up(writer)
