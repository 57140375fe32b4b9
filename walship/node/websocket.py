"""One stream of a WebSocket at a node's own front door, run by the node's service (R23)."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from walship.errors import NotDone, NotReadOnly, ProtocolViolation, TransactionTimeout, WalshipError
from walship.front.websocket import Client
from walship.hrana.auth import may_not_write
from walship.hrana.baton import CLOSED
from walship.hrana.types import Batch, BatchRequest, StreamRequest
from walship.node.requests import changes_connection, freshness, may_open
from walship.service.request import Call

if TYPE_CHECKING:
    from walship.node.app import Served

__all__ = ["SocketStream"]

_log = logging.getLogger("walship.node.websocket")

_R = TypeVar("_R")


class SocketStream:
    """Implements `walship.front.websocket.ClientStream`.

    The service's stream behind it comes and goes: one that was forgotten while it held nothing is begun anew; when
    something was lost with it, one request is told so, and the next begins anew.
    """

    def __init__(self, service: Served, client: Client) -> None:
        self._service, self._client = service, client
        self._stream = 0  # the service's; 0 = it keeps nothing for us
        self._changed = False  # settings or TEMP objects were left on its connection
        self._autocommit = True

    @property
    def in_transaction(self) -> bool:
        return not self._autocommit

    async def run(self, requests: list[StreamRequest]) -> Sequence[bytes]:
        reply = await self._revived(self._call(requests), self._service.pipeline)
        self._changed = self._changed or changes_connection(requests)
        self._stream, self._autocommit = reply.stream, reply.autocommit
        return reply.results

    async def cursor(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        reply = await self._revived(self._call([]), lambda call: self._service.cursor(call, batch))
        self._changed = self._changed or changes_connection([BatchRequest(batch)])
        self._stream, self._autocommit = reply.stream, self._autocommit and not may_open(batch)
        async with aclosing(cast("AsyncGenerator[bytes, None]", reply.lines)) as chunks:
            async for chunk in chunks:
                yield chunk
        self._autocommit = reply.autocommit

    async def close(self) -> None:
        stream, self._stream = self._stream, 0
        self._changed, self._autocommit = False, True
        if stream:
            try:
                await self._service.close_stream(stream)
            except WalshipError as error:  # what it held is rolled back all the same, by the service's own timers
                _log.info("close stream error=%s", error)

    def _call(self, requests: list[StreamRequest]) -> Call:
        client = self._client
        level, floor = freshness(client.headers)
        return Call(
            requests=requests,
            stream=self._stream,
            floor=floor,
            level=level,
            read_only=not client.grant.may_write,
            keep=True,
            version=client.version,
        )

    async def _revived(self, call: Call, run: Callable[[Call], Awaitable[_R]]) -> _R:
        try:
            try:
                return await run(call)
            except ProtocolViolation as error:
                if str(error) != CLOSED or self._changed or self.in_transaction or not call.stream:
                    raise
                return await run(replace(call, stream=0))
        except WalshipError as error:
            if _lost_its_stream(error):
                await self.close()
            if isinstance(error, NotReadOnly) and call.read_only:
                raise may_not_write() from error
            raise


def _lost_its_stream(error: WalshipError) -> bool:
    """Is what the stream held gone with this error? What was refused before it began leaves it as it was."""
    if isinstance(error, TransactionTimeout) or str(error) == CLOSED:
        return True
    return not isinstance(error, NotDone | ProtocolViolation)
