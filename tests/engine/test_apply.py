"""Applying by WAL append: after any workload the follower is the leader, byte for byte, and no reader ever noticed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import LeaderNode, ask, assert_same_files, cluster, outside, read, scanned
from walship.engine.database import Database

TABLES = (
    "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER)",
    "CREATE TABLE counter(n INTEGER)",
    "INSERT INTO counter VALUES(0)",
    "CREATE TABLE pair(k INTEGER, side TEXT)",
    "CREATE TABLE big(id INTEGER PRIMARY KEY, body BLOB)",
    "CREATE VIRTUAL TABLE note USING fts5(text)",
)


class Workload:
    """Random statements that keep the invariants of `outsider.py`; each call is one commit of its own."""

    def __init__(self, leader: LeaderNode, seed: int) -> None:
        self.leader = leader
        self.random = random.Random(seed)
        self.tables = 0
        self.steps = [
            (30, self.transfer),
            (15, self.pair),
            (10, self.grow),
            (6, self.shrink),
            (4, self.create),
            (3, self.alter),
            (3, self.drop),
            (2, self.vacuum),
            (8, self.search),
        ]

    def set_up(self) -> None:
        self.leader.write(*TABLES)
        self.leader.write(*(f"INSERT INTO account VALUES({number}, 10)" for number in range(1, 101)))
        self.leader.commit()

    def run(self, commits: int) -> None:
        weights, steps = zip(*self.steps, strict=True)
        for _ in range(commits):
            self.random.choices(steps, weights)[0]()
            if self.random.random() < 0.6:
                self.leader.commit()
        self.leader.commit()

    def transfer(self) -> None:
        amount, one, two = self.random.randint(1, 9), self.random.randint(1, 100), self.random.randint(1, 100)
        self.leader.write(
            "BEGIN",
            f"UPDATE account SET balance = balance - {amount} WHERE id = {one}",
            f"UPDATE account SET balance = balance + {amount} WHERE id = {two}",
            "UPDATE counter SET n = n + 1",
            "COMMIT",
        )

    def pair(self) -> None:
        k = self.random.getrandbits(40)
        self.leader.write(f"INSERT INTO pair VALUES({k}, 'left'), ({k}, 'right')")

    def grow(self) -> None:
        for _ in range(self.random.randint(1, 6)):
            size = self.random.choice((10, 500, 5000, 60_000))
            self.leader.write(f"INSERT INTO big(body) VALUES(randomblob({size}))")

    def shrink(self) -> None:
        self.leader.write(f"DELETE FROM big WHERE id % {self.random.randint(2, 5)} = 0")

    def create(self) -> None:
        self.tables += 1
        self.leader.write(
            f"CREATE TABLE t{self.tables}(a, b DEFAULT 7)",
            f"INSERT INTO t{self.tables}(a) VALUES {', '.join(['(randomblob(50))'] * 40)}",
            f"CREATE INDEX i{self.tables} ON t{self.tables}(a)",
        )

    def alter(self) -> None:
        if self.tables:
            self.leader.write(f"ALTER TABLE t{self.tables} ADD COLUMN c{self.random.getrandbits(48)} DEFAULT 'x'")

    def drop(self) -> None:
        if self.tables:
            self.leader.write(f"DROP TABLE t{self.tables}")
            self.tables -= 1

    def vacuum(self) -> None:
        if self.leader.connection.pragma("auto_vacuum"):
            self.leader.write("PRAGMA incremental_vacuum(20)")
        else:
            self.leader.write("VACUUM")

    def search(self) -> None:
        words = " ".join(f"word{self.random.randint(1, 300)}" for _ in range(30))
        self.leader.write(f"INSERT INTO note VALUES('{words}')")


class InsideReader(threading.Thread):
    """A reader of the node's own process, as the service has them: repeatable, monotonic, whole transactions."""

    def __init__(self, database: Database, pause_seconds: float, pragma: str) -> None:
        super().__init__(daemon=True)
        self.connection = database.connect_reader()
        self.connection.execute(pragma).fetchall()
        self.pause_seconds = pause_seconds
        self.done = threading.Event()
        self.reads = 0
        self.violations: list[str] = []

    def run(self) -> None:
        last = -1
        try:
            while not self.done.is_set():
                self.connection.execute("BEGIN")
                first = self.look()
                self.done.wait(self.pause_seconds)
                second = self.look()
                self.connection.execute("COMMIT")
                self.reads += 1
                if first != second or first[0] != 1000 or first[1] < last:
                    self.violations.append(f"{first}, {second} after {last}")
                last = first[1]
        except apsw.Error as error:
            self.violations.append(repr(error))

    def look(self) -> tuple[int, int]:
        (total,) = self.connection.execute("SELECT sum(balance) FROM account").fetchall()[0]
        (counter,) = self.connection.execute("SELECT n FROM counter").fetchall()[0]
        return total, counter

    def end(self) -> list[str]:
        self.done.set()
        self.join(20)
        self.connection.close()
        return self.violations


@pytest.mark.parametrize(
    ("page_size", "setup", "commits"),
    [
        (512, (), 400),
        (4096, (), 600),
        (4096, ("PRAGMA auto_vacuum=INCREMENTAL",), 400),
        (1024, ("PRAGMA auto_vacuum=FULL",), 500),
        (65536, (), 500),
    ],
)
async def test_follower_equals_leader_byte_for_byte_under_readers(
    tmp_path: Path, page_size: int, setup: tuple[str, ...], commits: int
) -> None:
    """engine.md 11.2 and 11.3: random commits, readers in this process and in another, equal files at the end."""
    async with cluster(tmp_path, page_size=page_size, setup=setup) as (leader, follower):
        workload = Workload(leader, page_size)
        workload.set_up()
        await follower.catch_up(leader)
        inside = [
            InsideReader(follower.database, 0.0, "PRAGMA cache_size=10"),
            InsideReader(follower.database, 0.02, "PRAGMA mmap_size=100000000"),
        ]
        stop = asyncio.Event()

        async def shipping() -> None:
            while not stop.is_set():
                await follower.ship(leader)
                await asyncio.sleep(0.002)

        with outside() as outsider:
            assert ask(outsider, "watch", str(follower.directory / "data.db")) == "ok"
            for reader in inside:
                reader.start()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(shipping())
                await asyncio.to_thread(workload.run, commits)
                stop.set()
            await follower.catch_up(leader)
            report = json.loads(ask(outsider, "report"))
            violations = [text for reader in inside for text in reader.end()]
        assert report["violations"] == []
        assert violations == []
        assert report["reads"] > 5
        assert all(reader.reads > 2 for reader in inside)
        expected = leader.tip.checksum
        assert [scanned(node.database) for node in (leader, follower)] == [expected, expected]
        assert follower.replica.checksums == leader.replica.checksums
        assert read(follower.database, "PRAGMA integrity_check") == [("ok",)]
        assert not follower.failures
        assert not follower.follower.mismatches
    assert_same_files(tmp_path / "leader", tmp_path / "follower")
