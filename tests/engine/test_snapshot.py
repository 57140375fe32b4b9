"""Snapshots: the whole database at exactly one position, streamed while commits go on (engine.md 10)."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import HERE, LeaderNode, ask, cluster, outside, read, rows, scanned
from walship.engine.snapshot import Snapshot, ltx_chunks, scan
from walship.errors import CorruptDatabase, HistoryMismatch
from walship.formats.ltx import LtxDecoder
from walship.formats.position import Tip

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)
AGGREGATE = "SELECT count(*), sum(length(body)), group_concat(substr(hex(body), 1, 4)) FROM t"


def restored(chunks: Iterable[bytes], path: Path) -> apsw.Connection:
    """What a receiver makes of an LTX snapshot, opened as a database of its own."""
    decoder = LtxDecoder()
    with path.open("wb") as file:
        for chunk in chunks:
            decoder.receive_data(chunk)
            for pgno, page in decoder.pages():
                file.seek((pgno - 1) * len(page))
                file.write(page)
        decoder.finish()
    return apsw.Connection(str(path))


def fill(leader: LeaderNode, count: int = 300) -> None:
    leader.write(*(f"INSERT INTO t VALUES({number}, randomblob(2500))" for number in range(count)))
    leader.leader.commit_group()


@pytest.mark.parametrize("branch", ["file", "wal"])
def test_a_snapshot_under_load_is_the_state_it_was_pinned_at(tmp_path: Path, branch: str) -> None:
    """Both branches: everything backfilled at the pin (the file alone, READ(0)), or newest frames from the -wal."""
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    fill(leader)
    if branch == "file":
        assert leader.leader.checkpoint()
    header, snapshot = leader.leader.pin_snapshot()
    assert bool(snapshot._frames) is (branch == "wal")
    pinned = leader.database.connect_reader()
    pinned.execute("BEGIN")
    expected = rows(pinned, AGGREGATE)
    stream = ltx_chunks(snapshot, header, chunk_bytes=50_000)
    chunks = [next(stream)]
    for number in range(40):
        leader.commit(
            f"UPDATE t SET body = randomblob(2600) WHERE id % 40 = {number}",
            f"DELETE FROM t WHERE id = {number}",
            f"INSERT INTO t VALUES({1000 + number}, randomblob(9000))",
        )
        if number % 10 == 9:
            leader.leader.checkpoint()
        chunks.extend(itertools.islice(stream, 1))
    chunks.extend(stream)
    snapshot.close()
    copy = restored(chunks, tmp_path / "copy.db")
    assert rows(copy, AGGREGATE) == expected
    assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
    copy.close()
    pinned.close()
    leader.close()


async def test_snapshots_pinned_between_groups_have_the_position_they_say(tmp_path: Path) -> None:
    """Pinned in the writer thread while clients and a foreign program write without a pause."""
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    writer = leader.start_writer()
    stop = asyncio.Event()

    async def client(first: int) -> None:
        number = first
        while not stop.is_set():
            number += 1
            await writer.submit(
                lambda c, n=number: c.execute("INSERT INTO t VALUES(?, randomblob(700))", (n,)).fetchall()
            )

    with outside() as other:
        ask(other, "open", str(tmp_path / "n" / "data.db"))
        foreign_stop = threading.Event()

        def foreign() -> None:
            number = 1 << 40
            while not foreign_stop.wait(0.002):
                number += 1
                ask(other, "run", f"INSERT INTO t VALUES({number}, randomblob(10))")

        thread = threading.Thread(target=foreign)
        thread.start()
        async with asyncio.TaskGroup() as tasks:
            for first in (0, 1 << 20, 1 << 21):
                tasks.create_task(client(first))
            for number in range(8):
                header, snapshot = await writer.run(leader.leader.pin_snapshot)
                chunks = await asyncio.to_thread(lambda s=snapshot, h=header: list(ltx_chunks(s, h)))
                snapshot.close()
                copy = restored(chunks, tmp_path / f"copy{number}.db")
                # founding is txid 1, and each commit since added one row: the position is the number of rows
                assert rows(copy, "SELECT count(*) + 1 FROM t") == [(header.position.txid,)]
                copy.close()
            stop.set()
        foreign_stop.set()
        thread.join()
        ask(other, "close")
    await leader.stop()


def slipping_in(leader: LeaderNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign commit right after the next group commit, before anybody can take WRITE."""
    commit_group = leader.leader.commit_group

    def commit_and_slip() -> Tip:
        tip = commit_group()
        monkeypatch.setattr(leader.leader, "commit_group", commit_group)
        leader.write("INSERT INTO t VALUES(9999, 'slipped in')")
        return tip

    monkeypatch.setattr(leader.leader, "commit_group", commit_and_slip)


