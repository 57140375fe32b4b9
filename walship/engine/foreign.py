"""Commits of other programs on a copy that was not theirs to write: found, kept as an orphan, and replaced (R10).

The fence keeps them out while a node follows. They can come in while the process is down, or in the moment between
the last capture of a deposed leader and its fence, when somebody was writing just then.

    while following   the wal-index is not as we left it: the frames since are theirs (`found_live`)
    at a start        a page of the -wal after what we left (or of the whole file, when nothing says where that was)
                      has an image that no frame of the log gave it (`found_at_start`)

What is found is written as an orphan first; only then is the copy replaced by the leader's. To know at a start where
our own frames end, `left` is kept in the state record: at each mark and each new generation of the -wal. It uses the
fields that a leader counts from (R7), with the same meaning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walship.engine.capture import Capture, WalPoint
from walship.engine.database import Database
from walship.engine.durable_state import DurableState, FileStamp, WalBase
from walship.engine.log import Log
from walship.engine.orphans import Manifest, Reason, write_orphan
from walship.engine.replay import merge_frames
from walship.engine.snapshot import Snapshot
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.position import Tip
from walship.formats.wal import WAL_HEADER_SIZE, WalFrameHeader, WalHeader, frame_offset
from walship.formats.wal_index import WalIndexHeader

__all__ = ["Foreign", "checksum_at", "found_at_start", "found_live", "keep", "left"]

_log = logging.getLogger("walship.engine")

_Pages = Iterable[tuple[int, bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Foreign:
    """What others committed.

    base: the state that was left.   tip: what is there now, at base's position, as nobody gave it another.
    checksums: of the pages there now.   pages: number and image of those that differ from base, ascending; each call
    reads them anew, while the fence is held.
    """

    base: Tip
    tip: Tip
    checksums: PageChecksums
    pages: Callable[[], _Pages]


def left(database: Database, txid: int) -> dict[str, Any]:
    """Fields for the state record: the content is at `txid`, and this is where the -wal ends."""
    header = database.index.header()
    if header.mx_frame:
        base = WalBase(txid, header.salts, header.mx_frame, header.frame_checksum)
        return {"base": base, "next_base": None, "next_base_file": None}
    return {"base": None, "next_base": txid, "next_base_file": FileStamp.of(database.file_fd)}


def found_live(
    database: Database, before: WalIndexHeader, header: WalIndexHeader, checksums: PageChecksums, at: Tip
) -> Foreign | None:
    """What was committed since the wal-index was `before`, when the content was `at` with `checksums`. None: nothing
    that changed a page. The fence is held."""

    def accepts(pgno: int, checksum: int) -> bool:
        return checksum == checksums.get(pgno)

    point = WalPoint(before.salts, before.mx_frame, before.frame_checksum) if before.mx_frame else None
    appended = header.mx_frame > before.mx_frame if header.salts == before.salts else not before.mx_frame
    if appended:
        captured = Capture(database, point).read()
        # Each commit raises the counter by one: a different number means that a generation came and went.
        if captured is not None and captured.commits == (header.change - before.change) & 0xFFFFFFFF:
            return _foreign(captured.pages, captured.commit, checksums, at, accepts)
    _log.warning("somebody wrote and emptied the -wal: comparing every page path=%s", database.path)
    snapshot = Snapshot.pin(database)
    try:
        return _foreign(snapshot.pages, snapshot.commit, checksums, at, accepts)
    finally:
        snapshot.close()


def found_at_start(
    database: Database, log: Log, state: DurableState, mark: Tip, checksums: PageChecksums
) -> Foreign | None:
    """What was committed while this node was down; None: nothing. `checksums` are those of `mark`. The fence is held.

    What we left is the state at some frame of the log, at or after the mark; so a page must have the image of the mark
    or of a frame since.
    """
    header = database.index.header()
    untouched = state.next_base is not None and state.next_base_file == FileStamp.of(database.file_fd)
    if untouched and not header.mx_frame:
        return None
    history = _History.since(log, mark, checksums)
    point, txid = None, state.next_base or 0
    base = state.base
    if (
        base is not None
        and (header.salts == base.salts and header.mx_frame >= base.frame)
        and checksum_at(database, base.frame) == base.frame_checksum
    ):
        point, txid = WalPoint(base.salts, base.frame, base.frame_checksum), base.txid
    counted = (point is not None or untouched) and txid >= mark.position.txid
    snapshot = Snapshot.pin(database)
    try:
        if counted:
            captured = Capture(database, point).read()
            if captured is None:
                return None
            pages, commit = captured.pages, captured.commit
        else:
            _log.warning("nothing says where this follower's -wal ended: comparing every page path=%s", database.path)
            pages, commit = snapshot.pages, snapshot.commit
        newest = history.newest_in(pages())
        at, expected = history.state_at(max(newest, history.index_of(txid)))
        return _foreign(pages, commit, expected, at, history.accepts)
    finally:
        snapshot.close()


def keep(foreign: Foreign, directory: Path, log: Log, *, node: str) -> Manifest:
    """Write the orphan. Nobody knows when those commits were made; it says the time of the newest frame of `log`, so
    that finding them again gives the same file. Raises StorageFailed; the copy must not be replaced then."""
    return write_orphan(
        directory,
        foreign.pages(),
        cluster=log.cluster,
        node=node,
        reason=Reason.FOREIGN,
        base=foreign.base,
        tip=foreign.tip,
        page_size=foreign.checksums.page_size,
        acks_wanted=1,  # no client of the cluster was told that they are committed
        first_time_ms=log.last_time_ms,
        last_time_ms=log.last_time_ms,
    )


def checksum_at(database: Database, frame: int) -> tuple[int, int]:
    """The running checksum stored in a frame of the -wal, or in its header for frame 0."""
    if frame == 0:
        return WalHeader.parse(os.pread(database.wal_fd, WAL_HEADER_SIZE, 0)).checksum
    return WalFrameHeader.parse(os.pread(database.wal_fd, 24, frame_offset(frame, database.page_size))).checksum


@dataclass(slots=True)
class _History:
    """Which images history gave to which pages, from the mark to the end of the log.

    tips: the states, the mark's first.   versions: page -> (index into `tips`, page checksum), ascending.
    """

    tips: list[Tip]
    checksums: PageChecksums
    versions: dict[int, list[tuple[int, int]]]

    @classmethod
    def since(cls, log: Log, mark: Tip, checksums: PageChecksums) -> _History:
        tips, versions = [mark], dict[int, list[tuple[int, int]]]()
        for ref in log.frames_after(mark.position):
            batch = merge_frames(log, [ref])
            if batch is None:
                continue
            for pgno, page in zip(batch.pgnos, batch.pages(), strict=True):
                versions.setdefault(pgno, []).append((len(tips), page_checksum(pgno, page)))
            tips.append(ref.header.tip)
        return cls(tips, checksums, versions)

    def accepts(self, pgno: int, checksum: int) -> bool:
        return self.index(pgno, checksum) is not None

    def index(self, pgno: int, checksum: int) -> int | None:
        """The first state in which the page has this checksum."""
        if checksum == self.checksums.get(pgno):
            return 0
        return next((at for at, known in self.versions.get(pgno, ()) if known == checksum), None)

    def newest_in(self, pages: _Pages) -> int:
        """The oldest state that can have all the images that are history's."""
        return max((self.index(pgno, page_checksum(pgno, page)) or 0 for pgno, page in pages), default=0)

    def index_of(self, txid: int) -> int:
        return max((at for at, tip in enumerate(self.tips) if tip.position.txid <= txid), default=0)

    def state_at(self, index: int) -> tuple[Tip, PageChecksums]:
        sums = {
            pgno: [known for at, known in versions if at <= index][-1]
            for pgno, versions in self.versions.items()
            if versions[0][0] <= index
        }
        checksums = self.checksums.copy()
        checksums.set_many(sums, self.tips[index].commit)
        return self.tips[index], checksums


def _foreign(
    pages: Callable[[], _Pages], commit: int, checksums: PageChecksums, at: Tip, accepts: Callable[[int, int], bool]
) -> Foreign | None:
    sums: dict[int, int] = {}
    for pgno, page in pages():
        checksum = page_checksum(pgno, page)
        if pgno > at.commit or not accepts(pgno, checksum):
            sums[pgno] = checksum
    if not sums:
        return None
    present = checksums.copy()
    present.set_many(sums, commit)
    tip = Tip(at.position, present.rolling, commit)
    return Foreign(at, tip, present, lambda: ((pgno, page) for pgno, page in pages() if pgno in sums))
