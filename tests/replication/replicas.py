"""A leader and followers for tests: real SQLite commits, logs and sockets, the real publisher and subscriber.

What the engine will do with the -wal is done here the slow way: a rollback-journal database, whose file is compared
page by page after each commit. What the engine will do when it applies is done by replaying the follower's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw

from walship.engine.intake import Intake
from walship.engine.log import FrameRef, Log, LogLimits
from walship.engine.watermarks import Watermarks
from walship.errors import CorruptDatabase, HistoryMismatch
from walship.formats.checksum import PageChecksums
from walship.formats.frame import (
    FrameEncoder,
    FrameFlags,
    FrameHeader,
    SnapshotHeader,
    encode_frame,
)
from walship.formats.ltx import LtxDecoder, LtxHeader, decode, encode
from walship.formats.position import Position, TermHistory, Tip
from walship.replication.publisher import FeedLimits, Publisher
from walship.replication.subscriber import Identity, Subscriber, SubscriberLimits

CLUSTER = bytes(range(16))
PAGE_SIZE = 4096
LIMITS = LogLimits(max_bytes=1 << 30)
NOWHERE = Position(0, 0)


class Database:
    """A real SQLite database whose commits come out as (pages, commit)."""

    def __init__(self, path: Path) -> None:
        self.connection = apsw.Connection(str(path))
        self.connection.execute(f"PRAGMA page_size={PAGE_SIZE}; PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY")
        self.path = path
        self.sums = PageChecksums(PAGE_SIZE)
        self.pages: dict[int, bytes] = {}
        self.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, body BLOB)")

    def commit(self, sql: str) -> dict[int, bytes]:
        self.connection.execute(sql)
        data = self.path.read_bytes()
        now = {at // PAGE_SIZE + 1: data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE)}
        changed = {pgno: page for pgno, page in now.items() if self.pages.get(pgno) != page}
        self.pages = now
        self.sums.apply(changed.items(), len(now))
        return changed


class Writer:
    """Turns commits into frames that extend `tip`."""

    def __init__(self, directory: Path, *, term: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.database = Database(directory / "leader.db")
        self.term = term
        self.acked = NOWHERE
        self.tip = Tip(Position(term, 1), self.database.sums.rolling, len(self.database.pages))

    def frame(self, size_bytes: int = 2000) -> tuple[FrameHeader, bytes]:
        """One commit: (header, LTX payload)."""
        pages = self.database.commit(f"INSERT INTO t(body) VALUES (randomblob({size_bytes}))")
        previous = self.tip
        txid = previous.position.txid + 1
        commit = len(self.database.pages)
        header = self._header(FrameFlags(0), previous, txid, self.database.sums.rolling, commit)
        self.tip = header.tip
        return header, encode(LtxHeader(PAGE_SIZE, commit, txid, txid), sorted(pages.items()))

    def term_start(self, term: int) -> FrameHeader:
        self.term = term
        previous = self.tip
        header = self._header(
            FrameFlags.TERM_START, previous, previous.position.txid, previous.checksum, previous.commit
        )
        self.tip = header.tip
        return header

    def _header(self, flags: FrameFlags, previous: Tip, txid: int, checksum: int, commit: int) -> FrameHeader:
        return FrameHeader(
            flags=flags,
            cluster=CLUSTER,
            database=1,
            term=self.term,
            min_txid=previous.position.txid + 1,
            max_txid=txid,
            previous=previous.position,
            previous_checksum=previous.checksum,
            checksum=checksum,
            commit=commit,
            page_size=PAGE_SIZE,
            time_ms=1000 + txid,
            acked=self.acked,
        )

    def snapshot(self) -> tuple[SnapshotHeader, bytes]:
        """The whole database now: (header, LTX)."""
        position, commit = self.tip.position, len(self.database.pages)
        ltx = encode(LtxHeader(PAGE_SIZE, commit, 1, position.txid), sorted(self.database.pages.items()))
        return SnapshotHeader(CLUSTER, 1, position, self.tip.checksum, commit, PAGE_SIZE, 1000, Position(0, 0)), ltx


@dataclass
class OpenSnapshot:
    header: SnapshotHeader
    chunks: Iterator[bytes]


class Leader:
    """A publisher with all around it. Is the publisher's `Source`."""

    def __init__(self, directory: Path, *, term: int = 1, log_limits: LogLimits = LIMITS, **more: object) -> None:
        self.writer = Writer(directory, term=term)
        self.cluster, self.node_id, self.name = CLUSTER, "aa" * 16, "north"
        self.term = term
        self.leader_url: str | None = None
        self.log = Log.open(directory / "log", cluster=CLUSTER, base=self.writer.tip, limits=log_limits, **more)  # type: ignore[arg-type]
        self.watermarks = Watermarks(self.log.tip.position, TermHistory([(term, 0)]))
        self.acks: dict[str, tuple[Position, Position, bool]] = {}
        self.all_acks: list[Position] = []
        self.forgotten: list[str] = []
        self.snapshots_opened = 0
        self.hold_chunks_after: int | None = None
        self.chunk_gate = threading.Event()
        self.connections: list[asyncio.StreamWriter] = []
        self.url = ""

    # what Source asks

    @contextlib.asynccontextmanager
    async def open_snapshot(self, have: PageChecksums | None = None) -> AsyncIterator[OpenSnapshot]:
        self.snapshots_opened += 1
        header, ltx = self.writer.snapshot()
        with self.log.pin(header.position):
            yield OpenSnapshot(header, self._chunks(ltx))

    def _chunks(self, ltx: bytes) -> Iterator[bytes]:
        for number, at in enumerate(range(0, len(ltx), 200_000)):
            if self.hold_chunks_after is not None and number >= self.hold_chunks_after:
                self.chunk_gate.wait(10)
            yield ltx[at : at + 200_000]

    def record_ack(self, node_id: str, durable: Position, applied: Position, *, voter: bool) -> None:
        self.acks[node_id] = (durable, applied, voter)
        self.all_acks.append(durable)

    def forget(self, node_id: str) -> None:
        self.forgotten.append(node_id)

    # what the engine would do

    def commit_before_serving(self, size_bytes: int) -> None:
        header, payload = self.writer.frame(size_bytes)
        self.watermarks.captured = self.log.append(header, encode_frame(header, payload)).header.position
        self.sync()

    def commit(self, size_bytes: int = 2000, *, offer: bool = True, durable: bool = True) -> FrameRef:
        header, payload = self.writer.frame(size_bytes)
        if len(payload) > 16 << 20:
            return self._commit_large(header, payload)
        data = encode_frame(header, payload)
        ref = self.log.append(header, data)
        if offer:
            self.publisher.offer(ref, data)
        self.watermarks.captured = ref.header.position
        if durable:
            self.sync()
        return ref

    def _commit_large(self, header: FrameHeader, payload: bytes) -> FrameRef:
        encoder = FrameEncoder(header)
        with self.log.begin(header) as appender:
            appender.write(encoder.header_record())
            for at in range(0, len(payload), 300_000):
                appender.write(encoder.part(payload[at : at + 300_000]))
            appender.write(encoder.end())
            ref = appender.commit()
        self.watermarks.captured = ref.header.position
        self.sync()
        return ref

    def start_term(self, term: int) -> None:
        header = self.writer.term_start(term)
        self.log.append(header, encode_frame(header))
        self.term = term
        self.watermarks.add_term(term, header.max_txid)
        self.sync()

    def sync(self) -> None:
        self.watermarks.durable = self.log.sync().position

    def cut_connections(self) -> None:
        for writer in self.connections:
            if not writer.transport.is_closing():
                writer.transport.abort()
        self.connections.clear()

    @contextlib.asynccontextmanager
    async def serving(self, limits: FeedLimits | None = None, **more: object) -> AsyncIterator[Leader]:
        self.publisher = Publisher(self, limits=limits, **more)  # type: ignore[arg-type]
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            async with asyncio.TaskGroup() as group:
                running = group.create_task(self.publisher.run())
                yield self
                running.cancel()
        finally:
            self.cut_connections()
            server.close()
            await server.wait_closed()
            await asyncio.sleep(0.01)  # connections that were just cut are closed in the next ticks
            self.log.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: walship-replication/1\r\n\r\n"
            )
            self.connections.append(writer)
            await self.publisher.serve(reader, writer)
        writer.close()


