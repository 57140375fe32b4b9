"""Pre-flight for an existing database: may this file become a walship database, and is it well?

Goal: every reason to refuse is found before anything is written, and a refused file keeps every byte it had.
Plan: look at names, rights, header, journal, locks and disk first, without SQLite; then let SQLite check the content
through a connection that can neither write nor recover nor checkpoint; only then, as a step of its own, switch the
journal mode, which SQLite itself does as one transaction.

All of it runs in a subprocess (`python -m walship.cli.adopt`): closing a descriptor of a database drops every POSIX
lock this process holds on it (SQLite file-format: "how to corrupt"), so no process that serves a database may look at
its file this way; and a file made to crash SQLite takes down only the look.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import stat
import struct
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

from walship.cli import output
from walship.errors import DatabaseRefused, StorageFailed

__all__ = ["Journal", "Verdict", "check_and_switch", "inspect", "preflight", "switch_to_wal"]

MAGIC = b"SQLite format 3\0"
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
WAL_MAGIC = 0x377F0682  # the last bit set: checksums in big-endian order (file format 4.1)
STORE_APPLICATION_ID = int.from_bytes(b"wshS", "big")
PENDING, RESERVED, SHARED, SHARED_SIZE = 0x40000000, 0x40000001, 0x40000002, 510  # os.h: lock bytes of the unix VFS
SPARE_BYTES = 16 << 20  # room for a -wal and a log beside the file; less is a full disk about to happen
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


class Journal(StrEnum):
    """How the file keeps its transactions now."""

    NEW = "new"
    ROLLBACK = "rollback"
    WAL = "wal"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A file that may be adopted. `path` has no symbolic links left; `notes` are for the operator."""

    path: Path
    journal: Journal
    size_bytes: int
    page_size: int
    notes: tuple[str, ...] = ()


async def check_and_switch(path: Path, *, data_dir: Path, copies: int) -> Verdict:
    """Pre-flight, say what was found, switch to WAL if needed. Raises DatabaseRefused, StorageFailed."""
    verdict = await preflight(path, data_dir=data_dir, copies=copies)
    for text in verdict.notes:
        output.note(f"walship: {text}")
    if verdict.journal is Journal.ROLLBACK:
        await _subprocess("switch", verdict.path)
        output.note(f"walship: {verdict.path} is now in WAL mode (it was in rollback-journal mode)")
    return verdict


async def preflight(path: Path, *, data_dir: Path, copies: int) -> Verdict:
    """Inspect `path` in a subprocess and check that `copies` followers' copies fit under `data_dir`."""
    found = await _subprocess("inspect", path)
    verdict = Verdict(
        Path(found["path"]), Journal(found["journal"]), found["size_bytes"], found["page_size"], tuple(found["notes"])
    )
    place = next(parent for parent in [data_dir, *data_dir.parents] if parent.exists())
    needed = verdict.size_bytes * copies + SPARE_BYTES
    if (free := shutil.disk_usage(place).free) < needed:
        raise DatabaseRefused(
            path,
            f"the disk of {data_dir} has {free >> 20} MiB free, and {copies} copies of it need {needed >> 20} MiB",
            "Free some space, or name another --data directory.",
        )
    return verdict


async def _subprocess(step: str, path: Path) -> dict[str, Any]:
    """Run one step; killed when cancelled, which is safe: a look changes nothing, the switch is one transaction."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "walship.cli.adopt", step, str(path), stdout=asyncio.subprocess.PIPE
    )
    try:
        text, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise DatabaseRefused(
            path,
            f"the check of this file ended abnormally (exit {process.returncode})",
            "Check it with: sqlite3 FILE 'PRAGMA integrity_check'.",
        ) from error
    if "refused" in answer:
        raise DatabaseRefused(path, *answer["refused"])
    if "failed" in answer:
        raise StorageFailed(answer["failed"])
    return answer


def inspect(path: Path) -> Verdict:
    """The verdict on `path`; changes nothing. Raises DatabaseRefused, with the reason and what to do about it."""
    real = Path(os.path.realpath(path))
    _check_directory(path, real.parent)
    if not real.exists():
        return Verdict(real, Journal.NEW, 0, 0, (f"{real} does not exist: a new database is made there",))
    _check_file(path, real)
    with real.open("rb") as file:
        header = file.read(100)
        size = os.fstat(file.fileno()).st_size
        journal = _check_header(path, header, size, _size(_beside(real, "-wal")))
        notes = _check_locks(path, file.fileno(), journal)
        _check_journal(path, real, file.fileno())
    _check_wal(path, real, journal)
    page_size = _check_content(path, real, journal, in_use=bool(notes))
    if journal is Journal.ROLLBACK:
        notes.append(f"{real} will be switched from rollback-journal to WAL mode; any SQLite since 3.7 reads it")
    return Verdict(real, journal, max(size, _size(_beside(real, "-wal"))), page_size, tuple(notes))


def switch_to_wal(path: Path) -> None:
    """PRAGMA journal_mode = WAL: one transaction of SQLite's own; on failure the file is as it was."""
    with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as db:
        db.set_busy_timeout(0)
        with _as_refusal(path):
            mode = db.execute("PRAGMA journal_mode = WAL").get
        if mode != "wal":
            raise DatabaseRefused(
                path,
                f"it could not be switched to WAL mode (it stays in {mode} mode)",
                "WAL needs shared memory: use a local disk, not a network file system.",
            )


