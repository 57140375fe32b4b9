"""One stream of a WebSocket at the proxy: the streams, plans and nodes of HTTP, without batons (hrana.md 1.6).

The client names its stream by the connection, so there is always a record here, but it is registered only from its
first request on, and one whose only request also closes it never is: most statements come that way.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import msgspec

from proxy.dispatch import CursorAnswer, Dispatcher
from proxy.front import CursorRefused, Front, cursor_failure, freshness_headers, reply_results
from proxy.link import LinkLost
from proxy.plan import Plan
from proxy.router import Need
from proxy.streams import ClientStream, Streams
from walship.errors import WalshipError
from walship.formats.link import CursorEnd
from walship.front.websocket import Client
from walship.hrana.json import cursor_error
from walship.hrana.types import Batch, CloseRequest, CursorBody, PipelineBody, StreamRequest

__all__ = ["SocketStream"]


class SocketStream:
    """Implements `walship.front.websocket.ClientStream`. Calls come one at a time."""

    def __init__(self, front: Front, streams: Streams, dispatcher: Dispatcher, client: Client) -> None:
        self._front, self._streams, self._dispatcher, self._client = front, streams, dispatcher, client
        self._stream: ClientStream | None = None

    @property
    def in_transaction(self) -> bool:
        return self._stream is not None and not self._stream.autocommit

    async def run(self, requests: list[StreamRequest]) -> Sequence[msgspec.Raw]:
        pipeline = PipelineBody(requests)
        with self._front.counted() as counted:
            stream = self._begin(closes=isinstance(requests[-1], CloseRequest))
            plan = self._plan(stream, pipeline)
            counted.planned(plan)
            try:
                answer = await self._dispatcher.pipeline(plan, stream, self._client.version)
            except BaseException as error:
                self._front.fail(stream, resumed=True, error=error)
                raise
            reply, name = answer.reply, answer.backend.name
            self._front.finish(
                stream, plan, node=name, connection=answer.connection, node_stream=reply.stream, flags=reply.flags
            )
            self._front.count_read(plan, name)
            if plan.closes:
                self._stream = None
            return reply_results(reply.body)

    async def cursor(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        with self._front.counted() as counted:
            stream = self._begin(closes=False)
            plan = self._plan(stream, CursorBody(batch))
            counted.planned(plan)
            try:
                answer = await self._dispatcher.cursor(plan, stream)
            except BaseException as error:
                self._front.fail(stream, resumed=True, error=error)
                raise
            self._front.count_read(plan, answer.backend.name)
        chunk: bytes | None = answer.first.partition(b"\n")[2]  # the head line is for batons
        ended = answer.cursor.ended and isinstance(answer.cursor.end, CursorEnd)
        try:
            if ended:  # a small one is here whole: its stream is free while the client fetches
                self._front.end_cursor(stream, plan, answer)
            while chunk is not None:
                yield chunk
                chunk = None if ended else await answer.cursor.chunk()
            if not ended:
                ended = True
                self._front.end_cursor(stream, plan, answer)
        except (LinkLost, CursorRefused) as error:
            ended = True
            self._front.fail(stream, resumed=True, error=error)
            yield cursor_error(cursor_failure(plan, error))
        finally:
            if not ended:
                await self._give_up(stream, plan, answer)

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        pin, kept = stream.pin, stream.kept
        self._streams.close(stream)
        if kept is not None:
            self._front.orphaned_pins.append(kept)
        if pin is not None:  # at once, not by the sweeper: others may wait for its write turn
            await self._dispatcher.close_pin(pin)

    def _begin(self, *, closes: bool) -> ClientStream:
        """The stream, busy. Raises what `Streams.take` does, and ProtocolViolation for unreadable headers."""
        stream = self._stream
        if stream is None:
            stream = self._streams.open()
            consistency, min_position = freshness_headers(self._client.headers)
            stream.settings = stream.settings.overridden(consistency=consistency, min_position=min_position)
            if closes:
                return stream
            self._stream = stream
        self._streams.take(stream, self._front.now())
        return stream

    def _plan(self, stream: ClientStream, decoded: PipelineBody | CursorBody) -> Plan:
        body = msgspec.json.encode(decoded)
        try:
            return self._front.plan(stream, decoded, body, stream.settings, may_write=self._client.grant.may_write)
        except WalshipError:
            self._streams.release(stream, self._front.now())
            raise

    async def _give_up(self, stream: ClientStream, plan: Plan, answer: CursorAnswer) -> None:
        """The client wants no more rows. What may be a transaction or a write is read to its end, to know how it ended;
        the node has all of that already (it makes such rows at once)."""
        if stream.pin is None and plan.need is Need.READ:
            answer.cursor.abandon()
            self._streams.release(stream, self._front.now())
            return
        try:
            while await answer.cursor.chunk() is not None:
                pass
            self._front.end_cursor(stream, plan, answer)
        except (LinkLost, CursorRefused) as error:
            self._front.fail(stream, resumed=True, error=error)
