"""The durable state record: what a node must remember about itself that neither its log nor its -wal can say.

One small file, written whole each time: temporary file, fsync, rename, fsync of the directory. Either the old record
or the new one is there, never a mixture; several facts that must change together change in one write (R2, R7, R12).

The file is a first line `walship-state 1 CHECKSUM` (CRC-64/GO-ISO of the rest, 16 hex digits) and then JSON, so that
an operator can read it. It must not be edited: the checksum would not fit, and what it says has been promised.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import msgspec
from fastcrc import crc64

from walship.engine import failpoints
from walship.engine.files import sync_directory
from walship.errors import CorruptState, Fenced, StorageFailed, UsageError
from walship.formats.position import Tip

__all__ = ["STATE_FILE", "DurableState", "FileStamp", "StateFile", "Truth", "WalBase"]

STATE_FILE = "state"
_TEMPORARY = "state.new"
_MAGIC = b"walship-state"
_VERSION = b"1"
_SIZE_LIMIT = 64 << 20  # `installing` lists terms; anything larger is not our file


class Truth(StrEnum):
    """Where a node's newest commits are (R2): a follower's and a stopped node's in the log, a leader's in the -wal."""

    LOG = "log"
    WAL = "wal"


@dataclass(frozen=True, slots=True)
class WalBase:
    """The -wal generation with these salts holds, at this frame (0 = its header), exactly `txid`.

    `frame_checksum` is the running checksum stored in that frame, or in the header for frame 0 (file format 4.1).
    """

    txid: int
    salts: tuple[int, int]
    frame: int
    frame_checksum: tuple[int, int]

    def __str__(self) -> str:
        return f"txid {self.txid} at frame {self.frame} of generation {self.salts[0]:08x}-{self.salts[1]:08x}"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What the database file looked like at a moment: every later write to it, by whomever, gives it another stamp."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Self:
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class DurableState:
    """Everything in the record.

    node_id, cluster_id: 32 hex digits; cluster_id is None before the node joined one (R1).
    promised: the seal, the lowest term this node may still serve or follow; it never falls.
    truth, led: where the newest commits are, and the term of this node's last leadership (R2).
    base, next_base: what txids of the -wal are counted from; `next_base` is the txid at which the next generation,
        whose salts nobody has seen yet, will start (R7).
    next_base_file: the database file when it held everything up to `next_base`. Another stamp means that somebody has
        copied frames into it since; then no generation can be said to be the next one. While truth is `log` the same
        three say what a follower left in its -wal, so that what others wrote to it is found (R10).
    mark: everything up to here is durable in database file and -wal, and the saved checksum array is of it (R8).
    installing: a snapshot install, whole or sparse, that has begun and is to be finished at start (R9, R12).
    """

    node_id: str
    name: str
    cluster_id: str | None
    database_path: str
    promised: int = 0
    truth: Truth = Truth.LOG
    led: int | None = None
    base: WalBase | None = None
    next_base: int | None = None
    next_base_file: FileStamp | None = None
    mark: Tip | None = None
    installing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for what, value in (("node", self.node_id), ("cluster", self.cluster_id)):
            if value is not None and (len(value) != 32 or value.strip("0123456789abcdef")):
                raise CorruptState(f"a {what} id is 32 lower-case hex digits, not {value[:60]!r}")
        if min(self.promised, self.led or 0, self.next_base or 0) < 0:
            raise CorruptState("a term or txid in the state record is negative")

    def to_bytes(self) -> bytes:
        """Return the file's content, ending in a line feed."""
        body = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        return b"%s %s %016x\n" % (_MAGIC, _VERSION, crc64.go_iso(body)) + body

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a file's content. Raises CorruptState when it is damaged, cut, or of a newer walship."""
        first, line_feed, body = data.partition(b"\n")
        words = first.split(b" ")
        if not line_feed or len(words) != 3 or words[0] != _MAGIC:
            raise CorruptState("it does not begin like a state record")
        if words[1] != _VERSION:
            raise CorruptState(f"it has version {words[1][:20]!r}, this walship reads version 1")
        if words[2] != b"%016x" % crc64.go_iso(body):
            raise CorruptState("its checksum does not fit its content")
        try:
            return msgspec.json.decode(body, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise CorruptState(f"its checksum fits, but its content does not: {error}") from error

    def __str__(self) -> str:
        led = f", led term {self.led}" if self.led is not None else ""
        return f"{self.name}: promised {self.promised}, truth {self.truth}{led}, mark {self.mark}"


class StateFile:
    """The record in a node's directory: `state` is what is durable, `update` changes it.

    Safe from any thread: updates are one after another, each based on the one before. Does not guard against a
    second process; the lock on the data directory does (R3).
    """

    def __init__(self, directory: Path, state: DurableState) -> None:
        self._directory = directory
        self._state = state
        self._lock = threading.Lock()
        self._failed: str | None = None

    @staticmethod
    def exists(directory: Path) -> bool:
        """True iff the directory has a record, good or damaged."""
        return (directory / STATE_FILE).exists()

    @classmethod
    def create(cls, directory: Path, state: DurableState) -> Self:
        """Write the first record, durably. Raises UsageError when there is one already, StorageFailed."""
        if cls.exists(directory):
            raise UsageError(f"{directory} belongs to a node already; nothing was changed. Give the node another one")
        file = cls(directory, state)
        file._write(state)
        return file

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the record; write none. Raises CorruptState when it is damaged or not there, StorageFailed."""
        path = directory / STATE_FILE
        try:
            if path.stat().st_size > _SIZE_LIMIT:
                raise CorruptState(f"{path} is too large to be a state record; it was not changed")
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptState(f"{path} is missing, so {directory} is not the directory of a node") from error
        except OSError as error:
            raise StorageFailed(f"{path} cannot be read: {error.strerror}. It was not changed") from error
        try:
            state = DurableState.parse(data)
        except CorruptState as error:
            raise CorruptState(
                f"{path} cannot be trusted: {error}. The node must not guess what it promised; "
                "move the directory away and let the node join again with an empty one"
            ) from error
        with suppress(FileNotFoundError):
            (directory / _TEMPORARY).unlink()  # of a process that died before its rename; it never counted
        return cls(directory, state)

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def state(self) -> DurableState:
        """The newest durable record."""
        return self._state

    def update(self, **changes: Any) -> DurableState:
        """Make a record with `changes` (field=value) durable, then current; return it.

        Raises Fenced when `promised` would fall (the caller lost a race against a newer term), StorageFailed when the
        disk does. After a failed fsync or rename nobody knows which record is on disk: every later call raises too,
        and the process must end.
        """
        with self._lock:
            if self._failed is not None:
                raise StorageFailed(self._failed)
            state = replace(self._state, **changes)
            if state.promised < self._state.promised:
                raise Fenced(
                    f"term {state.promised} is over: this node has promised {self._state.promised}. Nothing was changed"
                )
            if state != self._state:
                self._write(state)
                self._state = state
            return state

    def _write(self, state: DurableState) -> None:
        temporary = self._directory / _TEMPORARY
        path = self._directory / STATE_FILE
        try:
            with temporary.open("wb", buffering=0) as file:
                data = memoryview(state.to_bytes())
                while data:
                    data = data[file.write(data) :]
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    raise self._final(path, error) from error
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise StorageFailed(f"{temporary} cannot be written: {error.strerror}. {path} is unchanged") from error
        failpoints.reach("state.temp_written")
        try:
            temporary.replace(path)
            failpoints.reach("state.renamed")
            sync_directory(self._directory)
        except OSError as error:
            raise self._final(path, error) from error

    def _final(self, path: Path, error: OSError) -> StorageFailed:
        self._failed = (
            f"{path} could not be made durable: {error.strerror}. Its old or its new content is there, whole; "
            "the process must end, and the next start reads it again"
        )
        return StorageFailed(self._failed)
