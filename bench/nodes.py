"""A leader and a follower in one process, composed of the engine's own parts, without a network."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from walship.engine.durable_state import DurableState, StateFile
from walship.engine.follower import Follower
from walship.engine.leader import Leader
from walship.engine.log import LogLimits
from walship.engine.marks import Marks
from walship.engine.replica import Replica
from walship.engine.watermarks import Watermarks
from walship.node.promote import promote
from walship.node.recover import FIRST_POSITION, found_database, recover

__all__ = ["found", "follow", "lead"]

CLUSTER = b"walship benchmark"[:16]
LIMITS = LogLimits(max_bytes=4 << 30)


def found(base: Path, directory: Path) -> tuple[StateFile, Marks, Replica]:
    """A node whose database is a copy of `base`, as the first position of a cluster."""
    directory.mkdir()
    database = Path(shutil.copy(base, directory / "data.db"))
    state = StateFile.create(directory, DurableState("0" * 32, directory.name, CLUSTER.hex(), str(database)))
    marks = Marks(directory, state)
    found_database(state, marks)
    replica = recover(directory, state, marks, cluster=CLUSTER, limits=LIMITS)
    assert replica is not None
    return state, marks, replica


def lead(base: Path, directory: Path) -> tuple[Leader, Replica]:
    """Leads term 1. Close the leader, then the replica."""
    state, _, replica = found(base, directory)
    leader = promote(
        replica,
        state,
        Watermarks(FIRST_POSITION),
        cluster=CLUSTER,
        term=1,
        now_ms=lambda: time.time_ns() // 1_000_000,
        on_frame=lambda ref, data: None,
    )
    return leader, replica


def follow(base: Path, directory: Path, failures: list[BaseException]) -> tuple[Follower, Watermarks]:
    """A follower at the first position, on the running event loop. Stop it, then close its replica."""
    state, marks, replica = found(base, directory)
    watermarks = Watermarks()
    follower = Follower(
        directory=directory,
        state=state,
        cluster=CLUSTER,
        voter=True,
        acks=1,
        limits=LIMITS,
        replica=replica,
        marks=marks,
        watermarks=watermarks,
        on_replica=lambda replica: None,
        on_failure=failures.append,
    )
    return follower, watermarks
