"""Starting a node: from what is on disk to an open replica whose content is the log's tip (R2, R7, R8, R9).

Order, each step durable before the next position is reported:

    1 a snapshot install that had begun is finished            (state.installing; a sparse one after 3, over the log)
    2 the log is opened: verified, torn tail cut, fsynced
    3 SQLite recovers the -wal; it is fsynced
    4 truth=wal: commits that the -wal holds and the log does not are appended, one frame each, flagged rebuilt
    5 truth=log: everything from the mark to the log's end is applied again, as one merged commit

Every node starts as a follower, and sets truth=log when it begins to follow (`engine.follower`). Until then, or until
a new term has its own base (`promote`), the -wal stays the truth: what other programs committed before this start is
found again by the next one, whatever happens to this one. WRITE is held from step 3 on, until the node leads (R10).

A follower never counts its -wal: its own frames there are merged differently than the leader's.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from walship.engine.apply import Applier
from walship.engine.capture import Capture, WalPoint
from walship.engine.database import Database
from walship.engine.durable_state import DurableState, FileStamp, StateFile, Truth, WalBase
from walship.engine.foreign import checksum_at, found_at_start, keep
from walship.engine.leader import log_captured
from walship.engine.log import Log, LogLimits
from walship.engine.marks import Marks
from walship.engine.replay import merge_frames
from walship.engine.replica import Replica
from walship.engine.seed import announced_tip, finish_install
from walship.engine.snapshot import Snapshot, scan
from walship.engine.sparse import finish_sparse_install
from walship.engine.verify import differing_pages
from walship.errors import CorruptData, CorruptDatabase, CorruptLog, CorruptLtx, CorruptWal, HistoryMismatch
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.frame import FrameFlags
from walship.formats.position import Position, Tip

__all__ = ["FIRST_POSITION", "found_database", "point_of", "recover"]

_log = logging.getLogger("walship.node")

# The content a cluster begins with counts as transaction 1, since an LTX snapshot covers transactions 1..n.
FIRST_POSITION = Position(0, 1)


def found_database(state: StateFile, marks: Marks) -> Tip:
    """The database of a new cluster, adopted or empty: scan it and mark it as the first position.

    What other programs commit during the scan and after it is counted from there at the start that follows.

    Raises DatabaseRefused or CorruptDatabase; the file was not changed then.
    """
    path = Path(state.state.database_path)
    database = Database.open(path, create=not path.exists() or path.stat().st_size == 0)
    try:
        database.sync_wal()
        snapshot = Snapshot.pin(database)
        try:
            checksums = scan(snapshot)
            at = point_of(snapshot)
            state.update(
                truth=Truth.WAL,
                led=FIRST_POSITION.term,
                base=WalBase(FIRST_POSITION.txid, at.salts, at.frame, at.checksum) if at else None,
                next_base=None if at else FIRST_POSITION.txid,
                next_base_file=None if at else FileStamp.of(database.file_fd),
            )
        finally:
            snapshot.close()
        tip = Tip(FIRST_POSITION, checksums.rolling, checksums.commit)
        marks.save(tip, checksums)
    finally:
        database.close()
    return tip


def recover(directory: Path, state: StateFile, marks: Marks, *, cluster: bytes, limits: LogLimits) -> Replica | None:
    """Open the replica in `directory`; None when this node needs a snapshot (it is new, or its copy is broken).

    Raises CorruptData when a leader's own truth cannot be read back: only an operator can decide then. StorageFailed.
    """
    installing, mark = state.state.installing, state.state.mark
    if installing is None and mark is None:
        return None
    try:
        log = Log.open(directory / "log", cluster=cluster, base=mark or announced_tip(state), limits=limits)
    except CorruptLog as error:
        if state.state.truth is Truth.WAL:
            raise
        _log.error("log is damaged, asking for a snapshot error=%s", error)
        _set_log_aside(directory)
        return None
    try:
        if installing is not None and "base" not in installing:
            finish_install(directory, state, cluster, log, marks)
        return _open(state, log, marks, cluster)
    except (CorruptDatabase, CorruptLtx, HistoryMismatch, CorruptWal) as error:
        log.close()
        if state.state.truth is Truth.WAL:
            raise
        _log.error("database is damaged, asking for a snapshot error=%s", error)
        return None
    except BaseException:
        log.close()
        raise


def _open(state: StateFile, log: Log, marks: Marks, cluster: bytes) -> Replica:
    database = Database.open(Path(state.state.database_path))
    try:
        database.fence.require()  # from here on until this node leads (R10)
        database.sync_wal()
        log.sync()
        mark = state.state.mark
        assert mark is not None
        if state.state.installing is not None:
            replica = Replica(database, log, finish_sparse_install(state, database, log, marks), marks)
            marks.attach(log)
            return replica
        checksums = marks.load()
        if state.state.truth is Truth.WAL:
            replica = _open_truth_wal(state.state, database, log, marks, checksums, cluster)
        else:
            replica = _open_foreign(state, database, log, marks, mark, checksums) or _open_truth_log(
                database, log, marks, mark, checksums
            )
        marks.attach(log)
    except BaseException:
        database.close()
        raise
    return replica


def _open_foreign(
    state: StateFile, database: Database, log: Log, marks: Marks, mark: Tip, checksums: PageChecksums | None
) -> Replica | None:
    """When other programs committed while this node was down: keep that as an orphan, and open what is there as a copy
    that is to be replaced and shown to nobody (R10). The fence stays, so they commit no more to it."""
    foreign = None if checksums is None else found_at_start(database, log, state.state, mark, checksums)
    if foreign is None:
        return None
    kept = keep(foreign, state.directory, log, node=state.state.name)
    reason = f"other programs wrote to {database.path} while this node was down; what they wrote is orphan {kept.name}"
    return Replica(database, log, foreign.checksums, marks, foreign=reason)


def _open_truth_log(database: Database, log: Log, marks: Marks, mark: Tip, checksums: PageChecksums | None) -> Replica:
    refs = list(log.frames_after(mark.position))
    batch = merge_frames(log, refs)
    if checksums is not None and batch is not None:
        sums = {pgno: page_checksum(pgno, page) for pgno, page in zip(batch.pgnos, batch.pages(), strict=True)}
        checksums.set_many(sums, batch.commit)
    if batch is not None and batch.pgnos:
        Applier(database).apply(batch, sync=False, publishing=lambda: None)
    if checksums is None:
        _log.warning("page checksums of the mark are missing or damaged, scanning the database")
        checksums = _scan(database)
    if checksums.rolling != log.tip.checksum:
        raise CorruptDatabase(
            f"{database.path}: after replaying the log to {log.tip.position} its checksum is "
            f"{checksums.rolling:016x}, history says {log.tip.checksum:016x}"
        )
    return Replica(database, log, checksums, marks)


def _open_truth_wal(
    state: DurableState,
    database: Database,
    log: Log,
    marks: Marks,
    checksums: PageChecksums | None,
    cluster: bytes,
) -> Replica:
    """A leader's restart: the -wal knows more than the log. Count its commits from the durable base (R2, R7)."""
    mark = state.mark
    assert mark is not None
    if checksums is not None:
        batch = merge_frames(log, list(log.frames_after(mark.position)))
        if batch is not None:
            sums = {pgno: page_checksum(pgno, page) for pgno, page in zip(batch.pgnos, batch.pages(), strict=True)}
            checksums.set_many(sums, batch.commit)
        if checksums.rolling != log.tip.checksum:
            checksums = None
    pinned = Snapshot.pin(database)
    try:
        start = _count_from(state, database, log.tip.position.txid)
        if start is None:
            counted = None
        elif state.led == FIRST_POSITION.term:  # no term to log commits in yet: any there are, are compared
            counted = checksums if start[0] == point_of(pinned) else None
        else:
            counted = _recount(state, database, log, checksums, cluster, *start)
        if counted is not None:
            return Replica(database, log, counted, marks, pinned=pinned)
        differing = _compare(database, log, checksums, pinned)
        assert checksums is not None
        return Replica(database, log, checksums, marks, differing, pinned)
    except BaseException:
        pinned.close()
        raise


