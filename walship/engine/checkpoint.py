"""When to checkpoint, as a pure decision, and the checkpoint calls themselves.

Follower: SQLite copies our frames back; now and then the -wal must be emptied, or it grows without bound. SQLite's own
TRUNCATE would need WRITE, which the fence holds (R10): `empty` does the same under the fence, so that no foreign
program gets a turn in between. It needs every reader off the WAL for a moment, so it waits only briefly, and longer
once a minute when the -wal is past its limit (engine.md 4). Readers are never blocked.

Leader: the writer resets the WAL in place, which keeps it preallocated and its fsyncs cheap (engine.md 8, 9);
`leader.py` has that sequence. Here is only when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import apsw

from walship.engine.database import Database
from walship.errors import StorageFailed

__all__ = ["CheckpointPolicy", "CheckpointTally", "Step", "empty", "passive", "restart", "truncate"]

_PAUSE_SECONDS = 0.001


class Step(Enum):
    """What to do now."""

    NOTHING = auto()
    PASSIVE = auto()
    TRUNCATE = auto()
    TRUNCATE_PATIENTLY = auto()


@dataclass(slots=True)
class CheckpointPolicy:
    """Decides from bytes in the present WAL generation and the time, both given.

    passive_bytes: copy frames back this often; truncate_bytes: try to empty the WAL past this size;
    limit_bytes: past this a patient attempt is allowed every `patience_seconds`.
    """

    passive_bytes: int = 4 << 20
    truncate_bytes: int = 16 << 20
    limit_bytes: int = 256 << 20
    patience_seconds: float = 60.0
    _next_passive_bytes: int = 0
    _next_truncate_bytes: int = 0
    _patient_after: float = 0.0

    def decide(self, wal_bytes: int, now: float) -> Step:
        """`now` is monotonic, in seconds. Call `emptied` after the WAL was emptied."""
        if wal_bytes >= self.limit_bytes and now >= self._patient_after:
            self._patient_after = now + self.patience_seconds
            return Step.TRUNCATE_PATIENTLY
        if wal_bytes >= max(self.truncate_bytes, self._next_truncate_bytes):
            # A failed attempt is not repeated at once: it costs a pause of the applier each time.
            self._next_truncate_bytes = wal_bytes + self.passive_bytes
            return Step.TRUNCATE
        if wal_bytes >= max(self.passive_bytes, self._next_passive_bytes):
            self._next_passive_bytes = wal_bytes + self.passive_bytes
            return Step.PASSIVE
        return Step.NOTHING

    def emptied(self) -> None:
        self._next_passive_bytes = self._next_truncate_bytes = 0


@dataclass(slots=True)
class CheckpointTally:
    """Attempts to empty the -wal (or to let it begin anew) since the process began. One thread counts, any may read."""

    done: int = 0
    held_back: int = 0  # by a reader, or somebody who writes

    def count(self, *, done: bool) -> None:
        if done:
            self.done += 1
        else:
            self.held_back += 1


def passive(connection: apsw.Connection) -> tuple[int, int]:
    """Copy back what readers allow. Returns (frames in the WAL, frames copied back), or (-1, -1) when busy."""
    try:
        return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    except apsw.BusyError:
        return -1, -1


def restart(connection: apsw.Connection, timeout_ms: int) -> bool:
    """Copy everything back and see every reader off the WAL, so that the next writer begins it anew; False when some
    stayed longer than `timeout_ms`."""
    return _exclusive(connection, apsw.SQLITE_CHECKPOINT_RESTART, timeout_ms)


def truncate(connection: apsw.Connection, timeout_ms: int) -> bool:
    """Copy everything back and empty the -wal; False when readers did not leave within `timeout_ms`."""
    return _exclusive(connection, apsw.SQLITE_CHECKPOINT_TRUNCATE, timeout_ms)


def empty(
    database: Database, connection: apsw.Connection, wait_seconds: float, let_go: Callable[[], None] = lambda: None
) -> bool:
    """Copy everything back and empty the -wal, WRITE being held by the fence all the time; False when readers, or
    another program's checkpoint, did not leave within `wait_seconds`. Nothing of ours may be applied meanwhile.

    let_go: called once when everything is in the database file, right before the -wal's past is let go (R7).
    Raises StorageFailed.
    """
    index = database.index
    frames = index.header().mx_frame
    if not frames and not database.wal_size_bytes():
        return True
    deadline = time.monotonic() + wait_seconds
    while True:
        passive(connection)
        if index.checkpoint_info().n_backfill >= frames:
            break
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    let_go()
    with database.fence.alone(max(0.0, deadline - time.monotonic())) as alone:
        if not alone:
            return False
        salt, _ = index.header().salts
        index.restart(((salt + 1) & 0xFFFFFFFF, int.from_bytes(os.urandom(4))))
        try:
            os.ftruncate(database.wal_fd, 0)
        except OSError as error:  # harmless: the old generation's frames are all in the database file
            raise StorageFailed(
                f"{database.wal_path}: cannot be emptied ({error.strerror}). Nothing is lost."
            ) from error
    return True


def _exclusive(connection: apsw.Connection, mode: int, timeout_ms: int) -> bool:
    connection.set_busy_timeout(timeout_ms)
    try:
        connection.wal_checkpoint(mode=mode)
    except (apsw.BusyError, apsw.LockedError):
        return False
    finally:
        connection.set_busy_timeout(2000)
    return True
