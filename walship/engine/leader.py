"""The leading side of one database: commits become frames, frames become durable, the -wal stays bounded.

Everything here runs in the writer thread. One group of commits goes through these steps (design.md 4):

    capture new frames -> fdatasync of the -wal -> (new generation: its base made durable) -> frame into the log

Nothing may be shipped before that fdatasync. The log is written, not synced: while `truth` is `wal`, the -wal is what
a restart recounts from (R2); the log is synced before the -wal's past is let go (R7).

A guard (a parked read transaction on READ(i>0)) makes it impossible that anybody resets the -wal under us; it is
moved forward only inside `checkpoint` and right after a generation began (engine.md 8, "leapfrog").
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import apsw

from walship.engine import failpoints
from walship.engine.attempts import Pending
from walship.engine.capture import Capture, Captured, WalPoint
from walship.engine.checkpoint import CheckpointTally, empty, passive, restart, truncate
from walship.engine.database import Database
from walship.engine.durable_state import FileStamp, StateFile, Truth, WalBase
from walship.engine.log import FrameRef, Log
from walship.engine.marks import Marks
from walship.engine.snapshot import Snapshot
from walship.engine.watermarks import Watermarks
from walship.errors import Unavailable
from walship.formats import ltx
from walship.formats.checksum import PageChecksums
from walship.formats.frame import CommitToken, FrameEncoder, FrameFlags, FrameHeader, SnapshotHeader, encode_frame
from walship.formats.position import Position, Tip
from walship.formats.wal import FRAME_HEADER_SIZE
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Leader", "log_captured"]

_log = logging.getLogger("walship.engine")

CHECKPOINT_BYTES = 4 << 20  # reset the -wal in place about this often: SQLite's own default of 1,000 pages
PATIENCE_BYTES = 16 << 20  # past this readers are waited for a little
WAL_LIMIT_BYTES = 64 << 20  # past this the -wal file is given back to the disk, and readers are waited for longer
_SHORT_WAIT_MS = 5
_LONG_WAIT_MS = 20
_CLOSE_SECONDS = 0.1
_PIN_TRIES = 20


class Guard:
    """Two read connections that take turns, so that at every moment one of them holds a read transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._active = database.connect_reader()
        self._idle = database.connect_reader()
        self.on_file = self._begin(self._active)

    def advance(self, let_go: Callable[[], bool]) -> bool:
        """Begin a new read transaction at the tip, then end the old one; everything up to the tip must be in the log.

        Landing on the file alone lets go of the -wal's past. `let_go` is called just before that; when it says no,
        the old transaction stays, and False is returned.
        """
        on_file = self._begin(self._idle)
        if on_file and not let_go():
            self._idle.execute("COMMIT")
            return False
        self.on_file = on_file
        self._active.execute("COMMIT")
        self._active, self._idle = self._idle, self._active
        return True

    def close(self) -> None:
        self._active.close(True)
        self._idle.close(True)

    def _begin(self, connection: apsw.Connection) -> bool:
        """Begin; True when the transaction landed on READ(0), which ignores the -wal. It counts only after a read."""
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        index = self._database.index
        return index.checkpoint_info().n_backfill >= index.header().mx_frame


