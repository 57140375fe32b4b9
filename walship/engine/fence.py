"""The fence: SQLite's WRITE lock, held by this node whenever it is not the serving leader (R10).

Foreign programs that try to write to the file get SQLITE_BUSY; readers and checkpoints of anybody are not affected.

How it is held: an open file description lock (F_OFD_SETLK) on byte 120 of the -shm, on the one descriptor that
`WalIndex` keeps. SQLite locks the same byte by a POSIX lock, and the two kinds conflict, also inside one process. An
open transaction of a connection would do too, but it pins a read mark (no frame past it could be copied back) and
keeps a page cache that applying makes stale (engine.md T2). Measured: taking and releasing costs 2 us, a BEGIN
IMMEDIATE with its COMMIT 5 to 13; while the fence stays held, applying a batch costs no lock at all.

Unlike a POSIX lock it is not lost when some other descriptor of the -shm is closed (T1), and it ends with the process.

Warnings: while it is held, no connection of this process can write, truncate the -wal or repair a torn wal-index;
`checkpoint.empty` empties the -wal under it. Used from one thread at a time: the one that applies, leads or recovers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from walship.engine.shm import WalIndex
from walship.errors import Unavailable
from walship.formats.wal_index import CHECKPOINT_LOCK, READ_LOCKS, READ_MARKS, WRITE_LOCK

__all__ = ["PATIENCE_SECONDS", "Fence"]

PATIENCE_SECONDS = 2.0  # how long a start or a batch waits for a foreign transaction to end
_SPINS = 100  # tries without a pause: what a foreign commit takes
_PAUSE_SECONDS = 0.0005
_REPAIRS = 5


class Fence:
    """The WRITE lock of one database. `repair` makes SQLite rebuild a torn wal-index header."""

    def __init__(self, index: WalIndex, repair: Callable[[], None]) -> None:
        self._index = index
        self._repair = repair
        self._held = False

    @property
    def held(self) -> bool:
        """From any thread."""
        return self._held

    def take(self, wait_seconds: float = 0.0) -> bool:
        """Hold WRITE from here on; True at once when it is held already. False when somebody else still held it after
        a few tries and `wait_seconds`. Never waits in SQLite's busy handler, which would leave gaps of 100 ms.

        Once held the wal-index header is whole: a writer that died between its two copies left it torn, and nobody
        could repair it any more.
        """
        if self._held:
            return True
        deadline = time.monotonic() + wait_seconds
        for _ in range(_REPAIRS):
            if not self._spin(deadline):
                return False
            if self._index.whole():
                self._held = True
                return True
            self._index.unlock(WRITE_LOCK, 1)
            self._repair()
        return False

    def require(self) -> None:
        """`take`, or raise Unavailable after `PATIENCE_SECONDS`."""
        if not self.take(PATIENCE_SECONDS):
            raise Unavailable(
                f"{self._index.path}: another process has held SQLite's write lock for {PATIENCE_SECONDS:g} s. Nothing "
                "was changed; find out who writes to the file of a node that does not lead, and stop it."
            )

    def release(self) -> None:
        """Let foreign programs write: this node leads. Idempotent."""
        if self._held:
            self._held = False
            self._index.unlock(WRITE_LOCK, 1)

    @contextlib.contextmanager
    def alone(self, wait_seconds: float) -> Iterator[bool]:
        """With the fence held: no reader needs the -wal and nobody checkpoints, for a moment. False when some still did
        after `wait_seconds`."""
        if not self._held:
            raise AssertionError("the fence is not held")
        deadline = time.monotonic() + wait_seconds
        locked = self._lock_all()
        while not locked and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            locked = self._lock_all()
        try:
            yield locked
        finally:
            if locked:
                self._index.unlock(READ_LOCKS + 1, READ_MARKS - 1)
                self._index.unlock(CHECKPOINT_LOCK, 1)

    def _lock_all(self) -> bool:
        # CKPT too: older SQLite versions may mix up two generations when one ends while they begin to checkpoint.
        if not self._index.lock(CHECKPOINT_LOCK, 1):
            return False
        if self._index.lock(READ_LOCKS + 1, READ_MARKS - 1):
            return True
        self._index.unlock(CHECKPOINT_LOCK, 1)
        return False

    def _spin(self, deadline: float) -> bool:
        for _ in range(_SPINS):
            if self._index.lock(WRITE_LOCK, 1):
                return True
        while time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            if self._index.lock(WRITE_LOCK, 1):
                return True
        return False
