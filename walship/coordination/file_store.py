"""The embedded store: one directory on one host, one small SQLite file used by all processes of the cluster.

Plan. `store.db` (WAL mode, synchronous=FULL: one fsync a change) holds the records and one revision counter that
numbers every change, so versions never repeat. Each call is one short transaction in the store's own thread, under
a deadline. After each commit the writer writes the revision into the file `changed`; a watch is woken by inotify on
that file, in any process. (The -wal itself would wake too early: it is written before its commit can be seen.) A
watch looks every POLL_SECONDS anyway: a writer can die before the notice, and inotify has limits.

This file is walship's own and has nothing to do with the user's database.

Beside it, `HeldLock`: an flock held for the life of a process. The kernel drops it when the process ends, however it
ends, so it is proof of death without a timer (failover.md 3.3).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import apsw
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from walship.coordination.store import Change, Versioned
from walship.errors import CompareFailed, StoreUnavailable, UsageError

__all__ = ["FileStore", "HeldLock", "holder_alive"]

T = TypeVar("T")

DEADLINE_SECONDS = 5.0  # of one call; a change takes about a millisecond, a stalled disk now and then a second
BUSY_MS = 4000  # below the deadline, so that SQLite's own answer arrives first
POLL_SECONDS = 1.0  # the belt under inotify
LOCK_TRIES = 20  # a probe (holder_alive) holds the lock for microseconds; try again before calling it held
LOCK_PAUSE_SECONDS = 0.005

# Tells our file from any other SQLite file somebody points us at ("wshS" as a big-endian integer).
APPLICATION_ID = int.from_bytes(b"wshS", "big")

log = logging.getLogger("walship.store")

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = 1;
CREATE TABLE IF NOT EXISTS revision (id INTEGER PRIMARY KEY CHECK (id = 1), n INTEGER NOT NULL);
INSERT OR IGNORE INTO revision VALUES (1, 0);
CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
"""


class FileStore:
    """`Store` on a local directory. Safe between threads of one loop and between processes of one host.

    Not for network file systems: SQLite's WAL needs shared memory, and flock must mean the same to everybody.
    """

    def __init__(self, directory: Path, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._directory = directory
        self._path = directory / "store.db"
        self._notice = directory / "changed"
        self._deadline_seconds = deadline_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="walship-store")
        self._connection: apsw.Connection | None = None  # the thread's; opened by the first call
        self._wakers: set[asyncio.Event] = set()
        self._observer: BaseObserver | None = None
        self._observing = asyncio.Lock()
        self._observed = False  # inotify was tried; it works or it does not
        self._closed = False

    async def get(self, key: str) -> Versioned | None:
        def read(db: apsw.Connection) -> Versioned | None:
            for value, version in db.execute("SELECT value, version FROM record WHERE key = ?", (key,)):
                return Versioned(value, version)
            return None

        return await self._run(read, f"reading {key}")

    async def put_if(self, key: str, value: bytes, *, version: int | None) -> int:
        def write(db: apsw.Connection) -> int:
            _compare(db, key, version)
            revision = _next_revision(db)
            db.execute(
                "INSERT INTO record VALUES (?1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET value = ?2, version = ?3",
                (key, value, revision),
            )
            return revision

        return await self._change(write, f"changing {key}")

    async def delete(self, key: str, *, version: int) -> None:
        def write(db: apsw.Connection) -> int:
            _compare(db, key, version)
            db.execute("DELETE FROM record WHERE key = ?", (key,))
            return _next_revision(db)

        await self._change(write, f"deleting {key}")

    async def list(self, prefix: str) -> dict[str, Versioned]:
        return (await self._look(prefix, seen=None))[1] or {}

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        waker = asyncio.Event()
        self._wakers.add(waker)
        try:
            known: dict[str, Versioned] = {}
            seen: int | None = None
            while not self._closed:
                waker.clear()
                try:
                    await self._observe()
                    seen, present = await self._look(prefix, seen)
                except StoreUnavailable as error:
                    if self._closed:
                        return
                    log.warning("watch %s: %s; trying again", prefix, error)
                    present = None
                if present is not None:
                    gone = [Change(key, None) for key in known.keys() - present.keys()]
                    fresh = [Change(key, state) for key, state in present.items() if known.get(key) != state]
                    known = present
                    for change in gone + fresh:
                        yield change
                # Not wait_for: before 3.12 it swallows a cancellation that comes together with its result.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await waker.wait()
        finally:
            self._wakers.discard(waker)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake()
        observer, self._observer = self._observer, None
        release = asyncio.get_running_loop().run_in_executor(self._thread, self._release, observer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._deadline_seconds):
                await release
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _release(self, observer: BaseObserver | None) -> None:
        if observer is not None:
            observer.stop()
            observer.join(1.0)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _change(self, write: Callable[[apsw.Connection], int], doing: str) -> int:
        """Run `write`, which returns the new revision, as one transaction; then tell every watch on this host."""

        def job(db: apsw.Connection) -> int:
            revision = _transaction(write)(db)
            self._notice.write_text(f"{revision}\n")
            return revision

        return await self._run(job, doing)

    async def _look(self, prefix: str, seen: int | None) -> tuple[int, dict[str, Versioned] | None]:
        """(revision, records under `prefix`), the records only when the revision is no longer `seen`."""

        def read(db: apsw.Connection) -> tuple[int, dict[str, Versioned] | None]:
            revision: int = db.execute("SELECT n FROM revision").get
            if revision == seen:
                return revision, None
            # One statement is one snapshot: the revision and the records it numbers.
            rows: list[Any] = db.execute(
                "SELECT n, key, value, version FROM revision LEFT JOIN record ON substr(key, 1, length(?1)) = ?1 "
                "ORDER BY key",
                (prefix,),
            ).fetchall()
            return rows[0][0], {key: Versioned(value, version) for _, key, value, version in rows if key is not None}

        return await self._run(read, f"listing {prefix or 'everything'}")

    async def _run(self, work: Callable[[apsw.Connection], T], doing: str) -> T:
        """Run `work` on the store's thread, within the deadline, with SQLite's errors as ours."""
        if self._closed:
            raise StoreUnavailable(f"{self._path}: closed while {doing}")

        def job() -> T:
            try:
                if self._connection is None:
                    self._connection = _open(self._path)
                return work(self._connection)
            except (apsw.Error, OSError) as error:
                raise StoreUnavailable(
                    f"the coordination store {self._path} failed while {doing}: {error}. "
                    "Data is not affected; check the directory and its disk"
                ) from error

        future = asyncio.get_running_loop().run_in_executor(self._thread, job)
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await future
        except TimeoutError as error:
            raise StoreUnavailable(
                f"the coordination store {self._path} did not answer within {self._deadline_seconds} s while {doing}; "
                "a change may or may not have happened: read it again"
            ) from error

    async def _observe(self) -> None:
        """Start inotify once; without it a watch still works, at the pace of the poll."""
        async with self._observing:  # several watches begin at once; a second observer would never be stopped
            if self._observed or self._closed:
                return
            await self._run(lambda _db: None, "opening")  # creates the directory, so that it can be observed
            self._observed = True
            loop = asyncio.get_running_loop()
            try:
                observer = Observer()  # raises when the user's limit of inotify instances is reached
                observer.schedule(_Handler(loop, self._wake, str(self._notice)), str(self._directory))
                observer.start()
            except OSError as error:
                log.warning(
                    "inotify is not available on %s (%s): changes are seen within a second", self._directory, error
                )
                return
            self._observer = observer

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()


