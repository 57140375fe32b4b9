"""Before a node does anything: whose directory is this, which cluster is that, and may the two meet (R1, R3).

Nothing here changes a database. What it may write: the lock file, the first state record, the cluster record with
`--init`, and, with `--replace-local`, files moved aside.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import secrets
import time
from pathlib import Path

from walship.config import NodeConfig
from walship.coordination.etcd_url import hide_password
from walship.coordination.file_store import HeldLock
from walship.coordination.record import ClusterRecord, LeaderRecord, Seen, create_cluster, read_cluster, read_leader
from walship.coordination.store import Store
from walship.engine.durable_state import DurableState, StateFile
from walship.engine.marks import EVERY_BYTES, Marks
from walship.errors import CompareFailed, Fenced, StorageFailed, UsageError
from walship.node.recover import found_database

__all__ = ["Membership", "join", "lock_directory"]

_log = logging.getLogger("walship.node")
_LOCK = "node.lock"


@dataclasses.dataclass(frozen=True, slots=True)
class Membership:
    """This node in its cluster. `leads`: the record's holder is this node, or nobody ever led and it founds."""

    state: StateFile
    marks: Marks
    record: ClusterRecord
    leader: Seen[LeaderRecord] | None
    leads: bool

    @property
    def cluster(self) -> bytes:
        return bytes.fromhex(self.record.cluster_id)

    def is_voter(self, name: str) -> bool:
        return name in self.record.voters


def lock_directory(directory: Path) -> HeldLock:
    """Make the directory ours for the life of the process (R3). Raises UsageError when it is not to be had."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return HeldLock(directory / _LOCK)
    except OSError as error:
        raise UsageError(
            f"--data {directory}: {error.strerror}. Nothing was changed. Name a directory this user can write"
        ) from error


async def join(config: NodeConfig, store: Store) -> Membership:
    """Find or found the cluster, find or make this node's state record, and check that they belong together.

    Raises UsageError when they do not (another cluster, data of unknown origin, no record and no `--init`), Fenced when
    the store is older than what this node promised.
    """
    directory = config.data_dir
    state = StateFile.open(directory) if StateFile.exists(directory) else None
    seen = await read_cluster(store)
    if seen is None:
        seen = await _found_cluster(config, store, state)
    record = seen.record
    if not record.secret:
        _log.warning("this cluster was founded before it had a secret: whoever reaches its ports can read and write")
    leader = await read_leader(store)
    founds = config.init and leader is None
    if state is None:
        state = _first_state(config, record, founds=founds)
    _check_same_cluster(state, record, config)
    if leader is not None and leader.record.term < state.state.promised:
        raise Fenced(
            f"the cluster's record is at term {leader.record.term}, this node promised to refuse all below "
            f"{state.state.promised}: the record is older than the data. Nothing was changed; bring back the "
            "newer store"
        )
    marks = Marks(directory, state, every_bytes=min(EVERY_BYTES, config.log_max_bytes // 4))
    if founds and state.state.mark is None:
        found_database(state, marks)
    if state.state.cluster_id is None:
        state.update(cluster_id=record.cluster_id)
    leads = founds or (leader is not None and leader.record.holder == state.state.node_id)
    return Membership(state, marks, record, leader, leads)


async def _found_cluster(config: NodeConfig, store: Store, state: StateFile | None) -> Seen[ClusterRecord]:
    if not config.init:
        raise UsageError(
            f"{hide_password(config.cluster_url)} has no cluster record. Nothing was changed. Found a cluster with "
            "`walship up`, or with `walship node --init` on its first node"
        )
    if state is not None and state.state.cluster_id is not None:
        raise UsageError(
            f"{config.data_dir} belongs to cluster {state.state.cluster_id}, and the store has no record of it: the "
            "record was lost. Nothing was changed (R1: a new cluster is never founded over old data). Bring the store "
            "back from a copy"
        )
    record = ClusterRecord(
        cluster_id=secrets.token_hex(16),
        created_ms=time.time_ns() // 1_000_000,
        voters=config.voters or (config.name,),
        acks=config.ack,
        database=str(config.database or ""),
        secret=secrets.token_hex(32),
    )
    try:
        return await create_cluster(store, record)
    except CompareFailed:
        seen = await read_cluster(store)  # somebody else founded it meanwhile: join that one
        if seen is None:
            raise
        return seen


def _first_state(config: NodeConfig, record: ClusterRecord, *, founds: bool) -> StateFile:
    path = config.database_path.absolute()
    if not founds and path.exists() and path.stat().st_size > 0:
        if not config.replace_local:
            raise UsageError(
                f"{path} exists, but {config.data_dir} belongs to no cluster yet: its content is not this cluster's "
                "history. Nothing was changed. Join with an empty directory, or give --replace-local to have the file "
                "moved aside"
            )
        _move_aside(path)
    state = DurableState(
        node_id=secrets.token_hex(16),
        name=config.name,
        cluster_id=None if founds else record.cluster_id,
        database_path=str(path),
    )
    return StateFile.create(config.data_dir, state)


def _check_same_cluster(state: StateFile, record: ClusterRecord, config: NodeConfig) -> None:
    mine = state.state
    if mine.cluster_id not in (None, record.cluster_id):
        raise UsageError(
            f"{config.data_dir} belongs to cluster {mine.cluster_id}, {hide_password(config.cluster_url)} is cluster "
            f"{record.cluster_id}. Nothing was changed. Name the right --cluster, or another --data directory"
        )
    if mine.name != config.name:
        raise UsageError(
            f"{config.data_dir} belongs to node {mine.name!r}, not to {config.name!r}. Nothing was changed. "
            "Name the right --data directory"
        )
    if config.database is not None and Path(mine.database_path) != config.database.absolute():
        raise UsageError(
            f"{config.data_dir} holds {mine.database_path}, not {config.database}. Nothing was changed. "
            "Leave --database out to resume"
        )


def _move_aside(path: Path) -> None:
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.replaced-{number}")
        if aside.exists():
            continue
        try:
            path.with_name(path.name + "-shm").unlink(missing_ok=True)
            for suffix in ("-wal", ""):  # the file last: a -wal left alone by a crash would be taken for the next one's
                old = path.with_name(path.name + suffix)
                if old.exists():
                    old.rename(aside.with_name(aside.name + suffix))
            os.sync()
        except OSError as error:
            raise StorageFailed(f"{path} cannot be moved aside ({error.strerror}); it is kept") from error
        return