def point_of(snapshot: Snapshot) -> WalPoint | None:
    """Where in the -wal a pinned state ends; None when the -wal is empty."""
    header = snapshot.header
    return WalPoint(header.salts, header.mx_frame, header.frame_checksum) if header.mx_frame else None


def _recount(
    state: DurableState,
    database: Database,
    log: Log,
    checksums: PageChecksums | None,
    cluster: bytes,
    at: WalPoint | None,
    txid: int,
) -> PageChecksums | None:
    """Append the commits of the -wal after `at`, which is at `txid`, that the log does not hold yet.

    Without `checksums` of the log's tip the file is scanned (R8): that gives the state after the last commit alone, so
    all missing commits become one frame. Returns the checksums at the log's new tip; None when the count contradicts
    the log.
    """
    assert state.led is not None
    present = checksums
    if present is None:
        _log.warning("page checksums of the mark are missing or damaged, scanning the database")
        present = _scan(database)
    capture = Capture(database, at)
    before = log.tip.position.txid
    while captured := capture.read(one_commit=checksums is not None or txid < before):
        txid += captured.commits
        if txid > log.tip.position.txid:
            log_captured(
                log,
                captured,
                present,
                cluster=cluster,
                # A promotion that crashed may have logged the start of its term, which nobody has seen.
                term=max(state.led, log.tip.position.term),
                now_ms=log.last_time_ms,
                acked=Position(0, 0),
                flags=FrameFlags.REBUILT,
            )
        capture.advance(captured)
    log.sync()
    if txid != log.tip.position.txid:
        _log.warning("the -wal ends at txid %d, the log at %s: comparing pages", txid, log.tip)
        return None
    if txid > before:
        _log.info("recounted commits=%d tip=%s", txid - before, log.tip)
    return present if present.rolling == log.tip.checksum else None


