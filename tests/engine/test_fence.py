"""R10: SQLite's WRITE lock as the local fence. Foreign programs get SQLITE_BUSY from every node that does not lead, and
nobody else notices: readers read, checkpoints copy back, the -wal stays bounded."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import FollowerNode, LeaderNode, ask, cluster, make_database, outside, read, rows, scanned
from tests.waiting import eventually
from walship.engine.acks import AckTracker
from walship.engine.checkpoint import CheckpointPolicy, empty
from walship.engine.database import Database
from walship.engine.writer import Writer, WriterLimits
from walship.errors import Unavailable
from walship.formats.wal_index import INDEX_HEADER_SIZE

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)", "CREATE TABLE hammer(id INTEGER PRIMARY KEY, body)")
WRITES = (
    "INSERT INTO t VALUES(1000, 'foreign')",
    "BEGIN IMMEDIATE",
    "VACUUM",
    "PRAGMA journal_mode=delete",
    "PRAGMA user_version=7",
)


def refused(process: subprocess.Popen[str]) -> bool:
    return all(ask(process, "run", sql).endswith("locked") for sql in WRITES)


class TestLock:
    def test_who_does_not_hold_it_cannot_write_and_can_do_all_else(self, tmp_path: Path) -> None:
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        with outside() as other:
            ask(other, "open", str(tmp_path / "data.db"))
            assert database.fence.take()
            assert refused(other)
            assert ask(other, "run", "SELECT count(*) FROM t") == "[(0,)]"
            assert ask(other, "run", "PRAGMA wal_checkpoint").startswith("[(0,")
            assert ask(other, "run", "PRAGMA wal_checkpoint(TRUNCATE)").startswith("[(1,")
            database.connect_reader().close()
            database.connect_writer().close()
            assert refused(other), "it stands whatever is closed (engine.md T1)"
            database.fence.release()
            assert ask(other, "run", WRITES[0]) == "[]"
            assert ask(other, "run", "PRAGMA wal_checkpoint(TRUNCATE)").startswith("[(0,")
        database.close()

    def test_it_is_given_up_after_a_bounded_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        monkeypatch.setattr("walship.engine.fence.PATIENCE_SECONDS", 0.05)
        with outside() as other:
            ask(other, "open", str(tmp_path / "data.db"))
            assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
            assert not database.fence.take()
            with pytest.raises(Unavailable, match="write lock"):
                database.fence.require()
            assert not database.fence.held
            ask(other, "run", "COMMIT")
            assert database.fence.take()
        database.close()

    def test_a_torn_header_is_repaired_before_it_holds(self, tmp_path: Path) -> None:
        """Nobody could do it later: SQLite's recovery needs WRITE."""
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        database.index._head[8] ^= 1
        assert database.fence.take()
        assert database.index.whole()
        assert read(database, "SELECT count(*) FROM t") == [(0,)]
        database.close()

    def test_it_ends_with_the_database(self, tmp_path: Path) -> None:
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        assert database.fence.take()
        database.close()
        with outside() as other:
            ask(other, "open", str(tmp_path / "data.db"))
            assert ask(other, "run", WRITES[0]) == "[]"


