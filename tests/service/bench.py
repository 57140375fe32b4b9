"""A real leader (engine, log, writer thread) and a real service on it; and the same database seen as a follower."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from walship.engine.acks import AckTracker
from walship.engine.database import Database
from walship.engine.durable_state import DurableState, StateFile
from walship.engine.log import LogLimits
from walship.engine.marks import Marks
from walship.engine.watermarks import Watermarks
from walship.engine.writer import Writer, WriterLimits
from walship.formats.position import Position
from walship.hrana.types import (
    Batch,
    BatchRequest,
    BatchStep,
    CloseRequest,
    ExecuteRequest,
    IntegerValue,
    Stmt,
    StreamRequest,
    TextValue,
    Value,
)
from walship.node.promote import promote
from walship.node.recover import found_database, recover
from walship.service.limits import Limits
from walship.service.request import Call, Reply
from walship.service.service import Service

CLUSTER = bytes(range(16))
CLOSE = CloseRequest()


@dataclass
class StandIn:
    """A host: what a node will be to its service."""

    database: Database
    watermarks: Watermarks
    writer: Writer | None
    name: str = "node1"
    leader: tuple[str | None, str | None, int] = ("node1", "http://127.0.0.1:1", 1)
    proofs: int = 0

    async def read_index(self, timeout_seconds: float) -> Position:
        self.proofs += 1
        return self.watermarks.durable


@dataclass
class Bench:
    """A leader and its service, with short words for tests."""

    host: StandIn
    service: Service
    streams: list[int] = field(default_factory=list)

    async def call(self, *requests: StreamRequest, **fields: Any) -> Reply:
        return await self.service.pipeline(Call(list(requests), **fields))

    async def run(self, sql: str, *args: object, **fields: Any) -> Any:
        """One statement on a stream of its own: its decoded StreamResult."""
        reply = await self.call(execute(sql, *args), CLOSE, **fields)
        return msgspec.json.decode(reply.results[0])

    async def rows(self, sql: str, *args: object, **fields: Any) -> list[list[Any]]:
        return rows_of(await self.run(sql, *args, **fields))

    async def on(self, stream: int, *requests: StreamRequest, **fields: Any) -> tuple[Reply, list[Any]]:
        """Requests on a kept stream (0 begins one): the reply and its decoded results."""
        reply = await self.call(*requests, stream=stream, **{"keep": True, **fields})
        return reply, [msgspec.json.decode(result) for result in reply.results]


def value(item: object) -> Value:
    return IntegerValue(str(item)) if isinstance(item, int) else TextValue(str(item))


def stmt(sql: str, *args: object, want_rows: bool | None = None) -> Stmt:
    return Stmt(sql=sql, args=[value(arg) for arg in args], want_rows=want_rows)


def execute(sql: str, *args: object) -> ExecuteRequest:
    return ExecuteRequest(stmt(sql, *args))


def batch(*steps: str | tuple[str, Any]) -> BatchRequest:
    return BatchRequest(steps_of(*steps))


def steps_of(*steps: str | tuple[str, Any]) -> Batch:
    return Batch([BatchStep(stmt(s)) if isinstance(s, str) else BatchStep(stmt(s[0]), s[1]) for s in steps])


def rows_of(result: Any) -> list[list[Any]]:
    assert result["type"] == "ok", result
    return [[_plain(v) for v in row] for row in result["response"]["result"]["rows"]]


def _plain(v: Any) -> Any:
    if v["type"] == "integer":
        return int(v["value"])
    return v.get("value", v.get("base64"))


def code_of(result: Any) -> str:
    assert result["type"] == "error", result
    return str(result["error"]["code"])


@asynccontextmanager
async def leading(
    directory: Path,
    limits: Limits,
    *,
    writer_limits: WriterLimits = WriterLimits(),
    clock: Any = time.monotonic,
    acknowledging: bool = True,
    failing: bool = False,
) -> AsyncIterator[Bench]:
    """A one-node cluster with ack 0, its database in `directory`.

    acknowledging: what is durable counts as acknowledged at once; False leaves `acked` to the test.
    failing: the writer will fail, and the files are left as after a crash.
    """
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240
    state = StateFile.create(directory, DurableState("0" * 32, "node1", CLUSTER.hex(), str(directory / "db.sqlite")))
    marks = Marks(directory, state)
    tip = found_database(state, marks)
    replica = recover(directory, state, marks, cluster=CLUSTER, limits=LogLimits(1 << 30))
    assert replica is not None
    watermarks = Watermarks(tip.position)
    leader = promote(
        replica,
        state,
        watermarks,
        cluster=CLUSTER,
        term=1,
        now_ms=lambda: int(time.time() * 1000),
        on_frame=lambda ref, data: None,
    )
    acks = AckTracker(1, 0, replica.log.tip.position)
    failures: list[BaseException] = []
    writer = Writer(leader, acks, limits=writer_limits, on_failure=failures.append)
    writer.start()

    def acknowledge() -> None:
        watermarks.acked = acks.covered(watermarks.durable)

    end = watermarks.on_change(acknowledge if acknowledging else lambda: None)
    acknowledge()
    host = StandIn(replica.database, watermarks, writer)
    try:
        async with Service(host, limits, clock) as service:
            yield Bench(host, service)
    finally:
        await writer.stop()
        end()
        (leader.abandon if failing else leader.close)()
        replica.close()
        assert bool(failures) is failing


@asynccontextmanager
async def following(bench: Bench, at: Position, limits: Limits = Limits()) -> AsyncIterator[Bench]:
    """The leader's own database, served as a follower would that shows `at`."""
    host = StandIn(bench.host.database, Watermarks(at), None, name="node2")
    async with Service(host, limits) as service:
        yield Bench(host, service)


def results(reply: Reply) -> Sequence[Any]:
    return [msgspec.json.decode(result) for result in reply.results]
