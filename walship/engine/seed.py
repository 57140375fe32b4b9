"""A seed: a snapshot received into a file beside the database, verified, and only then put in its place (R9).

The old state stays untouched until the new one is complete, verified and durable. What is replaced is moved aside,
never deleted.

    receiving   incoming/seed.db            pages at their place, checksums taken while writing
    verified    fsynced; LTX file checksum and rolling checksum both right
    installing  the state record says so: from here a crash is finished by `finish_install` at the next start
    installed   database in place, log begins at the snapshot's position, mark there, record cleared
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from walship.engine import failpoints
from walship.engine.apply import Batch
from walship.engine.durable_state import StateFile, Truth
from walship.engine.files import sync_directory
from walship.engine.log import Log
from walship.engine.marks import Marks
from walship.errors import CorruptDatabase, CorruptState, StorageFailed
from walship.formats import ltx
from walship.formats.checksum import PageChecksums, lock_pgno, page_checksum
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position, TermHistory, Tip

__all__ = [
    "Incoming",
    "SeedFile",
    "announced_terms",
    "announced_tip",
    "announcement",
    "complete_install",
    "finish_install",
    "scan_file",
]

_RUN_PAGES = 512


class Incoming:
    """A file that a snapshot comes into, whole or sparse, and the checksums of the state it makes. Blocking."""

    def __init__(self, path: Path, header: SnapshotHeader, checksums: PageChecksums) -> None:
        self.header = header
        self.path = path
        self.path.parent.mkdir(exist_ok=True)
        self.checksums = checksums
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._decoder = ltx.LtxDecoder()
        self._sums: dict[int, int] = {}

    def close(self) -> None:
        """Close the descriptor; the file is never opened by SQLite under this name. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Drop what was received."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _make_durable(self, size_bytes: int) -> None:
        """Raises StorageFailed."""
        try:
            os.ftruncate(self._fd, size_bytes)
            os.fsync(self._fd)
            sync_directory(self.path.parent)
        except OSError as error:
            raise StorageFailed(f"{self.path}: cannot make the snapshot durable ({error.strerror})") from error
        failpoints.reach("seed.received")

    def _fold(self) -> None:
        if self._sums:
            self.checksums.set_many(self._sums, max(self.checksums.commit, max(self._sums)))
            self._sums = {}


class SeedFile(Incoming):
    """Receives one snapshot. Blocking; the follower calls it from a worker thread, one call at a time."""

    def __init__(self, directory: Path, header: SnapshotHeader) -> None:
        super().__init__(directory / "incoming" / "seed.db", header, PageChecksums(header.page_size))

    def write(self, data: bytes) -> None:
        """Take the next piece of LTX. Raises CorruptLtx, CorruptData or StorageFailed; then `abort`."""
        self._decoder.receive_data(data)
        size = self.header.page_size
        try:
            for pgno, page in self._decoder.pages():
                os.pwrite(self._fd, page, (pgno - 1) * size)
                self._sums[pgno] = page_checksum(pgno, page)
        except OSError as error:
            raise StorageFailed(
                f"{self.path}: cannot write the snapshot ({error.strerror}). The old state stands; free disk space."
            ) from error
        if len(self._sums) >= _RUN_PAGES:
            self._fold()

    def finish(self) -> None:
        """Verify everything and make the file durable. Raises CorruptLtx, CorruptDatabase or StorageFailed."""
        self._decoder.finish()
        self._fold()
        header = self.header
        self.checksums.set_many({}, header.commit)
        if self.checksums.rolling != header.checksum:
            raise CorruptDatabase(
                f"the snapshot at {header.position} has checksum {self.checksums.rolling:016x}, its sender announced "
                f"{header.checksum:016x}. It was not installed; the old state stands."
            )
        self._make_durable(header.commit * header.page_size)

    def announce(self, state: StateFile, terms: TermHistory) -> None:
        """Make the intention durable: from here a crash is finished at the next start."""
        state.update(installing=announcement(self.header, terms))
        failpoints.reach("seed.installing")

    def batch(self) -> Batch:
        """The whole image as one batch, to be applied under live readers. Valid until `close`."""
        lock = lock_pgno(self.header.page_size)
        pgnos = [pgno for pgno in range(1, self.header.commit + 1) if pgno != lock]
        size, fd = self.header.page_size, self._fd

        def pages() -> Iterator[bytes]:
            return (os.pread(fd, size, (pgno - 1) * size) for pgno in pgnos)

        return Batch(pgnos, pages, self.header.commit)


