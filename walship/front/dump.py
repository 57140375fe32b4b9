"""GET /dump at the front doors of node and proxy: the database as SQL text, streamed (hrana.md 1.1).

A dump that cannot go on ends in `ROLLBACK`, so that a shell which reads it keeps nothing of it, and its answer is cut
off instead of ended, so that whoever downloads it is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Final, cast

from walship.errors import WalshipError
from walship.front.answer import Headers, Receive, Send, send_head, until_disconnect

__all__ = ["DUMP_PATH", "send_dump", "wants_row_ids"]

DUMP_PATH: Final = "/dump"
STALL_SECONDS: Final = 60.0  # its snapshot keeps the -wal of a node from restarting
_FAILED: Final = b"ROLLBACK; -- due to errors\n"

_log = logging.getLogger("walship.front")


def wants_row_ids(query: bytes) -> bool:
    """Does the query string say `preserve_row_ids`?"""
    found = dict(part.partition(b"=")[::2] for part in query.split(b"&"))
    return found.get(b"preserve_row_ids", b"false").lower() in (b"", b"1", b"true", b"yes", b"on")


async def send_dump(
    chunks: AsyncIterator[bytes],
    headers: Headers,
    receive: Receive,
    send: Send,
) -> None:
    """Answer with all chunks, at the client's pace. Closes `chunks` whatever happens."""

    async def part(body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(STALL_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async with aclosing(cast("AsyncGenerator[bytes, None]", chunks)) as texts, asyncio.TaskGroup() as tasks:
        gone = tasks.create_task(until_disconnect(receive), name="dump disconnect")
        try:
            await send_head(send, 200, "text/plain; charset=utf-8", [(b"cache-control", b"no-store"), *headers])
            async for text in texts:
                if gone.done():
                    return
                await part(text, more=True)
            await part(b"", more=False)
        except WalshipError as error:
            _log.warning("cut dump reason=%s", error)
            with suppress(TimeoutError):
                await part(_FAILED, more=True)
        except TimeoutError:
            _log.info("cut dump reason=nobody took it for %g s", STALL_SECONDS)
        finally:
            gone.cancel()
