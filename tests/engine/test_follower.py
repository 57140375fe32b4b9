"""A follower: what it acknowledges, what it shows, how it continues after a stop or a crash, how it counts its lag."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from tests.engine.nodes import (
    FollowerNode,
    LeaderNode,
    assert_same_files,
    cluster,
    crash_image,
    read,
    scanned,
)
from tests.waiting import eventually
from walship.engine.durable_state import StateFile
from walship.engine.lag import LagMeter
from walship.formats.position import Position

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(position: Position) -> tuple[int, int]:
    return position.term, position.txid


class Held:
    """Keeps the applying thread of a follower busy until `release`."""

    def __init__(self, follower: FollowerNode) -> None:
        self.gate = threading.Event()
        self.entered = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            loop.call_soon_threadsafe(self.entered.set)
            self.gate.wait(20)

        self.task = asyncio.ensure_future(follower.follower.run_between_batches(wait))

    async def release(self) -> None:
        self.gate.set()
        await self.task


async def hold_replayer(follower: FollowerNode) -> Held:
    held = Held(follower)
    await held.entered.wait()
    return held


class TestAcknowledgments:
    async def test_what_is_logged_is_acknowledged_before_it_is_applied(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            held = await hold_replayer(follower)
            tip = leader.commit("INSERT INTO t VALUES(1, 'x')").position
            await follower.ship(leader)
            await eventually(lambda: follower.watermarks.logged == tip)
            durable, applied = await follower.follower.progress(None)
            assert durable == tip
            assert key(applied) < key(tip)
            await held.release()
            await follower.applied(tip)

    async def test_a_voter_that_applies_too_late_holds_its_acknowledgments(self, tmp_path: Path) -> None:
        """R13: more than 1 s of logged frames not applied; and they are given again once it caught up."""
        clock = Clock()
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        follower = FollowerNode(tmp_path / "follower", clock=clock)
        await follower.seed(leader.leader.pin_snapshot)
        await follower.catch_up(leader)
        held = await hold_replayer(follower)
        first = leader.commit("INSERT INTO t VALUES(1, 'x')").position
        await follower.ship(leader)
        await eventually(lambda: follower.watermarks.logged == first)
        seen = await follower.follower.progress(None)
        assert seen[0] == first
        clock.now += 1.5
        second = leader.commit("INSERT INTO t VALUES(2, 'x')").position
        await follower.ship(leader)
        await eventually(lambda: follower.watermarks.logged == second)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.15):
                await follower.follower.progress(seen)
        await held.release()
        async with asyncio.timeout(5):
            while seen[0] != second:
                seen = await follower.follower.progress(seen)
        await leader.stop()
        await follower.stop()

    async def test_a_voter_far_behind_in_bytes_holds_its_acknowledgments(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """R13: more than 64 MiB, here made small. Frames applied long ago do not count."""
        monkeypatch.setattr("walship.engine.follower._HELD_ACKS_BYTES", 60_000)
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            for number in range(12):  # far more than the bound in all, but never behind
                leader.commit(f"INSERT INTO t VALUES({number}, randomblob(9000))")
                await follower.catch_up(leader)
            held = await hold_replayer(follower)
            kept = leader.commit("INSERT INTO t VALUES(100, randomblob(9000))").position
            await follower.ship(leader)
            await eventually(lambda: follower.watermarks.logged == kept)
            seen = await follower.follower.progress(None)
            assert seen[0] == kept
            leader.commit("INSERT INTO t VALUES(101, randomblob(90000))")
            await follower.ship(leader)
            await eventually(lambda: follower.watermarks.logged == leader.tip.position)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.15):
                    await follower.follower.progress(seen)
            await held.release()
            await follower.applied(leader.tip.position)
            assert (await follower.follower.progress(seen))[0] == leader.tip.position

    @pytest.mark.parametrize(("acks", "voter"), [(2, True), (1, False), (0, False)])
    async def test_only_what_is_acknowledged_is_applied(self, tmp_path: Path, acks: int, voter: bool) -> None:
        """R15: with n >= 2, and on every non-voter, no reader sees what may yet be lost."""
        async with cluster(tmp_path, setup=SETUP, acks=acks, voter=voter) as (leader, follower):
            first = leader.commit("INSERT INTO t VALUES(1, 'x')").position
            leader.commit("INSERT INTO t VALUES(2, 'x')")
            await follower.ship(leader)
            await eventually(lambda: follower.watermarks.logged == leader.tip.position)
            assert (await follower.follower.progress(None))[0] == leader.tip.position
            assert read(follower.database, "SELECT id FROM t") == []
            follower.follower.heard(tip=leader.tip.position, acked=first, leader_time_ms=0, keep_from=0)
            await follower.applied(first)
            assert read(follower.database, "SELECT id FROM t") == [(1,)]
            follower.follower.heard(tip=leader.tip.position, acked=leader.tip.position, leader_time_ms=0, keep_from=0)
            await follower.applied(leader.tip.position)

    @pytest.mark.parametrize("acks", [0, 1])
    async def test_voters_apply_at_once_below_two_acknowledgments(self, tmp_path: Path, acks: int) -> None:
        async with cluster(tmp_path, setup=SETUP, acks=acks) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            assert read(follower.database, "SELECT id FROM t") == [(1,)]


class TestRestart:
    async def test_a_stopped_follower_continues_where_it_was(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        follower = FollowerNode(tmp_path / "follower")
        await follower.seed(leader.leader.pin_snapshot)
        for number in range(30):
            leader.commit(f"INSERT INTO t VALUES({number}, randomblob(500))")
            if number == 10:
                await follower.catch_up(leader)
                await follower.stop()
                follower = FollowerNode(tmp_path / "follower")
                assert follower.watermarks.applied == leader.tip.position
        await follower.catch_up(leader)
        await leader.stop()
        await follower.stop()
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_after_a_crash_the_log_from_the_mark_on_is_applied_as_one_commit(self, tmp_path: Path) -> None:
        """R2: followers never recount; the -wal may even be gone, as after a loss of power without a sync."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            for number in range(30):
                leader.commit(f"INSERT INTO t VALUES({number}, randomblob(5000))")
                if number % 4 == 3:
                    leader.commit(f"DELETE FROM t WHERE id < {number - 2}", "VACUUM")
                await follower.catch_up(leader)
            image = crash_image(follower.directory, tmp_path / "image")
            (image / "data.db-wal").unlink()
            again = FollowerNode(image)
            assert again.follower.tip == leader.tip
            assert scanned(again.database) == leader.tip.checksum
            await again.stop()

    async def test_a_node_killed_between_seed_and_mark_needs_no_second_seed(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        follower = FollowerNode(tmp_path / "follower")
        await follower.seed(leader.leader.pin_snapshot)
        assert StateFile.open(tmp_path / "follower").state.installing is None
        again = FollowerNode(crash_image(follower.directory, tmp_path / "image"))
        assert again.follower.tip == leader.tip
        await again.stop()
        await follower.stop()
        await leader.stop()


class TestLag:
    def test_it_is_the_age_of_the_oldest_position_not_applied(self) -> None:
        meter = LagMeter.new()
        assert meter.seconds(Position(1, 1), 50.0) == 0
        for txid in range(1, 6):
            meter.heard(Position(1, txid), float(txid))
        assert meter.seconds(Position(1, 2), 10.0) == 7.0
        assert meter.seconds(Position(1, 5), 11.0) == 0.0

    def test_hearing_the_same_again_makes_it_no_younger(self) -> None:
        meter = LagMeter.new()
        meter.heard(Position(1, 5), 1.0)
        meter.heard(Position(1, 5), 9.0)
        assert meter.seconds(Position(1, 4), 10.0) == 9.0

    def test_it_stays_right_for_a_node_that_is_stuck_for_long(self) -> None:
        """Bounded memory must not make an old lag look young."""
        meter = LagMeter.new()
        for txid in range(1, 50_001):
            meter.heard(Position(1, txid), txid / 1000)
        assert meter.seconds(Position(1, 0), 50.0) == pytest.approx(49.999)
        assert meter.seconds(Position(1, 25_000), 50.0) == pytest.approx(25.0, rel=0.1)


def test_the_files_are_not_left_open(tmp_path: Path) -> None:
    """R25: after a clean close no descriptor of the node's directory is left."""

    async def life() -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)

    asyncio.run(life())
    left = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink() and entry.exists()]
    assert [path for path in left if path.startswith(str(tmp_path))] == []


async def test_what_a_read_sees_lies_between_applied_before_and_publishing_after(tmp_path: Path) -> None:
    """R17: `publishing` moves before the header is written, `applied` after it; a reader in between proves nothing
    less and nothing more than the two."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        start = leader.tip.position.txid
        marks, done = follower.watermarks, threading.Event()
        wrong: list[tuple[int, int, int]] = []
        reads = 0

        def look() -> None:
            nonlocal reads
            connection = follower.database.connect_reader()
            while not done.is_set():
                low = marks.applied.txid
                ((count,),) = connection.execute("SELECT count(*) FROM t").fetchall()
                high = marks.publishing.txid
                if not low <= start + count <= high:
                    wrong.append((low, start + count, high))
                reads += 1
            connection.close()

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(250):
            leader.commit(f"INSERT INTO t VALUES({number}, 'x')")
            await follower.ship(leader)
        await follower.applied(leader.tip.position)
        done.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert reads > 50
