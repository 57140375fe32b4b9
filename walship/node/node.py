"""A node: opens its parts, wires them, changes between leading and following, closes them in reverse.

Decisions live in the parts: who leads is the elector's, the durable order of a change is `promote`'s and the engine's.
Whether it leads or follows is `Sides`'.

Stop (SIGTERM, SIGINT): hand the lead over, refuse new work and finish what runs -> end the links -> end replication ->
log, sync, mark -> close every connection, then the files -> exit 0. After a failure of the disk nothing is tidied up:
the process ends at once and the next start recovers, since whatever it did next could be wrong (R5).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from walship.config import NodeConfig
from walship.coordination.record import (
    NodeRecord,
    Phase,
    announce_leader,
    read_terms,
    register_node,
)
from walship.coordination.store import Store
from walship.engine.database import Database
from walship.engine.durable_state import Truth
from walship.engine.follower import Follower
from walship.engine.leader import Leader
from walship.engine.log import FrameRef, Log
from walship.engine.replica import Replica
from walship.engine.retention import LogLimits
from walship.engine.sparse import open_chunks
from walship.engine.watermarks import Watermarks
from walship.engine.writer import Writer
from walship.errors import (
    CompareFailed,
    CorruptData,
    Draining,
    NotLeader,
    Unavailable,
    WalshipError,
)
from walship.formats.checksum import PageChecksums
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position
from walship.hrana.types import Batch, Level
from walship.node.admin_orphans import Orphanage
from walship.node.complaints import Complaints
from walship.node.elector import Elector
from walship.node.embedded import EmbeddedReplicas
from walship.node.join import Membership
from walship.node.leading import Leading, boottime
from walship.node.link_server import LinkServer
from walship.node.outcomes import Outcomes
from walship.node.recover import recover
from walship.node.report import Report
from walship.node.role import Event, Role, next_role
from walship.node.scrub import pin_follower, pin_leader, scrub
from walship.node.sides import Sides
from walship.node.switchover import switch_over
from walship.node.voters import Voters
from walship.replication.publisher import Publisher, turn_away
from walship.replication.subscriber import Subscriber
from walship.service.limits import Limits
from walship.service.request import Call, CursorReply, Reply
from walship.service.service import Service

__all__ = ["Node"]

_log = logging.getLogger("walship.node")

_RETENTION_SECONDS = 1.0
_HAND_OVER_SECONDS = 6.0
_LOCATE_SECONDS = 1.0
_ZERO = Position(0, 0)


@dataclass(frozen=True, slots=True)
class _OpenSnapshot:
    """Implements `replication.feed.SnapshotStream`."""

    header: SnapshotHeader
    chunks: Iterator[bytes]


class Node:
    """One node, running. Implements the `Source` of the publisher, the `Host` of the service and its `Served`.

    Make it with `open`, on the event loop; `serve` runs it until `stop` is set or something fails.
    """

    def __init__(self, config: NodeConfig, store: Store, member: Membership, url: str) -> None:
        self.config = config
        self.name = config.name
        self.url = url
        self.member = member
        self.cluster = member.cluster
        self.node_id = member.state.state.node_id
        self.boot_nonce = secrets.token_hex(8)
        self.voter = member.is_voter(config.name)
        self.role = Role.STARTING
        self.since_ms = self.now_ms()
        self.watermarks = Watermarks(_ZERO)
        self.replica: Replica | None = None
        self.service: Service | None = None
        self.verified_ms: int | None = None
        self.report = Report(self)
        self.orphans = Orphanage(
            config.data_dir,
            self.report.numbers,
            keep_seconds=config.orphan_keep_seconds,
            keep_bytes=config.orphan_max_bytes,
        )
        self.embedded = EmbeddedReplicas(self, store, config.data_dir)
        self.stop = asyncio.Event()
        self._given = _ZERO
        self.store = store
        limits = LogLimits(
            max_bytes=config.log_max_bytes,
            segment_bytes=min(64 << 20, max(1 << 20, config.log_max_bytes // 8)),
            keep_seconds=config.log_keep_seconds,
        )
        self._limits = limits
        self.sides = Sides(self, limits)
        self.voters = Voters(self)
        self.elector = Elector(self)
        self.links = LinkServer(
            self,
            self.report.link_status,
            self._on_change,
            position_for=self.position_for,
            outcome_of=Outcomes(self, lambda outcome: self.report.numbers.outcomes.labels(outcome.value).inc()).of,
            stand=self.elector.stand,
            joined=lambda: self.joined,
        )
        self._failure: BaseException | None = None
        self._replica_changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._spawned: set[asyncio.Task[None]] = set()

    # --- Source and Host --------------------------------------------------------------------------------------

    @property
    def leading(self) -> Leader | None:
        return self.sides.led.engine if self.sides.led is not None else None

    @property
    def led(self) -> Leading | None:
        return self.sides.led

    @property
    def writer(self) -> Writer | None:
        return self.sides.led.writer if self.sides.led is not None else None

    @property
    def publisher(self) -> Publisher | None:
        return self.sides.led.publisher if self.sides.led is not None else None

    @property
    def follower(self) -> Follower | None:
        return self.sides.following.follower if self.sides.following is not None else None

    @property
    def subscriber(self) -> Subscriber | None:
        return self.sides.following.subscriber if self.sides.following is not None else None

    @property
    def acks_required(self) -> int:
        return self.member.record.acks

    @property
    def established(self) -> bool:
        """True while this node serves as the leader: its term-start is acknowledged, its lease lasts (R19)."""
        return self.sides.led is not None and self.sides.led.established

    @property
    def joined(self) -> bool:
        """False while this node may show what is no history: it led or started, and has not followed since (I21)."""
        return self.sides.joined

    @property
    def term(self) -> int:
        return self.sides.led.term if self.sides.led is not None else 0

    @property
    def log(self) -> Log:
        return self._replica().log

    @property
    def lease_ms(self) -> int:
        return int(self.config.lease_seconds * 1000)

    @property
    def database(self) -> Database:
        return self._replica().database

    @property
    def leader_url(self) -> str | None:
        return self.sides.leader_record.url if self.sides.leader_record is not None else None

    @property
    def leader(self) -> tuple[str | None, str | None, int]:
        record = self.sides.leader_record
        return (None, None, 0) if record is None else (record.name, record.url, record.term)

    def record_ack(self, node_id: str, durable: Position, applied: Position, *, voter: bool) -> None:
        if self.sides.led is not None:  # who counts as a voter is the record's to say, not the follower's
            self.sides.led.record_ack(node_id, durable)

    def forget(self, node_id: str) -> None:
        """A connection ended; what that follower acknowledged stays acknowledged."""

    @contextlib.asynccontextmanager
    async def open_snapshot(self, have: PageChecksums | None = None) -> AsyncIterator[_OpenSnapshot]:
        leading, writer = self.leading, self.writer
        if leading is None or writer is None:
            raise Unavailable(f"{self.name} does not lead and sends no snapshots; ask the leader")
        header, snapshot, chunks = await writer.run(lambda: open_chunks(leading, self._replica(), have))
        self.report.numbers.snapshots.labels("sent").inc()
        try:
            yield _OpenSnapshot(header, chunks)
        finally:
            await asyncio.to_thread(snapshot.close)

    # --- Served: the service, once there is a database --------------------------------------------------------

    async def pipeline(self, call: Call) -> Reply:
        reply = await self._service().pipeline(call)
        self._gave(call, reply.position)
        return reply

    async def cursor(self, call: Call, batch: Batch) -> CursorReply:
        reply = await self._service().cursor(call, batch)
        self._gave(call, reply.position)
        return reply

    async def dump(self, call: Call, *, row_ids: bool) -> CursorReply:
        return await self._service().dump(call, row_ids=row_ids)

    async def read_index(self, timeout_seconds: float) -> Position:
        """See `Host.read_index`."""
        if self.publisher is None:
            raise NotLeader(*self.leader)
        return await self.publisher.read_index(timeout_seconds)

    async def position_for(self, level: Level, timeout_seconds: float) -> Position:
        """What a proxy asks to know how fresh a read must be (R18).

        `linearizable`: the read index. `session`: a position that covers all that was acknowledged or shown to
        anybody, by the leader's own knowledge. `any`: what this node has on disk, whatever its role.
        """
        if level is Level.LINEARIZABLE:
            return await self.read_index(timeout_seconds)
        marks, led = self.watermarks, self.led
        if led is None:
            if level is Level.SESSION:
                raise NotLeader(*self.leader)
            return marks.logged
        if level is Level.SESSION and not led.live():  # the next leader may have acknowledged more (model m6, LEASE)
            raise Draining(f"the lease of {self.name} has ended; it cannot say what is acknowledged. Ask again")
        # With n <= 1 voters apply, and show, what they have on disk, a moment before it counts as acknowledged (R15).
        if self.member.record.acks <= 1 or level is Level.ANY:
            return marks.durable
        return max(marks.acked, self._given, key=Position.order)

    def _gave(self, call: Call, position: Position) -> None:
        """A client that chose its own number of acknowledgments was told of `position`, maybe before it was acked."""
        given = self._given
        if call.ack is not None and position.order() > given.order():
            self._given = position

    async def close_stream(self, stream: int) -> None:
        if self.service is not None:
            await self.service.close_stream(stream)

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Recover; found the cluster's first term, or go on where this node led last. Raises what prevents it."""
        member = self.member
        self.replica = await asyncio.to_thread(
            recover, self.config.data_dir, member.state, member.marks, cluster=self.cluster, limits=self._limits
        )
        self.become(Event.RECOVERED)
        for record in await read_terms(self.store):
            self.watermarks.add_term(record.term, record.start.prev_txid, record.start.prev_term)
        await register_node(self.store, self._node_record())
        if member.leads and await self._go_on_leading():
            return
        if self.replica is None or member.state.state.truth is Truth.LOG:
            self.sides.follow()  # else the -wal stays the truth until it is known who leads

    async def _go_on_leading(self) -> bool:
        """The record's holder is this node, so nobody else was elected since its former process ended, and its own
        -wal and log hold all that was acknowledged: it claims the next term without asking for votes. False when it
        neither leads nor follows yet."""
        member = self.member
        record = member.leader.record if member.leader is not None else None
        if record is not None and record.phase is not Phase.SERVING:
            return False  # a claim or a handoff was under way: the elector decides
        if self.replica is None:
            raise CorruptData(
                f"{self.config.data_dir}: this node leads by the record, but its own copy cannot be opened. Nothing "
                "was changed. Restore its files, or start another node that holds the data"
            )
        began = boottime()
        try:
            claim = await self.elector.claim(member.leader)
        except CompareFailed:
            return False
        await self.sides.promise(claim.record.term)
        start = await self.sides.begin_term(claim.record.term)
        try:
            seen = await announce_leader(self.store, claim, start=start)
        except CompareFailed as error:  # it took longer than a lease, and somebody else claimed
            await self.sides.step_down(claim.record.term, str(error))
            return True
        await self.sides.serve_term(seen, began)
        self.elector.core.began_alone(seen)
        return True

    async def serve(self) -> BaseException | None:
        """Run everything until `stop` or a failure; returns the failure. After a stop all is drained."""
        try:
            async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
                self._run_background(tasks, stack)
                opener = tasks.create_task(self._open_service(stack), name="open service")
                await self.stop.wait()
                opener.cancel()
                await self._hand_over()
                self.become(Event.STOP)
                if self._failure is not None:
                    return self._failure
                await self._drain()
        except BaseExceptionGroup as group:
            self.fail(group)
        return self._failure

    async def close(self) -> None:
        """Make what is known durable and close the files, in order. Not after a failure."""
        await self.sides.close()
        if self.replica is not None:
            self.replica.unpin()
            await asyncio.to_thread(self.replica.close)

    def fail(self, error: BaseException) -> None:
        """Something happened after which this process must not go on."""
        if self._failure is None:
            unforeseen = not isinstance(error, WalshipError)
            _log.critical("node ends error=%s", error, exc_info=error if unforeseen else None)
            self._failure = error
        self.stop.set()

    def unready(self) -> str | None:
        """Why no SQL can be served now, or None."""
        if self.role is Role.STOPPING:
            return f"{self.name} is shutting down"
        if self.replica is None:
            return f"{self.name} has no database yet; it waits for its first snapshot from the leader"
        if self.service is None:
            return f"{self.name} waits to hear from the leader that what it holds is acknowledged"
        return None

    # --- leading and following --------------------------------------------------------------------------------

    async def serve_replication(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one follower, or send it to the leader."""
        await self.sides.decided()
        if self.publisher is not None:
            await self.publisher.serve(reader, writer)
        else:
            await turn_away(reader, writer, f"{self.name} does not lead", self.leader_url)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` beside everything else; an error that is not of the tree ends the node."""
        task = self._loop.create_task(work, name=name)
        self._spawned.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._spawned.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, WalshipError):
            _log.warning("%s ended error=%s", task.get_name(), error)
        elif error is not None:
            self.fail(error)

    def on_frame(self, ref: FrameRef, data: bytes | None) -> None:
        """Writer thread: offer small frames to the publisher, so that shipping them reads no file."""
        publisher = self.publisher
        if data is not None and publisher is not None:
            self._loop.call_soon_threadsafe(publisher.offer, ref, data)

    def on_replica(self, replica: Replica) -> None:
        self.replica = replica
        self.report.numbers.snapshots.labels("installed").inc()
        self._replica_changed.set()

    # --- background -------------------------------------------------------------------------------------------

    def _run_background(self, tasks: asyncio.TaskGroup, stack: contextlib.AsyncExitStack) -> None:
        """Start what runs beside the service; it ends after the service has."""
        work: list[tuple[str, Coroutine[Any, Any, None]]] = [
            ("elector", self.elector.run()),
            ("watch voters", self.voters.watch()),
            ("log retention", self._retain()),
            ("scrub", self._scrub()),
            ("embedded replicas", self.embedded.run()),
            ("complaints", Complaints(self).run()),
            ("orphans", self.orphans.run()),
        ]
        for name, coroutine in work:
            stack.callback(tasks.create_task(coroutine, name=name).cancel)

    async def _open_service(self, stack: contextlib.AsyncExitStack) -> None:
        """Serve SQL as soon as there is a database, and it holds nothing that must not be shown yet."""
        await self._until_replica()
        if self.follower is not None:
            await self.follower.until_acknowledged()
        self.service = await stack.enter_async_context(Service(self, Limits.of(self.config)))

    async def _retain(self) -> None:
        """Prune the log: never past the mark, kept for the slowest follower within bounds (R9). And see that nobody
        took the files away: two -wal files of one database would come to differ (engine.md T16)."""
        while True:
            await asyncio.sleep(_RETENTION_SECONDS)
            replica = self.replica
            if replica is None:
                continue
            keep_from = self.publisher.keep_from() if self.publisher is not None else self._keep_from()
            replica.marks.touch()
            try:
                replica.database.check_files()
                await asyncio.to_thread(replica.log.prune, keep_from=keep_from, now_ms=self.now_ms())
            except WalshipError as error:
                self.fail(error)

    def _keep_from(self) -> int | None:
        return self.follower.keep_from if self.follower is not None else None

    async def _scrub(self) -> None:
        """Once after the start: every page against the array that history gave (R8)."""
        replica = await self._until_replica()
        try:
            if self.leading is not None and self.writer is not None:
                pinned = await pin_leader(self.leading, self.writer, replica)
            elif self.follower is not None:
                pinned = await pin_follower(self.follower, replica)
            else:
                return
            reason = await asyncio.to_thread(scrub, pinned, self.stop.is_set)
        except (Unavailable, Draining) as error:
            _log.info("scrub was not run reason=%s", error)
            return
        if reason is None:
            self.verified_ms = self.now_ms()
        elif self.follower is not None:
            self.follower.replace(reason)
        else:
            self.fail(CorruptData(f"{self.database.path}: {reason}; this leader must not go on serving them"))

    async def _hand_over(self) -> None:
        """Before this node stops, let another one lead, if one follows closely. Raises nothing."""
        if self._failure is not None or self.sides.led is None or len(self.member.record.voters) < 2:
            return
        try:
            async with asyncio.timeout(_HAND_OVER_SECONDS):
                await switch_over(self)
        except (WalshipError, TimeoutError) as error:
            _log.info("stop without handing over: %s", error or "no time left")

    async def _drain(self) -> None:
        until = self._loop.time() + self.config.drain_seconds
        if self.service is not None:
            await self.service.drain(self.config.drain_seconds)
        await self.links.drain(max(until - self._loop.time(), 1.0))  # what ended just now is still answered
        if self.publisher is not None:
            await self.publisher.close()

    # --- small ------------------------------------------------------------------------------------------------

    @staticmethod
    def now_ms() -> int:
        return time.time_ns() // 1_000_000

    def become(self, event: Event) -> None:
        self.role = next_role(self.role, event)
        self.since_ms = self.now_ms()
        _log.info("role=%s event=%s term=%d", self.role, event, self.leader[2])

    async def _until_replica(self) -> Replica:
        while self.replica is None:
            self._replica_changed.clear()
            await self._replica_changed.wait()
        return self.replica

    def _replica(self) -> Replica:
        if self.replica is None:
            raise Unavailable(f"{self.name} has no database yet; it waits for its first snapshot from the leader")
        return self.replica

    def _service(self) -> Service:
        # While stopping, the service itself refuses what is new (Draining) and lets open transactions end.
        if self.service is None:
            raise Unavailable(f"{self.unready()}. Nothing was changed; try another node or connect to the proxy.")
        return self.service

    def _node_record(self) -> NodeRecord:
        return NodeRecord(
            node_id=self.node_id,
            name=self.name,
            url=self.url,
            zone=self.config.zone,
            pid=os.getpid(),
            boot_nonce=self.boot_nonce,
            database=self.member.state.state.database_path,
            voter=self.voter,
        )

    def _on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self.watermarks.on_change(callback)
