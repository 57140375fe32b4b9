"""One follower's connection on the leader: snapshot if needed, then frames as they become durable, acks back.

Three loops in one task group. `_ship` writes what the follower lacks, from memory while it keeps up, from the log
while it catches up. `_beat` says ten times a second where the leader stands. `_listen` takes the acks. Every write
to the socket is whole records, so a heartbeat may be written between any two of them, also between the parts of a
frame of 500 MB or while a disk is slow.

Bounds: one batch of BATCH_BYTES in flight (the socket's buffer must drain before the next is made), so a follower
that does not read costs this much memory, for at most `silence_seconds`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from walship.engine.log import FrameRef, Log
from walship.engine.watermarks import Watermarks
from walship.errors import HistoryMismatch, ProtocolViolation, Unavailable
from walship.formats.checksum import PageChecksums
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position
from walship.formats.record import RECORD_HEADER_SIZE, RECORD_OVERHEAD
from walship.replication.catchup import FromLog, FromSnapshot
from walship.replication.comparison import Comparison
from walship.replication.hangup import abort, hang_up, send
from walship.replication.holds import Holds
from walship.replication.messages import (
    MAX_HISTORY,
    Ack,
    Goodbye,
    GoodbyeReason,
    Heartbeat,
    Hello,
    StreamSource,
    Welcome,
)
from walship.replication.protocol import LeaderProtocol, PagesReceived, Phase
from walship.replication.rounds import Rounds
from walship.replication.tail import Tail
from walship.replication.threads import in_thread

__all__ = ["BATCH_BYTES", "Ended", "Feed", "FeedLimits", "FollowerStatistics", "SnapshotStream", "Source"]

BATCH_BYTES = 4 << 20
_READ_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
_QUIET_BYTES = 1 << 20  # with more than this waiting in the socket's buffer a heartbeat would only come late


class SnapshotStream(Protocol):
    """A snapshot that is open: what it is of, and its LTX bytes. `chunks` blocks and is run in a thread."""

    @property
    def header(self) -> SnapshotHeader: ...

    @property
    def chunks(self) -> Iterator[bytes]: ...


class Source(Protocol):
    """What a publisher needs of its node. All of it is called on the loop."""

    @property
    def cluster(self) -> bytes: ...

    @property
    def node_id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Log: ...

    @property
    def watermarks(self) -> Watermarks: ...

    @property
    def term(self) -> int:
        """The term this node leads in now, 0 when it does not lead."""
        ...

    @property
    def leader_url(self) -> str | None:
        """Where the leader is, when this node is none."""
        ...

    def open_snapshot(self, have: PageChecksums | None = None) -> AbstractAsyncContextManager[SnapshotStream]:
        """Pin the database and the log at one position. With `have` the snapshot may be sparse: only the pages that
        differ from those."""
        ...

    def record_ack(self, node_id: str, durable: Position, applied: Position, *, voter: bool) -> None:
        """Learn what a follower holds. Both positions are in this leader's history."""
        ...

    def forget(self, node_id: str) -> None:
        """Learn that the connection is gone."""
        ...


@dataclass(frozen=True, slots=True)
class FeedLimits:
    """`heartbeat_seconds` must stay well below a follower's silence bound of 1 s."""

    heartbeat_seconds: float = 0.1
    silence_seconds: float = 30.0
    hello_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class FollowerStatistics:
    """One follower, as `/status` shows it.

    `lag_txids` counts commits that are durable here and not there; `lag_bytes` the frame bytes sent and not yet
    acknowledged as durable. `phase` says whether it streams or is being seeded.
    """

    name: str
    node_id: str
    voter: bool
    phase: str
    sent: Position
    durable: Position
    applied: Position
    lag_txids: int
    lag_bytes: int
    sent_bytes: int
    connected_seconds: float
    last_ack_age_seconds: float
    flags: int


class Ended(Exception):
    """Ends the task group of a feed; never leaves this package."""


