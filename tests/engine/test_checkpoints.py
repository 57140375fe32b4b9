"""The -wal stays bounded on both sides, whoever reads; and who holds it back can be seen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.nodes import ask, cluster, outside, scanned
from walship.engine.checkpoint import CheckpointPolicy, Step
from walship.engine.database import Database

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)
ROUND = "UPDATE t SET body = randomblob(4000) WHERE id <= 20"  # some 25 frames of 4 KiB


@contextmanager
def readers(database: Database, count: int, seconds: float) -> Iterator[None]:
    """`count` threads whose read transactions follow one another without a pause, each lasting `seconds`."""
    stop = threading.Event()

    def loop() -> None:
        connection = database.connect_reader()
        while not stop.is_set():
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM t").fetchall()
            stop.wait(seconds)
            connection.execute("COMMIT")
        connection.close()

    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decisions in kilobytes instead of megabytes, so that a test sees many of them."""
    monkeypatch.setattr("walship.engine.leader.CHECKPOINT_BYTES", 400 << 10)
    monkeypatch.setattr("walship.engine.leader.PATIENCE_BYTES", 1 << 20)
    monkeypatch.setattr("walship.engine.leader.WAL_LIMIT_BYTES", 2 << 20)
    monkeypatch.setattr(
        "walship.engine.replayer.CheckpointPolicy",
        lambda: CheckpointPolicy(400 << 10, 1 << 20, 4 << 20, patience_seconds=0.3),
    )


@pytest.mark.parametrize("seconds", [0.001, 0.01])
async def test_it_stays_bounded_on_both_sides_under_overlapping_readers(tmp_path: Path, seconds: float) -> None:
    """engine.md 11.8: readers that overlap without end never let a single moment pass without one of them."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit("INSERT INTO t(body) VALUES" + ",".join(["(randomblob(4000))"] * 60))
        highest = [0, 0]
        with readers(leader.database, 3, seconds), readers(follower.database, 3, seconds):
            for _ in range(100):
                leader.write(ROUND)
                leader.leader.commit_group()
                leader.leader.checkpoint_if_due()
                await follower.catch_up(leader)
                for number, node in enumerate((leader, follower)):
                    highest[number] = max(highest[number], node.database.wal_size_bytes())
        assert 100 * 20 * 4000 > 7 << 20
        assert highest[0] < 5 << 20, f"the leader's -wal grew to {highest[0]} bytes"
        assert highest[1] < 5 << 20, f"the follower's -wal grew to {highest[1]} bytes"


async def test_a_long_reader_holds_it_back_visibly_and_it_recovers(tmp_path: Path) -> None:
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit("INSERT INTO t(body) VALUES" + ",".join(["(randomblob(4000))"] * 60))
        await follower.catch_up(leader)
        long = [node.database.connect_reader() for node in (leader, follower)]
        for connection in long:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM t").fetchall()
        assert leader.leader.held_back_seconds() == 0
        for _ in range(40):
            leader.write(ROUND)
            leader.leader.commit_group()
            leader.leader.checkpoint_if_due()
            await follower.catch_up(leader)
        assert leader.leader.held_back_seconds() > 0
        assert follower.follower.held_back_seconds() > 0
        assert all(node.database.wal_size_bytes() > 3 << 20 for node in (leader, follower))
        for connection in long:
            assert connection.execute("SELECT count(*) FROM t").fetchall() == [(60,)]
            connection.execute("COMMIT")
            connection.close()
        for _ in range(60):
            leader.write(ROUND)
            leader.leader.commit_group()
            leader.leader.checkpoint_if_due()
            await follower.catch_up(leader)
        assert leader.leader.held_back_seconds() == 0
        assert follower.follower.held_back_seconds() == 0
        assert leader.database.wal_size_bytes() < 2 << 20  # given back to the disk: it had passed the limit
        assert follower.database.wal_size_bytes() < 2 << 20
        assert scanned(follower.database) == leader.tip.checksum


async def test_the_leader_reuses_its_wal_in_place(tmp_path: Path) -> None:
    """engine.md 9: a preallocated -wal makes every synced commit cheaper; so no TRUNCATE below the limit."""
    async with cluster(tmp_path, setup=SETUP) as (leader, _):
        leader.commit("INSERT INTO t(body) VALUES" + ",".join(["(randomblob(4000))"] * 60))
        sizes, salts = set(), set()
        for _ in range(60):
            leader.write(ROUND)
            leader.leader.commit_group()
            leader.leader.checkpoint_if_due()
            sizes.add(leader.database.wal_size_bytes())
            salts.add(leader.database.index.header().salts)
        assert len(salts) > 2
        assert max(sizes) < 800 << 10
        assert min(sorted(sizes)[-3:]) > 300 << 10


async def test_a_foreign_checkpoint_loop_neither_loses_frames_nor_stalls_writers(tmp_path: Path) -> None:
    """engine.md 11.10 and 11.11, the hostile TRUNCATE loop: every commit is captured, and none waits for seconds."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit("INSERT INTO t(body) VALUES" + ",".join(["(randomblob(4000))"] * 60))
        stop = threading.Event()
        with outside() as other:
            ask(other, "open", str(leader.directory / "data.db"))

            def hostile() -> None:
                while not stop.is_set():
                    for mode in ("TRUNCATE", "RESTART", "FULL", "PASSIVE"):
                        ask(other, "run", f"PRAGMA wal_checkpoint({mode})")

            thread = threading.Thread(target=hostile)
            thread.start()
            slowest = 0.0
            loop = asyncio.get_running_loop()
            for number in range(150):
                began = loop.time()
                leader.write(f"UPDATE t SET body = randomblob(4000) WHERE id = {number % 60}")
                slowest = max(slowest, loop.time() - began)
                leader.leader.commit_group()
                leader.leader.checkpoint_if_due()
            stop.set()
            thread.join()
            ask(other, "close")
        await follower.catch_up(leader)
        assert slowest < 1.0
        assert scanned(follower.database) == scanned(leader.database) == leader.tip.checksum


