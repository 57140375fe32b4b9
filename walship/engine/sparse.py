"""A sparse seed: only the pages that differ, laid over what a node has already (R12, R9).

The follower says which pages it has (their checksums), the leader pins a state and sends the pages that are different
there. What comes is kept in `incoming/seed.ltx` until it is complete and the old checksums with those pages give the
leader's rolling checksum; then it is applied as one commit under live readers.

The log stays until that is done. So a crash at any moment is mended from what is on disk: the log from the mark to the
state that was compared, with the new pages over it, applied as one commit, is the leader's state whatever of it had
been applied before. There is no state in between to remember, and nothing to undo.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from walship.engine import failpoints
from walship.engine.apply import Applier, Batch
from walship.engine.database import Database
from walship.engine.durable_state import StateFile
from walship.engine.leader import Leader
from walship.engine.log import Log
from walship.engine.marks import Marks
from walship.engine.replay import merge_frames
from walship.engine.replica import Replica
from walship.engine.seed import Incoming, announced_terms, announced_tip, announcement, complete_install
from walship.engine.snapshot import Snapshot, ltx_chunks, scan
from walship.errors import CorruptDatabase, CorruptLtx, CorruptState, StorageFailed
from walship.formats import ltx
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position, TermHistory, Tip

__all__ = ["SparseSeedFile", "finish_sparse_install", "open_chunks", "sparse_chunks"]

_RUN_PAGES = 512


class SparseSeedFile(Incoming):
    """Receives one sparse snapshot. Blocking; the follower calls it from a worker thread, one call at a time.

    Args:
        base: the state that was compared; checksums: its pages, copied here.
    """

    def __init__(self, directory: Path, header: SnapshotHeader, base: Tip, checksums: PageChecksums) -> None:
        super().__init__(_path(directory), header, checksums.copy())
        self.base = base
        self._size_bytes = 0

    def write(self, data: bytes) -> None:
        """Take the next piece of LTX. Raises CorruptLtx, CorruptData or StorageFailed; then `abort`."""
        self._decoder.receive_data(data)
        for pgno, page in self._decoder.pages():
            self._sums[pgno] = page_checksum(pgno, page)
        if len(self._sums) >= _RUN_PAGES:
            self._fold()
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, self._size_bytes)
                self._size_bytes += written
                view = view[written:]
        except OSError as error:
            raise StorageFailed(
                f"{self.path}: cannot write the snapshot ({error.strerror}). The old state stands; free disk space."
            ) from error

    def finish(self) -> None:
        """Verify everything and make the file durable. Raises CorruptData, StorageFailed."""
        self._decoder.finish()
        self._fold()
        header, found = self.header, self._decoder.header
        assert found is not None
        if found.commit != header.commit or found.page_size != header.page_size or found.is_snapshot:
            raise CorruptLtx(f"{found} is not the payload of a {header}")
        self.checksums.set_many({}, header.commit)
        if self.checksums.rolling != header.checksum:
            raise CorruptDatabase(
                f"what differs at {header.position} gives checksum {self.checksums.rolling:016x} here, its sender has "
                f"{header.checksum:016x}. It was not installed; the old state stands, a whole snapshot is asked for."
            )
        self._make_durable(self._size_bytes)

    def announce(self, state: StateFile, terms: TermHistory) -> None:
        """Make the intention durable: from here a crash is finished at the next start."""
        position = self.base.position
        base = {"term": position.term, "txid": position.txid, "commit": self.base.commit}
        state.update(installing=announcement(self.header, terms) | {"base": base})
        failpoints.reach("seed.installing")

    def batch(self) -> Batch:
        """The pages as one batch, to be applied under live readers. Valid until `close`."""
        return _read_batch(self._fd, self._size_bytes)


def finish_sparse_install(state: StateFile, database: Database, log: Log, marks: Marks) -> PageChecksums:
    """Finish an announced sparse install after a crash; the fence is held. Safe to repeat. Returns the checksums of
    the state that was announced, at which database and log then are.

    Raises CorruptDatabase, CorruptLtx or LogTruncated when that cannot be reached: then a whole snapshot is needed.
    """
    tip, path = announced_tip(state), _path(state.directory)
    checksums: PageChecksums | None = None
    if log.tip != tip:
        checksums = _apply_again(path, state.state.installing or {}, database, log, marks)
    database.sync_wal()
    if checksums is None:
        snapshot = Snapshot.pin(database)
        try:
            checksums = scan(snapshot)
        finally:
            snapshot.close()
    if checksums.rolling != tip.checksum or checksums.commit != tip.commit:
        raise CorruptDatabase(f"{database.path}: with the pages that differed it is not the announced state {tip}")
    if log.tip != tip:
        log.reset(tip, announced_terms(state))
    complete_install(state, marks, tip, checksums)
    path.unlink(missing_ok=True)
    return checksums


def _apply_again(
    path: Path, installing: dict[str, Any], database: Database, log: Log, marks: Marks
) -> PageChecksums | None:
    """Apply the log from the mark to the state that was compared, with the pages of the file over it, as one commit.
    Returns the checksums afterwards, None when those of the mark are not there."""
    mark = marks.tip
    try:
        base = Position(int(installing["base"]["term"]), int(installing["base"]["txid"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptState(f"the state record announces a sparse install that makes no sense: {installing}") from error
    if mark is None:
        raise CorruptDatabase(f"{database.path}: nothing says from where the log is to be applied again")
    limit = base.order()
    refs = list(itertools.takewhile(lambda ref: ref.header.position.order() <= limit, log.frames_after(mark.position)))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CorruptDatabase(f"{path} is gone, and with it the pages that were to be put in place") from error
    try:
        batch = _over(merge_frames(log, refs), _read_batch(fd, os.fstat(fd).st_size))
        checksums = marks.load()
        if checksums is not None:
            pages = zip(batch.pgnos, batch.pages(), strict=True)
            while run := {pgno: page_checksum(pgno, page) for pgno, page in itertools.islice(pages, _RUN_PAGES)}:
                checksums.set_many(run, max(checksums.commit, max(run)))
            checksums.set_many({}, batch.commit)
        Applier(database).apply(batch, sync=True, publishing=lambda: None)
    finally:
        os.close(fd)
    return checksums


def _over(below: Batch | None, above: Batch) -> Batch:
    """Both as one batch: of a page in both, that of `above`; its size of the database."""
    if below is None:
        return above
    under = below
    wins = set(above.pgnos)
    pgnos = array("I", sorted(wins.union(pgno for pgno in under.pgnos if pgno <= above.commit)))

    def pages() -> Iterator[bytes | memoryview]:
        lower, upper = zip(under.pgnos, under.pages(), strict=True), iter(above.pages())
        for pgno in pgnos:
            if pgno in wins:
                yield next(upper)
            else:
                yield next(page for number, page in lower if number == pgno)

    return Batch(pgnos, pages, above.commit)


def _read_batch(fd: int, size_bytes: int) -> Batch:
    """The pages of an LTX file. Raises CorruptLtx."""

    def read_at(offset: int, size: int) -> bytes:
        return os.pread(fd, size, offset)

    header, index = ltx.open_index(read_at, size_bytes)
    pgnos, offsets, sizes = array("I"), array("Q"), array("I")
    for pgno, offset, size in index:
        pgnos.append(pgno)
        offsets.append(offset)
        sizes.append(size)

    def pages() -> Iterator[bytes]:
        for pgno, offset, size in zip(pgnos, offsets, sizes, strict=True):
            yield ltx.read_page(read_at, offset, size, header.page_size, expected_pgno=pgno)[1]

    return Batch(pgnos, pages, header.commit)


def open_chunks(
    leader: Leader, replica: Replica, have: PageChecksums | None
) -> tuple[SnapshotHeader, Snapshot, Iterator[bytes]]:
    """Pin the leader's database: header, the pin (to be closed), and the LTX of it all or of what differs from `have`.

    Runs in the writer thread: the array of `replica` is copied at exactly the pinned position, everything else is done
    while iterating. Raises Unavailable.
    """
    header, snapshot = leader.pin_snapshot()
    # A file that begins with transaction 1 is a whole snapshot by the rules of LTX.
    if have is None or have.page_size != header.page_size or header.position.txid == 1:
        return header, snapshot, ltx_chunks(snapshot, header)
    header = dataclasses.replace(header, sparse=True)
    return header, snapshot, sparse_chunks(snapshot, header, replica.checksums.copy(), have)


def sparse_chunks(
    snapshot: Snapshot,
    header: SnapshotHeader,
    mine: PageChecksums,
    have: PageChecksums,
    *,
    chunk_bytes: int = 1 << 20,
) -> Iterator[bytes]:
    """The pages of `snapshot`, whose checksums are `mine`, that differ from `have`, as one LTX file in pieces.

    Page 1 is always there, so that the file is never empty. Raises CorruptDatabase when a page is not what its checksum
    says; the file then lacks its end.
    """
    encoder = ltx.LtxEncoder(
        ltx.LtxHeader(
            page_size=snapshot.page_size,
            commit=snapshot.commit,
            min_txid=header.position.txid,
            max_txid=header.position.txid,
            timestamp_ms=header.time_ms,
        ),
        previous_commit=have.commit,
    )
    pgnos = array("I", (pgno for pgno in mine.differing(have) if pgno <= snapshot.commit))
    if not pgnos or pgnos[0] != 1:
        pgnos.insert(0, 1)
    chunk = bytearray(encoder.header_bytes())
    for pgno, page in snapshot.pages_of(pgnos):
        if page_checksum(pgno, page) != mine.get(pgno):
            raise CorruptDatabase(
                f"page {pgno} at {header.position} is not what history says. The snapshot was not completed; run "
                "`walship status` and re-seed this node."
            )
        chunk += encoder.page(pgno, page)
        if len(chunk) >= chunk_bytes:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk + encoder.finish())


def _path(directory: Path) -> Path:
    return directory / "incoming" / "seed.ltx"