class Feed:
    """Serves one welcomed follower until its connection ends.

    Args:
        prompt_acked: tell the follower at once when the acked position moves, not with the next heartbeat: it waits
            for that before it applies (R15).
    """

    def __init__(
        self,
        source: Source,
        hello: Hello,
        protocol: LeaderProtocol,
        writer: asyncio.StreamWriter,
        *,
        tail: Tail,
        holds: Holds,
        rounds: Rounds,
        limits: FeedLimits,
        prompt_acked: bool,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.hello = hello
        self.sent = self.durable = self.applied = Position(0, 0)
        self.sent_bytes = self.batches_from_tail = self.batches_from_log = 0
        self._source = source
        self._term = source.term
        self._protocol = protocol
        self._writer = writer
        self._tail = tail
        self._holds = holds
        self._rounds = rounds
        self._limits = limits
        self._prompt_acked = prompt_acked
        self._clock = clock
        self._wall_clock = wall_clock
        self._wake = asyncio.Event()
        self._installed = asyncio.Event()
        self._comparison = Comparison()
        self._compared = asyncio.Event()
        self._told_acked = Position(0, 0)
        self._unacked: deque[tuple[Position, int]] = deque()  # (end of a batch, sent_bytes by then)
        self._acked_bytes = 0
        self._flags = 0
        self._since = self._last_ack = clock()
        self.stopped_by_us = False

    # what the publisher does with it

    def wake(self) -> None:
        """Marks have moved: look for something to ship."""
        self._wake.set()

    def stop(self, reason: GoodbyeReason, message: str) -> None:
        """Say goodbye and close. What is in the socket's buffer is still sent. Idempotent."""
        self.stopped_by_us = True
        if self._protocol.phase is not Phase.CLOSED:
            send(self._writer, self._protocol.send_goodbye(Goodbye(reason, message)))
        hang_up(self._writer)
        self._wake.set()

    def beat(self) -> None:
        """Say at once where the leader stands, unless that would only queue up behind a lot of frames."""
        quiet = self._writer.transport.get_write_buffer_size() <= _QUIET_BYTES
        if quiet and self._protocol.phase is not Phase.CLOSED:
            send(self._writer, self._heartbeat())

    def abort(self) -> None:
        """Close at once; what is in the socket's buffer is lost."""
        abort(self._writer)

    def statistics(self) -> FollowerStatistics:
        now = self._clock()
        return FollowerStatistics(
            name=self.hello.name,
            node_id=self.hello.node_id,
            voter=self.hello.voter,
            phase=self._protocol.phase.name.lower(),
            sent=self.sent,
            durable=self.durable,
            applied=self.applied,
            lag_txids=max(self._source.watermarks.durable.txid - self.durable.txid, 0),
            lag_bytes=self.sent_bytes - self._acked_bytes,
            sent_bytes=self.sent_bytes,
            connected_seconds=now - self._since,
            last_ack_age_seconds=now - self._last_ack,
            flags=self._flags,
        )

    async def run(self, reader: asyncio.StreamReader, answer: FromLog | FromSnapshot) -> None:
        """Serve until the connection ends. Raises an exception group; `Ended` in it is a clean end."""
        send(self._writer, self._protocol.send_welcome(self._welcome(answer)) + self._heartbeat())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat(), name=f"heartbeats to {self.hello.name}")
            group.create_task(self._ship(answer), name=f"frames to {self.hello.name}")
            await self._listen(reader)  # in the body: see raise_if_cancelled

    def _welcome(self, answer: FromLog | FromSnapshot) -> Welcome:
        source = self._source
        return Welcome(
            node_id=source.node_id,
            name=source.name,
            term=self._term,
            source=_stream_source(answer),
            position=answer.position if isinstance(answer, FromLog) else source.watermarks.durable,
            keep_from=self._holds.keep_from(),
            history=_history(source)[-MAX_HISTORY:],
            acked=source.watermarks.acked,
            why=answer.why if isinstance(answer, FromSnapshot) else "",
            differs=isinstance(answer, FromSnapshot) and answer.differs,
        )

    # the three loops

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                async with asyncio.timeout(self._limits.silence_seconds):
                    data = await reader.read(_READ_BYTES)
            except TimeoutError as error:
                raise Unavailable(f"no ack in {self._limits.silence_seconds:g} s; the connection is closed") from error
            if not data:
                raise Ended("the follower closed the connection")
            ack: Ack | None = None
            for event in self._protocol.receive_data(data):
                if isinstance(event, Goodbye):
                    raise Ended(str(event))
                if isinstance(event, PagesReceived):
                    self._comparison.receive(event.data)
                    if self._comparison.complete:
                        self._compared.set()
                if isinstance(event, Ack):
                    ack = event  # the latest wins; acks only grow
            if ack is not None:
                self._on_ack(ack)

    def _on_ack(self, ack: Ack) -> None:
        self._last_ack = self._clock()
        self._flags = int(ack.flags)
        if ack.is_seeding:
            self._holds.alive(self.hello.node_id)
            return
        if _key(ack.durable) > _key(self.sent):
            raise ProtocolViolation(f"{ack}, but only {self.sent} was sent; the ack is not counted")
        self._installed.set()
        self.durable, self.applied = ack.durable, ack.applied
        while self._unacked and _key(self._unacked[0][0]) <= _key(ack.durable):
            self._acked_bytes = self._unacked.popleft()[1]
        self._holds.progress(self.hello.node_id, ack.durable)
        self._source.record_ack(self.hello.node_id, ack.durable, ack.applied, voter=self.hello.voter)
        if self.hello.voter:
            self._rounds.echoed(self.hello.node_id, ack.round, ack.durable)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._limits.heartbeat_seconds)
            self._check_term()
            if self._protocol.phase is Phase.CLOSED:
                raise Ended("goodbye was said")
            self.beat()

    async def _ship(self, answer: FromLog | FromSnapshot) -> None:
        if isinstance(answer, FromSnapshot):
            await self._seed(sparse=answer.sparse)
        else:
            self.sent = answer.position
        while self._protocol.phase is Phase.STREAMING:
            self._wake.clear()
            self._check_term()
            durable = self._source.watermarks.durable
            batch = self._from_tail(durable)
            if not batch and _key(self.sent) < _key(durable) and await self._from_log(durable):
                continue
            if self._prompt_acked and self._source.watermarks.acked != self._told_acked:
                batch.append(self._heartbeat())
            if batch:
                await self._write(b"".join(batch))
            else:
                await self._wake.wait()
        raise Ended("goodbye was said")

    # shipping

    def _from_tail(self, durable: Position) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        position = self.sent
        while size < BATCH_BYTES and (entry := self._tail.after(position)) is not None:
            ref, data = entry
            if _key(ref.header.position) > _key(durable):
                break
            batch.append(self._protocol.send_frames(data))
            size += len(data)
            position = ref.header.position
        if batch:
            self.batches_from_tail += 1
            self._count(position, size)
        return batch

    async def _from_log(self, durable: Position) -> bool:
        """Ship what the log has after `sent`; False when it has nothing (the frame is still being appended)."""
        try:
            batch, last = await in_thread(_read_batch, self._source.log, self.sent, durable)
            if last is None:
                return False
            self.batches_from_log += 1
            if batch:
                self._count(last.header.position, len(batch))
                await self._write(self._protocol.send_frames(batch))
            else:
                await self._stream(last)
        except HistoryMismatch as error:
            message = f"the log no longer has what follows {self.sent}; connect again for a snapshot ({error})"
            self.stop(GoodbyeReason.LOG_TRUNCATED, message[:1000])
            raise Ended(message) from error
        return True

    async def _stream(self, ref: FrameRef) -> None:
        chunks = iter(self._source.log.chunks(ref, _CHUNK_BYTES))
        pending = bytearray()
        while (chunk := await in_thread(next, chunks, None)) is not None:
            pending += chunk
            whole = whole_records(pending)
            if whole:
                await self._write(self._protocol.send_frames(bytes(pending[:whole])))
                del pending[:whole]
        self._count(ref.header.position, ref.size_bytes)

    def _count(self, position: Position, size_bytes: int) -> None:
        self.sent = position
        self.sent_bytes += size_bytes
        self._unacked.append((position, self.sent_bytes))

    async def _seed(self, *, sparse: bool) -> None:
        have: PageChecksums | None = None
        if sparse:
            await self._compared.wait()
            have = await in_thread(self._comparison.result)
        async with self._source.open_snapshot(have) as snapshot:
            have = None
            header = snapshot.header
            self._holds.hold(self.hello, header.position)
            await self._write(self._protocol.send_snapshot_header(header))
            chunks = snapshot.chunks
            while (data := await in_thread(_next_bytes, chunks, _CHUNK_BYTES)) is not None:
                if records := self._protocol.send_snapshot_data(data):
                    await self._write(records)
                    self.sent_bytes += len(records)
            self.sent = header.position  # before the end goes out: the ack for it must not come as a surprise
            self._acked_bytes = self.sent_bytes
            await self._write(self._protocol.send_snapshot_end())
        # Installing takes as long as the database is large; its acks say that the follower lives.
        await self._installed.wait()

    async def _write(self, data: bytes) -> None:
        """Write, and wait until the socket's buffer has drained. Raises Unavailable when it does not move."""
        send(self._writer, data)
        transport = self._writer.transport
        while True:
            before = transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self._limits.silence_seconds):
                    return await self._writer.drain()
            except TimeoutError as error:
                if transport.get_write_buffer_size() >= before:
                    abort(self._writer)  # a close would wait for the buffer that nobody reads
                    raise Unavailable(
                        f"the follower read nothing for {self._limits.silence_seconds:g} s, {before} bytes wait; "
                        "the connection is closed, it may come back and catch up"
                    ) from error

    def _heartbeat(self) -> bytes:
        marks = self._source.watermarks
        self._told_acked = marks.acked
        return self._protocol.send_heartbeat(
            Heartbeat(
                tip=marks.durable,
                acked=self._told_acked,
                leader_time_ms=int(self._wall_clock() * 1000),
                keep_from=self._holds.keep_from(),
                monotonic_ms=int(self._clock() * 1000),
                round=self._rounds.number,
            )
        )

    def _check_term(self) -> None:
        if self._source.term != self._term:
            self.stop(GoodbyeReason.TERM_ENDED, f"this node no longer leads in term {self._term}")
            raise Ended("the term ended")


