"""Capturing commits on the leader: which frames the -wal gained, read through the wal-index header (engine.md 8, B1).

Frames at or below mxFrame of a valid header are committed by definition, so no checksum pass is needed; that each
frame carries the generation's salts and the last one the header's checksum is verified all the same.

A run larger than 16 MiB is described (page -> frame) instead of held; its pages are read again from the -wal while
they are packed, which is safe because no frame is reused before the checkpoint that we ourselves order (R7).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from walship.engine.database import Database
from walship.errors import CorruptWal
from walship.formats.wal import FRAME_HEADER_LAYOUT, FRAME_HEADER_SIZE, WAL_HEADER_SIZE, WalHeader, frame_offset
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Capture", "Captured", "WalPoint"]

_HELD_BYTES = 16 << 20  # R6: nothing holds more of a frame in memory
_CHUNK_BYTES = 4 << 20
_SMALL_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class WalPoint:
    """A frame boundary of one -wal generation: frames 1..frame are behind us, the last has `checksum` (the header's
    own for frame 0)."""

    salts: tuple[int, int]
    frame: int
    checksum: tuple[int, int]

    def __str__(self) -> str:
        return f"frame {self.frame} of generation {self.salts[0]:08x}-{self.salts[1]:08x}"


@dataclass(frozen=True, slots=True)
class Captured:
    """A run of whole commits.

    since: where the run starts; a frame of 0 means that it opens a generation.
    until: where it ends.   commit_frames: the last frame of each SQLite commit.   commit: database size in pages
    afterwards.
    newest: page number -> number of the newest frame of the run that holds it, for pages up to `commit`.
    """

    database: Database
    since: WalPoint
    until: WalPoint
    commit_frames: array[int]
    commit: int
    newest: dict[int, int]
    data: bytes | None

    @property
    def commits(self) -> int:
        return len(self.commit_frames)

    def commits_until(self, frame: int) -> int:
        """How many of the commits end at or before `frame`."""
        return bisect_right(self.commit_frames, frame)

    @property
    def salts(self) -> tuple[int, int]:
        return self.until.salts

    @property
    def offset_bytes(self) -> int:
        return frame_offset(self.since.frame + 1, self.database.page_size)

    @property
    def size_bytes(self) -> int:
        return (self.until.frame - self.since.frame) * (FRAME_HEADER_SIZE + self.database.page_size)

    def pages(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """(pgno, newest image), ascending."""
        page_size = self.database.page_size
        if self.data is None:
            for pgno in sorted(self.newest):
                offset = frame_offset(self.newest[pgno], page_size) + FRAME_HEADER_SIZE
                yield pgno, _pread(self.database.wal_fd, page_size, offset, self.until)
            return
        view = memoryview(self.data)
        first, step = self.since.frame + 1, FRAME_HEADER_SIZE + page_size
        for pgno in sorted(self.newest):
            start = (self.newest[pgno] - first) * step + FRAME_HEADER_SIZE
            yield pgno, view[start : start + page_size]


class Capture:
    """Follows the -wal of one database. Used from one thread, with frames past `at` protected from reuse."""

    def __init__(self, database: Database, at: WalPoint | None) -> None:
        """`at` None: the -wal is empty and the next generation is counted from its first frame."""
        self._database = database
        self.at = at

    def behind(self, header: WalIndexHeader) -> bool:
        """True iff `header` shows commits not captured yet."""
        at = self.at
        if at is None or header.salts != at.salts:
            return header.mx_frame > 0
        return header.mx_frame > at.frame

    def read(self, *, one_commit: bool = False) -> Captured | None:
        """The commits since `at`, or the first of them alone; None when there are none. Does not move `at`.

        Raises CorruptWal when the -wal contradicts its index.
        """
        header = self._database.index.header()
        if not self.behind(header):
            if self.at is not None and header.salts == self.at.salts and header.mx_frame < self.at.frame:
                raise CorruptWal(f"{self._database.wal_path}: {header} went back behind {self.at}")
            return None
        since = self.at
        if since is None or since.salts != header.salts:
            wal_header = WalHeader.parse(os.pread(self._database.wal_fd, WAL_HEADER_SIZE, 0))
            since = WalPoint(header.salts, 0, wal_header.checksum)
        return self._read(since, header, one_commit=one_commit)

    def advance(self, captured: Captured) -> None:
        """Go past `captured`, once it is in the log."""
        self.at = captured.until

    def _read(self, since: WalPoint, header: WalIndexHeader, *, one_commit: bool) -> Captured:
        database, page_size = self._database, self._database.page_size
        step = FRAME_HEADER_SIZE + page_size
        total = (header.mx_frame - since.frame) * step
        offset = frame_offset(since.frame + 1, page_size)
        frame, commits, commit = since.frame, array("Q"), 0
        newest: dict[int, int] = {}
        data: bytes | None = None
        checksum = since.checksum
        # One commit at a time is read in small pieces, so that a recount of many stays linear.
        held_bytes, chunk_bytes = (0, _SMALL_CHUNK_BYTES) if one_commit else (_HELD_BYTES, _CHUNK_BYTES)
        done = 0
        while done < total:
            size = min(total - done, total if total <= held_bytes else max(1, chunk_bytes // step) * step)
            chunk = _pread(database.wal_fd, size, offset + done, since)
            for at in range(0, size, step):
                pgno, frame_commit, salt1, salt2, sum1, sum2 = FRAME_HEADER_LAYOUT.unpack_from(chunk, at)
                frame += 1
                if (salt1, salt2) != header.salts or not pgno:
                    raise CorruptWal(
                        f"{database.wal_path}: frame {frame} is not of the generation that the wal-index counts it in"
                    )
                newest[pgno] = frame
                if frame_commit:
                    commits.append(frame)
                    commit = frame_commit
                    checksum = (sum1, sum2)
                    if one_commit:
                        break
            done += size
            if size == total and not one_commit:
                data = chunk
            if one_commit and commits:
                break
        if not one_commit and (checksum != header.frame_checksum or frame != header.mx_frame):
            raise CorruptWal(f"{database.wal_path}: its last commit frame has another checksum than the wal-index")
        for pgno in array("I", (pgno for pgno in newest if pgno > commit)):
            del newest[pgno]
        return Captured(database, since, WalPoint(header.salts, frame, checksum), commits, commit, newest, data)


def _pread(fd: int, size: int, offset: int, at: WalPoint) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise CorruptWal(
            f"the -wal ends at byte {offset + len(data)}, inside frames that its index counts (after {at})"
        )
    return data