def finish_install(directory: Path, state: StateFile, cluster: bytes, log: Log, marks: Marks) -> None:
    """Put an announced seed in place of the database. No connection may be open. Safe to repeat after a crash.

    Raises CorruptDatabase when the file does not have the announced checksum, StorageFailed.
    """
    installing = state.state.installing
    if installing is None:
        return
    tip = announced_tip(state)
    seed, database = directory / "incoming" / "seed.db", Path(state.state.database_path)
    if seed.exists():
        _move_aside(directory, database)
        seed.rename(database)
        sync_directory(database.parent)
        sync_directory(seed.parent)
    checksums = scan_file(database, int(installing["page_size"]))
    if checksums.rolling != tip.checksum or checksums.commit != tip.commit:
        raise CorruptDatabase(f"{database}: the installed snapshot is not the announced state {tip}")
    log.reset(tip, announced_terms(state))
    complete_install(state, marks, tip, checksums)


def complete_install(state: StateFile, marks: Marks, tip: Tip, checksums: PageChecksums) -> None:
    """The database is at `tip` and durable, the log begins there: clear the intention."""
    marks.save(tip, checksums)
    state.update(installing=None, truth=Truth.LOG, base=None, next_base=None, next_base_file=None)
    failpoints.reach("seed.installed")


def announcement(header: SnapshotHeader, terms: TermHistory) -> dict[str, Any]:
    """What the state record says while a snapshot is installed: its tip, and where the terms before it began."""
    return {
        "term": header.position.term,
        "txid": header.position.txid,
        "checksum": f"{header.checksum:016x}",
        "commit": header.commit,
        "page_size": header.page_size,
        "terms": [list(start) for start in terms.starts()],
    }


def announced_terms(state: StateFile) -> TermHistory:
    """Where the terms before an announced seed began. Raises CorruptState."""
    installing = state.state.installing or {}
    try:
        return TermHistory((int(term), int(start)) for term, start in installing.get("terms", ()))
    except (ValueError, TypeError) as error:
        raise CorruptState(f"the state record announces a seed with terms that make no sense: {installing}") from error


def announced_tip(state: StateFile) -> Tip:
    """The position of the seed whose installation was announced. Raises CorruptState."""
    installing = state.state.installing or {}
    try:
        position = Position(int(installing["term"]), int(installing["txid"]))
        return Tip(position, int(installing["checksum"], 16), int(installing["commit"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptState(
            f"the state record announces a snapshot install that makes no sense: {installing}"
        ) from error


def scan_file(path: Path, page_size: int) -> PageChecksums:
    """Page checksums of a database file that no connection has open and that has no -wal."""
    checksums = PageChecksums(page_size)
    lock = lock_pgno(page_size)
    with path.open("rb") as file:
        commit = os.fstat(file.fileno()).st_size // page_size
        numbers = iter(range(1, commit + 1))
        while run := list(itertools.islice(numbers, _RUN_PAGES)):
            sums = {}
            for pgno in run:
                page = file.read(page_size)
                if pgno != lock:
                    sums[pgno] = page_checksum(pgno, page)
            checksums.set_many(sums, run[-1])
    return checksums


def _move_aside(directory: Path, database: Path) -> None:
    """Keep what is replaced: the database file and its -wal move to replaced/N; the -shm is only an index.

    The file goes last: SQLite would take a -wal that a crash left behind alone for that of the file put there next.
    """
    database.with_name(database.name + "-shm").unlink(missing_ok=True)
    paths = [path for suffix in ("-wal", "") if (path := database.with_name(database.name + suffix)).exists()]
    if not paths:
        return
    replaced = directory / "replaced"
    replaced.mkdir(exist_ok=True)
    number = 1 + max((int(entry.name) for entry in replaced.iterdir() if entry.name.isdecimal()), default=0)
    aside = replaced / str(number)
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    sync_directory(aside)
    sync_directory(database.parent)
