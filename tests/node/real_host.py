"""A leader or follower for tests of the node shells: real engine, real service, no replication.

The leader owns a database, a log and the writer thread. A follower stands on the same file with reading connections
only, and its watermarks follow the leader's when the test says so.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from walship.engine.acks import AckTracker
from walship.engine.database import Database
from walship.engine.durable_state import DurableState, StateFile
from walship.engine.leader import Leader
from walship.engine.log import Log, LogLimits
from walship.engine.marks import Marks
from walship.engine.watermarks import Watermarks
from walship.engine.writer import Writer
from walship.errors import NotLeader
from walship.formats.checksum import FLAG, PageChecksums
from walship.formats.link import Role, Status
from walship.formats.position import Position, TermHistory, Tip
from walship.service.limits import Limits
from walship.service.service import Service

CLUSTER = bytes(16)
NODE_ID = "ab" * 16
TERM = 3


@dataclass
class RealHost:
    name: str
    database: Database
    watermarks: Watermarks
    writer: Writer | None = None
    leader: tuple[str | None, str | None, int] = ("n1", "http://n1:1", TERM)
    sick: str | None = None
    proofs: int = 0
    service: Service = field(init=False)

    def status(self) -> Mapping[str, object]:
        return {"name": self.name, "position": str(self.watermarks.captured)}

    def unhealthy(self) -> str | None:
        return self.sick

    def metrics(self) -> bytes:
        return b"walship_up 1\n"

    async def read_index(self, timeout_seconds: float) -> Position:
        if self.writer is None:
            raise NotLeader(*self.leader)
        self.proofs += 1
        return self.watermarks.durable

    def link_status(self) -> Status:
        marks = self.watermarks
        role = Role.FOLLOWER if self.writer is None else Role.LEADER
        applied = marks.applied if self.writer is None else marks.captured
        return Status(self.name, NODE_ID, role, TERM, applied, marks.durable, marks.acked, history=((TERM, 0),))


@asynccontextmanager
async def real_leader(directory: Path, limits: Limits = Limits()) -> AsyncIterator[RealHost]:
    start = Tip(Position(TERM, 0), FLAG, 0)
    database = Database.open(directory / "db", create=True)
    state = StateFile.create(directory, DurableState(NODE_ID, "n1", CLUSTER.hex(), str(directory / "db")))
    log = Log.open(directory / "log", cluster=CLUSTER, base=start, limits=LogLimits(1 << 30))
    watermarks = Watermarks(start.position, TermHistory([(TERM, 0)]))
    marks = Marks(directory, state)
    marks.attach(log)
    leader = Leader(
        database=database,
        log=log,
        state=state,
        marks=marks,
        checksums=PageChecksums(database.page_size),
        watermarks=watermarks,
        cluster=CLUSTER,
        term=TERM,
        at=None,
        now_ms=lambda: time.time_ns() // 1_000_000,
        on_frame=lambda _ref, _data: None,
    )
    failures: list[BaseException] = []
    acks = AckTracker(TERM, 0, start.position)
    writer = Writer(leader, acks, on_failure=failures.append)
    writer.start()

    def acknowledge() -> None:
        watermarks.acked = acks.covered(watermarks.durable)

    end = watermarks.on_change(acknowledge)
    host = RealHost("n1", database, watermarks, writer)
    host.service = Service(host, limits)
    try:
        async with host.service:
            yield host
    finally:
        await writer.stop()
        end()
        leader.close()
        log.close()
        database.close()
    assert failures == []


@asynccontextmanager
async def real_follower(leader: RealHost) -> AsyncIterator[RealHost]:
    position = leader.watermarks.captured
    watermarks = Watermarks(position, TermHistory([(TERM, 0)]))
    host = RealHost("n2", leader.database, watermarks)
    host.service = Service(host)
    async with host.service:
        yield host
