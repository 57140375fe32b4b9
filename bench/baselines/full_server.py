"""The floor for durable writes: the same HTTP shell, and SQLite with synchronous=FULL, one commit after the other.

    python -m bench.baselines.full_server DATABASE

`NodeApp` on `serving` is exactly a node's front door; behind it, instead of the service with its writer thread and
group commit, one connection runs each request when it arrives, on the loop's own thread (no hand-over to pay for).
Checkpoints are SQLite's own default. Prints its port on one line.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Generator, Mapping
from typing import Any

import apsw
import uvloop

from walship.formats.position import Position
from walship.front.listen import listen
from walship.hrana import json as hrana
from walship.hrana.types import Batch, CloseRequest
from walship.node.app import NodeApp
from walship.node.http_server import serving
from walship.service.executor import Executor
from walship.service.limits import Limits
from walship.service.request import Call, CursorReply, Reply

NOWHERE = Position(1, 1)


class OneByOne:
    """Implements `Served` and `Pages` on one connection."""

    def __init__(self, path: str) -> None:
        self._connection = apsw.Connection(path)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        # Asked here: through the executor the node's policy would answer, not SQLite.
        assert self._connection.pragma("synchronous") == 2, "this is not the floor"
        self._executor = Executor(self._connection, Limits(), may_write=True)

    async def pipeline(self, call: Call) -> Reply:
        results = [
            hrana.ok("close") if isinstance(request, CloseRequest) else _finish(self._executor.perform(request))
            for request in call.requests
        ]
        return Reply(results, NOWHERE, 0, self._connection.get_autocommit())

    async def cursor(self, call: Call, batch: Batch) -> CursorReply:
        raise NotImplementedError

    async def close_stream(self, stream: int) -> None:
        """There are none to close."""

    def status(self) -> Mapping[str, object]:
        return {}

    def unhealthy(self) -> str | None:
        return None

    def metrics(self) -> bytes:
        return b""


def _finish(program: Generator[Any, Any, bytes]) -> bytes:
    try:
        next(program)
    except StopIteration as end:
        value: bytes = end.value
        return value
    raise AssertionError("a connection that may write was asked for the right to")


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    service = OneByOne(sys.argv[1])
    async with serving(NodeApp(service, service, name="baseline"), listen("127.0.0.1", 0)) as address:
        print(address.port, flush=True)
        await stop.wait()


if __name__ == "__main__":
    uvloop.run(main())
