"""The WebSocket front door of node and proxy: tasks around the pure protocol of `walship.hrana.websocket`.

One `Door` serves any number of connections as an ASGI application for the `websocket` scope. A connection has one task
that reads and one for each stream that has work, all in one task group:

    read ──> Connection (pure) ──> jobs ──> one lane per stream, in order ──> its ClientStream ──> send

Everything is bounded. A lane with `LANE_JOBS` jobs, or too many jobs or bytes of them, stops the reading, and the
kernel's window then stops the client. No connection runs more than `RUNNING` jobs at once, so that a few of them cannot
take all there is to take. A client that does not take its answers gets no new ones begun, and is cut off after
`STALL_SECONDS`, or when such clients fill the memory kept for them all. When a client goes away, what runs is run to
its end (nothing that writes is cancelled), what is queued is dropped, and every stream is closed, which rolls back
what was open.

Our side never ends an idle connection. When the server stops, it sends `DRAIN` in place of a client's message: what
runs and what is open may end first, then the connection is closed with 1012.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from walship.errors import ProtocolViolation, WalshipError
from walship.hrana import websocket as core
from walship.hrana import websocket_messages as messages
from walship.hrana.auth import FULL, Grant
from walship.hrana.json import cursor_error, failed
from walship.hrana.types import Batch, CloseRequest, ErrorBody, StreamRequest
from walship.hrana.websocket import CloseCode

__all__ = ["ABORT", "DRAIN", "Client", "ClientStream", "Door"]

_log = logging.getLogger("walship.front")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = bytes | msgspec.Raw

DRAIN: Final = "walship.drain"
"""The type of the message by which the server says that it stops (walship/front/websocket_protocol.py)."""

ABORT: Final = "walship.abort"
"""The type of the message by which a connection is ended at once, whatever its client has not read yet."""

PATH: Final = "/"
STOPPING: Final = "The server is stopping; connect again"
LANE_JOBS: Final = 8  # as sqld (hrana.md 1.6)
RUNNING: Final = 32  # jobs at once on one connection; a transaction that is open always goes on
SHARED_JOBS: Final = 16_384  # of all connections; beyond it each has SHARE_JOBS, the same for bytes
SHARE_JOBS: Final = 16
SHARED_BYTES: Final = 256 << 20
SHARE_BYTES: Final = 64 << 10
FETCH_BYTES: Final = 1_250_000  # of entries in one answer; the next fetch gets the next (sqld: an eighth of 10 MB)
BUFFER_BYTES: Final = 30 << 20  # rows kept of a cursor that another request of its stream overtakes
UNSENT_BYTES: Final = 4 << 20  # answers waiting for the client, beyond which no job is begun
SHARED_UNSENT_BYTES: Final = 256 << 20  # of all connections; beyond it the one that has most is cut off
STALL_SECONDS: Final = 60.0
HELLO_SECONDS: Final = 30.0  # a client that has not said hello by then is none
DRAIN_SHARE: Final = 0.8  # of the drain time; what is left is for saying goodbye


@dataclass(slots=True)
class Client:
    """Who is at the other end. `grant` changes when the client says hello again."""

    version: int
    headers: Sequence[tuple[bytes, bytes]]
    grant: Grant = FULL


class ClientStream(Protocol):
    """One stream of one client, wherever it is run. Used by one call at a time."""

    @property
    def in_transaction(self) -> bool:
        """Would something be lost if the stream ended now?"""
        ...

    async def run(self, requests: list[StreamRequest]) -> Sequence[Result]:
        """One StreamResult per request. A `close` behind them ends the stream. Raises errors of the tree."""
        ...

    def cursor(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        """Chunks of whole lines of a cursor, without the head line. Raises errors of the tree, before the first chunk
        and between two. To be closed when it is not read to its end."""
        ...

    async def close(self) -> None:
        """End the stream, rolling back what is open. Idempotent; raises nothing of the tree."""
        ...


class Door:
    """The WebSocket application of one process.

    Args:
        open_stream: makes a stream; costs nothing until it runs something.
        authenticate: the grant of a token in hello; raises AuthFailed.
        queued_bytes: of jobs waiting on one connection, beyond which it is not read from.
        drain_seconds: how long the server waits for its connections when it stops.
    """

    def __init__(
        self,
        open_stream: Callable[[Client], ClientStream],
        authenticate: Callable[[str | None], Grant],
        *,
        queued_bytes: int,
        drain_seconds: float,
        limits: core.Limits = core.Limits(),
        max_connections: int = 8192,
    ) -> None:
        self.open_stream, self.authenticate, self.limits = open_stream, authenticate, limits
        self.queued_bytes = queued_bytes
        self.drain_seconds = drain_seconds * DRAIN_SHARE
        self.max_connections = max_connections
        self.jobs = self.job_bytes = self.unsent_bytes = 0
        self._open: set[_Connection] = set()

    @property
    def connections(self) -> int:
        return len(self._open)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        if scope["path"] not in (PATH, ""):
            await _refuse(send, 404, "Hrana over WebSocket is served at /")
            return
        if self.connections >= self.max_connections:
            await _refuse(send, 503, f"{self.connections} WebSocket connections are open already. Try again")
            return
        try:
            version, subprotocol = core.negotiate(scope["subprotocols"])
        except ProtocolViolation as error:
            await _refuse(send, 400, str(error))
            return
        connection = _Connection(self, Client(version, scope["headers"]), receive, send)
        self._open.add(connection)
        try:
            await send({"type": "websocket.accept", "subprotocol": subprotocol})
            await connection.serve()
        except OSError:
            return  # it went away while it was accepted
        finally:
            self._open.discard(connection)

    async def make_room(self) -> None:
        """Cut off who has most answers waiting, until all of them fit."""
        if self.unsent_bytes <= SHARED_UNSENT_BYTES:
            return
        waiting = sorted((each for each in self._open if not each.over), key=lambda each: each.unsent_bytes)
        unsent = sum(each.unsent_bytes for each in waiting)
        while unsent > SHARED_UNSENT_BYTES:
            largest = waiting.pop()
            unsent -= largest.unsent_bytes
            await largest.abort("it had most of the answers that fill the memory kept for clients that do not read")


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    with suppress(OSError):
        await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})


@dataclass(eq=False, slots=True)
class _Lane:
    """The jobs of one stream, in order."""

    stream: ClientStream
    jobs: deque[tuple[core.Job, int]] = field(default_factory=deque)
    cursor: _Cursor | None = None
    running: bool = False


class _Connection:
    """One connection from its acceptance to its end."""

    def __init__(self, door: Door, client: Client, receive: Receive, send: Send) -> None:
        self._door, self._client, self._receive, self._asgi_send = door, client, receive, send
        self._core = core.Connection(client.version, door.limits)
        self._lanes: dict[int, _Lane] = {}
        self._closing: set[_Lane] = set()  # their ids are free again, their last jobs are not done
        self._sending = asyncio.Lock()
        self._progress = asyncio.Event()  # a job ended, or an answer is out
        self._jobs = self._job_bytes = self.unsent_bytes = 0
        self._slots = asyncio.Semaphore(RUNNING)
        self.over = False  # nothing can be sent any more
        self._group: asyncio.TaskGroup
        self._reading: asyncio.Task[None]

    async def serve(self) -> None:
        """Until the client, a broken rule or the server's stop ends it; streams are closed then."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._reading = group.create_task(self._read(), name="websocket")
        except Exception:
            await self._hang_up(CloseCode.INTERNAL, "Internal error")
            raise
        except asyncio.CancelledError:
            # The server's time is over. Its task ends here, and it would log the cancellation as a fault of ours.
            await self._hang_up(CloseCode.RESTART, STOPPING)
        finally:
            self._count(-self._jobs, -self._job_bytes)
            for lane in [*self._lanes.values(), *self._closing]:
                await _end(lane)

    # --- in -----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                while self._core.state in (core.State.NEW, core.State.GREETED):
                    if not await self._next():
                        return
        except TimeoutError:
            await self._hang_up(CloseCode.POLICY, f"No hello within {HELLO_SECONDS:g} s")
            return
        while await self._next():
            pass

    async def _next(self) -> bool:
        """Take one message; False when there will be no more."""
        message = await self._receive()
        kind = message["type"]
        if kind == "websocket.disconnect":
            self._lose()
            return False
        if kind == DRAIN:
            self._group.create_task(self._leave(), name="websocket drain")
            return True
        text = message.get("text")
        actions = self._core.receive_binary() if text is None else self._core.receive_text(text)
        for action in actions:
            if not await self._act(action, len(text or "")):
                return False
        return True

    async def _act(self, action: core.Action, size: int) -> bool:
        """Do what the protocol says; False when it says that this is the end."""
        if isinstance(action, core.Send):
            await self._send(action.data)
        elif isinstance(action, core.HangUp):
            await self._hang_up(action.code, action.reason)
            return False
        elif isinstance(action, core.Authenticate):
            for answer in self._authenticate(action.jwt):
                if not await self._act(answer, 0):
                    return False
        else:
            await self._enqueue(action, size)
        return not self.over

    def _authenticate(self, jwt: str | None) -> list[core.Action]:
        try:
            self._client.grant = self._door.authenticate(jwt)
        except WalshipError as error:
            return self._core.rejected(error)
        return self._core.accepted()

    async def _enqueue(self, job: core.Job, size: int) -> None:
        lane = self._lanes.get(job.stream_id)
        if lane is None:
            if isinstance(job, core.EndStream):
                await self._send(messages.response_ok(job.request_id, "close_stream"))
                return
            lane = self._lanes[job.stream_id] = _Lane(self._door.open_stream(self._client))
        if isinstance(job, core.EndStream):
            self._closing.add(self._lanes.pop(job.stream_id))
        lane.jobs.append((job, size))
        self._count(1, size)
        if not lane.running:
            lane.running = True
            self._group.create_task(self._work(lane), name=f"websocket stream {job.stream_id}")
        while (len(lane.jobs) > LANE_JOBS or self._has_too_much()) and not self.over:
            await self._wait()

    def _count(self, jobs: int, size: int) -> None:
        self._jobs += jobs
        self._job_bytes += size
        self._door.jobs += jobs
        self._door.job_bytes += size

    def _has_too_much(self) -> bool:
        door = self._door
        return (
            self._job_bytes > door.queued_bytes
            or (self._jobs > SHARE_JOBS and door.jobs > SHARED_JOBS)
            or (self._job_bytes > SHARE_BYTES and door.job_bytes > SHARED_BYTES)
        )

    async def _wait(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    # --- the work of one stream ---------------------------------------------------------------------------------

    async def _work(self, lane: _Lane) -> None:
        """Run the jobs of a lane until it has none."""
        while lane.jobs and not self.over:
            free = lane.stream.in_transaction  # others may wait for just its end
            if not free:
                await self._slots.acquire()
            try:
                while self.unsent_bytes > UNSENT_BYTES and not self.over:
                    await self._wait()
                if not self.over:
                    await self._work_one(lane)
            finally:
                if not free:
                    self._slots.release()
                self._progress.set()
        lane.running = False
        self._progress.set()

    async def _work_one(self, lane: _Lane) -> None:
        job, size = lane.jobs.popleft()
        last = lane.jobs[0][0] if lane.jobs else None
        try:
            if isinstance(job, core.Run) and isinstance(last, core.EndStream):
                # As most clients send one statement: told of the end at once, its node need not keep the stream.
                self._count(-1, -lane.jobs.popleft()[1])
                await self._run(lane, job, last)
            else:
                await self._perform(lane, job)
        finally:
            self._count(-1, -size)

    async def _perform(self, lane: _Lane, job: core.Job) -> None:
        if isinstance(job, core.Run):
            await self._run(lane, job, None)
        elif isinstance(job, core.StartCursor):
            await self._start_cursor(lane, job)
        elif isinstance(job, core.FetchCursor):
            await self._fetch(lane, job)
        elif isinstance(job, core.EndCursor):
            await _end_cursor(lane)
            await self._send(messages.response_ok(job.request_id, "close_cursor"))
        else:
            await self._end(lane, job)

    async def _run(self, lane: _Lane, job: core.Run, end: core.EndStream | None) -> None:
        requests: list[StreamRequest] = [job.request] if end is None else [job.request, CloseRequest()]
        result: Result
        try:
            if lane.cursor is not None:
                await lane.cursor.buffer_rest()
            result = (await lane.stream.run(requests))[0]
        except WalshipError as error:
            result = failed(ErrorBody.of(error))
        await self._send(messages.response(job.request_id, result))
        if end is not None:
            await self._end(lane, end)

    async def _start_cursor(self, lane: _Lane, job: core.StartCursor) -> None:
        cursor = _Cursor(lane.stream.cursor(job.batch))
        try:
            await cursor.start()
        except WalshipError as error:
            await self._send(messages.response_error(job.request_id, ErrorBody.of(error)))
            return
        lane.cursor = cursor
        await self._send(messages.response_ok(job.request_id, "open_cursor"))

    async def _fetch(self, lane: _Lane, job: core.FetchCursor) -> None:
        if lane.cursor is None:
            error = ErrorBody(f"Cursor {job.cursor_id} has failed to open", "CURSOR_NOT_OPEN")
            await self._send(messages.response_error(job.request_id, error))
            return
        entries, done = await lane.cursor.fetch(job.max_count)
        await self._send(messages.fetched(job.request_id, entries, done=done))

    async def _end(self, lane: _Lane, job: core.EndStream) -> None:
        self._closing.discard(lane)
        await _end(lane)
        await self._send(messages.response_ok(job.request_id, "close_stream"))

    # --- out ----------------------------------------------------------------------------------------------------

    async def _send(self, data: bytes) -> None:
        self._count_unsent(len(data))
        try:
            await self._door.make_room()
            async with asyncio.timeout(STALL_SECONDS), self._sending:
                if not self.over:
                    await self._asgi_send({"type": "websocket.send", "text": data.decode()})
        except TimeoutError:
            await self.abort(f"took no answer for {STALL_SECONDS:g} s")
        except OSError:
            self._lose()
            self._reading.cancel()
        finally:
            self._count_unsent(-len(data))
            self._progress.set()

    def _count_unsent(self, size: int) -> None:
        self.unsent_bytes += size
        self._door.unsent_bytes += size

    async def abort(self, reason: str) -> None:
        """End the connection now: its client reads nothing, so it can be told nothing."""
        if not self.over:
            _log.info("cut off websocket reason=%s", reason)
            self._lose()
            self._reading.cancel()
        with suppress(OSError):
            await self._asgi_send({"type": ABORT})

    async def _hang_up(self, code: CloseCode, reason: str) -> None:
        try:
            async with asyncio.timeout(STALL_SECONDS), self._sending:
                if not self.over:
                    self._lose()
                    await self._asgi_send({"type": "websocket.close", "code": int(code), "reason": reason})
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Nothing more can be said; what waits for something is told to look again."""
        self.over = True
        self._progress.set()

    async def _leave(self) -> None:
        """The server stops: let what runs and what is open end, for a bounded time, and say goodbye."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._door.drain_seconds):
                while not self.over and any(map(_is_busy, [*self._lanes.values(), *self._closing])):
                    await self._wait()
        await self._hang_up(CloseCode.RESTART, STOPPING)
        self._reading.cancel()


def _is_busy(lane: _Lane) -> bool:
    return lane.running or lane.stream.in_transaction


async def _end_cursor(lane: _Lane) -> None:
    cursor, lane.cursor = lane.cursor, None
    if cursor is not None:
        await cursor.close()


async def _end(lane: _Lane) -> None:
    await _end_cursor(lane)
    await lane.stream.close()


class _Cursor:
    """The entries of one batch, pulled as they are asked for."""

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks
        self._entries: deque[bytes] = deque()
        self._done = False

    async def start(self) -> None:
        """Begin the batch. Raises what ends it as a whole."""
        await self._pull()

    async def fetch(self, max_count: int) -> tuple[list[bytes], bool]:
        """The next entries, and whether there are no more."""
        entries: list[bytes] = []
        size = 0
        while len(entries) < max_count and size < FETCH_BYTES:
            if not self._entries:
                if self._done:
                    break
                await self._pull_or_fail()
                continue
            entry = self._entries.popleft()
            size += len(entry)
            entries.append(entry)
        return entries, self._done and not self._entries

    async def buffer_rest(self) -> None:
        """Take all that is left, so that its stream is free; what does not fit ends the cursor with an error."""
        size = sum(map(len, self._entries))
        while not self._done:
            before = len(self._entries)
            await self._pull_or_fail()
            size += sum(len(self._entries[index]) for index in range(before, len(self._entries)))
            if size > BUFFER_BYTES:
                await self.close()
                self._fail(ErrorBody("The response is too large to be kept; fetch it first", "RESPONSE_TOO_LARGE"))

    async def close(self) -> None:
        """Give up what was not fetched."""
        self._done = True
        await self._chunks.aclose()

    async def _pull(self) -> None:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            self._done = True
        else:
            self._entries.extend(line for line in chunk.split(b"\n") if line)

    async def _pull_or_fail(self) -> None:
        try:
            await self._pull()
        except WalshipError as error:
            self._fail(ErrorBody.of(error))

    def _fail(self, error: ErrorBody) -> None:
        self._done = True
        self._entries.append(cursor_error(error).rstrip(b"\n"))