def _count_from(state: DurableState, database: Database, tip_txid: int) -> tuple[WalPoint | None, int] | None:
    """Where in the -wal which txid is known, or None when nothing says so."""
    header = database.index.header()
    base = state.base
    if base is not None and header.mx_frame and header.salts == base.salts:
        if header.mx_frame >= base.frame and checksum_at(database, base.frame) == base.frame_checksum:
            return WalPoint(base.salts, base.frame, base.frame_checksum), base.txid
        return None
    # Empty, or a generation that nobody saw begin. It is the next one only if the file is as it was left: any process
    # that closes last, or checkpoints, copies frames into it and may delete or reset the -wal that held them.
    untouched = state.next_base_file == FileStamp.of(database.file_fd)
    return (None, tip_txid) if state.next_base == tip_txid and untouched else None


def _compare(database: Database, log: Log, checksums: PageChecksums | None, pinned: Snapshot) -> list[int]:
    """Nothing says how the -wal continues the log: compare every page with what the log's history gives (R7).
    Returns those that differ."""
    if checksums is None or checksums.rolling != log.tip.checksum:
        raise CorruptData(
            f"{database.path}: neither the -wal's position nor the page checksums of the last mark can be trusted, so "
            "this leader cannot tell what its last commits were. Nothing was changed. Start it as a follower of a "
            "copy, or found a new cluster on this file with `walship up` and an empty data directory."
        )
    differing = list(differing_pages(pinned, checksums))
    if differing:
        _log.warning("database differs from the log pages=%d: one rebuilt frame opens the next term", len(differing))
    return differing


def _scan(database: Database) -> PageChecksums:
    snapshot = Snapshot.pin(database)
    try:
        return scan(snapshot)
    finally:
        snapshot.close()


def _set_log_aside(directory: Path) -> None:
    for number in itertools.count(1):
        aside = directory / f"log-damaged-{number}"
        if not aside.exists():
            (directory / "log").rename(aside)
            return
