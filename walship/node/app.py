"""The HTTP front door of a node: Hrana over HTTP on one service, and the pages around it.

A plain ASGI callable takes the Hrana requests (perf.md 1: a router before them would cost as much as the request);
Starlette serves the rest. Reads here are of level `any` unless the client sends a token (R23); a write on a follower
answers with the error that names the leader.

Every error of the tree becomes a status and a body by the table in `walship.hrana.http`; any other exception is a
bug, which uvicorn logs with its traceback and answers with 500.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar, cast

from starlette.routing import Route

from walship.errors import (
    AuthFailed,
    NotDone,
    NotReadOnly,
    ProtocolViolation,
    TransactionTimeout,
    WalshipError,
)
from walship.formats.position import Position
from walship.front.answer import (
    CORS,
    Receive,
    Send,
    send_answer,
    send_failure,
    send_head,
    send_preflight,
    until_disconnect,
)
from walship.front.body import Bodies, BodyRefused
from walship.front.dump import DUMP_PATH, send_dump, wants_row_ids
from walship.front.pages import Pages, plain_pages
from walship.front.websocket import Door
from walship.hrana import http, json, v1
from walship.hrana.auth import OPEN, Gate, Grant, may_not_write
from walship.hrana.baton import CLOSED, stream_expired
from walship.hrana.types import Batch, BatchRequest, ErrorBody, Level
from walship.node.requests import changes_connection, freshness, may_open
from walship.node.streams import Stream, StreamTable
from walship.node.websocket import SocketStream
from walship.service.request import Call, CursorReply, Reply

__all__ = ["NodeApp", "Served"]

Scope = MutableMapping[str, Any]
_R = TypeVar("_R")


class Served(Protocol):
    """What the front door and the link need of `walship.service.service.Service`."""

    async def pipeline(self, call: Call) -> Reply: ...

    async def cursor(self, call: Call, batch: Batch) -> CursorReply: ...

    async def dump(self, call: Call, *, row_ids: bool) -> CursorReply: ...

    async def close_stream(self, stream: int) -> None: ...


# A client may think between rows, but its read transaction keeps the -wal from restarting.
STALL_SECONDS: Final = 60.0


class NodeApp:
    """The ASGI application of a node.

    Args:
        service: the node's own service.
        name: of the node; sent as `walship-served-by`.
        max_body_bytes: longer request bodies are refused with 413, unread.
        baton_key: signs batons; random unless batons must survive this process.
        gate: who is let in; by default everybody.
        drain_seconds: how long WebSocket connections may take to end when the server stops.
        routes: further pages (embedded replicas).
    """

    def __init__(
        self,
        service: Served,
        pages: Pages,
        *,
        name: str,
        max_body_bytes: int = http.DEFAULT_MAX_BODY_BYTES,
        baton_key: bytes | None = None,
        gate: Gate = OPEN,
        drain_seconds: float = 10.0,
        routes: Sequence[Route] = (),
    ) -> None:
        self._service = service
        self._bodies = Bodies(max_body_bytes)
        self._gate = gate
        # Batons are signed, so ids need not be secret; asking the kernel for each would let go of the GIL, and under
        # writes getting it back from the writer thread costs far more than the call.
        rng = random.Random(secrets.token_bytes(32))
        self._streams = StreamTable(baton_key or secrets.token_bytes(32), lambda: rng.getrandbits(64))
        self._served_by = (b"walship-served-by", name.encode("ascii", "replace"))
        self._pages = plain_pages(pages, routes)
        self._door = Door(
            lambda client: SocketStream(service, client),
            gate.authenticator.check_token,
            queued_bytes=max_body_bytes,
            drain_seconds=drain_seconds,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # its token comes with its first message
            await self._door(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        method: str = scope["method"]
        try:
            scope["walship.grant"] = self._gate.admit(method, scope["path"], scope["headers"])
        except AuthFailed as error:
            await self._fail(http.failure(error), send)
            return
        endpoint = http.ENDPOINTS.get(scope["path"]) if method == "POST" else None
        if method == "GET" and scope["path"] == DUMP_PATH:
            await self._dump(scope, receive, send)
        elif endpoint is not None:
            await self._hrana(endpoint, scope, receive, send)
        elif method == "OPTIONS":
            await send_preflight(send)
        else:
            await self._pages(scope, receive, send)

    async def _hrana(self, endpoint: http.Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        grant: Grant = scope["walship.grant"]
        body: bytes | None = None
        try:
            body = await self._bodies.read(scope["headers"], receive)
            if body is None:
                return
            level, floor = freshness(scope["headers"])
            if endpoint.verb is http.Verb.PIPELINE:
                await self._pipeline(body, endpoint.version, level, floor, grant, send)
            elif endpoint.version == v1.VERSION:
                await self._v1(endpoint.verb, body, level, floor, grant, send)
            else:
                await self._cursor(body, level, floor, grant, receive, send)
        except BodyRefused as refused:
            await refused.answer(receive, send, [self._served_by, *CORS])
        except WalshipError as error:
            refusal = may_not_write() if isinstance(error, NotReadOnly) and not grant.may_write else error
            await self._fail(http.failure(refusal), send)
        finally:
            self._bodies.release(body)

    async def _pipeline(
        self, body: bytes, version: int, level: Level, floor: Position | None, grant: Grant, send: Send
    ) -> None:
        decoded = json.decode_pipeline(body, version=version)
        stream = self._streams.begin(decoded.baton)
        call = Call(
            requests=decoded.requests,
            stream=stream.service_stream,
            floor=floor,
            level=level,
            read_only=not grant.may_write,
            keep=True,
            version=version,
        )
        reply = await self._run(stream, call, self._service.pipeline)
        stream.changed = stream.changed or changes_connection(decoded.requests)
        baton = self._streams.finish(stream, reply.stream, in_transaction=not reply.autocommit)
        await self._reply(json.pipeline_reply(baton, reply.results), reply.position, send)

    async def _v1(
        self, verb: http.Verb, body: bytes, level: Level, floor: Position | None, grant: Grant, send: Send
    ) -> None:
        decoded = v1.decode(verb, body)
        call = Call(
            requests=decoded.requests,
            floor=floor,
            level=level,
            read_only=not grant.may_write,
            version=v1.VERSION,
        )
        reply = await self._service.pipeline(call)
        found = v1.answer(reply.results[0])
        if isinstance(found, http.Failure):
            await self._fail(found, send)
        else:
            await self._reply(found, reply.position, send)

    async def _reply(self, data: bytes, position: Position, send: Send) -> None:
        headers = [(b"walship-position", str(position).encode()), self._served_by, *CORS]
        await send_answer(send, 200, http.JSON_TYPE, data, headers)

    async def _cursor(
        self, body: bytes, level: Level, floor: Position | None, grant: Grant, receive: Receive, send: Send
    ) -> None:
        decoded = json.decode_cursor(body)
        stream = self._streams.begin(decoded.baton)
        call = Call(
            requests=[],
            stream=stream.service_stream,
            floor=floor,
            level=level,
            read_only=not grant.may_write,
            keep=True,
        )
        reply = await self._run(stream, call, lambda call: self._service.cursor(call, decoded.batch))
        # The head goes out before the batch has run, so its baton must assume what the batch may do. The client may
        # use that baton at once, so the stream is free from here on; the service keeps its requests in order.
        stream.changed = stream.changed or changes_connection([BatchRequest(decoded.batch)])
        may_be_open = stream.in_transaction or may_open(decoded.batch)
        baton = self._streams.finish(stream, reply.stream, in_transaction=may_be_open)
        sequence = stream.sequence
        headers = [(b"walship-position", str(reply.position).encode()), self._served_by, *CORS]
        await send_head(send, 200, http.CURSOR_TYPE, headers)
        await _stream_lines(json.cursor_head(baton), reply.lines, receive, send)
        if stream.sequence == sequence:
            stream.in_transaction = not reply.autocommit

    async def _dump(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            level, floor = freshness(scope["headers"])
            call = Call(requests=[], floor=floor, level=level, read_only=True)
            reply = await self._service.dump(call, row_ids=wants_row_ids(scope["query_string"]))
        except WalshipError as error:
            await self._fail(http.failure(error), send)
            return
        headers = [(b"walship-position", str(reply.position).encode()), self._served_by, *CORS]
        await send_dump(reply.lines, headers, receive, send)

    async def _run(self, stream: Stream, call: Call, run: Callable[[Call], Awaitable[_R]]) -> _R:
        """Run the call on its stream; a stream that the service gave up while it held nothing is revived."""
        try:
            try:
                return await run(call)
            except ProtocolViolation as error:
                if str(error) != CLOSED or call.stream == 0:
                    raise
                if stream.has_state:
                    raise stream_expired() from error
                stream.service_stream = 0
                return await run(replace(call, stream=0))
        except WalshipError as error:
            self._give_back(stream, error)
            raise

    def _give_back(self, stream: Stream, error: WalshipError) -> None:
        """After a whole-request failure: keep what is still true of the stream.

        What was refused before it began leaves the stream as it was, so the same baton may be sent again; a client
        that never forgets its baton would otherwise be locked out by one full queue (hrana.md 1.4).
        """
        if isinstance(error, NotDone | ProtocolViolation) and not isinstance(error, TransactionTimeout):
            self._streams.undo(stream)
        else:
            self._streams.drop(stream)

    async def _fail(self, failure: http.Failure, send: Send) -> None:
        await send_failure(send, failure, [self._served_by, *CORS])


async def _stream_lines(head: bytes, lines: AsyncIterator[bytes], receive: Receive, send: Send) -> None:
    """Send the head and all lines; stop when the client goes away, so that its read transaction ends with it."""
    async with aclosing(cast("AsyncGenerator[bytes, None]", lines)) as chunks, asyncio.TaskGroup() as group:
        watch = group.create_task(until_disconnect(receive), name="cursor disconnect")
        pending = head
        try:
            async for chunk in chunks:
                if watch.done():
                    return
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "http.response.body", "body": pending + chunk, "more_body": True})
                pending = b""
        except TimeoutError:
            return  # uvicorn closes the connection of an answer that has no end
        except WalshipError as error:
            pending += json.cursor_error(ErrorBody.of(error))
        finally:
            watch.cancel()
        await send({"type": "http.response.body", "body": pending})
