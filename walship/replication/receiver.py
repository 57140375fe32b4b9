"""One connection to the leader on the follower: hello, welcome, then whatever comes, into the sink.

Two loops in one task group. `_receive` reads and feeds the sink; when the sink's bounded queue is full it waits, the
socket fills and the leader stops: that is the back-pressure. Silence is counted only while it waits for bytes.
`_acknowledge` tells how far the sink is, the latest state only, and twice a second that this node lives.

Fencing (failover.md I3, I4): what the stream's term allows is checked again before each frame and each ack, because a
newer term may be promised over another connection at any moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from walship.errors import Fenced, HistoryMismatch, Refused, StorageFailed, Unavailable, WalshipError
from walship.formats.frame import FrameHeader, SnapshotHeader
from walship.formats.position import Position, Tip
from walship.replication.comparison import pieces
from walship.replication.hangup import send
from walship.replication.messages import (
    PROTOCOL,
    Ack,
    AckFlags,
    Goodbye,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Refusal,
    Welcome,
)
from walship.replication.protocol import (
    FollowerProtocol,
    FrameBegan,
    FrameEnded,
    FramePartReceived,
    FrameReceived,
    Phase,
    SnapshotBegan,
    SnapshotEnded,
    SnapshotPartReceived,
)
from walship.replication.threads import in_thread, raise_if_cancelled, to_its_end

__all__ = ["Identity", "Receiver", "Seed", "Sink", "SubscriberLimits", "Tally"]

_READ_BYTES = 256 << 10
_OVERSLEPT = 1.5  # a timeout that fires this much late says more about our own loop than about the leader
_NOWHERE = Position(0, 0)


class Seed(Protocol):
    """A snapshot being taken. Either `install` or `abort` is called at the end, once."""

    async def write(self, ltx: bytes) -> None:
        """Take the next LTX bytes; waits when the disk is slower than the network. Never cancelled in the middle."""
        ...

    async def install(self) -> None:
        """Verify what was written, then replace the database and the log. Raises CorruptData: nothing was replaced.

        Never cancelled in the middle, and never followed by `abort`: what it leaves behind when it fails is its own.
        """
        ...

    async def abort(self) -> None:
        """Throw away what was written; the old state stays."""
        ...


class Sink(Protocol):
    """What a subscriber needs of its node. All of it is called on the loop, except `promise`."""

    @property
    def tip(self) -> Tip | None:
        """Where the log ends, frames included that are accepted but not yet durable; None: a snapshot is needed."""
        ...

    @property
    def promised(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def voter(self) -> bool: ...

    @property
    def comparable(self) -> bool:
        """True while the copy is sound, and small enough, to be compared page by page with the leader's."""
        ...

    async def page_checksums(self) -> bytes:
        """The page checksum record of what the database holds; it changes no more until this connection ends, or a
        seed is installed. Raises Unavailable."""
        ...

    def promise(self, term: int) -> None:
        """Make the promise durable before returning. Runs in a worker thread."""
        ...

    async def receive(self, header: FrameHeader, data: bytes) -> None:
        """Take a whole frame; waits while the queue is full."""
        ...

    async def begin(self, header: FrameHeader) -> None:
        """A large frame begins; its header record is `encode_record(FRAME_HEADER, header.to_body())`."""
        ...

    async def part(self, record: bytes) -> None: ...

    async def end(self, record: bytes) -> None: ...

    async def abandon(self) -> None:
        """The connection ended inside a large frame: forget what came of it."""
        ...

    def heard(self, *, tip: Position, acked: Position, leader_time_ms: int, keep_from: int) -> None:
        """Learn where the leader stands."""
        ...

    async def progress(self, after: tuple[Position, Position] | None) -> tuple[Position, Position]:
        """Wait until (durable, applied) differs from `after`, and return it. Must bear being cancelled."""
        ...

    async def seed(self, header: SnapshotHeader) -> Seed: ...

    def history(self, terms: list[tuple[int, int]], *, differs: bool) -> None:
        """A connection begins: learn where the terms of the leader's log began, and whether it says that this node's
        tip is not in its history."""
        ...

    def mismatch(self, error: HistoryMismatch) -> None:
        """Be loud: this node and the leader disagree about history."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is. `boot_nonce` is new in every process (R3)."""

    cluster: bytes
    node_id: str
    name: str
    boot_nonce: str


@dataclass(frozen=True, slots=True)
class SubscriberLimits:
    """`silence_seconds`: no byte for this long means that the leader is gone; heartbeats come every 0.1 s."""

    silence_seconds: float = 1.0
    connect_seconds: float = 2.0
    welcome_seconds: float = 5.0
    write_seconds: float = 5.0
    ack_seconds: float = 0.5
    backoff_first_seconds: float = 0.05
    backoff_most_seconds: float = 2.0


@dataclass(slots=True)
class Tally:
    """Counts over all connections; `leader_name` and `term` are of the newest welcome."""

    leader_name: str | None = None
    term: int = 0
    connections: int = 0
    failures: int = 0
    seeds: int = 0
    mismatches: int = 0
    frames: int = 0
    received_bytes: int = 0