class ReplicaSeed:
    """Collects a snapshot; installs it only if its pages are what the header promises."""

    def __init__(self, replica: Replica, header: SnapshotHeader) -> None:
        self.replica, self.header = replica, header
        self.decoder = LtxDecoder()
        self.pages: dict[int, bytes] = {}

    async def write(self, ltx: bytes) -> None:
        self.decoder.receive_data(ltx)
        self.pages.update(self.decoder.pages())

    async def install(self) -> None:
        self.pages.update(self.decoder.pages())
        self.decoder.finish()
        sums = PageChecksums(self.header.page_size)
        if sums.apply(self.pages.items(), self.header.commit) != self.header.checksum:
            raise CorruptDatabase("the snapshot's pages are not what its header says")
        self.replica.installing = True
        await self.replica.install_gate.wait()
        await self.replica.install(self.header, self.pages)

    async def abort(self) -> None:
        self.replica.aborted_seeds += 1


@dataclass
class Heard:
    tip: Position
    acked: Position
    leader_time_ms: int
    keep_from: int


class Replica:
    """A follower's log without a database. Is the subscriber's `Sink`."""

    def __init__(self, directory: Path, name: str = "south", *, voter: bool = True, base: Tip | None = None) -> None:
        self.directory, self.name, self.voter = directory, name, voter
        self.promised, self.page_size = 0, 0
        self.comparable = False
        self.log: Log | None = None
        self.intake: Intake | None = None
        self.pages: dict[int, bytes] = {}
        self.base_pages: dict[int, bytes] = {}
        self.heard_all: list[Heard] = []
        self.promises: list[int] = []
        self.histories: list[list[tuple[int, int]]] = []
        self.mismatches: list[HistoryMismatch] = []
        self.frames: list[FrameHeader] = []
        self.streamed: list[str] = []
        self.aborted_seeds = 0
        self.installing = False
        self.receive_gate = asyncio.Event()
        self.receive_gate.set()
        self.install_gate = asyncio.Event()
        self.install_gate.set()
        self.calls: list[str] = []  # for seeds that keep a record
        self._logged = NOWHERE
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if base is not None or (directory / "log").exists():
            self._open(base or Tip(NOWHERE, 1 << 63, 0))

    def _open(self, base: Tip) -> None:
        self.log = Log.open(self.directory / "log", cluster=CLUSTER, base=base, limits=LIMITS)
        self._start()

    def _start(self) -> None:
        assert self.log is not None
        self._logged = self.log.sync().position
        self.intake = Intake(self.log, on_logged=self._on_logged, on_failure=lambda _: None)
        self._changed.set()

    def _on_logged(self, tip: Tip, _: int) -> None:
        self._logged = tip.position
        self._loop.call_soon_threadsafe(self._changed.set)

    async def stop(self) -> None:
        if self.intake is not None:
            await self.intake.stop()

    # what Sink asks

    @property
    def tip(self) -> Tip | None:
        return self.intake.tip if self.intake is not None else None

    def promise(self, term: int) -> None:
        self.promises.append(term)
        self.promised = term

    async def page_checksums(self) -> bytes:
        raise AssertionError("not comparable")

    async def receive(self, header: FrameHeader, data: bytes) -> None:
        await self.receive_gate.wait()
        self.frames.append(header)
        await self._intake.receive(header, data)

    async def begin(self, header: FrameHeader) -> None:
        self.streamed.append("begin")
        await self._intake.begin(header)

    async def part(self, record: bytes) -> None:
        self.streamed.append("part")
        await self._intake.part(record)

    async def end(self, record: bytes) -> None:
        self.streamed.append("end")
        await self._intake.end(record)

    async def abandon(self) -> None:
        self.streamed.append("abandon")
        await self._intake.abandon()

    def heard(self, *, tip: Position, acked: Position, leader_time_ms: int, keep_from: int) -> None:
        self.heard_all.append(Heard(tip, acked, leader_time_ms, keep_from))
        if self.streamed and self.streamed[-1] == "part":
            self.streamed.append("heartbeat")

    async def progress(self, after: tuple[Position, Position] | None) -> tuple[Position, Position]:
        while (now := (self._logged, self._logged)) == after:
            self._changed.clear()
            await self._changed.wait()
        return now

    async def seed(self, header: SnapshotHeader) -> ReplicaSeed:
        return ReplicaSeed(self, header)

    async def install(self, header: SnapshotHeader, pages: dict[int, bytes]) -> None:
        await self.stop()
        self.base_pages = pages
        if self.log is None:
            self._open(header.tip)
        else:
            self.log.reset(header.tip)
            self._start()

    def history(self, terms: list[tuple[int, int]], *, differs: bool) -> None:
        self.histories.append(terms)

    def mismatch(self, error: HistoryMismatch) -> None:
        self.mismatches.append(error)

    @property
    def _intake(self) -> Intake:
        assert self.intake is not None
        return self.intake

    # what the tests ask

    def replay(self) -> dict[int, bytes]:
        """The database this log leads to."""
        assert self.log is not None
        pages = dict(self.base_pages)
        for ref in self.log.frames_after(self.log.base.position):
            if not ref.header.is_term_start:
                payload = self.log.payload(ref)
                pages.update(decode(payload.read_at(0, payload.size_bytes))[1])
                pages = {pgno: page for pgno, page in pages.items() if pgno <= ref.header.commit}
        return pages


@dataclass
class Followers:
    """Subscribers that follow `leader`, each in its own task."""

    leader: Leader
    limits: SubscriberLimits = field(default_factory=SubscriberLimits)

    @contextlib.asynccontextmanager
    async def following(self, *replicas: Replica, nonce: str = "n1") -> AsyncIterator[list[Subscriber]]:
        async def locate() -> tuple[str, int] | None:
            return self.leader.url, self.leader.writer.term

        subscribers = [
            Subscriber(replica, locate, Identity(CLUSTER, node_id(replica), replica.name, nonce), limits=self.limits)
            for replica in replicas
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(subscriber.run()) for subscriber in subscribers]
                yield subscribers
                for task in tasks:
                    task.cancel()
        finally:
            for replica in replicas:
                await replica.stop()


def node_id(replica: Replica) -> str:
    return replica.name.encode().hex().ljust(32, "0")


def caught_up(leader: Leader, *replicas: Replica) -> bool:
    return all(leader.acks.get(node_id(each), (None,))[0] == leader.log.durable_tip.position for each in replicas)
