"""R25: POSIX locks survive everything the engine does. Closing any descriptor of the -shm or of the database file would
silently drop all locks of this process on it; then two writers, or a deleted -wal, are only a matter of time."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.engine.nodes import FollowerNode, LeaderNode, ask, cluster, outside, read, rows, scanned
from walship.engine.snapshot import Snapshot, ltx_chunks
from walship.engine.verify import verify
from walship.errors import HistoryMismatch, Unavailable

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)
FREE = "[]"
LOCKED = "OperationalError: database is locked"


def open_files(directory: Path) -> Counter[str]:
    """How often this process has each file of `directory` open: database and -shm."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target in (str(directory / "data.db"), str(directory / "data.db-shm")):
            found[Path(target).name] += 1
    return found


def mapped(directory: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(directory / "data.db-shm"))


class Probe:
    """Another process that tries to take WRITE."""

    def __init__(self, node: LeaderNode | FollowerNode, process: object) -> None:
        self.node = node
        self.process = process
        assert ask(process, "open", str(node.directory / "data.db")) == "ok"  # type: ignore[arg-type]

    def while_held(self) -> str:
        with self.node.database.holding_write():
            return self.take()

    def take(self) -> str:
        answer = ask(self.process, "run", "BEGIN IMMEDIATE")  # type: ignore[arg-type]
        if answer == FREE:
            ask(self.process, "run", "ROLLBACK")  # type: ignore[arg-type]
        return answer


async def test_the_write_lock_holds_after_everything_a_leader_does(tmp_path: Path) -> None:
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    with outside() as process:
        probe = Probe(leader, process)
        assert probe.take() == FREE
        assert probe.while_held() == LOCKED
        for number in range(300):
            leader.write(f"INSERT INTO t VALUES({number}, randomblob(9000))")  # several blocks of the index
        leader.leader.commit_group()
        assert probe.while_held() == LOCKED
        assert leader.leader.checkpoint()
        assert probe.while_held() == LOCKED
        header, snapshot = leader.leader.pin_snapshot()
        assert sum(map(len, ltx_chunks(snapshot, header))) > 1_000_000
        snapshot.close()
        assert probe.while_held() == LOCKED
        snapshot = Snapshot.pin(leader.database)
        assert verify(leader.database, snapshot, leader.replica.checksums, leader.tip.position).ok
        assert scanned(leader.database) == leader.tip.checksum
        assert probe.while_held() == LOCKED
        for _ in range(3):
            leader.database.connect_reader().close()
            leader.database.connect_writer().close()
        read(leader.database, "SELECT count(*) FROM t")
        assert probe.while_held() == LOCKED
        leader.database.check_files()
        leader.database.wal_size_bytes()
        assert probe.while_held() == LOCKED
        ask(process, "close")
    leader.close()


async def test_the_write_lock_holds_after_everything_a_follower_does(tmp_path: Path) -> None:
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        with outside() as process:
            probe = Probe(follower, process)
            held = lambda: follower.follower.run_between_batches(probe.while_held)  # noqa: E731
            assert await held() == LOCKED
            for number in range(200):
                leader.write(f"INSERT INTO t VALUES({number}, randomblob(30000))")
            leader.leader.commit_group()
            await follower.catch_up(leader)
            assert await held() == LOCKED
            follower.follower.mismatch(HistoryMismatch("for the test"))
            await follower.seed(leader.leader.pin_snapshot)
            assert await held() == LOCKED
            leader.commit("DELETE FROM t WHERE id > 3", "VACUUM")
            await follower.catch_up(leader)
            assert await held() == LOCKED
            assert scanned(follower.database) == leader.tip.checksum
            assert await held() == LOCKED
            ask(process, "close")


async def test_no_descriptor_comes_and_goes_while_a_node_lives(tmp_path: Path) -> None:
    """What is open only grows with SQLite connections, and mappings of the -shm are never given up."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit("INSERT INTO t VALUES(0, 'x')")
        await follower.catch_up(leader)
        nodes = (leader, follower)
        before = [(open_files(node.directory), mapped(node.directory)) for node in nodes]
        for number in range(1, 100):
            leader.commit(f"INSERT INTO t VALUES({number}, randomblob(9000))")
        await follower.catch_up(leader)
        header, snapshot = leader.leader.pin_snapshot()
        for _ in ltx_chunks(snapshot, header):
            pass
        snapshot.close()
        leader.leader.checkpoint()
        follower.follower.mismatch(HistoryMismatch("for the test"))
        await follower.seed(leader.leader.pin_snapshot)
        leader.commit("INSERT INTO t VALUES(1000, 'x')")
        await follower.catch_up(leader)
        for node in nodes:
            read(node.database, "SELECT count(*) FROM t")
        after = [(open_files(node.directory), mapped(node.directory)) for node in nodes]
        for (files_before, maps_before), (files_after, maps_after) in zip(before, after, strict=True):
            assert files_after["data.db-shm"] >= files_before["data.db-shm"] >= 2
            assert files_after["data.db"] >= files_before["data.db"]
            assert maps_after >= maps_before


async def test_another_process_that_closes_never_thinks_it_is_the_last(tmp_path: Path) -> None:
    """T1: had we lost our lock on the file, SQLite 3.40 would delete -wal and -shm under us."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        for number in range(5):
            leader.commit(f"INSERT INTO t VALUES({number}, randomblob(9000))")
            await follower.catch_up(leader)
            for node in (leader, follower):
                header, snapshot = leader.leader.pin_snapshot()
                del header
                snapshot.close()
                with outside() as process:
                    ask(process, "open", str(node.directory / "data.db"))
                    ask(process, "run", "SELECT count(*) FROM t")
                    ask(process, "close")
                node.database.check_files()
                assert (node.directory / "data.db-wal").exists()
                assert (node.directory / "data.db-shm").exists()


async def test_the_holder_sees_every_commit_that_was_applied_under_it(tmp_path: Path) -> None:
    """T2: ended by ROLLBACK it would keep a stale cache, from the second apply on."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        holder = follower.database.holder

        def look(sql: str) -> list[object]:
            return rows(holder, sql)

        for number in range(6):
            leader.commit(f"INSERT INTO t VALUES({number}, 'x')")
            await follower.catch_up(leader)
            seen = await follower.follower.run_between_batches(lambda: look("SELECT count(*) FROM t"))
            assert seen == [(number + 1,)]
        leader.commit("CREATE TABLE other(x)", "INSERT INTO other VALUES(5)")
        await follower.catch_up(leader)
        assert await follower.follower.run_between_batches(lambda: look("SELECT x FROM other")) == [(5,)]
        leader.commit("DELETE FROM t", "VACUUM")
        await follower.catch_up(leader)
        assert await follower.follower.run_between_batches(lambda: look("PRAGMA integrity_check")) == [("ok",)]


async def test_replaced_files_are_noticed(tmp_path: Path) -> None:
    """T16."""
    leader = LeaderNode(tmp_path / "n", setup=SETUP)
    leader.commit("INSERT INTO t VALUES(1, 'x')")
    leader.database.check_files()
    (tmp_path / "n" / "data.db-wal").unlink()
    with pytest.raises(Unavailable, match="deleted or replaced"):
        leader.database.check_files()
    await asyncio.to_thread(leader.abandon)
