"""The node's end of the proxy link: requests of many clients over one upgraded connection (perf.md 4).

Each request runs as its own task in the connection's task group and is answered by exactly one REPLY, one REFUSED, or
CHUNK* END. Writes of one turn of the loop leave in one piece. Everything is bounded: requests in flight (OVERLOADED
beyond), a cursor's unconfirmed bytes (the proxy grants more), and a proxy that does not read is not read from.

Nothing that writes is cancelled: when the proxy goes away, requests under way run to their end with nobody to tell.
Cursors stop at their next chunk, since they only read for somebody. Streams end with the link they came by: their
proxy has told its clients that they are lost, and an open transaction would keep the write turn from everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, cast

import msgspec

from walship.engine.tokens import Name
from walship.errors import Behind, Draining, Fenced, Overloaded, ProtocolViolation, Unavailable, WalshipError
from walship.formats import link
from walship.formats.position import Position
from walship.hrana import json
from walship.hrana.types import CloseRequest, DumpBody, ErrorBody, Level
from walship.node.app import Served
from walship.service.request import Call

__all__ = ["LinkServer"]

log = logging.getLogger("walship.link")

MAX_IN_FLIGHT: Final = 1024  # per link; a proxy keeps its own bound below it
READ_BYTES: Final = 256 << 10
WRITE_HIGH_WATER: Final = 1 << 20  # beyond it no further requests are read
STATUS_SECONDS: Final = 0.1  # at least this often
STATUS_PAUSE_SECONDS: Final = 0.005  # at most this often
STALL_SECONDS: Final = 30.0  # a proxy that takes nothing for so long is gone, as far as it matters
CURSOR_STALL_SECONDS: Final = 60.0  # a cursor keeps the -wal from restarting; its client may think, but not for ever
_DUMP: Final = msgspec.json.Decoder(DumpBody)
_LEVELS: Final = {
    link.ReadLevel.ANY: Level.ANY,
    link.ReadLevel.SESSION: Level.SESSION,
    link.ReadLevel.LINEARIZABLE: Level.LINEARIZABLE,
}


class LinkServer:
    """Serves any number of links from one service.

    Args:
        status: what the node is now, `in_flight` aside, which is filled in here.
        on_change: registers a callback for changes of the status (watermarks, role) and returns its end;
            `Watermarks.on_change` has this shape.
        position_for: answers READ_INDEX: (level, patience in seconds) to a position.
        outcome_of: answers OUTCOME; see `walship.node.outcomes`.
        stand: a proxy asks this node to stand for election.
        joined: False while what this node shows may be no history (failover.md I21): `session` is refused then.
    """

    def __init__(
        self,
        service: Served,
        status: Callable[[], link.Status],
        on_change: Callable[[Callable[[], None]], Callable[[], None]],
        *,
        position_for: Callable[[Level, float], Awaitable[Position]] | None = None,
        outcome_of: Callable[[Name, Position, float, int | None], Awaitable[tuple[link.OutcomeBody, Position]]]
        | None = None,
        stand: Callable[[], None] | None = None,
        joined: Callable[[], bool] = lambda: True,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self.position_for = position_for
        self.outcome_of = outcome_of
        self.stand = stand
        self.joined = joined
        self.service = service
        self.status = status
        self.on_change = on_change
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self.draining = False
        self._ended = False
        self._links: set[_Link] = set()

    @property
    def links(self) -> int:
        return len(self._links)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one link until the proxy or `drain` ends it: the handler for `GET /walship/link`."""
        if self._ended:
            writer.close()  # a proxy that came back while the last parts close; it would keep the process from ending
            return
        served = _Link(self, reader, writer)
        self._links.add(served)
        try:
            await served.run()
        finally:
            self._links.discard(served)

    async def drain(self, deadline_seconds: float) -> None:
        """Tell the proxies, refuse new requests, let those under way finish, end the links. Idempotent."""
        self.draining = True
        for served in tuple(self._links):
            served.changed.set()
        try:
            async with asyncio.timeout(deadline_seconds):
                for served in tuple(self._links):
                    await served.idle()
        except TimeoutError:
            log.warning("end links with requests under way count=%d", self.in_flight)
        self._ended = True
        for served in tuple(self._links):
            served.end()

    def current_status(self) -> link.Status:
        """The status to send, complete."""
        status = self.status()
        flags = status.flags | link.StatusFlags.DRAINING if self.draining else status.flags
        return link.Status(
            status.name,
            status.node_id,
            status.role,
            status.term,
            status.applied,
            status.durable,
            status.acked,
            self.in_flight,
            status.lag_ms,
            flags,
            status.history,
        )


