"""GET /dump at the proxy: a node that is fresh enough dumps, by the link, at this client's pace."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
from starlette.types import Receive, Scope, Send

from proxy.dispatch import CursorAnswer, Dispatcher
from proxy.front import Front, freshness_headers, served
from proxy.plan import Plan
from proxy.router import Need
from proxy.streams import Streams
from walship.errors import WalshipError
from walship.formats.link import CursorEnd, Refusal, Verb, error_of
from walship.front.answer import send_failure
from walship.front.dump import send_dump, wants_row_ids
from walship.hrana.http import failure
from walship.hrana.types import DumpBody

__all__ = ["dump"]


async def dump(
    front: Front, streams: Streams, dispatcher: Dispatcher, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer one request. It is a read like any other: level, floor and choice of the node are the same."""
    try:
        with front.counted() as counted:
            front.check_open()
            consistency, min_position = freshness_headers(scope["headers"])
            settings = streams.settings.overridden(consistency=consistency, min_position=min_position)
            body = msgspec.json.encode(DumpBody(wants_row_ids(scope["query_string"])))
            plan = Plan(
                Need.READ,
                body,
                texts=(),
                closes=True,
                opens=False,
                commits=False,
                makes_state=False,
                stored={},
                settings=settings,
                read_only=True,
            )
            counted.planned(plan)
            answer = await dispatcher.cursor(plan, streams.open(), Verb.DUMP)
            front.count_read(plan, answer.backend.name)
    except WalshipError as error:
        await send_failure(send, failure(error))
        return
    headers = served(answer.backend.name, answer.cursor.position)
    await send_dump(_chunks(answer), headers, receive, send)


async def _chunks(answer: CursorAnswer) -> AsyncGenerator[bytes, None]:
    """The text. Raises the error that a node ended it with, and LinkLost."""
    try:
        chunk: bytes | None = answer.first
        while chunk is not None:
            yield chunk
            chunk = await answer.cursor.chunk()
        end = answer.cursor.end
        if isinstance(end, Refusal):
            raise error_of(end)
    finally:
        if not isinstance(answer.cursor.end, CursorEnd):
            answer.cursor.abandon()
