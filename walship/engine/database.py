"""One database file and everything this process holds open on it (R25).

Goals: one owner for the long-lived descriptors (database file, -shm, -wal) and for every SQLite connection, so that
the order "all connections first, then our descriptors" holds whatever else goes wrong. Closing a descriptor of the
database or the -shm while a connection lives drops this process's POSIX locks (engine.md 3): a second writer could
then slip in, or another process could delete the -wal under us.

Nothing else in walship opens these files; everything else goes through apsw connections made here.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw

from walship.engine.barrier import choose_barrier
from walship.engine.fence import Fence
from walship.engine.shm import WalIndex
from walship.errors import CorruptDatabase, DatabaseRefused, StorageFailed, Unavailable
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Database", "holding_write"]

_READER_BUSY_MS = 100
_HOLDER_BUSY_MS = 2000
_STATEMENT_CACHE = 512  # distinct texts kept prepared per connection (perf.md 3)


class Database:
    """The owner of one database in WAL mode.

    Attributes:
        holder: the connection that takes WRITE for a moment while this node leads. It must always end an untouched
            BEGIN IMMEDIATE with COMMIT, never ROLLBACK (engine.md T2).
        fence: WRITE while this node does not lead (R10).
        left: the wal-index when the content was last known to be what the log says, while the fence could not be had;
            None: it is so now, or the -wal is the truth. A commit since is a foreign one.
        index: the mapped wal-index.
        wal_fd: a descriptor of the -wal, for pread, pwrite and fdatasync.
        file_fd: a descriptor of the database file, for pread only.
    """

    def __init__(self, path: Path, holder: apsw.Connection, page_size: int, barrier: Callable[[], None]) -> None:
        self.path = path
        self.page_size = page_size
        self.holder = holder
        self._connections: weakref.WeakSet[apsw.Connection] = weakref.WeakSet([holder])
        self.index = WalIndex(path.with_name(path.name + "-shm"), barrier)
        self.left: WalIndexHeader | None = None
        self.fence = Fence(self.index, lambda: _read_schema(holder))
        self.wal_path = path.with_name(path.name + "-wal")
        self.wal_fd = os.open(self.wal_path, os.O_RDWR | os.O_CLOEXEC)
        self.file_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Database:
        """Open an existing WAL database (or create an empty one) and run SQLite's recovery.

        Raises DatabaseRefused when the file is not a usable WAL database (not SQLite, rollback mode, locked by an
        exclusive process), CorruptDatabase when SQLite finds it malformed.
        """
        barrier = choose_barrier()
        path = path.absolute()
        flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
        try:
            holder = apsw.Connection(str(path), flags=flags, statementcachesize=_STATEMENT_CACHE)
            try:
                page_size = _prepare_holder(holder, path, create=create)
            except BaseException:
                holder.close()
                raise
        except (apsw.NotADBError, apsw.CorruptError) as error:
            raise CorruptDatabase(
                f"{path}: SQLite cannot read it ({error}). The file was not changed; restore it or re-seed the node."
            ) from error
        except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.PermissionsError) as error:
            raise DatabaseRefused(
                path, f"SQLite cannot open it for writing ({error})", "Check path and rights."
            ) from error
        except (apsw.BusyError, apsw.LockedError) as error:
            raise DatabaseRefused(
                path, f"another process holds it locked ({error})", "Stop that process, or wait for it."
            ) from error
        return cls(path, holder, page_size, barrier)

    def connect_reader(self) -> apsw.Connection:
        """A read-only connection. Sees published commits only, never blocks and is never blocked by applying."""
        connection = apsw.Connection(
            str(self.path), flags=apsw.SQLITE_OPEN_READONLY, statementcachesize=_STATEMENT_CACHE
        )
        connection.set_busy_timeout(_READER_BUSY_MS)
        _never_checkpoint_on_close(connection)
        self._connections.add(connection)
        return connection

    def connect_writer(self) -> apsw.Connection:
        """A connection that may write, for the leader: synchronous NORMAL, since we fdatasync the -wal ourselves
        before anything is acknowledged (engine.md 9), and no automatic checkpoint (R7)."""
        connection = apsw.Connection(
            str(self.path), flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=_STATEMENT_CACHE
        )
        connection.set_busy_timeout(_HOLDER_BUSY_MS)
        _never_checkpoint_on_close(connection)
        _run(connection, "PRAGMA wal_autocheckpoint=0", "PRAGMA synchronous=NORMAL")
        self._connections.add(connection)
        return connection

    @contextlib.contextmanager
    def holding_write(self) -> Iterator[None]:
        """WRITE held, by the fence or for this moment. Raises apsw.BusyError when somebody else holds it."""
        if self.fence.held:
            yield
            return
        with holding_write(self.holder):
            yield

    def sync_wal(self) -> None:
        """fdatasync of the -wal. Raises StorageFailed, after which the process must end (R5)."""
        try:
            os.fdatasync(self.wal_fd)
        except OSError as error:
            raise StorageFailed(
                f"{self.wal_path}: fdatasync failed ({error.strerror}). What was acknowledged before is durable; "
                "this node must stop and recover from its files."
            ) from error

    def check_files(self) -> None:
        """Raises Unavailable when somebody unlinked or replaced the files under us (engine.md T16)."""
        for fd, path in ((self.wal_fd, self.wal_path), (self.file_fd, self.path), (self.index.fd, self.path)):
            if os.fstat(fd).st_nlink == 0:
                raise Unavailable(
                    f"{path}: the file was deleted or replaced while this node had it open. "
                    "Writers may be split between two files: stop them; this node stops and recovers at its next start."
                )

    def wal_size_bytes(self) -> int:
        return os.fstat(self.wal_fd).st_size

    def close(self) -> None:
        """Close every connection, then our descriptors. The -wal stays as it is: what a restart counts from (R7).
        Idempotent."""
        for connection in list(self._connections):
            connection.close(True)
        self._connections.clear()
        self.index.close()
        for name in ("wal_fd", "file_fd"):
            fd: int = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


@contextlib.contextmanager
def holding_write(connection: apsw.Connection) -> Iterator[None]:
    """WRITE held through an untouched transaction, always ended by COMMIT: ROLLBACK would leave the connection with
    a stale page cache (engine.md T2). Raises apsw.BusyError when somebody else holds it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def _prepare_holder(holder: apsw.Connection, path: Path, *, create: bool) -> int:
    holder.set_busy_timeout(_HOLDER_BUSY_MS)
    _never_checkpoint_on_close(holder)
    if create:
        _run(holder, "PRAGMA journal_mode=WAL")
    _run(holder, "PRAGMA wal_autocheckpoint=0", "PRAGMA synchronous=NORMAL")
    mode = holder.pragma("journal_mode")
    if mode != "wal":
        raise DatabaseRefused(
            path, f"it is in {mode} mode, not WAL", "Adopt it with `walship up FILE`, which switches it."
        )
    # One read runs recovery; one empty write transaction makes sure that -wal, -shm and index block 0 exist.
    _read_schema(holder)
    with holding_write(holder):
        pass
    return int(holder.pragma("page_size"))


def _read_schema(connection: apsw.Connection) -> None:
    """Any read will do: it runs SQLite's recovery where the wal-index needs it."""
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()


def _never_checkpoint_on_close(connection: apsw.Connection) -> None:
    """SQLite's last close would checkpoint and delete the -wal, also after a failure, when the log may not hold it
    yet. Only `checkpoint.truncate` empties it, in the order of R7."""
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)


def _run(connection: apsw.Connection, *statements: str) -> None:
    # One by one and fetched: execute() of a script stops at the first row (engine.md T13).
    for statement in statements:
        connection.execute(statement).fetchall()
