"""Frame numbers for embedded replicas: what a client rebuilds from them is the leader's database, byte for byte."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from tests.engine.nodes import LeaderNode
from walship.engine.numbering import FrameNumbering
from walship.engine.snapshot import Snapshot
from walship.errors import HistoryMismatch
from walship.formats.position import Position
from walship.formats.wal import FRAME_HEADER_SIZE, WalFrameHeader

PAGE = 4096


def image_of(node: LeaderNode) -> dict[int, bytes]:
    snapshot = Snapshot.pin(node.replica.database)
    try:
        return {pgno: bytes(page) for pgno, page in snapshot.pages()}
    finally:
        snapshot.close()


def apply_frames(image: dict[int, bytes], frames: bytes) -> None:
    """What a client does: pages gather until a commit frame, which also says how large the database is."""
    pending: dict[int, bytes] = {}
    step = FRAME_HEADER_SIZE + PAGE
    assert len(frames) % step == 0
    for at in range(0, len(frames), step):
        header = WalFrameHeader.parse(frames, at)
        pending[header.pgno] = frames[at + FRAME_HEADER_SIZE : at + step]
        if header.commit:
            image.update(pending)
            pending = {}
            for pgno in [pgno for pgno in image if pgno > header.commit]:
                del image[pgno]
    assert not pending, "the frames end inside a transaction"


@pytest.mark.parametrize("piece", [1, 7, 128])
def test_frames_rebuild_the_leaders_database(tmp_path: Path, piece: int) -> None:
    """Growth, deletion and VACUUM; read in pieces of any size, numbered without gaps."""
    with contextlib.closing(LeaderNode(tmp_path / "n1")) as node:
        node.write("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
        start, image = node.commit().position, image_of(node)
        rng = random.Random(piece)
        for round_ in range(12):
            for _ in range(rng.randint(1, 5)):
                node.write(f"INSERT INTO t(v) VALUES (zeroblob({rng.randint(1, 9000)}))")
            if round_ % 4 == 3:
                node.write("DELETE FROM t WHERE id % 2", "VACUUM")
            node.commit()
        numbering = FrameNumbering(node.replica.log, start)
        numbering.extend(node.commit().position)
        frames = b"".join(numbering.frames(first, piece) for first in range(1, numbering.page_count + 1, piece))
        assert len(frames) == numbering.page_count * (FRAME_HEADER_SIZE + PAGE)
        assert numbering.frames(numbering.page_count + 1, piece) == b""
        apply_frames(image, frames)
        assert image == image_of(node)


def test_counting_stops_at_the_limit(tmp_path: Path) -> None:
    """Only what is acknowledged is numbered; what comes later goes on from there."""
    with contextlib.closing(LeaderNode(tmp_path / "n1")) as node:
        node.write("CREATE TABLE t(v)")
        start = node.commit().position
        node.write("INSERT INTO t VALUES (1)")
        middle = node.commit().position
        node.write("INSERT INTO t VALUES (2)")
        end = node.commit().position
        numbering = FrameNumbering(node.replica.log, start)
        numbering.extend(middle)
        first = numbering.page_count
        assert first > 0
        assert numbering.end == middle
        numbering.extend(end)
        assert numbering.page_count > first


def test_a_position_that_is_not_in_the_log_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(LeaderNode(tmp_path / "n1")) as node, pytest.raises(HistoryMismatch):
        FrameNumbering(node.replica.log, Position(9, 9))