async def test_the_mark_moves_on_while_a_node_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R8, R9: else its pin would keep the whole log, and a restart replay it all."""
    monkeypatch.setattr("walship.engine.marks.EVERY_BYTES", 300 << 10)
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit("INSERT INTO t(body) VALUES" + ",".join(["(randomblob(4000))"] * 60))
        first = leader.state.state.mark
        blocker = leader.database.connect_reader()
        blocker.execute("BEGIN")
        blocker.execute("SELECT count(*) FROM t").fetchall()
        for _ in range(30):
            leader.write(ROUND)
            leader.leader.commit_group()
            leader.leader.checkpoint_if_due()
            await follower.catch_up(leader)
        assert first is not None
        assert leader.state.state.mark is not None
        assert leader.state.state.mark.position.txid > first.position.txid + 5
        assert follower.state.state.mark is not None
        assert follower.state.state.mark.position.txid > first.position.txid + 5
        blocker.close()


class TestPolicy:
    def test_small_is_left_alone_and_larger_is_copied_back_then_emptied(self) -> None:
        policy = CheckpointPolicy(100, 400, 1000, patience_seconds=60)
        policy.decide(1000, 1.0)  # the one patient attempt of this minute
        policy.emptied()
        assert policy.decide(50, 1.0) is Step.NOTHING
        assert policy.decide(120, 1.0) is Step.PASSIVE
        assert policy.decide(130, 1.0) is Step.NOTHING
        assert policy.decide(230, 1.0) is Step.PASSIVE
        assert policy.decide(420, 1.0) is Step.TRUNCATE
        assert policy.decide(430, 1.0) is not Step.TRUNCATE

    def test_patience_is_for_once_a_minute(self) -> None:
        policy = CheckpointPolicy(100, 400, 1000, patience_seconds=60)
        assert policy.decide(1500, 100.0) is Step.TRUNCATE_PATIENTLY
        assert policy.decide(1600, 101.0) is Step.TRUNCATE
        assert policy.decide(2000, 161.0) is Step.TRUNCATE_PATIENTLY