class Leader:
    """One database while this node leads `term`. Not thread-safe: the writer thread owns it.

    on_frame: called in the writer thread with each frame once it may be shipped, and its bytes when they are small.
    on_group: called in the writer thread after each group with its commits and the seconds of its fdatasync.
    """

    def __init__(
        self,
        *,
        database: Database,
        log: Log,
        state: StateFile,
        marks: Marks,
        checksums: PageChecksums,
        watermarks: Watermarks,
        cluster: bytes,
        term: int,
        at: WalPoint | None,
        now_ms: Callable[[], int],
        on_frame: Callable[[FrameRef, bytes | None], None],
        on_group: Callable[[int, float], None] = lambda _commits, _seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database = database
        self.log = log
        self.term = term
        self.watermarks = watermarks
        self._state = state
        self._marks = marks
        self._checksums = checksums
        self._cluster = cluster
        self._now_ms = now_ms
        self._on_frame = on_frame
        self._on_group = on_group
        self._clock = clock
        self._capture = Capture(database, at)
        self._checkpointer = database.connect_writer()
        self._guard = Guard(database)
        self.pending = Pending()
        self._attempt_after_bytes = 0
        self._held_back_since: float | None = None
        self.group_frames = 0
        self.checkpoints = CheckpointTally()

    @property
    def tip(self) -> Tip:
        return self.log.tip

    def commit_group(self) -> Tip:
        """Make every commit in the -wal durable and part of the log, as one frame with the tokens that are pending.
        Returns the tip.

        Raises StorageFailed or CorruptWal; the process must then end, and recounts at its next start.
        """
        captured = self._capture.read()
        if captured is None:
            return self.log.tip
        failpoints.reach("writer.committed")
        started = self._clock()
        self.database.sync_wal()
        sync_seconds = self._clock() - started
        failpoints.reach("writer.synced")
        self._begin_generation(captured)
        before = self.log.tip.position.txid
        tokens = self.pending.take(lambda frame: before + captured.commits_until(frame), before + captured.commits)
        ref, data = log_captured(
            self.log,
            captured,
            self._checksums,
            cluster=self._cluster,
            term=self.term,
            now_ms=self._now_ms(),
            acked=self.watermarks.acked,
            tokens=tokens,
        )
        failpoints.reach("writer.logged")
        tip = self.log.tip
        self.group_frames = captured.until.frame - captured.since.frame
        self.watermarks.captured = tip.position
        self._capture.advance(captured)
        self._marks.appended(ref.size_bytes)
        self.watermarks.durable = tip.position
        self._on_frame(ref, data)
        self._on_group(captured.commits, sync_seconds)
        if self._guard.on_file:
            self._guard.advance(self._let_go)
        return tip

    def make_way(self) -> bool:
        """Move the guard on when another process waits for it in a checkpoint, which may hold WRITE meanwhile. True
        when there was one.

        A TRUNCATE needs two moves: one that lets the last frames be copied back, one that lands on the file. Call
        this whenever idle, and while waiting for WRITE: waiting while parked would stall everybody (engine.md 8).
        """
        if not self.database.index.others_checkpoint():
            return False
        self.commit_group()
        self._guard.advance(self._let_go)
        return True

    def checkpoint_if_due(self) -> bool:
        """Copy the -wal back and let the next writer reuse it, once it has grown enough. True when it was done."""
        size_bytes = self.wal_bytes()
        if size_bytes < max(CHECKPOINT_BYTES, self._attempt_after_bytes):
            return False
        done = self.checkpoint()
        self.checkpoints.count(done=done)
        # A long reader can hold the reset back; do not pay for an attempt after every group meanwhile.
        self._attempt_after_bytes = 0 if done else size_bytes + CHECKPOINT_BYTES
        return done

    def checkpoint(self) -> bool:
        """One full checkpoint in the order that R7 asks for. False when a reader or a foreign writer is in the way.

        While WRITE is held new readers begin at the tip, which lets frames be copied back; so readers that come and
        go are waited for, longer the larger the -wal has become.
        """
        self.commit_group()
        tip = self.log.sync()
        failpoints.reach("checkpoint.log_synced")
        self._marks.save_if_due(tip, self._checksums)
        size_bytes = self.wal_bytes()
        holder = self.database.holder
        holder.set_busy_timeout(0)  # waiting while parked on a read mark could stall every writer (engine.md 8)
        try:
            with self.database.holding_write():
                header = self.database.index.header()
                if self._capture.behind(header):
                    return False  # a foreign commit slipped in; it is captured first
                self._guard.advance(self._let_go)
                if not self._backfill(header.mx_frame, _wait_seconds(size_bytes)):
                    self._held_back_since = self._held_back_since or self._clock()
                    return False
                failpoints.reach("checkpoint.wal_backfilled")
                if not self._guard.advance(self._let_go):
                    return False
        except apsw.BusyError:
            return False
        finally:
            holder.set_busy_timeout(2000)
        self._held_back_since = None
        if self.database.fence.held:
            return True  # no writer comes; who empties the -wal does it under the fence
        # The next writer reuses the -wal from its start, unless readers of its past are still there.
        if self.database.wal_size_bytes() > WAL_LIMIT_BYTES:
            truncate(self._checkpointer, _LONG_WAIT_MS)
        elif size_bytes > PATIENCE_BYTES:
            restart(self._checkpointer, _SHORT_WAIT_MS)
        return True

    def _let_go(self) -> bool:
        """R7: the log is synced through everything in the -wal and `next_base` is durable, before the guard, which
        still holds this generation, lets it be reset. False when a commit came in that is not captured yet."""
        if self._capture.behind(self.database.index.header()):
            return False
        tip = self.log.sync()
        # Everything is in the file now: what it must look like if nobody but the next generation's first writer comes.
        self._state.update(next_base=tip.position.txid, next_base_file=FileStamp.of(self.database.file_fd))
        failpoints.reach("checkpoint.state_written")
        return True

    def _backfill(self, mx_frame: int, wait_seconds: float) -> bool:
        """Copy frames back until all are in the file; False when readers of an older state are still there at the end
        of the wait. WRITE is held."""
        deadline = self._clock() + wait_seconds
        while True:
            passive(self._checkpointer)
            if self.database.index.checkpoint_info().n_backfill >= mx_frame:
                return True
            if self._clock() >= deadline:
                return False
            time.sleep(0.001)

    def wal_bytes(self) -> int:
        """Bytes of frames in the present generation of the -wal. From any thread."""
        return self.database.index.header().mx_frame * (FRAME_HEADER_SIZE + self.database.page_size)

    def free_bytes(self) -> int:
        """What the disk still gives to the -wal and to the log, the lesser of the two (R5). From any thread."""
        places = (os.statvfs(self.database.path.parent), os.statvfs(self.log.directory))
        return min(place.f_bavail * place.f_frsize for place in places)

    def held_back_seconds(self) -> float:
        """For how long a reader has kept the -wal from being emptied; 0 when none does. From any thread."""
        since = self._held_back_since
        return 0.0 if since is None else self._clock() - since

    def pin_snapshot(self) -> tuple[SnapshotHeader, Snapshot]:
        """Pin the database at exactly the log's tip. Raises Unavailable when foreign writers do not pause."""
        for _ in range(_PIN_TRIES):
            self.commit_group()
            try:
                with self.database.holding_write():
                    if self._capture.behind(self.database.index.header()):
                        continue
                    snapshot = Snapshot.pin(self.database)
            except apsw.BusyError as error:
                raise Unavailable(
                    "another process held SQLite's write lock for seconds, so no snapshot could be pinned; "
                    "nothing was sent, ask again"
                ) from error
            tip = self.log.tip
            complete_since, tokens = self.log.tokens.export()
            header = SnapshotHeader(
                cluster=self._cluster,
                database=1,
                position=tip.position,
                checksum=tip.checksum,
                commit=tip.commit,
                page_size=self.database.page_size,
                time_ms=self._now_ms(),
                complete_since=complete_since,
                tokens=tokens,
            )
            return header, snapshot
        raise Unavailable("foreign writers left no moment to pin a snapshot; nothing was sent, ask again")

    def fence(self) -> bool:
        """Hold off foreign writers, because this node must not lead now: its lease has ended, or it stops (R10). False
        when somebody is writing this moment: call again; nothing may wait for it. Own transactions get SQLITE_BUSY."""
        return self.database.fence.take()

    def unfence(self) -> None:
        """Let foreign programs write again: the lease lives."""
        self.database.fence.release()

    def close(self) -> None:
        """Stop leading: log everything, copy it back, make `next_base` durable, then empty the -wal (R7) and let go.

        While a reader keeps frames from being copied back the -wal stays, and a restart counts it from `base`.
        """
        fenced = self.fence()
        done = self.checkpoint()
        self._marks.save(self.log.sync(), self._checksums)
        self._guard.close()
        if done and fenced:  # nothing is copied any more, so the file keeps its stamp
            empty(self.database, self._checkpointer, _CLOSE_SECONDS)
        elif done:
            truncate(self._checkpointer, round(_CLOSE_SECONDS * 1000))
        self._checkpointer.close(True)

    def hold_still(self) -> Tip:
        """Keep foreign writers out and log everything: nothing changes from here on until `unfence`. Raises
        Unavailable when somebody else is writing this moment."""
        self.database.fence.require()
        self.commit_group()
        return self.log.tip

    def step_down(self) -> Tip:
        """Stop leading because another node will (R2, demote): everything committed is captured and in the log, which
        is the truth from here on. Only then may a SEAL be answered with the tip that is returned.

        Foreign writers are held off if SQLite's lock is to be had at once; what they still slip in is found by the
        following side (R10). Raises StorageFailed or CorruptWal: the process must end, and recounts at its next start.
        """
        fenced = self.fence()
        self.commit_group()
        self.database.left = None if fenced else self._captured_header()
        tip = self.log.sync()
        failpoints.reach("leader.step_down_synced")
        self._state.update(truth=Truth.LOG, base=None, next_base=None, next_base_file=None)
        failpoints.reach("leader.truth_log")
        self._guard.close()
        self._checkpointer.close(True)
        return tip

    def _captured_header(self) -> WalIndexHeader:
        """The wal-index as it is, or was, where everything is captured."""
        header, at = self.database.index.header(), self._capture.at
        if not self._capture.behind(header):
            return header
        salts, frame, checksum = (at.salts, at.frame, at.checksum) if at is not None else (header.salts, 0, (0, 0))
        # The commits since have raised the change counter, so any lower one will do.
        change = (header.change - 1) & 0xFFFFFFFF
        return replace(header, salts=salts, mx_frame=frame, frame_checksum=checksum, change=change)

    def abandon(self) -> None:
        """Close this side's connections without a promise about their state: after a failure."""
        self._guard.close()
        self._checkpointer.close(True)

    def settled(self) -> bool:
        """True iff every commit visible to a reader right now is captured. May be called from any thread."""
        return not self._capture.behind(self.database.index.header())

    def _begin_generation(self, captured: Captured) -> None:
        """The first frames of a generation: what they are counted from becomes durable before the log moves past
        `next_base` (R7)."""
        base = self._state.state.base
        since = captured.since
        if since.frame or (base is not None and base.salts == since.salts):
            return
        txid = self.log.tip.position.txid
        self._state.update(base=WalBase(txid, since.salts, 0, since.checksum), next_base=None, next_base_file=None)
        failpoints.reach("generation.based")


def _wait_seconds(wal_bytes: int) -> float:
    """How long writers may be held up for readers: not at all while the -wal is small."""
    if wal_bytes <= PATIENCE_BYTES:
        return 0.0
    return (_LONG_WAIT_MS if wal_bytes > WAL_LIMIT_BYTES else _SHORT_WAIT_MS) / 1000


class Commits(Protocol):
    """What `log_captured` packs: `Captured`, or what stands for it when a -wal could not be counted.

    `data` None: too large to be held, so the frame is streamed.
    """

    @property
    def database(self) -> Database: ...
    @property
    def commits(self) -> int: ...
    @property
    def commit(self) -> int: ...
    @property
    def salts(self) -> tuple[int, int]: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def data(self) -> bytes | None: ...
    def pages(self) -> Iterable[tuple[int, bytes | memoryview]]: ...


def log_captured(
    log: Log,
    captured: Commits,
    checksums: PageChecksums,
    *,
    cluster: bytes,
    term: int,
    now_ms: int,
    acked: Position,
    tokens: tuple[CommitToken, ...] = (),
    flags: FrameFlags = FrameFlags(0),
) -> tuple[FrameRef, bytes | None]:
    """Pack `captured` as the frame after the log's tip and append it; `checksums` moves along.

    Returns the frame's place and, when it is small, its bytes. Memory stays bounded for any size (R6).
    """
    previous = log.tip
    first, last = previous.position.txid + 1, previous.position.txid + captured.commits
    rolling = checksums.apply(captured.pages(), captured.commit)
    header = FrameHeader(
        flags=flags,
        cluster=cluster,
        database=1,
        term=term,
        min_txid=first,
        max_txid=last,
        previous=previous.position,
        previous_checksum=previous.checksum,
        checksum=rolling,
        commit=captured.commit,
        page_size=captured.database.page_size,
        time_ms=max(now_ms, log.last_time_ms),
        acked=acked,
        tokens=tokens,
    )
    payload = ltx.LtxHeader(
        page_size=header.page_size,
        commit=header.commit,
        min_txid=first,
        max_txid=last,
        timestamp_ms=header.time_ms,
        wal_offset=captured.offset_bytes,
        wal_size=captured.size_bytes,
        wal_salts=captured.salts,
    )
    if captured.data is not None:
        data = encode_frame(header, ltx.encode(payload, captured.pages(), previous_commit=previous.commit))
        return log.append(header, data), data
    encoder, frame = ltx.LtxEncoder(payload, previous_commit=previous.commit), FrameEncoder(header)
    appender = log.begin(header)
    try:
        appender.write(frame.header_record())
        appender.write(frame.part(encoder.header_bytes()))
        for pgno, page in captured.pages():
            appender.write(frame.part(encoder.page(pgno, page)))
        appender.write(frame.part(encoder.finish()))
        appender.write(frame.end())
    except BaseException:
        appender.abort()
        raise
    return appender.commit(), None