class _Window:
    """How many more bytes of a cursor the proxy will take."""

    __slots__ = ("_more", "closed", "left")

    def __init__(self) -> None:
        self.left = link.CURSOR_WINDOW
        self.closed = False
        self._more = asyncio.Event()

    def grant(self, size_bytes: int) -> None:
        self.left += size_bytes
        self._more.set()

    def close(self) -> None:
        self.closed = True
        self._more.set()

    async def spend(self, size_bytes: int) -> bool:
        """Wait until something is left, then take; one chunk may pass the window, the next waits.

        False when the link is gone. Raises Unavailable when nobody takes anything for too long.
        """
        while self.left <= 0 and not self.closed:
            self._more.clear()
            try:
                async with asyncio.timeout(CURSOR_STALL_SECONDS):
                    await self._more.wait()
            except TimeoutError:
                raise Unavailable(f"nobody took a row for {CURSOR_STALL_SECONDS:g} s; the cursor was ended") from None
        self.left -= size_bytes
        return not self.closed


class _Link:
    """One connection: a reading loop, a status loop, and a task per request, in one task group."""

    def __init__(self, server: LinkServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._windows: dict[int, _Window] = {}
        self._streams: set[int] = set()  # of the service, open for clients of this proxy
        self._in_flight = 0
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._lost = asyncio.Event()
        self.changed = asyncio.Event()
        writer.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)

    async def run(self) -> None:
        end_notice = self._server.on_change(self.changed.set)
        try:
            async with asyncio.TaskGroup() as group:
                statuses = group.create_task(self._send_statuses(), name="link statuses")
                try:
                    await self._read(group)
                finally:
                    self._lose()
                    statuses.cancel()
            await self._close_streams()
        finally:
            end_notice()

    async def _close_streams(self) -> None:
        """Behind the last request of the link: what it left open, nobody can reach any more."""
        for stream in self._streams:
            try:
                await self._server.service.pipeline(Call(requests=[CloseRequest()], stream=stream))
            except WalshipError as error:
                log.info("close stream of a lost link error=%s", error)

    def _follow(self, before: int, after: int) -> None:
        """A request on stream `before` left stream `after`; 0 is none."""
        self._streams.discard(before)
        if after:
            self._streams.add(after)

    async def idle(self) -> None:
        """Wait until no request of this link is under way and its answers are out of our hands."""
        await self._none_left.wait()
        self._flush()
        if not self._lost.is_set():
            await self._writer.drain()

    def end(self) -> None:
        """Close the connection; the reading loop then comes to its end."""
        self._lose()
        self._writer.close()

    async def _read(self, group: asyncio.TaskGroup) -> None:
        messages = link.LinkReader()
        while not self._lost.is_set():
            try:
                data = await self._reader.read(READ_BYTES)
                if not data:
                    return
                for message in messages.receive_data(data):
                    self._take(message, group)
                async with asyncio.timeout(STALL_SECONDS):
                    await self._writer.drain()
            except OSError as error:  # TimeoutError is one
                log.info("lost link reason=%s", error or type(error).__name__)
                return
            except ProtocolViolation as error:
                log.warning("close link reason=%s", error)
                return

    def _take(self, message: link.Message, group: asyncio.TaskGroup) -> None:
        if isinstance(message, link.Request):
            server = self._server
            if server.draining:
                self._refuse(message.id, Draining("this node is shutting down; nothing was run. Ask another node"))
            elif self._in_flight >= server.max_in_flight:
                self._refuse(message.id, Overloaded(f"{self._in_flight} requests are under way; nothing was run"))
            else:
                self._in_flight += 1
                server.in_flight += 1
                self._none_left.clear()
                group.create_task(self._answer(message))
        elif isinstance(message, link.Grant):
            window = self._windows.get(message.id)
            if window is not None:
                window.grant(message.size_bytes)
        else:
            raise ProtocolViolation(f"link: a proxy does not send a {type(message).__name__}")

    async def _answer(self, request: link.Request) -> None:
        try:
            if request.verb is link.Verb.CURSOR:
                await self._cursor(request)
            elif request.verb is link.Verb.DUMP:
                await self._dump(request)
            elif request.verb is link.Verb.READ_INDEX:
                await self._position(request)
            elif request.verb is link.Verb.OUTCOME:
                await self._outcome(request)
            elif request.verb is link.Verb.STAND:
                self._stand(request)
            else:
                await self._pipeline(request)
        except WalshipError as error:
            self._refuse(request.id, error)
        finally:
            self._windows.pop(request.id, None)
            self._in_flight -= 1
            self._server.in_flight -= 1
            if not self._in_flight:
                self._none_left.set()

    def _check_term(self, request: link.Request) -> None:
        status = self._server.status()
        if status.role is link.Role.LEADER and status.term < request.min_term:
            raise Fenced(f"this node leads term {status.term}, the proxy knows of term {request.min_term}")

    def _call(self, request: link.Request) -> Call:
        self._check_term(request)
        if request.level is not link.ReadLevel.ANY and not self._server.joined():
            raise Behind("this node has not followed a leader since it started or led; nothing was run. Ask another")
        name = (request.incarnation, request.seq)
        if name != link.NO_TOKEN and not request.term:
            raise ProtocolViolation("link: a request with a commit token is bound to no term; nothing was run")
        return Call(
            requests=[],
            stream=request.stream,
            floor=None if request.floor == link.NO_POSITION else request.floor,
            level=_LEVELS[request.level],
            read_only=link.RequestFlags.READ_ONLY in request.flags,
            keep=link.RequestFlags.KEEP in request.flags,
            wait_seconds=request.wait_ms / 1000,
            ack=None if request.ack < 0 else request.ack,
            version=request.version,
            term=request.term,
            token=None if name == link.NO_TOKEN else name,
        )

    async def _pipeline(self, request: link.Request) -> None:
        call = self._call(request)
        if request.verb is link.Verb.CLOSE_STREAM:
            self._streams.discard(request.stream)
            call.requests.append(CloseRequest())
        else:
            call.requests.extend(json.decode_pipeline(request.body, version=request.version).requests)
        reply = await self._server.service.pipeline(call)
        self._follow(request.stream, reply.stream)
        body = json.pipeline_reply(None, reply.results)
        flags = link.ReplyFlags.AUTOCOMMIT if reply.autocommit else link.ReplyFlags.NONE
        self._send(link.Reply(request.id, body, reply.position, reply.stream, flags).to_bytes())

    async def _position(self, request: link.Request) -> None:
        call = self._call(request)
        if self._server.position_for is None:
            raise ProtocolViolation("link: this node tells no positions")
        position = await self._server.position_for(call.level, call.wait_seconds)
        self._send(link.Reply(request.id, b"", position).to_bytes())

    def _stand(self, request: link.Request) -> None:
        if self._server.stand is None:
            raise ProtocolViolation("link: this node stands for no election")
        self._server.stand()
        self._send(link.Reply(request.id, b"", link.NO_POSITION).to_bytes())

    async def _outcome(self, request: link.Request) -> None:
        if self._server.outcome_of is None:
            raise ProtocolViolation("link: this node tells no outcomes")
        self._check_term(request)
        name = (request.incarnation, request.seq)
        ack = None if request.ack < 0 else request.ack
        body, position = await self._server.outcome_of(name, request.floor, request.wait_ms / 1000, ack)
        self._send(link.Reply(request.id, body.to_bytes(), position).to_bytes())

    async def _dump(self, request: link.Request) -> None:
        asked = json.decode_body(_DUMP, request.body)
        window = self._window(request.id)
        reply = await self._server.service.dump(self._call(request), row_ids=asked.preserve_row_ids)
        self._send(link.CursorHead(request.id, reply.position).to_bytes())
        async with aclosing(cast("AsyncGenerator[bytes, None]", reply.lines)) as chunks:
            async for chunk in chunks:
                if not await window.spend(len(chunk)):
                    return
                self._send(link.Chunk(request.id, chunk).to_bytes())
        self._send(link.CursorEnd(request.id, reply.position).to_bytes())

    def _window(self, id: int) -> _Window:
        window = self._windows[id] = _Window()
        if self._lost.is_set():
            window.close()
        return window

    async def _cursor(self, request: link.Request) -> None:
        batch = json.decode_cursor(request.body).batch
        window = self._window(request.id)
        reply = await self._server.service.cursor(self._call(request), batch)
        self._follow(request.stream, reply.stream)
        self._send(link.CursorHead(request.id, reply.position).to_bytes())
        pending = json.cursor_head(None)
        async with aclosing(cast("AsyncGenerator[bytes, None]", reply.lines)) as chunks:
            try:
                async for chunk in chunks:
                    pending += chunk
                    if not await window.spend(len(pending)):
                        return
                    self._send(link.Chunk(request.id, pending).to_bytes())
                    pending = b""
            except WalshipError as error:
                pending += json.cursor_error(ErrorBody.of(error))
        if pending:
            self._send(link.Chunk(request.id, pending).to_bytes())
        flags = link.ReplyFlags.AUTOCOMMIT if reply.autocommit else link.ReplyFlags.NONE
        self._send(link.CursorEnd(request.id, reply.position, reply.stream, flags).to_bytes())

    def _refuse(self, id: int, error: WalshipError) -> None:
        status = self._server.status()
        self._send(link.refusal_of(id, error, status.applied).to_bytes())

    def _send(self, data: bytes) -> None:
        """Queue a message; all of this turn of the loop leave in one write."""
        if self._lost.is_set():
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        out, self._out = self._out, []
        # A closing transport of uvloop raises on write, which would tear down whoever called.
        if out and not self._writer.transport.is_closing():
            self._writer.write(out[0] if len(out) == 1 else b"".join(out))

    def _lose(self) -> None:
        self._flush()
        self._lost.set()
        for window in self._windows.values():
            window.close()

    async def _send_statuses(self) -> None:
        """The first message of a link, then one on every change, coalesced, and at least one each 100 ms."""
        while not self._lost.is_set():
            self.changed.clear()
            self._send(self._server.current_status().to_bytes())
            await asyncio.sleep(STATUS_PAUSE_SECONDS)
            try:
                async with asyncio.timeout(STATUS_SECONDS):
                    await self.changed.wait()
            except TimeoutError:
                continue
