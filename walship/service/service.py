"""What a client sees of one node's database, without any transport.

Each call's requests are looked at together and run where they belong (R17, R20 to R22):

    only reads, nothing left open      a read batch on the loop thread, or a worker when they are not short
    writes, nothing left open          one job in the writer thread, on the shared connection, group commit
    a transaction left open, PRAGMA    a stream with a connection of its own, by turns with the writer thread
    or TEMP

A list is never split once it has begun to write: a reply that says "not done" must be true of all of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import apsw

from walship.engine.attempts import Attempt
from walship.errors import (
    Behind,
    Draining,
    NotLeader,
    NotReadOnly,
    Overloaded,
    TransactionTimeout,
)
from walship.formats.position import Position
from walship.hrana import json as hrana
from walship.hrana.types import Batch, BatchRequest, CloseRequest, ErrorBody, Level
from walship.service.bound import attempt_of, fill, last_to_commit, raise_after, writer_of
from walship.service.connections import Connections
from walship.service.cursors import LaneCursor, once
from walship.service.dump import dump
from walship.service.executor import Counters, Executor, Need, drive
from walship.service.limits import Limits, limit_values
from walship.service.plan import Item, Needs, look, resolve, resolve_batch
from walship.service.reads import Reads, acknowledged, fresh_enough, seen
from walship.service.request import Call, CursorReply, Host, Reply
from walship.service.session import Session, State, named
from walship.service.streams import Streams
from walship.sql import guard

__all__ = ["Service", "ServiceStatus"]

T = TypeVar("T")

_SWEEP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Counts for `/status` and metrics. `reads_moved`: over the inline budget, run again on a worker."""

    active_calls: int
    streams: int
    transactions: int
    connections: int
    cursors: int
    read_batches: int
    reads_inline: int
    reads_moved: int
    reads_sent_on: int
    draining: bool