def _check_directory(path: Path, directory: Path) -> None:
    if not directory.is_dir():
        raise DatabaseRefused(path, f"the directory {directory} does not exist", "Create it, or correct the path.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DatabaseRefused(
            path,
            f"the directory {directory} is read-only, and WAL mode keeps two files beside the database",
            "Make the directory writable for this user, or copy the database elsewhere.",
        )
    if (free := shutil.disk_usage(directory).free) < SPARE_BYTES:
        raise DatabaseRefused(
            path,
            f"the disk is full: {directory} has {free >> 10} KiB left, a start needs {SPARE_BYTES >> 20} MiB",
            "Free some space first.",
        )


def _check_file(path: Path, real: Path) -> None:
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DatabaseRefused(path, "it is not a regular file", "Name the SQLite database file itself.")
    if not os.access(real, os.R_OK | os.W_OK):
        raise DatabaseRefused(
            path, "this user may not read and write it", "Correct its permissions, or run as its owner."
        )
    if status.st_nlink > 1:
        raise DatabaseRefused(
            path,
            f"it has {status.st_nlink} names (hard links), and SQLite would keep a separate -wal for each",
            "Leave one name, or copy the file.",
        )


def _check_header(path: Path, header: bytes, size: int, wal_size: int) -> Journal:
    """File format 1.3: magic, page size, write and read versions."""
    if size == 0:
        return Journal.WAL if wal_size else Journal.NEW
    if len(header) < 100 or not header.startswith(MAGIC):
        raise DatabaseRefused(
            path,
            "it is not a SQLite database (or it is encrypted)",
            "Name a SQLite file, or none to start with an empty database.",
        )
    raw_page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if raw_page_size == 1 else raw_page_size
    if page_size < 512 or page_size & (page_size - 1):
        raise DatabaseRefused(path, f"its header is corrupt (page size {page_size})", "Restore it from a backup.")
    if int.from_bytes(header[68:72], "big") == STORE_APPLICATION_ID:
        raise DatabaseRefused(path, "it is walship's own coordination store", "Name your application's database.")
    if max(header[18], header[19]) > 2:
        raise DatabaseRefused(
            path, f"its format (version {header[18]}/{header[19]}) is newer than this SQLite", "Use a newer walship."
        )
    if header[19] == 2:
        return Journal.WAL
    if wal_size:
        raise DatabaseRefused(
            path,
            "a -wal file lies beside it although it is not in WAL mode, so it belongs to another database or copy",
            "Find out where the -wal comes from and move it away.",
        )
    return Journal.ROLLBACK


def _check_locks(path: Path, fd: int, journal: Journal) -> list[str]:
    """Who has the file locked? F_GETLK asks without taking anything."""
    writer = _holder(fd, fcntl.F_RDLCK, PENDING, SHARED_SIZE + 2)
    anybody = _holder(fd, fcntl.F_WRLCK, PENDING, SHARED_SIZE + 2)
    if writer and journal is Journal.WAL:
        raise DatabaseRefused(path, f"{writer} holds it in exclusive mode", "Stop that process first.")
    if anybody and journal is not Journal.WAL:
        raise DatabaseRefused(
            path,
            f"{anybody} is using it in rollback-journal mode, and the switch to WAL needs it alone",
            "Stop that process, or let it finish, first.",
        )
    if anybody and _is_walship_node(anybody.pid):
        raise DatabaseRefused(path, f"{anybody} is a walship node that serves it already", "Stop that cluster first.")
    if anybody:
        return [
            f"{anybody} has {path} open. It may go on reading; what it writes is replicated, "
            "but not waited for: let it write through the proxy"
        ]
    return []


@dataclasses.dataclass(frozen=True, slots=True)
class _Holder:
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid > 0 else "another process"


def _holder(fd: int, kind: int, start: int, length: int) -> _Holder | None:
    asked = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    found_kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if found_kind == fcntl.F_UNLCK else _Holder(pid)