def _history(source: Source) -> tuple[tuple[int, int], ...]:
    """Where the terms in the leader's log began. Only of times that the log has forgotten other sources may speak: they
    know terms as well that left nothing in it, and by those a follower would think its orphans to be history."""
    logged = source.log.terms().starts()
    oldest = min([term for term, _ in logged], default=source.term + 1)
    return tuple(start for start in source.watermarks.history.starts() if start[0] < oldest) + logged


def _stream_source(answer: FromLog | FromSnapshot) -> StreamSource:
    if isinstance(answer, FromLog):
        return StreamSource.LOG
    return StreamSource.PAGES if answer.sparse else StreamSource.SNAPSHOT


def whole_records(data: bytearray) -> int:
    """Return how many bytes at the start of `data` are whole records."""
    end = 0
    while len(data) >= end + RECORD_HEADER_SIZE:
        size = RECORD_OVERHEAD + int.from_bytes(data[end + 4 : end + RECORD_HEADER_SIZE], "big")
        if len(data) < end + size:
            break
        end += size
    return end


def _read_batch(log: Log, position: Position, durable: Position) -> tuple[bytes, FrameRef | None]:
    """Read frames after `position` up to `durable`, about BATCH_BYTES of them, and say which was the last.

    No bytes when the first is larger than that: it is to be streamed. No frame when there is none yet.
    """
    batch: list[bytes] = []
    size = 0
    last: FrameRef | None = None
    for ref in log.frames_after(position):
        if _key(ref.header.position) > _key(durable) or (batch and size + ref.size_bytes > BATCH_BYTES):
            break
        last = ref
        if ref.size_bytes > BATCH_BYTES:
            break
        batch.append(log.read(ref))
        size += ref.size_bytes
    return b"".join(batch), last


def _next_bytes(chunks: Iterator[bytes], size_bytes: int) -> bytes | None:
    """Take chunks until there are `size_bytes`; None at the end."""
    taken: list[bytes] = []
    size = 0
    for chunk in chunks:
        taken.append(bytes(chunk))
        size += len(chunk)
        if size >= size_bytes:
            break
    return b"".join(taken) if taken else None


def _key(position: Position) -> tuple[int, int]:
    """The order of positions within one log (R11); between histories it means nothing."""
    return position.term, position.txid
