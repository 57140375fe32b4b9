"""A follower: what it acknowledges, what it shows, how it gets a first and another copy, and how it finds damage."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from nodes import (
    FollowerNode,
    LeaderNode,
    ask,
    assert_same_files,
    cluster,
    crash_image,
    eventually,
    outside,
    read,
    scanned,
)

from walship.engine.durable_state import StateFile
from walship.engine.follower import LagMeter
from walship.engine.snapshot import Snapshot, ltx_chunks
from walship.engine.verify import verify
from walship.errors import CorruptDatabase, CorruptLtx, HistoryMismatch, Unavailable
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


class TestSeeds:
    async def test_an_empty_node_is_seeded_and_follows(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        leader.commit(
            "INSERT INTO t SELECT value, randomblob(2000) FROM (VALUES(1),(2)) AS v(value)"
        ) if False else None
        for number in range(200):
            leader.write(f"INSERT INTO t VALUES({number}, randomblob(2000))")
        leader.leader.commit_group()
        follower = FollowerNode(tmp_path / "follower")
        assert follower.follower.tip is None
        await follower.seed(leader.leader.pin_snapshot)
        assert follower.follower.tip == leader.tip
        assert follower.installed == [follower.replica]
        leader.commit("DELETE FROM t WHERE id % 3 = 0")
        await follower.catch_up(leader)
        await leader.stop()
        await follower.stop()
        assert_same_files(tmp_path / "leader", tmp_path / "follower")
        assert not (tmp_path / "follower" / "incoming" / "seed.db").exists()

    async def test_a_new_seed_under_live_readers_leaves_them_their_snapshot(self, tmp_path: Path) -> None:
        """R9: the whole image as one batch; an open reader keeps the old database, the next sees the new one."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit(*(f"INSERT INTO t VALUES({number}, randomblob(3000))" for number in range(50)))
            await follower.catch_up(leader)
            old = follower.database.connect_reader()
            old.execute("BEGIN")
            before = old.execute("SELECT count(*), sum(length(body)) FROM t").fetchall()
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                ask(other, "run", "BEGIN")
                outside_before = ask(other, "run", "SELECT count(*), sum(length(body)) FROM t")
                leader.commit("DELETE FROM t WHERE id > 10", "VACUUM", "CREATE TABLE more(x)")
                follower.follower.mismatch(HistoryMismatch("for the test"))
                assert follower.follower.tip is None
                await follower.seed(leader.leader.pin_snapshot)
                assert follower.follower.tip == leader.tip
                assert old.execute("SELECT count(*), sum(length(body)) FROM t").fetchall() == before
                assert ask(other, "run", "SELECT count(*), sum(length(body)) FROM t") == outside_before
                assert read(follower.database, "SELECT count(*) FROM t") == [(11,)]
                assert read(follower.database, "SELECT count(*) FROM more") == [(0,)]
                ask(other, "run", "COMMIT")
                assert ask(other, "run", "SELECT count(*) FROM t") == "[(11,)]"
                ask(other, "close")
            old.close()
            leader.commit("INSERT INTO more VALUES(1)")
            await follower.catch_up(leader)
            assert scanned(follower.database) == leader.tip.checksum
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_a_damaged_snapshot_is_not_installed(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        leader.commit(*(f"INSERT INTO t VALUES({number}, randomblob(3000))" for number in range(20)))
        follower = FollowerNode(tmp_path / "follower")
        header, snapshot = leader.leader.pin_snapshot()
        data = bytearray(b"".join(ltx_chunks(snapshot, header)))
        snapshot.close()
        data[len(data) // 2] ^= 1
        seed = await follower.follower.seed(header)

        async def take() -> None:
            await seed.write(bytes(data))
            await seed.install()

        with pytest.raises((CorruptLtx, CorruptDatabase)):
            await take()
        await seed.abort()
        assert follower.follower.tip is None
        await follower.seed(leader.leader.pin_snapshot)
        await leader.stop()
        await follower.stop()

    async def test_a_voter_takes_no_snapshot_below_what_it_acknowledged(self, tmp_path: Path) -> None:
        """R9."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            header, snapshot = leader.leader.pin_snapshot()
            snapshot.close()
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            with pytest.raises(HistoryMismatch, match="acknowledged"):
                await follower.follower.seed(header)
            assert read(follower.database, "SELECT id FROM t") == [(1,)]

    async def test_a_seed_that_cannot_get_the_write_lock_leaves_the_old_state(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            follower.database.holder.set_busy_timeout(20)
            follower.follower.mismatch(HistoryMismatch("for the test"))
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                ask(other, "run", "BEGIN IMMEDIATE")
                with pytest.raises(Unavailable):
                    await follower.seed(leader.leader.pin_snapshot)
                ask(other, "run", "ROLLBACK")
                ask(other, "close")
            assert follower.state.state.installing is None
            assert read(follower.database, "SELECT id FROM t") == [(1,)]
            await follower.seed(leader.leader.pin_snapshot)
            assert follower.follower.tip == leader.tip

    async def test_a_large_frame_comes_in_parts_and_may_be_abandoned(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            tip = leader.commit(
                "BEGIN", *(f"INSERT INTO t VALUES({n}, randomblob(40000))" for n in range(80)), "COMMIT"
            )
            ref = next(iter(leader.replica.log.frames_after(follower.follower.tip.position)))  # type: ignore[union-attr]
            while ref.header.position != tip.position:
                await follower.follower.receive(ref.header, leader.replica.log.read(ref))
                ref = leader.replica.log.next_after(ref.header.position)  # type: ignore[assignment]
            assert ref.size_bytes > 1 << 20
            await follower.follower.begin(ref.header)
            await follower.follower.part(leader.replica.log.read(ref)[300 : 1 << 18])
            await follower.follower.abandon()
            await follower.catch_up(leader)
            assert scanned(follower.database) == tip.checksum


class TestDamage:
    async def test_damaged_pages_are_found_and_a_new_copy_replaces_them(self, tmp_path: Path) -> None:
        """R8: the scrub compares file and array; what differs is repaired by a seed."""
        leader = LeaderNode(tmp_path / "leader", setup=SETUP)
        follower = FollowerNode(tmp_path / "follower")
        await follower.seed(leader.leader.pin_snapshot)
        for number in range(100):
            leader.commit(f"INSERT INTO t VALUES({number}, randomblob(3000))")
        await follower.catch_up(leader)
        await follower.stop()
        path = tmp_path / "follower" / "data.db"
        with path.open("r+b") as file:
            file.seek(20 * 4096 + 100)
            file.write(b"flipped by a disk")
        again = FollowerNode(tmp_path / "follower")

        def pin() -> tuple[Any, Any]:
            return Snapshot.pin(again.database), again.replica.checksums.copy()

        snapshot, expected = await again.follower.run_between_batches(pin)
        result = await asyncio.to_thread(verify, again.database, snapshot, expected, again.watermarks.applied)
        assert result.differing == (21,)
        with pytest.raises(CorruptDatabase):
            result.raise_if_damaged()
        again.follower.replace(str(result))
        with pytest.raises(HistoryMismatch, match="DAMAGED"):
            again.follower.heard(tip=leader.tip.position, acked=leader.tip.position, leader_time_ms=0, keep_from=0)
        await again.seed(leader.leader.pin_snapshot)
        await leader.stop()
        await again.stop()
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_a_foreign_write_is_found_before_the_next_apply(self, tmp_path: Path) -> None:
        """engine.md T8: nothing is applied over it; the node asks for a new copy, and gets it."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                assert ask(other, "run", "INSERT INTO t VALUES(666, 'foreign')") == "[]"
                ask(other, "run", "PRAGMA wal_checkpoint(TRUNCATE)")
                leader.commit("INSERT INTO t VALUES(2, 'x')")
                await follower.ship(leader)
                await eventually(lambda: follower.follower.tip is None)
                assert read(follower.database, "SELECT id FROM t") == [(1,), (666,)]
                ask(other, "close")
            await follower.seed(leader.leader.pin_snapshot)
            assert read(follower.database, "SELECT id FROM t") == [(1,), (2,)]
            assert follower.failures == []
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_checkpoints_of_anybody_are_no_foreign_writes(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                for number, mode in enumerate(("PASSIVE", "FULL", "RESTART", "TRUNCATE") * 3):
                    leader.commit(f"INSERT INTO t VALUES({number}, randomblob(500))")
                    await follower.catch_up(leader)
                    assert ask(other, "run", f"PRAGMA wal_checkpoint({mode})").startswith("[(0,")
                ask(other, "close")
            assert follower.follower.tip == leader.tip

    async def test_a_foreign_lock_is_waited_for(self, tmp_path: Path) -> None:
        """Somebody's checkpoint may hold WRITE while it waits for readers: that is no reason to end the node."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            await follower.catch_up(leader)
            follower.database.holder.set_busy_timeout(10)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                ask(other, "run", "BEGIN IMMEDIATE")
                leader.commit("INSERT INTO t VALUES(1, 'x')")
                await follower.ship(leader)
                await eventually(lambda: follower.watermarks.logged == leader.tip.position)
                await asyncio.sleep(0.1)
                assert follower.watermarks.applied != leader.tip.position
                ask(other, "run", "ROLLBACK")
                await follower.applied(leader.tip.position)
                ask(other, "close")
            assert follower.failures == []

    async def test_a_task_for_an_ended_replayer_is_answered(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (_, follower):
            await follower.follower.stop()
            async with asyncio.timeout(3):
                with pytest.raises(Exception, match="shutting down"):
                    await follower.follower.run_between_batches(lambda: None)


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