class Receiver:
    """One connection. Make one, `run` it once.

    Args:
        reseed: why a snapshot is wanted although the sink has a log; None when the log is to be continued.
        flags: asked before each ack.
    """

    def __init__(
        self,
        sink: Sink,
        identity: Identity,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        limits: SubscriberLimits,
        tally: Tally,
        flags: Callable[[], AckFlags],
        reseed: str | None,
    ) -> None:
        tip = sink.tip
        hello = Hello(
            protocol=PROTOCOL,
            cluster=identity.cluster.hex(),
            node_id=identity.node_id,
            name=identity.name,
            boot_nonce=identity.boot_nonce,
            tip=tip if reseed is None else None,
            promised=sink.promised,
            voter=sink.voter,
            page_size=sink.page_size,
            reseed=reseed,
            comparable=sink.comparable,
        )
        self.seeded = False
        self._sink = sink
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._tally = tally
        self._flags = flags
        self._protocol = FollowerProtocol(hello, own=tip.position if tip is not None else None)
        self._welcomed = asyncio.Event()
        self._installed = asyncio.Event()
        self._seed: Seed | None = None
        self._in_frame = False
        self._heard = Heartbeat(_NOWHERE, _NOWHERE, 0, 0, 0)
        self._round = 0
        self._told: tuple[Position, Position] | None = None  # what the last ack said
        self._handlers: dict[type, Callable[[Any], Awaitable[None]]] = {
            FrameReceived: self._on_frame,
            Heartbeat: self._on_heartbeat,
            FrameBegan: self._on_frame_began,
            FramePartReceived: self._on_frame_part,
            FrameEnded: self._on_frame_ended,
            Welcome: self._on_welcome,
            Refusal: self._on_refusal,
            Goodbye: self._on_goodbye,
            SnapshotBegan: self._on_snapshot_began,
            SnapshotPartReceived: self._on_snapshot_part,
            SnapshotEnded: self._on_snapshot_ended,
        }

    @property
    def is_streaming(self) -> bool:
        """True while frames flow, or would if there were any."""
        return self._protocol.phase is Phase.STREAMING

    @property
    def is_seeding(self) -> bool:
        return self._protocol.phase in (Phase.COMPARING, Phase.SEEDING, Phase.SNAPSHOT, Phase.INSTALLING)

    async def run(self) -> None:
        """Talk until the connection ends; always ends by raising, the worst error when there are several.

        Raises StorageFailed, HistoryMismatch, Fenced, Refused, CorruptData, ProtocolViolation, Unavailable, OSError.
        """
        try:
            send(self._writer, self._protocol.send_hello())
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._acknowledge(), name="acks to the leader")
                    await self._receive()  # in the body: see raise_if_cancelled
            except BaseExceptionGroup as errors:
                raise_if_cancelled()
                raise _worst(errors) from None
        except asyncio.CancelledError:
            if self._protocol.phase is not Phase.CLOSED:
                send(self._writer, self._protocol.send_goodbye(Goodbye(GoodbyeReason.STOPPING, "the follower stops")))
            raise
        finally:
            if self._in_frame:
                await self._sink.abandon()
            if self._seed is not None:
                await self._seed.abort()

    # --- reading ----------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        handlers = self._handlers
        clock = asyncio.get_running_loop().time
        patience_seconds = self._limits.welcome_seconds
        while True:
            began = clock()
            try:
                async with asyncio.timeout(patience_seconds):
                    data = await self._reader.read(_READ_BYTES)
            except TimeoutError as error:
                if clock() - began > patience_seconds * _OVERSLEPT:
                    continue  # this process was held up; what the leader said meanwhile waits in the socket
                raise Unavailable(f"nothing was heard from the leader for {patience_seconds:g} s") from error
            if not data:
                raise Unavailable("the leader closed the connection")
            self._tally.received_bytes += len(data)
            for event in self._protocol.receive_data(data):
                await handlers[type(event)](event)
            if self._welcomed.is_set():
                patience_seconds = self._limits.silence_seconds

    async def _on_welcome(self, welcome: Welcome) -> None:
        if welcome.term > self._sink.promised:
            await in_thread(self._sink.promise, welcome.term)
        self._check_fence()
        self._sink.history(list(welcome.history), differs=welcome.differs)
        self._tally.connections += 1
        self._tally.leader_name, self._tally.term = welcome.name, welcome.term
        self._heard = Heartbeat(_NOWHERE, welcome.acked, 0, welcome.keep_from, 0)
        self._welcomed.set()

    async def _on_refusal(self, refusal: Refusal) -> None:
        raise Refused(refusal.reason.value, refusal.message)

    async def _on_goodbye(self, goodbye: Goodbye) -> None:
        raise Unavailable(f"the leader said {goodbye}")

    async def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._heard = heartbeat
        if heartbeat.round > self._round:
            self._echo(heartbeat.round)
        self._sink.heard(
            tip=heartbeat.tip,
            acked=heartbeat.acked,
            leader_time_ms=heartbeat.leader_time_ms,
            keep_from=heartbeat.keep_from,
        )

    async def _on_frame(self, event: FrameReceived) -> None:
        self._check_fence()
        self._tally.frames += 1
        await self._sink.receive(event.header, event.data)
        self._hear_of(event.header)

    async def _on_frame_began(self, event: FrameBegan) -> None:
        self._check_fence()
        self._in_frame = True
        await self._sink.begin(event.header)

    async def _on_frame_part(self, event: FramePartReceived) -> None:
        await self._sink.part(event.record)

    async def _on_frame_ended(self, event: FrameEnded) -> None:
        self._check_fence()
        self._tally.frames += 1
        await self._sink.end(event.record)
        self._in_frame = False
        self._hear_of(event.header)

    def _hear_of(self, header: FrameHeader) -> None:
        """Pass on what a frame says of the acked position, when it is news; a frame of the past says old things."""
        last = self._heard
        if not last.leader_time_ms or _key(header.acked) <= _key(last.acked):
            return
        tip = max(last.tip, header.position, key=_key)
        self._heard = Heartbeat(tip, header.acked, last.leader_time_ms, last.keep_from, last.monotonic_ms)
        self._sink.heard(tip=tip, acked=header.acked, leader_time_ms=last.leader_time_ms, keep_from=last.keep_from)

    # --- a snapshot -------------------------------------------------------------------------------------------

    async def _on_snapshot_began(self, event: SnapshotBegan) -> None:
        self._check_fence()
        self._tally.seeds += 1
        await to_its_end(self._begin_seed(event.header))

    async def _begin_seed(self, header: SnapshotHeader) -> None:
        self._seed = await self._sink.seed(header)

    async def _on_snapshot_part(self, event: SnapshotPartReceived) -> None:
        assert self._seed is not None
        # `abort` comes next when the connection ends: a write still under way would go to a descriptor closed by then.
        await to_its_end(self._seed.write(event.data))

    async def _on_snapshot_ended(self, event: SnapshotEnded) -> None:
        assert self._seed is not None
        self._check_fence()
        seed, self._seed = self._seed, None  # from here on the seed cleans up after itself: it may be half installed
        await to_its_end(self._install(seed))
        durable, applied = await self._sink.progress(None)
        self._check_fence()
        send(self._writer, self._protocol.send_installed(Ack(durable, applied, self._flags())))
        self._installed.set()

    async def _install(self, seed: Seed) -> None:
        await seed.install()
        self.seeded = True

    # --- acknowledging ----------------------------------------------------------------------------------------

    async def _acknowledge(self) -> None:
        await self._welcomed.wait()
        if self._protocol.phase is Phase.COMPARING:
            await self._send(self._protocol.send_ack(Ack.seeding()))
            for piece in pieces(await self._sink.page_checksums()):
                await self._send(self._protocol.send_pages(piece) + self._protocol.send_ack(Ack.seeding()))
        while self.is_seeding:
            await self._send(self._protocol.send_ack(Ack.seeding()))
            try:
                async with asyncio.timeout(self._limits.ack_seconds):
                    await self._installed.wait()
            except TimeoutError:
                continue
        while True:
            self._told = await self._progress(self._told)
            self._check_fence()
            await self._send(self._protocol.send_ack(Ack(*self._told, self._flags(), self._round)))

    def _echo(self, number: int) -> None:
        """Tell the leader at once that it was heard: a read waits for it. What is new besides has its own ack."""
        self._check_fence()
        self._round = number
        if self._told is not None and self.is_streaming:
            send(self._writer, self._protocol.send_ack(Ack(*self._told, self._flags(), number)))

    async def _progress(self, last: tuple[Position, Position] | None) -> tuple[Position, Position]:
        """Wait for news, but not longer than the leader may go without a word from us."""
        if last is None:
            return await self._sink.progress(None)
        try:
            async with asyncio.timeout(self._limits.ack_seconds):
                return await self._sink.progress(last)
        except TimeoutError:
            return last

    async def _send(self, data: bytes) -> None:
        send(self._writer, data)
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await self._writer.drain()
        except TimeoutError as error:
            raise Unavailable(f"the leader took no ack for {self._limits.write_seconds:g} s") from error

    def _check_fence(self) -> None:
        promised = self._sink.promised
        if promised > self._protocol.term:
            raise Fenced(f"term {promised} is promised; nothing of term {self._protocol.term} is taken or acknowledged")


def _worst(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that decides what happens next: a failed disk, then a broken history, else the first."""
    errors = group.exceptions
    for error in errors:
        if not isinstance(error, WalshipError | OSError):
            return group if len(errors) > 1 else error
    return next(
        (error for kind in (StorageFailed, HistoryMismatch, Fenced) for error in errors if isinstance(error, kind)),
        errors[0],
    )


def _key(position: Position) -> tuple[int, int]:
    """The order of positions within one leader's history."""
    return position.term, position.txid
