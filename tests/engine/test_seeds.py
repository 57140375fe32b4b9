"""Copies: how a follower gets its first and another one, and how it finds out that it needs one."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engine.nodes import (
    FollowerNode,
    LeaderNode,
    ask,
    assert_same_files,
    cluster,
    crash_image,
    open_replica,
    outside,
    read,
    scanned,
)
from tests.waiting import eventually
from walship.engine.durable_state import StateFile
from walship.engine.seed import SeedFile
from walship.engine.snapshot import Snapshot, ltx_chunks
from walship.engine.verify import verify
from walship.errors import CorruptDatabase, CorruptLtx, HistoryMismatch, LogTruncated, Unavailable
from walship.formats.position import TermHistory

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)


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

    async def test_the_mark_may_be_touched_while_another_copy_is_installed(self, tmp_path: Path) -> None:
        """Retention does so every second, on another thread than the one that begins the log anew."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            replica = follower.replica
            assert replica is not None
            done, problems = threading.Event(), []

            def touch() -> None:
                while not done.is_set():
                    try:
                        replica.marks.touch()
                    except LogTruncated as error:
                        problems.append(error)
                        return

            toucher = threading.Thread(target=touch)
            toucher.start()
            try:
                for number in range(5):
                    leader.commit(f"INSERT INTO t VALUES({number}, randomblob(3000))")
                    follower.follower.mismatch(HistoryMismatch("for the test"))
                    await follower.seed(leader.leader.pin_snapshot)
            finally:
                done.set()
                toucher.join()
            assert problems == []

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

    async def test_a_seed_that_cannot_get_the_write_lock_leaves_the_old_state(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            monkeypatch.setattr("walship.engine.fence.PATIENCE_SECONDS", 0.02)
            follower.follower.mismatch(HistoryMismatch("for the test"))
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
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
        written = path.stat()
        with path.open("r+b") as file:
            file.seek(20 * 4096 + 100)
            file.write(b"flipped by a disk")
        os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # a disk leaves no trace; a program would (R10)
        again = FollowerNode(tmp_path / "follower")

        def pin() -> tuple[Any, Any]:
            return Snapshot.pin(again.database), again.replica.checksums.copy()

        snapshot, expected = await again.follower.run_between_batches(pin)
        result = await asyncio.to_thread(verify, again.database, snapshot, expected, again.watermarks.applied)
        assert result.differing == (21,)
        assert not result.ok
        again.follower.replace(str(result))
        with pytest.raises(HistoryMismatch, match="DAMAGED"):
            again.follower.heard(tip=leader.tip.position, acked=leader.tip.position, leader_time_ms=0, keep_from=0)
        await again.seed(leader.leader.pin_snapshot)
        await leader.stop()
        await again.stop()
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_a_seed_that_cannot_be_installed_now_leaves_nothing_open(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """R9, R25: somebody holds WRITE for seconds; each try once left a descriptor behind."""

        def open_seeds() -> int:
            files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            return sum("seed.db" in str(Path(file).resolve()) for file in files)

        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES (1, 'x')")
            monkeypatch.setattr("walship.engine.fence.PATIENCE_SECONDS", 0.01)
            follower.follower.replace("for the test")
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
                for _ in range(2):
                    with pytest.raises(Unavailable):
                        await follower.seed(leader.leader.pin_snapshot)
                assert open_seeds() == 0
                assert follower.state.state.installing is None
                ask(other, "run", "ROLLBACK")
                ask(other, "close")
            await follower.seed(leader.leader.pin_snapshot)
            assert read(follower.database, "SELECT id FROM t") == [(1,)]
            assert follower.failures == []

    async def test_a_seed_put_in_place_never_meets_the_wal_of_what_it_replaces(self, tmp_path: Path) -> None:
        """R9: a crash while the old files move aside may leave the -wal alone; SQLite would apply it to the seed."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit(*(f"INSERT INTO t VALUES({number}, 'old')" for number in range(9)))
            await follower.catch_up(leader)
            image = crash_image(follower.directory, tmp_path / "image")
            assert (image / "data.db-wal").stat().st_size > 0
            leader.commit("UPDATE t SET body = 'new'")
            header, snapshot = leader.leader.pin_snapshot()
            seed = SeedFile(image, header)
            for chunk in ltx_chunks(snapshot, header):
                seed.write(chunk)
            snapshot.close()
            seed.finish()
            seed.announce(StateFile.open(image), TermHistory())
            seed.close()
            (image / "data.db").unlink()
            _, _, replica = open_replica(image, "b")
            assert replica is not None
            assert read(replica.database, "SELECT DISTINCT body FROM t") == [("new",)]
            assert scanned(replica.database) == replica.checksums.rolling == leader.tip.checksum
            replica.close()

    async def test_a_foreign_write_is_found_before_the_next_apply(self, tmp_path: Path) -> None:
        """engine.md T8: nothing is applied over it; the node asks for a new copy, and gets it."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                assert ask(other, "run", "INSERT INTO t VALUES(665, 'refused')").endswith("locked")
                follower.database.fence.release()
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

    @pytest.mark.parametrize("fenced", [True, False])
    async def test_checkpoints_of_anybody_are_no_foreign_writes(self, tmp_path: Path, fenced: bool) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                for number, mode in enumerate(("PASSIVE", "FULL", "RESTART", "TRUNCATE") * 3):
                    leader.commit(f"INSERT INTO t VALUES({number}, randomblob(500))")
                    await follower.catch_up(leader)
                    if not fenced:
                        follower.database.fence.release()
                    done = "[(0," if mode == "PASSIVE" or not fenced else "[(1,"
                    assert ask(other, "run", f"PRAGMA wal_checkpoint({mode})").startswith(done)
                ask(other, "close")
            assert follower.follower.tip == leader.tip
            assert scanned(follower.database) == leader.tip.checksum

    async def test_a_foreign_lock_is_waited_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody's checkpoint may hold WRITE while it waits for readers: that is no reason to end the node."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            await follower.catch_up(leader)
            monkeypatch.setattr("walship.engine.fence.PATIENCE_SECONDS", 0.01)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
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