def test_a_commit_that_slips_in_before_the_pin_is_captured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    fill(leader, 20)
    before = leader.tip.position.txid
    slipping_in(leader, monkeypatch)
    header, snapshot = leader.leader.pin_snapshot()
    assert header.position.txid == before + 1
    assert header.checksum == scan(snapshot).rolling == leader.tip.checksum
    snapshot.close()
    leader.close()


def test_a_commit_that_slips_in_before_a_checkpoint_stays_in_the_wal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: nothing that the log does not hold is ever let go."""
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    fill(leader, 20)
    slipping_in(leader, monkeypatch)
    before = leader.state.state
    assert not leader.leader.checkpoint()
    assert not leader.leader._let_go()
    assert leader.state.state == before
    assert leader.leader.checkpoint()
    assert leader.state.state.next_base == leader.tip.position.txid
    leader.close()


async def test_a_follower_pins_between_batches(tmp_path: Path) -> None:
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        fill(leader, 50)
        await follower.catch_up(leader)
        snapshot = await follower.follower.run_between_batches(lambda: Snapshot.pin(follower.database))
        leader.commit("DELETE FROM t")
        await follower.catch_up(leader)
        assert scan(snapshot).rolling != leader.tip.checksum
        snapshot.close()
        assert scanned(follower.database) == leader.tip.checksum


def test_a_wrong_image_is_never_completed(tmp_path: Path) -> None:
    """The receiver gets no last piece when the pages are not what history says."""
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    fill(leader, 50)
    assert leader.leader.checkpoint()
    header, snapshot = leader.leader.pin_snapshot()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={tmp_path}/n/data.db", "bs=1", "seek=40000", "count=9", "conv=notrunc"],
        check=True,
        capture_output=True,
    )
    decoder = LtxDecoder()

    def receive() -> None:
        for chunk in ltx_chunks(snapshot, header):
            decoder.receive_data(chunk)

    with pytest.raises(CorruptDatabase, match="not completed"):
        receive()
    snapshot.close()
    leader.abandon()
    leader.replica.close()


def test_readers_and_pins_leave_no_connection_behind(tmp_path: Path) -> None:
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    fill(leader, 10)
    before = len(leader.database._connections)
    for _ in range(5):
        header, snapshot = leader.leader.pin_snapshot()
        list(ltx_chunks(snapshot, header))
        snapshot.close()
        snapshot.close()
    assert len(leader.database._connections) <= before + 5
    assert read(leader.database, "SELECT count(*) FROM t") == [(10,)]
    leader.close()


@pytest.mark.soak
async def test_a_database_beyond_the_lock_page(tmp_path: Path) -> None:
    """1 GiB and more at 64 KiB pages: the lock page is in no frame, no snapshot and no checksum."""
    lock = (1 << 30) // 65536 + 1
    async with cluster(tmp_path, page_size=65536, setup=SETUP) as (leader, follower):
        for _ in range(9):
            leader.commit("INSERT INTO t(body) VALUES(zeroblob(127000000))")
        assert leader.tip.commit > lock
        await follower.ship(leader)
        await follower.applied(leader.tip.position, 120)
        leader.commit("INSERT INTO t(body) VALUES('behind the lock page')")
        await follower.catch_up(leader)
        _, snapshot = leader.leader.pin_snapshot()
        numbers = [pgno for pgno, _ in snapshot.pages()]
        snapshot.close()
        assert lock not in numbers
        assert len(numbers) == leader.tip.commit - 1
        follower.follower.mismatch(HistoryMismatch("for the test"))
        await follower.seed(leader.leader.pin_snapshot)
        assert scanned(follower.database) == scanned(leader.database) == leader.tip.checksum


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_transaction_of_500_mb_needs_bounded_memory(tmp_path: Path) -> None:
    """R6: neither leader nor follower holds more than some tens of megabytes of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    done = subprocess.run(
        [sys.executable, str(HERE / "large_transaction.py"), str(tmp_path), "500"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"]
    assert result["grown_bytes"] < 200 << 20, result