def _is_walship_node(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"node" in words and any(word.endswith(b"walship") for word in words)


def _check_journal(path: Path, real: Path, fd: int) -> None:
    """A rollback journal with a live header is a transaction under way, or one a crash left behind (file format 3)."""
    try:
        with _beside(real, "-journal").open("rb") as file:
            hot = file.read(8) == JOURNAL_MAGIC
    except FileNotFoundError:
        return
    except OSError as error:
        raise DatabaseRefused(path, f"its rollback journal cannot be read: {error.strerror}", "Check it.") from error
    if not hot:
        return
    if holder := _holder(fd, fcntl.F_WRLCK, RESERVED, 1):
        raise DatabaseRefused(path, f"{holder} is in the middle of a transaction on it", "Wait or stop it.")
    raise DatabaseRefused(
        path,
        f"{real.name}-journal holds an unfinished transaction of a process that crashed",
        "Open it once with the sqlite3 shell (SQLite then rolls it back), check it, and try again.",
    )


def _check_wal(path: Path, real: Path, journal: Journal) -> None:
    try:
        with _beside(real, "-wal").open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DatabaseRefused(path, f"its -wal file cannot be read: {error.strerror}", "Check its rights.") from error
    magic = int.from_bytes(head[:4], "big")
    if journal is Journal.WAL and len(head) == 32 and magic == WAL_MAGIC | 1:
        raise DatabaseRefused(
            path,
            "its -wal file was written by a big-endian machine; this one could not continue it",
            "Checkpoint it first: sqlite3 FILE 'PRAGMA wal_checkpoint(TRUNCATE)'.",
        )


def _check_content(path: Path, real: Path, journal: Journal, *, in_use: bool) -> int:
    """SQLite's own quick_check; returns the page size.

    Without a -wal the file is opened `immutable`: no lock, no -shm, nothing left beside it. Where somebody may be
    writing at the same time, damage found that way is looked at again under the ordinary locks.
    """
    if journal is Journal.NEW:
        return 0
    if _size(_beside(real, "-wal")) == 0:
        try:
            return _quick_check(path, real, "mode=ro&immutable=1")
        except DatabaseRefused:
            if journal is Journal.WAL and not in_use:
                raise
    return _quick_check(path, real, "mode=ro")


def _quick_check(path: Path, real: Path, options: str) -> int:
    uri = f"file:{quote(str(real))}?{options}"
    remedy = "Restore it from a backup, or salvage it with the sqlite3 shell's .recover command."
    with (
        _as_refusal(path),
        contextlib.closing(apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)) as db,
    ):
        db.set_busy_timeout(1000)
        problems = [str(text) for (text,) in db.execute("PRAGMA quick_check(3)")]
        page_size: int = db.execute("PRAGMA page_size").get
    if problems != ["ok"]:
        raise DatabaseRefused(path, f"it is corrupt: {'; '.join(problems)[:300]}", remedy)
    return page_size


@contextlib.contextmanager
def _as_refusal(path: Path) -> Iterator[None]:
    """SQLite's errors in the words of this check."""
    try:
        yield
    except (apsw.BusyError, apsw.LockedError) as error:
        raise DatabaseRefused(path, "another process has it locked", "Stop that process first.") from error
    except apsw.NotADBError as error:
        raise DatabaseRefused(
            path, "it is not a SQLite database (or it is encrypted)", "Name a SQLite file."
        ) from error
    except apsw.CorruptError as error:
        raise DatabaseRefused(path, f"it is corrupt: {error}", "Restore it from a backup.") from error
    except apsw.FullError as error:
        raise DatabaseRefused(path, "the disk is full", "Free some space first.") from error
    except apsw.ReadOnlyError as error:
        raise DatabaseRefused(path, f"it cannot be written: {error}", "Correct its permissions.") from error
    except apsw.Error as error:
        raise DatabaseRefused(path, f"SQLite cannot read it: {error}", "Check the file and its disk.") from error


def _beside(real: Path, suffix: str) -> Path:
    return real.with_name(real.name + suffix)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _main(step: str, path: str) -> int:
    """The subprocess: one line of JSON with the answer."""
    try:
        if step == "switch":
            switch_to_wal(Path(path))
            answer: dict[str, object] = {}
        else:
            verdict = inspect(Path(path))
            answer = dataclasses.asdict(verdict) | {"path": str(verdict.path)}
    except DatabaseRefused as error:
        answer = {"refused": [error.reason, error.remedy]}
    except OSError as error:
        answer = {"failed": f"{path}: {error.strerror}. The file was not changed. Check the disk and the permissions"}
    output.line(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
