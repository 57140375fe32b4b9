"""A small node for the proxy's tests: real sockets, the real link codec, real SQLite. No replication.

All nodes of a test share one database file. The leader writes to it; a follower reads it, and may be told to lag: then
it holds a real read snapshot until `catch_up`. Positions count the leader's commits. Misbehaviour is scripted per node.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw

from walship.coordination.record import NodeRecord, node_key
from walship.coordination.store import Store
from walship.errors import Behind, NotLeader, ProtocolViolation, WalshipError
from walship.formats.link import (
    CURSOR_WINDOW,
    Chunk,
    CursorEnd,
    CursorHead,
    Grant,
    LinkReader,
    Outcome,
    OutcomeBody,
    ReadLevel,
    Reason,
    Refusal,
    Reply,
    ReplyFlags,
    Request,
    RequestFlags,
    Role,
    Status,
    StatusFlags,
    Verb,
    refusal_of,
)
from walship.formats.position import Position, TermHistory
from walship.hrana.json import cursor_head, decode_cursor, decode_pipeline, ok, pipeline_reply
from walship.hrana.types import CloseRequest, CloseSqlRequest, StoreSqlRequest
from walship.service.executor import Counters, Executor, drive
from walship.service.limits import Limits

STATUS_SECONDS = 0.02


@dataclass
class History:
    """What the leader has committed."""

    path: Path
    term: int = 1
    txid: int = 0
    terms: TermHistory = field(default_factory=lambda: TermHistory([(1, 0)]))
    tokens: dict[tuple[int, int], tuple[OutcomeBody, Position]] = field(default_factory=dict)
    burned: set[tuple[int, int]] = field(default_factory=set)

    @property
    def position(self) -> Position:
        return Position(self.term, self.txid)


class SmallNode:
    def __init__(self, name: str, history: History, role: Role) -> None:
        self.name, self.history, self.role = name, history, role
        self.node_id = os.urandom(16).hex()
        self.term = 0  # one it says it is in, whatever history says; 0: that
        self.refusals: deque[Reason] = deque()  # the next requests are refused for these reasons
        self.break_after_running = 0  # so many requests are run, and then the link breaks instead of an answer
        self.silent = False  # takes requests, answers nothing and tells no status
        self.mute = False  # runs what it gets, answers nothing and tells no status
        self.draining = False
        self.outcomes: deque[Outcome] = deque()  # what the next questions for an outcome are answered
        self.asked_outcomes: list[Request] = []
        self.stood = 0  # how often it was asked to stand
        self.served: list[Request] = []
        self.asked: list[ReadLevel] = []  # READ_INDEX requests
        self.unproven: WalshipError | None = None  # what a leader answers that cannot prove that it leads
        self.writers: set[asyncio.StreamWriter] = set()
        self.url = ""
        self._streams: dict[int, Executor] = {}
        self._last_stream = 0
        self._caught_up = asyncio.Event()
        self._caught_up.set()
        self._connection = self._connect()
        self._executor = Executor(self._connection, Limits(), may_write=role is Role.LEADER)
        self._applied = history.position
        self._grants: dict[int, int] = {}
        self.may_end_cursors = asyncio.Event()  # cleared, a cursor has sent its rows and not said so
        self.may_end_cursors.set()
        self._granted = asyncio.Event()

    def _connect(self) -> apsw.Connection:
        leader = self.role is Role.LEADER
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE if leader else apsw.SQLITE_OPEN_READONLY
        connection = apsw.Connection(str(self.history.path), flags=flags)
        if leader:
            connection.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF")
            connection.set_wal_hook(self._committed)
        return connection

    def _committed(self, *_: object) -> int:
        self.history.txid += 1
        return apsw.SQLITE_OK

    def lead(self) -> None:
        """Lead the next term, from what the leader before has committed."""
        self.history.term += 1
        self.history.terms.add(self.history.term, self.history.txid)
        self.role = Role.LEADER
        self._connection.close()
        self._connection = self._connect()
        self._executor = Executor(self._connection, Limits(), may_write=True)

    # --- freshness ------------------------------------------------------------------------------------------------

    @property
    def applied(self) -> Position:
        return self.history.position if self._caught_up.is_set() else self._applied

    def lag(self) -> None:
        """Stand still from now on: hold a snapshot."""
        self._caught_up.clear()
        self._applied = self.history.position
        self._connection.execute("BEGIN; SELECT count(*) FROM sqlite_schema").fetchall()

    def catch_up(self) -> None:
        self._connection.execute("COMMIT")
        self._caught_up.set()

    async def _reach(self, request: Request) -> None:
        floor = request.floor
        if floor.term and not self.history.terms.covers(self.applied, floor):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.wait_ms / 1000):
                    await self._caught_up.wait()
            if not self.history.terms.covers(self.applied, floor):
                raise Behind(f"{self.name} stands at {self.applied}, not at {floor}")

    # --- the server -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def serving(self, store: Store) -> AsyncIterator[SmallNode]:
        """Listen, register, serve."""
        async with asyncio.TaskGroup() as tasks:
            server = await asyncio.start_server(self._client, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            there = await store.get(node_key(self.name))
            record = NodeRecord(node_id=self.node_id, name=self.name, url=self.url, boot_nonce=os.urandom(4).hex())
            from walship.coordination.record import encode

            await store.put_if(node_key(self.name), encode(record), version=there.version if there else None)
            self._tasks = tasks
            try:
                yield self
            finally:
                server.close()
                self.cut()
        for executor in self._streams.values():
            executor.connection.close()
        self._connection.close()

    def cut(self) -> None:
        """Break every link."""
        for writer in list(self.writers):
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"GET /walship/link ")
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: walship-link\r\n\r\n")
            async with asyncio.TaskGroup() as tasks:
                statuses = tasks.create_task(self._tell(writer))
                link = LinkReader()
                while data := await reader.read(65536):
                    for message in link.receive_data(data):
                        if isinstance(message, Grant):
                            self._grants[message.id] = self._grants.get(message.id, 0) + message.size_bytes
                            self._granted.set()
                        else:
                            assert isinstance(message, Request)
                            tasks.create_task(self._answer(message, writer))
                statuses.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        except BaseExceptionGroup as group:
            if group.split(ConnectionError)[1] is not None:
                raise
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            if not (self.silent or self.mute):
                writer.write(self.status().to_bytes())
            await asyncio.sleep(STATUS_SECONDS)

    def status(self) -> Status:
        position = self.history.position
        return Status(
            self.name,
            self.node_id,
            self.role,
            self.term or self.history.term,
            self.applied,
            position,
            position,
            flags=StatusFlags.SERVING
            | (StatusFlags.DRAINING if self.draining else StatusFlags.NONE)
            | (StatusFlags.LED if self.role is Role.LEADER else StatusFlags.CANDIDATE),
            history=self.history.terms.starts(),
        )

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if self.silent:
            return
        if request.verb is Verb.READ_INDEX:
            writer.write(self._position(request).to_bytes())
            return
        if request.verb is Verb.STAND:
            self.stood += 1
            writer.write(Reply(request.id, b"", self.applied).to_bytes())
            return
        if request.verb is Verb.OUTCOME:
            self.asked_outcomes.append(request)
            writer.write(self._outcome(request).to_bytes())
            return
        self.served.append(request)
        try:
            if request.term and (self.role is not Role.LEADER or request.term != self.history.term):
                raise NotLeader(None, None, self.history.term)
            if self.refusals:
                reason = self.refusals.popleft()
                writer.write(Refusal(request.id, reason, reason.name, f"scripted: {reason.name}").to_bytes())
                return
            await self._reach(request)
            if request.verb is Verb.CURSOR:
                await self._cursor(request, writer)
                return
            reply = self._pipeline(request)
        except WalshipError as error:
            writer.write(refusal_of(request.id, error, self.applied).to_bytes())
            return
        if self.break_after_running:
            self.break_after_running -= 1
            writer.transport.abort()
            return
        if not self.mute:
            writer.write(reply.to_bytes())

    def _outcome(self, request: Request) -> Reply | Refusal:
        name = request.incarnation, request.seq
        if self.role is not Role.LEADER:
            return refusal_of(request.id, NotLeader(None, None, self.history.term), self.applied)
        if self.outcomes:
            return Reply(request.id, OutcomeBody(self.outcomes.popleft()).to_bytes(), self.applied)
        found = self.history.tokens.get(name)
        if found is None:
            self.history.burned.add(name)
            return Reply(request.id, OutcomeBody(Outcome.NOT_DONE).to_bytes(), self.applied)
        return Reply(request.id, found[0].to_bytes(), found[1])

    def _note_token(self, request: Request, connection: apsw.Connection, before: int, results: list[bytes]) -> None:
        name = request.incarnation, request.seq
        assert name not in self.history.tokens, "an attempt is run once"
        assert name not in self.history.burned, "what was told to be not done is not run"
        if request.seq and self.history.txid > before:
            rows = any(b'"cols":[{' in result for result in results)
            body = OutcomeBody(
                Outcome.DONE, self.history.txid, connection.changes(), connection.last_insert_rowid(), rows
            )
            self.history.tokens[name] = body, self.history.position

    def _position(self, request: Request) -> Reply | Refusal:
        self.asked.append(request.level)
        leads = self.role is Role.LEADER
        if not leads and request.level is not ReadLevel.ANY:
            return refusal_of(request.id, NotLeader(None, None, self.history.term), self.applied)
        if self.unproven is not None and request.level is ReadLevel.LINEARIZABLE:
            return refusal_of(request.id, self.unproven, self.applied)
        return Reply(request.id, b"", self.history.position)

    def _executor_for(self, request: Request) -> Executor:
        if request.stream:
            executor = self._streams.get(request.stream)
            if executor is None:
                raise ProtocolViolation("no such stream")
            return executor
        if request.flags & RequestFlags.READ_ONLY or self.role is Role.FOLLOWER:
            self._executor.may_write = False
            self._executor.start(Counters())
            return self._executor
        return Executor(self._connect(), Limits(), may_write=True)

    def _pipeline(self, request: Request) -> Reply:
        if request.verb is Verb.CLOSE_STREAM:
            gone = self._streams.pop(request.stream, None)
            if gone is not None:
                gone.connection.close()
            return Reply(request.id, b"", self.applied)
        requests = decode_pipeline(request.body, version=request.version).requests
        if self.role is not Role.LEADER and not request.flags & RequestFlags.READ_ONLY:
            raise NotLeader(None, None, self.history.term)
        executor = self._executor_for(request)
        before = self.history.txid
        results: list[bytes] = []
        texts: dict[int, str] = {}
        closed = False
        for item in requests:
            if isinstance(item, CloseRequest):
                closed = True
                results.append(ok("close"))
            elif isinstance(item, StoreSqlRequest):
                texts[item.sql_id] = item.sql
                results.append(ok("store_sql"))
            elif isinstance(item, CloseSqlRequest):
                results.append(ok("close_sql"))
            else:
                results.append(drive(executor.perform(_resolved(item, texts))))
        self._note_token(request, executor.connection, before, results)
        stream, autocommit = self._after(request, executor, closed=closed)
        flags = ReplyFlags.AUTOCOMMIT if autocommit else ReplyFlags.NONE
        return Reply(request.id, pipeline_reply(None, results), self.applied, stream, flags)

    def _after(self, request: Request, executor: Executor, *, closed: bool) -> tuple[int, bool]:
        """(the stream's id from now on, is it in autocommit)."""
        if executor is self._executor:
            return 0, True
        autocommit = executor.connection.get_autocommit()
        if closed or (autocommit and not request.flags & RequestFlags.KEEP):
            self._streams.pop(request.stream, None)
            executor.connection.close()
            return 0, True
        stream = request.stream
        if not stream:
            self._last_stream += 1
            stream = self._last_stream
            self._streams[stream] = executor
        return stream, autocommit

    async def _cursor(self, request: Request, writer: asyncio.StreamWriter) -> None:
        executor = self._executor_for(request)
        writer.write(CursorHead(request.id, self.applied).to_bytes())
        chunk = cursor_head(None)
        sent = 0
        with contextlib.closing(executor.lines(decode_cursor(request.body).batch)) as chunks:
            for lines in chunks:
                assert isinstance(lines, bytes)
                chunk += lines
                if len(chunk) > 64 * 1024:
                    while sent + len(chunk) > CURSOR_WINDOW + self._grants.get(request.id, 0):
                        self._granted.clear()
                        await self._granted.wait()
                    writer.write(Chunk(request.id, chunk).to_bytes())
                    sent, chunk = sent + len(chunk), b""
                    await writer.drain()
        if chunk:
            writer.write(Chunk(request.id, chunk).to_bytes())
        await self.may_end_cursors.wait()
        stream, autocommit = self._after(request, executor, closed=False)
        flags = ReplyFlags.AUTOCOMMIT if autocommit else ReplyFlags.NONE
        writer.write(CursorEnd(request.id, self.applied, stream, flags).to_bytes())


def _resolved(item, texts):  # type: ignore[no-untyped-def]
    """The request with stored texts of this pipeline written out."""
    import msgspec

    from walship.hrana.types import BatchRequest, ExecuteRequest

    def stmt(value):  # type: ignore[no-untyped-def]
        return (
            msgspec.structs.replace(value, sql=texts.get(value.sql_id, ""), sql_id=None) if value.sql is None else value
        )

    if isinstance(item, ExecuteRequest):
        return ExecuteRequest(stmt(item.stmt))
    if isinstance(item, BatchRequest):
        steps = [msgspec.structs.replace(step, stmt=stmt(step.stmt)) for step in item.batch.steps]
        return BatchRequest(msgspec.structs.replace(item.batch, steps=steps))
    return item