class _Handler(FileSystemEventHandler):
    """Runs in watchdog's thread: hands the wake-up to the loop. Only the notice counts; reads wake nobody."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None], notice: str) -> None:
        self._loop, self._wake, self._notice = loop, wake, notice

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.src_path == self._notice and event.event_type in ("modified", "created"):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._wake)


def _open(path: Path) -> apsw.Connection:
    """Open the store, creating it when it is new; several processes may do so at once."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)  # the records hold secrets
    until = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            return _open_once(path)
        except apsw.BusyError:  # the switch to WAL does not wait in the busy handler; the other one is nearly done
            if time.monotonic() > until:
                raise
            time.sleep(LOCK_PAUSE_SECONDS)


def _open_once(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path))
    try:
        db.set_busy_timeout(BUSY_MS)
        kind, tables = db.execute("PRAGMA application_id").get, db.execute("SELECT count(*) FROM sqlite_schema").get
        if kind not in (0, APPLICATION_ID) or (kind == 0 and tables):
            raise UsageError(f"{path} is not a walship store but another SQLite file; choose another directory")
        db.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
        if kind == 0:
            _transaction(lambda db: db.execute(_SCHEMA))(db)
    except BaseException:
        db.close()
        raise
    return db


def _transaction(work: Callable[[apsw.Connection], T]) -> Callable[[apsw.Connection], T]:
    """Wrap `work` in BEGIN IMMEDIATE: a compare and its swap see one state."""

    def job(db: apsw.Connection) -> T:
        db.execute("BEGIN IMMEDIATE")
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    return job


def _compare(db: apsw.Connection, key: str, version: int | None) -> None:
    have = db.execute("SELECT version FROM record WHERE key = ?", (key,)).get
    if have != version:
        raise CompareFailed(
            f"{key} is {_version(have)}, not {_version(version)}; somebody else changed it: read it again"
        )


def _version(version: int | None) -> str:
    return "absent" if version is None else f"at version {version}"


def _next_revision(db: apsw.Connection) -> int:
    revision: int = db.execute("UPDATE revision SET n = n + 1 RETURNING n").get
    return revision


class HeldLock:
    """An exclusive flock on `path`, held until `release` or the end of the process. Children do not inherit it.

    Raises UsageError when another live process holds it. The file keeps the holder's pid, for messages only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt < LOCK_TRIES - 1:
                    time.sleep(LOCK_PAUSE_SECONDS)
                    continue
                holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(self._fd)
                raise UsageError(
                    f"{path.parent} is in use by another live process (pid {holder}). Nothing was changed. "
                    "Stop it first, or name another directory"
                ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; idempotent. The file stays, since removing it would race with the next holder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def holder_alive(path: Path) -> bool:
    """True while some live process holds `HeldLock(path)`. A shared lock is taken for an instant to find out."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