class TestRoles:
    async def test_a_follower_holds_it_and_a_leader_does_not(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            with outside() as one, outside() as two:
                ask(one, "open", str(leader.directory / "data.db"))
                ask(two, "open", str(follower.directory / "data.db"))
                for number in range(3):
                    assert ask(one, "run", f"INSERT INTO t VALUES({number}, 'foreign')") == "[]"
                    leader.leader.commit_group()
                    assert refused(two)
                    await follower.catch_up(leader)
                    assert refused(two)
            assert scanned(follower.database) == leader.tip.checksum

    async def test_a_node_holds_it_from_its_start_until_it_leads(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        leader.commit("INSERT INTO t VALUES(1, 'x')")
        leader.close()
        with outside() as other:
            follower = FollowerNode(tmp_path / "n", name="a")
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            assert refused(other)
            await follower.stop()
            ask(other, "close")
        again = LeaderNode(tmp_path / "n")
        assert not again.database.fence.held
        again.close()

    async def test_a_leader_without_a_lease_holds_it_and_lets_go_again(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        leader.commit("INSERT INTO t VALUES(1, 'x')")
        with outside() as other:
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            assert leader.leader.fence()
            assert refused(other)
            leader.leader.commit_group()
            assert leader.leader.checkpoint()
            header, snapshot = leader.leader.pin_snapshot()
            snapshot.close()
            assert header.position == leader.tip.position
            assert refused(other)
            leader.leader.unfence()
            assert ask(other, "run", WRITES[0]) == "[]"
            ask(other, "run", "BEGIN IMMEDIATE")
            assert not leader.leader.fence(), "it does not wait"
            ask(other, "run", "COMMIT")
            ask(other, "close")
        leader.commit("INSERT INTO t VALUES(2, 'x')")
        assert scanned(leader.database) == leader.tip.checksum
        leader.close()

    async def test_a_writer_whose_lease_has_ended_keeps_others_out_until_it_is_renewed(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        live = True
        acks = AckTracker(leader.leader.term, 0, leader.watermarks.captured)
        limits = WriterLimits(foreign_poll_seconds=0.01)
        writer = Writer(leader.leader, acks, limits=limits, on_failure=leader.failures.append, live=lambda: live)
        leader.writer = writer
        writer.start()

        def insert(connection: apsw.Connection) -> None:
            connection.execute("INSERT INTO t(body) VALUES('ours')")

        with outside() as other:
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            assert ask(other, "run", WRITES[0]) == "[]"
            live = False
            await eventually(lambda: leader.database.fence.held)
            assert refused(other)
            live = True
            async with asyncio.timeout(1.5):  # not SQLite's busy timeout: the fence is let go before it runs
                await writer.submit(insert, ack=0)
            assert ask(other, "run", "INSERT INTO t VALUES(2000, 'theirs')") == "[]"
            ask(other, "close")
        await leader.stop()
        assert not leader.failures


class TestEmptying:
    def test_the_wal_is_emptied_without_letting_go(self, tmp_path: Path) -> None:
        """A foreign program that tries all the time does not get in once; a reader keeps what it sees."""
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        writer, reader = database.connect_writer(), database.connect_reader()
        assert database.fence.take()
        writer.set_busy_timeout(5000)
        with outside() as other:
            assert ask(other, "hammer", str(tmp_path / "data.db"), "eager") == "ok"
            for number in range(40):
                database.fence.release()
                writer.execute("INSERT INTO t(body) VALUES('a frame to be copied back')")
                while not database.fence.take():
                    time.sleep(0.001)
                assert database.index.header().mx_frame > 0
                reader.execute("BEGIN")
                before = rows(reader, "SELECT count(*) FROM hammer")
                empty(database, writer, 0.0)
                assert rows(reader, "SELECT count(*) FROM hammer") == before
                reader.execute("COMMIT")
                assert empty(database, writer, 5.0)
                assert database.wal_size_bytes() == 0
                assert database.index.header().mx_frame == 0, f"somebody wrote in round {number}"
            json.loads(ask(other, "enough"))
        assert read(database, "PRAGMA integrity_check") == [("ok",)]
        database.close()

    def test_a_reader_of_the_past_holds_it_back(self, tmp_path: Path) -> None:
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        writer, reader = database.connect_writer(), database.connect_reader()
        writer.execute("INSERT INTO t VALUES(1, 'x')")
        reader.execute("BEGIN")
        assert rows(reader, "SELECT count(*) FROM t") == [(1,)]
        writer.execute("INSERT INTO t VALUES(2, 'x')")
        assert database.fence.take()
        let_go: list[int] = []
        assert not empty(database, writer, 0.02, lambda: let_go.append(1))
        assert not let_go
        assert rows(reader, "SELECT count(*) FROM t") == [(1,)]
        reader.execute("COMMIT")
        assert empty(database, writer, 0.02, lambda: let_go.append(1))
        assert let_go == [1]
        assert database.wal_size_bytes() == 0
        database.close()

    def test_a_reader_of_the_wal_keeps_it(self, tmp_path: Path) -> None:
        """All is copied back, but it began before that, and reads its pages from the -wal."""
        make_database(tmp_path / "data.db", setup=SETUP)
        database = Database.open(tmp_path / "data.db")
        writer, reader = database.connect_writer(), database.connect_reader()
        writer.execute("INSERT INTO t VALUES(1, 'x')")
        reader.execute("BEGIN")
        assert rows(reader, "SELECT count(*) FROM hammer") == [(0,)]
        assert database.fence.take()
        assert not empty(database, writer, 0.02)
        assert database.index.checkpoint_info().n_backfill == database.index.header().mx_frame > 0
        assert rows(reader, "SELECT body FROM t") == [("x",)]
        with outside() as other:
            ask(other, "open", str(tmp_path / "data.db"))
            assert ask(other, "run", "PRAGMA wal_checkpoint").startswith("[(0,"), "its lock is given back"
        reader.execute("COMMIT")
        assert empty(database, writer, 0.02)
        database.close()

    async def test_a_hostile_checkpoint_loop_does_not_open_a_followers_fence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "walship.engine.replayer.CheckpointPolicy",
            lambda: CheckpointPolicy(100 << 10, 400 << 10, 4 << 20, patience_seconds=0.3),
        )
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            stop = threading.Event()
            answers: list[str] = []
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))

                def hostile() -> None:
                    while not stop.is_set():
                        for mode in ("TRUNCATE", "RESTART", "FULL", "PASSIVE"):
                            answers.append(ask(other, "run", f"PRAGMA wal_checkpoint({mode})"))
                        answers.append(ask(other, "run", "INSERT INTO t VALUES(9999, 'foreign')"))

                thread = threading.Thread(target=hostile)
                thread.start()
                for number in range(200):
                    leader.commit(f"INSERT INTO t VALUES({number}, randomblob(20000))")
                    await follower.catch_up(leader)
                stop.set()
                await asyncio.to_thread(thread.join)
                ask(other, "close")
            inserts = [answer for answer in answers if not answer.startswith("[(")]
            assert inserts
            assert all(answer.endswith("locked") for answer in inserts)
            assert follower.database.wal_size_bytes() < 3 << 20, "emptied now and then"
            assert scanned(follower.database) == leader.tip.checksum
            assert not follower.failures
            assert not follower.follower.mismatches


async def test_applying_waits_for_a_foreign_transaction_that_was_there_first(tmp_path: Path) -> None:
    """It may have begun before this node's fence: a commit of it is found, its rollback is nothing."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        with outside() as other:
            ask(other, "open", str(follower.directory / "data.db"))
            follower.database.fence.release()
            assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
            ask(other, "run", "INSERT INTO t VALUES(1, 'never')")
            tip = leader.commit("INSERT INTO t VALUES(2, 'x')")
            await follower.ship(leader)
            await eventually(lambda: follower.watermarks.logged == tip.position)
            assert follower.watermarks.applied != tip.position
            ask(other, "run", "ROLLBACK")
            await follower.applied(tip.position)
            await eventually(lambda: follower.database.fence.held)
            assert refused(other)
            ask(other, "close")
        assert scanned(follower.database) == tip.checksum
        assert not follower.follower.mismatches


def test_the_header_copies_are_what_is_looked_at(tmp_path: Path) -> None:
    make_database(tmp_path / "data.db", setup=SETUP)
    database = Database.open(tmp_path / "data.db")
    assert database.index.whole()
    database.index._head[INDEX_HEADER_SIZE + 8] ^= 1
    assert not database.index.whole()
    assert database.fence.take()
    assert database.index.whole()
    database.close()
