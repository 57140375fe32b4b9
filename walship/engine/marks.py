"""Marks: from where a restart must replay, and the page checksums of that position (R8).

A mark says: everything up to this tip is durable in the database file and its -wal. The array of page checksums is
saved in a file named after the position, before the state record names it; so the pair changes atomically.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from walship.engine import failpoints
from walship.engine.durable_state import StateFile
from walship.engine.files import sync_directory
from walship.engine.log import Log
from walship.engine.retention import Pin
from walship.errors import CorruptData, LogTruncated, StorageFailed
from walship.formats.checksum import PageChecksums
from walship.formats.position import Tip

__all__ = ["EVERY_BYTES", "Marks"]

EVERY_BYTES = 64 << 20  # log bytes between marks: what a restart replays at most, about a second's work


class Marks:
    """The mark of one node: `save` it, `load` it at start. Used from one thread at a time.

    every_bytes: a mark is due after so much log. A restart needs the log from the mark on, so this is also how much is
    kept in any case: it must be well below the log's own bound.
    """

    def __init__(self, directory: Path, state: StateFile, *, every_bytes: int = EVERY_BYTES) -> None:
        self._directory = directory
        self._state = state
        self._every_bytes = every_bytes
        self._bytes_since = 0
        self._pin: Pin | None = None

    def attach(self, log: Log) -> None:
        """Keep `log` from the mark on: a restart replays it. Again after the log was reset."""
        tip = self.tip
        self._pin = None if tip is None else log.pin(tip.position)

    def detach(self) -> None:
        """The log is about to be reset: an installed copy needs nothing that came before it. `attach` again after."""
        self._pin = None

    def touch(self) -> None:
        """The log's retention is about to run: the mark still needs its frames. From any thread.

        Raises LogTruncated when the log lost them.
        """
        pin = self._pin
        try:
            if pin is not None:
                pin.touch()
        except LogTruncated:
            if pin is self._pin:  # else the log was reset just now, by another thread
                raise

    @property
    def tip(self) -> Tip | None:
        return self._state.state.mark

    def appended(self, size_bytes: int) -> None:
        """Count log bytes since the last mark."""
        self._bytes_since += size_bytes

    def note(self, **facts: Any) -> None:
        """Make other fields of the state record durable: where the -wal is counted from. Raises StorageFailed."""
        self._state.update(**facts)

    def due(self) -> bool:
        return self._bytes_since >= self._every_bytes

    def save_if_due(self, tip: Tip, checksums: PageChecksums) -> None:
        if self.due():
            self.save(tip, checksums)

    def save(self, tip: Tip, checksums: PageChecksums) -> None:
        """Mark `tip`, whose page checksums are `checksums`. The database's -wal must be synced through it.

        Raises StorageFailed; the old mark stands then.
        """
        if tip == self.tip:
            return
        if checksums.rolling != tip.checksum:
            raise AssertionError(f"the array is at {checksums.rolling:016x}, not at {tip}")
        path = self._path(tip)
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(checksums.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_directory(self._directory)
        except OSError as error:
            raise StorageFailed(
                f"{temporary}: cannot save the page checksums ({error.strerror}). The last mark stands, "
                "nothing acknowledged is lost; free disk space."
            ) from error
        old = self.tip
        self._state.update(mark=tip)
        failpoints.reach("follower.marked")
        if self._pin is not None:
            self._pin.move(tip.position)
        self._bytes_since = 0
        if old is not None and old.position != tip.position:
            with contextlib.suppress(FileNotFoundError):
                self._path(old).unlink()

    def load(self) -> PageChecksums | None:
        """The array at the mark; None when it is missing, damaged or contradicts the mark (then scan)."""
        tip = self.tip
        if tip is None:
            return None
        try:
            checksums = PageChecksums.parse(self._path(tip).read_bytes())
        except (FileNotFoundError, CorruptData):
            return None
        return checksums if checksums.rolling == tip.checksum else None

    def _path(self, tip: Tip) -> Path:
        return self._directory / f"checksums-{tip.position}"
