"""Becoming the leader of a term on this node, in the durable order of R2."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from walship.engine import failpoints
from walship.engine.apply import Applier
from walship.engine.database import Database
from walship.engine.durable_state import FileStamp, StateFile, Truth, WalBase
from walship.engine.leader import Leader, log_captured
from walship.engine.log import FrameRef
from walship.engine.replica import Replica
from walship.engine.snapshot import Snapshot
from walship.engine.watermarks import Watermarks
from walship.errors import CorruptDatabase
from walship.formats.frame import FrameFlags, FrameHeader, encode_frame
from walship.formats.position import Position
from walship.node.recover import point_of

__all__ = ["promote"]

_log = logging.getLogger("walship.node")


def promote(
    replica: Replica,
    state: StateFile,
    watermarks: Watermarks,
    *,
    cluster: bytes,
    term: int,
    now_ms: Callable[[], int],
    on_frame: Callable[[FrameRef, bytes | None], None],
    on_group: Callable[[int, float], None] = lambda _commits, _seconds: None,
) -> Leader:
    """Open `term` on a replica that is applied to the end of its log. The term was claimed in the store before.

    Only after this returns may the term be announced or its frames be shipped. Foreign programs are kept out until the
    writer has begun (R10): what they commit in a term that is never announced would be history nowhere.
    Raises CorruptDatabase when the copy is not what the log's last frame says, Unavailable when another process holds
    SQLite's write lock; nothing of the term exists then.
    """
    database, log = replica.database, replica.log
    if replica.pinned is None:  # it has followed: a foreign commit would not be counted (R10)
        if not Applier(database).hold():
            database.fence.require()
            Applier(database).hold()
        replica.pinned = Snapshot.pin(database)
    pinned = replica.pinned
    database.sync_wal()
    tip = log.tip
    if replica.checksums.rolling != tip.checksum:
        raise CorruptDatabase(
            f"{database.path}: checksum {replica.checksums.rolling:016x}, the log's last frame says "
            f"{tip.checksum:016x}. This node must not lead; it re-seeds."
        )
    time_ms = max(now_ms(), log.last_time_ms)
    header = FrameHeader.start_of_term(tip, term, cluster=cluster, page_size=database.page_size, time_ms=time_ms)
    log.append(header, encode_frame(header))
    log.sync()
    failpoints.reach("leader.term_started")
    if replica.differing:
        # Before `truth=wal`: until then a restart finds the same difference again, after it the -wal counts from here.
        _log_difference(replica, pinned, cluster=cluster, term=term, now_ms=now_ms())
    at = point_of(pinned)  # not where the -wal ends by now: what others committed since is still to be captured
    txid = log.tip.position.txid
    state.update(
        truth=Truth.WAL,
        led=term,
        promised=max(term, state.state.promised),
        base=WalBase(txid, at.salts, at.frame, at.checksum) if at else None,
        next_base=None if at else txid,
        next_base_file=None if at else FileStamp.of(database.file_fd),
    )
    failpoints.reach("leader.truth_wal")
    for started, start in log.terms().starts():
        watermarks.add_term(started, start)
    watermarks.captured = log.tip.position
    watermarks.durable = log.tip.position
    leader = Leader(
        database=database,
        log=log,
        state=state,
        marks=replica.marks,
        checksums=replica.checksums,
        watermarks=watermarks,
        cluster=cluster,
        term=term,
        at=at,
        now_ms=now_ms,
        on_frame=on_frame,
        on_group=on_group,
    )
    replica.unpin()  # the leader's own guard holds the -wal's past from here on
    _log.info("leading term=%d tip=%s", term, log.tip)
    return leader


@dataclass(frozen=True, slots=True)
class _Difference:
    """Pages that differ from history, as if one commit had written them (R7)."""

    database: Database
    snapshot: Snapshot
    pgnos: frozenset[int]
    commits: int = 1
    offset_bytes: int = 32  # Litestream needs an offset inside a -wal (ltx.md, G3)
    size_bytes: int = 0
    data: bytes | None = None  # streamed: it may be every page there is (R6)

    @property
    def commit(self) -> int:
        return self.snapshot.commit

    @property
    def salts(self) -> tuple[int, int]:
        return self.snapshot.header.salts

    def pages(self) -> Iterator[tuple[int, bytes | memoryview]]:
        return ((pgno, page) for pgno, page in self.snapshot.pages() if pgno in self.pgnos)


def _log_difference(replica: Replica, pinned: Snapshot, *, cluster: bytes, term: int, now_ms: int) -> None:
    log_captured(
        replica.log,
        _Difference(replica.database, pinned, frozenset(replica.differing)),
        replica.checksums,
        cluster=cluster,
        term=term,
        now_ms=now_ms,
        acked=Position(0, 0),
        flags=FrameFlags.REBUILT,
    )
    replica.log.sync()
    replica.differing.clear()
