"""A node: opens its parts, wires them, closes them in reverse. Decisions live in the parts.

Start: lock the directory -> find the cluster -> recover (R2) -> claim and promote, if this node leads -> serve.
Stop (SIGTERM, SIGINT): refuse new work and finish what runs -> end the links -> end replication -> log, sync, mark ->
close every connection, then the files -> exit 0. After a failure of the disk nothing is tidied up: the process ends
at once and the next start recovers, since whatever it did next could be wrong (R5).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from walship.config import NodeConfig, open_gate
from walship.coordination.baton_key import baton_key
from walship.coordination.record import (
    LEADER,
    LeaderRecord,
    NodeRecord,
    Phase,
    TermStart,
    announce_leader,
    claim_next_term,
    decode,
    read_terms,
    register_node,
)
from walship.coordination.store import Store, open_store
from walship.engine import failpoints
from walship.engine.acks import AckTracker
from walship.engine.database import Database
from walship.engine.follower import Follower
from walship.engine.leader import Leader
from walship.engine.log import FrameRef, Log
from walship.engine.replica import Replica
from walship.engine.retention import LogLimits
from walship.engine.snapshot import ltx_chunks
from walship.engine.watermarks import Watermarks
from walship.engine.writer import Writer
from walship.errors import CorruptData, Draining, NotLeader, Unavailable, WalshipError
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position
from walship.front.listen import Address, listen
from walship.hrana.types import Batch, Level
from walship.node.app import NodeApp
from walship.node.embedded import EmbeddedReplicas
from walship.node.http_server import serving
from walship.node.join import Membership, join, lock_directory
from walship.node.link_server import LinkServer
from walship.node.promote import promote
from walship.node.recover import recover
from walship.node.report import Report
from walship.node.role import Event, Role, next_role
from walship.node.scrub import pin_follower, pin_leader, scrub
from walship.replication.publisher import Publisher
from walship.replication.subscriber import Identity, Subscriber
from walship.service.limits import Limits
from walship.service.request import Call, CursorReply, Reply
from walship.service.service import Service

__all__ = ["Node", "run"]

_log = logging.getLogger("walship.node")

_RETENTION_SECONDS = 1.0
_LOCATE_SECONDS = 1.0
_ZERO = Position(0, 0)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


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
        self.since_ms = now_ms()
        self.watermarks = Watermarks(_ZERO)
        self.leader_record: LeaderRecord | None = member.leader.record if member.leader else None
        self.replica: Replica | None = None
        self.leading: Leader | None = None
        self.writer: Writer | None = None
        self.publisher: Publisher | None = None
        self.follower: Follower | None = None
        self.subscriber: Subscriber | None = None
        self.service: Service | None = None
        self.verified_ms: int | None = None
        self.report = Report(self)
        self.embedded = EmbeddedReplicas(self, store, config.data_dir)
        self.stop = asyncio.Event()
        self._given = _ZERO
        self.links = LinkServer(self, self.report.link_status, self._on_change, position_for=self.position_for)
        self._store = store
        self._acks: AckTracker | None = None
        self._limits = LogLimits(
            max_bytes=config.log_max_bytes,
            segment_bytes=min(64 << 20, max(1 << 20, config.log_max_bytes // 8)),
            keep_seconds=config.log_keep_seconds,
        )
        self._failure: BaseException | None = None
        self._leader_changed = asyncio.Event()
        self._replica_changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    # --- Source and Host --------------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        return self.leading.term if self.leading is not None else 0

    @property
    def log(self) -> Log:
        return self._replica().log

    @property
    def database(self) -> Database:
        return self._replica().database

    @property
    def leader_url(self) -> str | None:
        return self.leader_record.url if self.leader_record is not None else None

    @property
    def leader(self) -> tuple[str | None, str | None, int]:
        record = self.leader_record
        return (None, None, 0) if record is None else (record.name, record.url, record.term)

    def record_ack(self, node_id: str, durable: Position, applied: Position, *, voter: bool) -> None:
        if voter and self._acks is not None:
            self._acks.record(node_id, durable)
            self._move_acked()

    def forget(self, node_id: str) -> None:
        """A connection ended; what that follower acknowledged stays acknowledged."""

    @contextlib.asynccontextmanager
    async def open_snapshot(self) -> AsyncIterator[_OpenSnapshot]:
        leading, writer = self.leading, self.writer
        if leading is None or writer is None:
            raise Unavailable(f"{self.name} does not lead and sends no snapshots; ask the leader")
        header, snapshot = await writer.run(leading.pin_snapshot)
        self.report.numbers.snapshots.labels("sent").inc()
        try:
            yield _OpenSnapshot(header, ltx_chunks(snapshot, header))
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
        marks = self.watermarks
        if self.leading is None:
            if level is Level.SESSION:
                raise NotLeader(*self.leader)
            return marks.logged
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
        """Recover, and lead if the record says so. Raises what makes that impossible."""
        member = self.member
        self.replica = await asyncio.to_thread(
            recover, self.config.data_dir, member.state, member.marks, cluster=self.cluster, limits=self._limits
        )
        self._become(Event.RECOVERED)
        for record in await read_terms(self._store):
            self.watermarks.add_term(record.term, record.start.prev_txid)
        await register_node(self._store, self._node_record())
        if member.leads:
            await self._lead()
        else:
            self._follow()

    async def serve(self) -> BaseException | None:
        """Run everything until `stop` or a failure; returns the failure. After a stop all is drained."""
        try:
            async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
                self._run_background(tasks, stack)
                opener = tasks.create_task(self._open_service(stack), name="open service")
                await self.stop.wait()
                opener.cancel()
                self._become(Event.STOP)
                if self._failure is not None:
                    return self._failure
                await self._drain()
        except BaseExceptionGroup as group:
            self.fail(group)
        return self._failure

    async def close(self) -> None:
        """Make what is known durable and close the files, in order. Not after a failure."""
        if self.writer is not None and self.leading is not None:
            await self.writer.stop()
            await asyncio.to_thread(self.leading.close)
            self.embedded.close()
        if self.follower is not None:
            await self.follower.stop()
        if self.replica is not None:
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

    async def _lead(self) -> None:
        member, replica = self.member, self.replica
        if replica is None:
            raise CorruptData(
                f"{self.config.data_dir}: this node leads by the record, but its own copy cannot be opened. Nothing "
                "was changed. Restore its files, or start another node that holds the data"
            )
        state = member.state
        claim = await claim_next_term(
            self._store,
            member.leader,
            holder=self.node_id,
            name=self.name,
            url=self.url,
            promised=state.state.promised,
        )
        failpoints.reach("leader.claimed")
        term = claim.record.term
        state.update(promised=term)
        self._become(Event.CLAIM_WON)
        previous = replica.log.tip
        self.leading = await asyncio.to_thread(
            promote,
            replica,
            state,
            self.watermarks,
            cluster=self.cluster,
            term=term,
            now_ms=now_ms,
            on_frame=self._on_frame,
            on_group=self.report.observe_group,
        )
        start = TermStart(previous.position.term, previous.position.txid, previous.checksum)
        serving_record = await announce_leader(self._store, claim, start=start)
        self.leader_record = serving_record.record
        self._acks = AckTracker(term, member.record.acks, _ZERO)
        self.writer = Writer(self.leading, self._acks, on_failure=self.fail)
        self.publisher = Publisher(self, prompt_acked=member.record.acks >= 2, acks=member.record.acks)
        self.watermarks.on_change(self._move_acked)
        self.writer.start()
        self._move_acked()
        await self.embedded.begin_term(self.leading.tip.position)
        self._become(Event.TERM_STARTED)

    def _follow(self) -> None:
        member = self.member
        self.follower = Follower(
            directory=self.config.data_dir,
            state=member.state,
            cluster=self.cluster,
            voter=self.voter,
            acks=member.record.acks,
            limits=self._limits,
            replica=self.replica,
            marks=member.marks,
            watermarks=self.watermarks,
            on_replica=self._on_replica,
            on_failure=self.fail,
            on_sync=self.report.observe_log_sync,
        )
        identity = Identity(self.cluster, self.node_id, self.name, self.boot_nonce)
        credential = member.record.credential("replication")
        self.subscriber = Subscriber(self.follower, self._locate_leader, identity, credential=credential)

    async def _subscribe(self, subscriber: Subscriber) -> None:
        try:
            await subscriber.run()
        except WalshipError as error:
            self.fail(error)

    def _move_acked(self) -> None:
        acks, marks = self._acks, self.watermarks
        if acks is None:
            return
        acked = acks.covered(marks.durable)
        if acked.order() > marks.acked.order():
            marks.acked = acked

    def _on_frame(self, ref: FrameRef, data: bytes | None) -> None:
        """Writer thread: offer small frames to the publisher, so that shipping them reads no file."""
        publisher = self.publisher
        if data is not None and publisher is not None:
            self._loop.call_soon_threadsafe(publisher.offer, ref, data)

    def _on_replica(self, replica: Replica) -> None:
        self.replica = replica
        self.report.numbers.snapshots.labels("installed").inc()
        self._replica_changed.set()

    async def _locate_leader(self) -> tuple[str, int] | None:
        record = self.leader_record
        if record is None or record.phase is not Phase.SERVING or record.holder == self.node_id:
            self._leader_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOCATE_SECONDS):
                    await self._leader_changed.wait()
            record = self.leader_record
        if record is None or record.phase is not Phase.SERVING or record.holder == self.node_id:
            return None
        return record.url, record.term

    # --- background -------------------------------------------------------------------------------------------

    async def _watch_leader(self) -> None:
        async for change in self._store.watch(LEADER):
            if change.key != LEADER or change.state is None:
                continue
            record = decode(LeaderRecord, LEADER, change.state.value)
            if self.leader_record is None or record.term >= self.leader_record.term:
                self.leader_record = record
                self._leader_changed.set()
            if self.leading is not None and record.term > self.leading.term:
                self.fail(
                    Unavailable(f"term {record.term} began elsewhere; this node stops leading {self.leading.term}")
                )

    def _run_background(self, tasks: asyncio.TaskGroup, stack: contextlib.AsyncExitStack) -> None:
        """Start what runs beside the service; it ends after the service has."""
        work: list[tuple[str, Coroutine[Any, Any, None]]] = [
            ("watch leader", self._watch_leader()),
            ("log retention", self._retain()),
            ("scrub", self._scrub()),
            ("embedded replicas", self.embedded.run()),
        ]
        if self.publisher is not None:
            work.append(("publisher", self.publisher.run()))
        if self.subscriber is not None:
            work.append(("subscriber", self._subscribe(self.subscriber)))
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
                await asyncio.to_thread(replica.log.prune, keep_from=keep_from, now_ms=now_ms())
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
            self.verified_ms = now_ms()
        elif self.follower is not None:
            self.follower.replace(reason)
        else:
            self.fail(CorruptData(f"{self.database.path}: {reason}; this leader must not go on serving them"))

    async def _drain(self) -> None:
        until = self._loop.time() + self.config.drain_seconds
        if self.service is not None:
            await self.service.drain(self.config.drain_seconds)
        await self.links.drain(max(until - self._loop.time(), 1.0))  # what ended just now is still answered
        if self.publisher is not None:
            await self.publisher.close()

    # --- small ------------------------------------------------------------------------------------------------

    def _become(self, event: Event) -> None:
        self.role = next_role(self.role, event)
        self.since_ms = now_ms()
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


async def run(config: NodeConfig) -> int:
    """The `walship node` command: run until SIGTERM or SIGINT. Returns 0; raises what made it impossible."""
    with lock_directory(config.data_dir):
        store = open_store(config.cluster_url)
        try:
            member = await join(config, store)
            listener = listen(config.listen_host, config.listen_port)
            node = Node(config, store, member, config.advertise or Address.of(listener).url)
            await node.start()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, node.stop.set)
            app = NodeApp(
                node,
                node.report,
                name=node.name,
                max_body_bytes=config.body_max_bytes,
                baton_key=await baton_key(store),
                gate=open_gate(config),
                drain_seconds=config.drain_seconds,
                routes=node.embedded.routes(),
            )
            upgrades = {"/walship/link": node.links.serve}
            if node.publisher is not None:
                upgrades["/walship/replication"] = node.publisher.serve
            credentials = {path: member.record.credential(path.rpartition("/")[2]) for path in upgrades}
            async with serving(
                app,
                listener,
                upgrades=upgrades,
                credentials=credentials,
                drain_seconds=config.drain_seconds,
                message_max_bytes=config.body_max_bytes,
            ):
                _say_ready(node)
                failure = await node.serve()
                if failure is not None:
                    _end_now(failure)
            await node.close()
        finally:
            await store.close()
    return 0


def _say_ready(node: Node) -> None:
    line = json.dumps({"ready": True, "url": node.url, "name": node.name, "pid": os.getpid()})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _end_now(error: BaseException) -> NoReturn:
    """After a failure nothing may be tidied up: closing could change what a restart counts from (R5, R7)."""
    sys.stderr.write(f"walship: {error}\n")
    sys.stderr.flush()
    logging.shutdown()
    os._exit(1)