class Service:
    """The SQL service of one node. Use as an async context manager on the node's event loop.

    Cancelling a call never cancels a statement that writes: it ends by itself, and the stream is rolled back.
    """

    def __init__(self, host: Host, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._limits = limits
        self._clock = clock
        self._cursors: set[LaneCursor] = set()
        self._active = 0
        self._draining = False
        self._quiet = asyncio.Event()
        self._shared: tuple[apsw.Connection, Executor] | None = None
        self._write_until = math.inf  # the writer thread's: when the statements of its present job end
        self._revoked = False  # this node stops leading: no job may run to its end
        self._reads: Reads
        self._connections: Connections
        self._streams: Streams
        self._tasks: asyncio.TaskGroup
        self._sweeper: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._reads = Reads(self._host, self._limits, self._clock)
        self._connections = Connections(self._host.database, self._limits, self._clock)
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._streams = Streams(self._host, self._connections, self._limits, self._clock, self._tasks, self._quiet.set)
        self._sweeper = self._tasks.create_task(self._sweep(), name="walship-service-sweep")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self._draining = True
        try:
            self._connections.interrupt_all()
            await self._end_streams()
            self._sweeper.cancel()
        finally:
            try:
                await self._tasks.__aexit__(None, None, None)  # the caller's own error stays its own
            finally:
                await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._reads.close()
        self._connections.close()

    # --- the interface ------------------------------------------------------------------------------------------

    async def pipeline(self, call: Call) -> Reply:
        """Run a list of requests on a stream. What it raises: see `walship.service.request`."""
        self._enter(call)
        try:
            await self._prove(call)
            if call.stream == 0:
                return await self._pipeline(None, call)
            if call.stream not in self._streams and all(isinstance(r, CloseRequest) for r in call.requests):
                # Some clients close what has died long ago (hrana.md 2.1).
                return Reply([hrana.ok("close")] * len(call.requests), seen(self._host), 0, True)
            session = self._streams.find(call.stream)
            async with self._streams.alone(session):
                return await self._pipeline(session, call)
        finally:
            self._leave()

    async def cursor(self, call: Call, batch: Batch) -> CursorReply:
        """Run a batch and stream its rows; `call.requests` is not looked at. Raises as `pipeline` does.

        Errors of steps, and one that ends the rows early, are among the lines.
        """
        self._enter(call)
        try:
            await self._prove(call)
            if call.stream == 0:
                return await self._cursor(None, call, batch)
            session = self._streams.find(call.stream)
            async with self._streams.alone(session):
                return await self._cursor(session, call, batch)
        finally:
            self._leave()

    async def dump(self, call: Call, *, row_ids: bool) -> CursorReply:
        """The database as SQL text (walship/service/dump.py) at one position, streamed; `lines` are chunks of it.

        Raises as a read does; and among the lines, Unavailable, when it cannot go on.
        """
        self._enter(call)
        try:
            return await self._dump(call, row_ids=row_ids)
        finally:
            self._leave()

    async def close_stream(self, stream: int) -> None:
        """Close a stream, rolling back what is open. Unknown streams are fine."""
        if stream in self._streams:
            session = self._streams[stream]
            async with self._streams.alone(session):
                await self._streams.close(session)

    def status(self) -> ServiceStatus:
        reads = self._reads
        return ServiceStatus(
            active_calls=self._active,
            streams=len(self._streams),
            transactions=self._streams.transactions,
            connections=self._connections.in_use,
            cursors=len(self._cursors),
            read_batches=reads.batches,
            reads_inline=reads.inline,
            reads_moved=reads.moved,
            reads_sent_on=reads.sent_on,
            draining=self._draining,
        )

    def stop_leading(self) -> None:
        """This node stops leading: what runs in the writer thread is interrupted, streams that own a connection for
        writing end, and their clients are told. Reads go on."""
        self._revoked = True
        self._streams.spawn(self._streams.expire_writers())

    def may_lead(self) -> None:
        """This node begins to lead."""
        self._revoked = False
        self._connections.drop_writers()

    async def drain(self, deadline_seconds: float) -> None:
        """Refuse new streams, let what runs and what is open end for at most `deadline_seconds`, roll back the rest."""
        self._draining = True
        try:
            async with asyncio.timeout(deadline_seconds):
                while self._active or self._cursors or any(s.pinned for s in self._streams):
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            self._connections.interrupt_all()
            if self._host.writer is not None:
                self._host.writer.give_up()
        await self._end_streams()

    # --- pipelines ----------------------------------------------------------------------------------------------

    async def _pipeline(self, session: Session | None, call: Call) -> Reply:
        texts = {} if session is None else session.texts
        items, closing = resolve(call.requests, texts, self._limits)
        needs = look(items, closing=closing)
        if _has_state(session) or needs.own_connection or not needs.certain:
            return await self._on_stream(session, call, items, needs, closing=closing)
        counters = Counters() if session is None else session.counters
        if needs.writes:
            results, position = await self._write(items, counters, call, needs)
        else:
            results, position = await self._read(items, counters, call)
        return Reply(results, position, await self._kept(session, call, counters, texts, closing=closing), True)

    async def _read(self, items: Sequence[Item], counters: Counters, call: Call) -> tuple[list[bytes], Position]:
        try:
            return await self._reads.run(
                items, counters, floor=call.floor, wait_seconds=call.wait_seconds, level=call.level
            )
        except NotReadOnly:
            self._check_may_write(call)
        return await self._job(items, counters, call)

    async def _write(
        self, items: Sequence[Item], counters: Counters, call: Call, needs: Needs
    ) -> tuple[list[bytes], Position]:
        self._check_may_write(call)
        if call.floor is not None:
            await fresh_enough(self._host, call.floor, call.wait_seconds)
        # Reads in front need not burden the writer thread; from the first write on it is one job.
        first = 0
        while not needs.words and not look(items[first : first + 1], closing=False).writes:
            first += 1
        results: list[bytes] = []
        if any(not isinstance(item, bytes) for item in items[:first]):
            try:
                results, _ = await self._reads.run(
                    items[:first], counters, floor=None, wait_seconds=0, level=call.level
                )
            except NotReadOnly:
                first = 0
        else:
            results = [item for item in items[:first] if isinstance(item, bytes)]
        written, position = await self._job(items[first:], counters, call)
        return results + written, position

    async def _job(self, items: Sequence[Item], counters: Counters, call: Call) -> tuple[list[bytes], Position]:
        """Run `items` in the writer thread, as one job of a group (R20). They leave no transaction open."""
        writer = writer_of(self._host, call.term)
        attempt = attempt_of(call)

        def work(executor: Executor) -> list[bytes]:
            return [item if isinstance(item, bytes) else drive(executor.perform(item)) for item in items]

        job = self._job_of(work, counters, attempt)
        done = await writer.submit(job, ack=call.ack, attempt=attempt)
        return done.value, done.position

    def _job_of(
        self, work: Callable[[Executor], T], counters: Counters, attempt: Attempt | None
    ) -> Callable[[apsw.Connection], T]:
        """`work` on the writer thread's connection, within bounds, leaving no transaction open."""

        def job(connection: apsw.Connection) -> T:
            executor = self._shared_executor(connection)
            executor.start(counters)
            self._write_until = self._clock() + self._limits.write_seconds
            try:
                return work(executor)
            finally:
                fill(attempt, executor)
                self._write_until = math.inf
                if not connection.get_autocommit():
                    connection.execute("ROLLBACK")

        return job

    def _shared_executor(self, connection: apsw.Connection) -> Executor:
        """The executor of the writer thread's connection; guarded when it is first seen."""
        if self._shared is None or self._shared[0] is not connection:
            guard.install(connection, follower=False, shared=True)
            limit_values(connection, self._limits.value_bytes)
            connection.set_progress_handler(self._shall_stop_job, 10_000)
            self._shared = (connection, Executor(connection, self._limits, may_write=True))
        return self._shared[1]

    def _shall_stop_job(self) -> bool:
        # Only while a job runs: our own ROLLBACK after it must not be interrupted.
        running = self._write_until < math.inf
        ending = self._revoked or self._connections.closing
        return running and (ending or self._clock() > self._write_until)

    def _check_may_write(self, call: Call) -> None:
        if call.read_only:
            raise NotReadOnly(
                "a statement of this request writes, and it was sent as a read. Nothing was changed. "
                "Send it to the leader, or connect to the proxy."
            )
        if self._host.writer is None:
            raise NotLeader(*self._host.leader)

    # --- streams with a connection ------------------------------------------------------------------------------

    async def _on_stream(
        self, session: Session | None, call: Call, items: Sequence[Item], needs: Needs, *, closing: bool
    ) -> Reply:
        self._check_may_own(session, call, needs)

        def run(session: Session) -> Coroutine[None, None, Reply]:
            return self._run_on_stream(session, call, items, needs, closing=closing)

        return await self._apart(session, call, run)

    async def _apart(
        self, session: Session | None, call: Call, run: Callable[[Session], Coroutine[None, None, T]]
    ) -> T:
        """Run a call on a stream, a new one if there is none, to its end, whatever happens to the caller."""
        if session is not None:
            return await self._streams.apart(session, named(self._host, session, call, run(session)))
        session = self._streams.new()
        async with session.lock:
            return await self._streams.apart(session, named(self._host, session, call, run(session)))

    def _check_may_own(self, session: Session | None, call: Call, needs: Needs) -> None:
        """A follower gives connections only to transactions that say they only read."""
        if self._host.writer is not None or (session is not None and session.pinned):
            return
        if needs.own_connection or not needs.read_only:
            self._check_may_write(call)

    async def _run_on_stream(
        self, session: Session, call: Call, items: Sequence[Item], needs: Needs, *, closing: bool
    ) -> Reply:
        results: list[bytes] = []
        committed: Position | None = None
        await self._open_call(session, call, needs)
        try:
            last = last_to_commit(items) if call.token else -1
            for number, item in enumerate(items):
                if isinstance(item, bytes):
                    results.append(item)
                    continue
                session.final = number >= last
                results.append(await session.perform(item))
                committed = await session.settle() or committed
            position = await self._position_of(call, committed)
            session.check_open()
        except BaseException as error:
            await self._streams.close(session)
            raise_after(committed, error)
            raise
        return await self._end_call(session, call, results, position, closing=closing)

    async def _open_call(self, session: Session, call: Call, needs: Needs) -> None:
        """Everything that can refuse a call before it has begun. A stream that existed stays as it was then."""
        fresh = not session.calls
        try:
            session.begin_call(read_only=call.read_only)
            session.ack = call.ack
            if call.floor is not None and session.needs_snapshot:
                await fresh_enough(self._host, call.floor, call.wait_seconds)
            try:
                await session.own(writer=self._host.writer is not None)
            except Overloaded:
                if not await self._streams.reclaim():
                    raise
                await session.own(writer=self._host.writer is not None)
        except BaseException as error:
            if fresh or isinstance(error, TransactionTimeout):
                await self._streams.close(session)
            raise
        session.calls += 1
        session.dirty = session.dirty or needs.lasting

    async def _position_of(self, call: Call, committed: Position | None) -> Position:
        if committed is not None and call.ack is not None:
            return committed  # the client chose what its commit waits for
        position = seen(self._host)
        if call.level is Level.ANY:
            return position
        return await acknowledged(self._host, position, self._limits.ack_seconds)

    async def _end_call(
        self, session: Session, call: Call, results: list[bytes], position: Position, *, closing: bool
    ) -> Reply:
        autocommit = session.state is State.AUTOCOMMIT
        if closing:
            await self._streams.close(session)
            return Reply(results, position, 0, True)
        if autocommit and not session.dirty:
            await session.abandon()
            if not (call.keep or session.settings):
                await self._streams.close(session)
                return Reply(results, position, 0, True)
        session.used_at = self._clock()
        return Reply(results, position, session.id, autocommit)

    # --- cursors ------------------------------------------------------------------------------------------------

    async def _cursor(self, session: Session | None, call: Call, batch: Batch) -> CursorReply:
        texts = {} if session is None else session.texts
        batch = resolve_batch(batch, texts, self._limits)
        needs = look([BatchRequest(batch)], closing=False)
        if _has_state(session) or needs.own_connection or not needs.certain:
            return await self._cursor_on_stream(session, call, batch, needs)
        counters = Counters() if session is None else session.counters
        if not needs.writes:
            try:
                lines, position = await self._cursor_of_reads(call, batch, counters)
            except NotReadOnly:
                self._check_may_write(call)
                lines, position = await self._cursor_of_job(call, batch, counters)
        else:
            self._check_may_write(call)
            lines, position = await self._cursor_of_job(call, batch, counters)
        stream = await self._kept(session, call, counters, texts, closing=False)
        return CursorReply(stream, position, True, lines)

    async def _cursor_of_reads(
        self, call: Call, batch: Batch, counters: Counters
    ) -> tuple[AsyncIterator[bytes], Position]:
        small, position = await self._reads.lines(
            batch, counters, floor=call.floor, wait_seconds=call.wait_seconds, level=call.level
        )
        if small is not None:
            return once(small), position
        lane = await self._connections.take(writer=False)
        cursor = LaneCursor(self._connections, lane, self._forget_cursor, self._clock)
        self._cursors.add(cursor)
        try:
            position = await cursor.begin(batch, counters, lambda: seen(self._host))
            if call.level is not Level.ANY:
                position = await acknowledged(self._host, position, self._limits.ack_seconds)
        except BaseException:
            cursor.close()
            raise
        return cursor.lines(), position

    async def _dump(self, call: Call, *, row_ids: bool) -> CursorReply:
        if call.floor is not None:
            await fresh_enough(self._host, call.floor, call.wait_seconds)
        lane = await self._connections.take(writer=False)
        cursor = LaneCursor(self._connections, lane, self._forget_cursor, self._clock)
        self._cursors.add(cursor)
        try:
            chunk_bytes = self._limits.chunk_bytes
            position = await cursor.begin_with(
                lambda: dump(lane.connection, row_ids=row_ids, chunk_bytes=chunk_bytes), lambda: seen(self._host)
            )
            if call.level is not Level.ANY:
                position = await acknowledged(self._host, position, self._limits.ack_seconds)
        except BaseException:
            cursor.close()
            raise
        return CursorReply(0, position, True, cursor.lines())

    async def _cursor_of_job(
        self, call: Call, batch: Batch, counters: Counters
    ) -> tuple[AsyncIterator[bytes], Position]:
        if call.floor is not None:
            await fresh_enough(self._host, call.floor, call.wait_seconds)
        writer = writer_of(self._host, call.term)
        attempt = attempt_of(call)

        job = self._job_of(lambda executor: self._gather(executor, batch), counters, attempt)
        done = await writer.submit(job, ack=call.ack, attempt=attempt)
        return once(done.value), done.position

    def _gather(self, executor: Executor, batch: Batch) -> bytes:
        """All lines of a batch that writes. Its rows are few; past the bound they are dropped, the work is not."""
        chunks: list[bytes] = []
        size = 0
        for chunk in executor.lines(batch):
            if isinstance(chunk, Need):
                raise AssertionError("the writer's connection may write")
            size += len(chunk)
            if size <= 3 * self._limits.response_bytes:
                chunks.append(chunk)
        if size > 3 * self._limits.response_bytes:
            chunks.append(hrana.cursor_error(ErrorBody("The response is too large", "RESPONSE_TOO_LARGE")))
        return b"".join(chunks)

    async def _cursor_on_stream(self, session: Session | None, call: Call, batch: Batch, needs: Needs) -> CursorReply:
        self._check_may_own(session, call, needs)
        return await self._apart(session, call, lambda owner: self._run_cursor_on_stream(owner, call, batch, needs))

    async def _run_cursor_on_stream(self, session: Session, call: Call, batch: Batch, needs: Needs) -> CursorReply:
        """All lines at once, bounded like any response: a stream is used by one request at a time, so rows that were
        handed out slowly would hold its transaction, and maybe the write turn, at the client's pace."""
        chunks: list[bytes] = []
        size = 0
        committed: Position | None = None
        await self._open_call(session, call, needs)
        try:
            lines = session.lines(batch)
            while (chunk := await session.chunk(lines)) is not None:
                size += len(chunk)
                if size > 3 * self._limits.response_bytes:
                    await session.stop_lines()
                    error = ErrorBody("The response is too large; ask for fewer rows at a time", "RESPONSE_TOO_LARGE")
                    chunks.append(hrana.cursor_error(error))
                    break
                chunks.append(chunk)
            session.final = True
            committed = await session.settle()
            position = await self._position_of(call, committed)
            session.check_open()
        except BaseException as error:
            await self._streams.close(session)
            raise_after(committed, error)
            raise
        reply = await self._end_call(session, call, [], position, closing=False)
        return CursorReply(reply.stream, position, reply.autocommit, once(b"".join(chunks)))

    def _forget_cursor(self, cursor: LaneCursor) -> None:
        self._cursors.discard(cursor)
        self._quiet.set()

    async def _prove(self, call: Call) -> None:
        """Before a linearizable call: proof that this node leads. Weaker than asked for, silently, is the one thing
        a level must never be (R18). Raises Behind, StatementFailed."""
        if call.level is not Level.LINEARIZABLE:
            return
        if self._host.writer is None:
            raise Behind("a follower cannot answer linearizable reads. Ask the leader, or connect to the proxy.")
        await self._host.read_index(self._limits.ack_seconds)

    # --- streams: finding, keeping, ending ----------------------------------------------------------------------

    def _enter(self, call: Call) -> None:
        if call.term:
            writer_of(self._host, call.term)
        if self._draining and call.stream == 0:
            raise Draining("this node is shutting down. Nothing was changed. Try another node, or the proxy.")
        if self._active >= self._limits.streams:
            raise Overloaded(f"{self._active} calls are running already. Nothing was changed. Try again.")
        self._active += 1

    def _leave(self) -> None:
        self._active -= 1
        self._quiet.set()

    async def _kept(
        self, session: Session | None, call: Call, counters: Counters, texts: dict[int, str], *, closing: bool
    ) -> int:
        """The id under which a stream without a connection goes on, or 0."""
        if closing:
            if session is not None:
                await self._streams.close(session)
            return 0
        if session is None:
            if not call.keep or not self._streams.room:
                return 0  # it may have committed: no reason to refuse it
            session = self._streams.new()
            session.texts, session.counters = texts, counters
        session.used_at = self._clock()
        session.calls += 1
        return session.id

    async def _end_streams(self) -> None:
        await self._streams.close_all()
        for cursor in list(self._cursors):
            cursor.close()

    async def _sweep(self) -> None:
        """Close what nobody uses any more."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            await self.sweep()

    async def sweep(self) -> None:
        """One look at all streams and cursors; called by the service itself, and by tests with their own clock."""
        await self._streams.sweep()
        now = self._clock()
        for cursor in list(self._cursors):
            if now - cursor.used_at > self._limits.read_seconds:
                cursor.close()


def _has_state(session: Session | None) -> bool:
    """Does the stream own something here, or did it, so that its client must be told?"""
    return session is not None and session.has_state
