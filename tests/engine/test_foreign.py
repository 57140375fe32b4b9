"""R10: what other programs commit to a follower's copy is found, kept as an orphan row by row, and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import (
    FollowerNode,
    LeaderNode,
    ask,
    assert_same_files,
    changed_by_others,
    cluster,
    crash_image,
    open_replica,
    outside,
    read,
    scanned,
)
from tests.waiting import eventually
from walship.engine.apply import Applier
from walship.engine.database import Database
from walship.engine.orphans import ORPHANS, Manifest, Reason, list_orphans
from walship.engine.snapshot import Snapshot
from walship.errors import CorruptDatabase
from walship.formats import ltx

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)
THEIRS = "SELECT id, body FROM t WHERE id >= 600 ORDER BY id"


def image_of(database: Database) -> bytes:
    snapshot = Snapshot.pin(database)
    try:
        return b"".join(bytes(page) for _, page in snapshot.pages())
    finally:
        snapshot.close()


def rows_of(directory: Path, manifest: Manifest, base: bytes, target: Path, sql: str = THEIRS) -> list[object]:
    """What a query gives on `base` with the orphan's pages over it."""
    header, pages = ltx.decode((directory / ORPHANS / f"{manifest.name}.ltx").read_bytes())
    data = bytearray(base)
    size = header.page_size
    for pgno, page in pages:
        data[(pgno - 1) * size : pgno * size] = page
    target.write_bytes(data[: header.commit * size])
    connection = apsw.Connection(str(target))
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def only(directory: Path) -> Manifest:
    (manifest,) = list_orphans(directory)
    assert manifest.reason is Reason.FOREIGN
    assert manifest.transactions == 0
    return manifest


class TestLive:
    """The fence is not held for a moment, as between a deposed leader's last capture and its fence."""

    @pytest.mark.parametrize("checkpoint", ["", "PASSIVE", "TRUNCATE"])
    @pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "applying"])
    async def test_foreign_rows_are_kept_and_gone(self, tmp_path: Path, checkpoint: str, quiet: bool) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            for number in range(20):
                leader.commit(f"INSERT INTO t VALUES({number}, randomblob(3000))")
            await follower.catch_up(leader)
            base = image_of(leader.database)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                assert ask(other, "run", "INSERT INTO t VALUES(600, 'one')") == "[]"
                assert ask(other, "run", "INSERT INTO t SELECT 601, group_concat(id) FROM t") == "[]"
                assert ask(other, "run", "DELETE FROM t WHERE id = 5") == "[]"
                theirs = ask(other, "run", THEIRS)
                if checkpoint:
                    assert ask(other, "run", f"PRAGMA wal_checkpoint({checkpoint})").startswith("[(0,")
                if quiet:
                    await follower.follower.run_between_batches(lambda: None)
                else:
                    leader.commit("INSERT INTO t VALUES(100, 'x')")
                    await follower.ship(leader)
                await eventually(lambda: not follower.follower.sound)
                assert ask(other, "run", "INSERT INTO t VALUES(700, 'late')").endswith("locked")
                ask(other, "close")
            manifest = only(follower.directory)
            kept = rows_of(follower.directory, manifest, base, tmp_path / "orphan.db")
            assert repr(kept) == theirs
            assert scanned(follower.database) == follower.replica.checksums.rolling, "the array is of what is there"
            await follower.seed(leader.leader.pin_snapshot)
            assert read(follower.database, THEIRS) == []
            await follower.catch_up(leader)
            assert not follower.failures
        assert_same_files(tmp_path / "leader", tmp_path / "follower")

    async def test_rows_that_came_and_went_count_too(self, tmp_path: Path) -> None:
        """Their bytes are left in the page: it is not what history gave, though its rows are."""
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            leader.commit("INSERT INTO t VALUES(1, 'x')")
            await follower.catch_up(leader)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                ask(other, "run", "INSERT INTO t VALUES(2, 'x')")
                ask(other, "run", "DELETE FROM t WHERE id = 2")
                ask(other, "close")
            leader.commit("INSERT INTO t VALUES(3, 'x')")
            await follower.ship(leader)
            await eventually(lambda: not follower.follower.sound)
            assert only(follower.directory).pages == 1
            await follower.seed(leader.leader.pin_snapshot)

    async def test_a_generation_that_came_and_went_is_not_missed(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            replayer = follower.follower._replayer
            assert replayer is not None
            assert await follower.follower.run_between_batches(lambda: replayer._empty(5.0))
            base = image_of(leader.database)
            with outside() as other:
                ask(other, "open", str(follower.directory / "data.db"))
                follower.database.fence.release()
                ask(other, "run", "INSERT INTO t VALUES(600, 'one')")
                ask(other, "run", "PRAGMA wal_checkpoint(TRUNCATE)")
                ask(other, "run", "CREATE TABLE other(x)")
                await follower.follower.run_between_batches(lambda: None)
                await eventually(lambda: not follower.follower.sound)
                ask(other, "close")
            assert rows_of(follower.directory, only(follower.directory), base, tmp_path / "orphan.db") == [(600, "one")]
            await follower.seed(leader.leader.pin_snapshot)


class TestStepDown:
    def test_what_is_captured_is_told_from_what_is_not(self, tmp_path: Path) -> None:
        """Also when the commit is copied into the file at once, and the -wal emptied."""
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        leader.commit("INSERT INTO t VALUES(1, 'x')")
        with outside() as other:
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            ask(other, "run", "INSERT INTO t VALUES(600, 'late')")
            leader.database.left = leader.leader._captured_header()
            leader.leader.abandon()
            assert ask(other, "run", "PRAGMA wal_checkpoint(TRUNCATE)").startswith("[(0,")
            ask(other, "close")
        with pytest.raises(CorruptDatabase, match="somebody else wrote"):
            Applier(leader.database).hold()
        leader.replica.close()

    async def test_what_is_committed_after_the_last_capture_is_an_orphan(self, tmp_path: Path) -> None:
        """Somebody was writing when this node stopped leading: SEAL does not wait, and the commit is not history."""
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        leader.commit("INSERT INTO t VALUES(1, 'x')")
        base = image_of(leader.database)
        with outside() as other:
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            assert ask(other, "run", "BEGIN IMMEDIATE") == "[]"
            ask(other, "run", "INSERT INTO t VALUES(600, 'late')")
            tip = leader.leader.step_down()
            assert tip == leader.tip
            ask(other, "run", "COMMIT")
            node = following(leader, tmp_path / "n")
            await eventually(lambda: not node.follower.sound)
            ask(other, "close")
        kept = rows_of(tmp_path / "n", only(tmp_path / "n"), base, tmp_path / "orphan.db")
        assert kept == [(600, "late")]
        await node.stop()

    async def test_with_the_fence_nothing_comes_in_between(self, tmp_path: Path) -> None:
        leader = LeaderNode(tmp_path / "n", setup=SETUP)
        leader.commit("INSERT INTO t VALUES(1, 'x')")
        with outside() as other:
            ask(other, "open", str(tmp_path / "n" / "data.db"))
            assert ask(other, "run", "INSERT INTO t VALUES(2, 'history')") == "[]"
            tip = leader.leader.step_down()
            assert ask(other, "run", "INSERT INTO t VALUES(600, 'late')").endswith("locked")
            node = following(leader, tmp_path / "n")
            await node.follower.run_between_batches(lambda: None)
            ask(other, "close")
        assert node.follower.sound
        assert read(node.database, "SELECT body FROM t") == [("x",), ("history",)]
        assert scanned(node.database) == tip.checksum
        await node.stop()


async def leader_goes_on(leader: LeaderNode, follower: FollowerNode) -> None:
    leader.commit("INSERT INTO t VALUES(500, 'more')")
    await follower.catch_up(leader)
    assert scanned(follower.database) == leader.tip.checksum
    assert not follower.failures


def following(leader: LeaderNode, directory: Path) -> FollowerNode:
    """The same open replica, which follows now."""

    def same(*_: object, **__: object) -> object:
        return leader.state, leader.marks, leader.replica

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.engine.nodes.open_replica", same)
        return FollowerNode(directory, name="a")


@contextlib.asynccontextmanager
async def stopped(tmp_path: Path, crashed: bool) -> AsyncIterator[tuple[LeaderNode, Path]]:
    """A leader, and the directory of a follower that is down: after a stop, or as a crash in mid-stream left it."""
    leader = LeaderNode(tmp_path / "leader", setup=SETUP)
    follower = FollowerNode(tmp_path / "follower")
    await follower.seed(leader.leader.pin_snapshot)
    for number in range(30):
        leader.commit(f"INSERT INTO t VALUES({number}, randomblob(3000))")
        await follower.catch_up(leader)
    if crashed:
        directory = crash_image(tmp_path / "follower", tmp_path / "image")
        await follower.stop()
    else:
        directory = tmp_path / "follower"
        await follower.stop()
    yield leader, directory
    await leader.stop()


class TestAtStart:
    @pytest.mark.parametrize("crashed", [False, True], ids=["stopped", "crashed"])
    @pytest.mark.parametrize("closed", [False, True], ids=["attached", "closed"])
    async def test_what_was_committed_while_it_was_down_is_kept(
        self, tmp_path: Path, crashed: bool, closed: bool
    ) -> None:
        async with stopped(tmp_path, crashed) as (leader, directory):
            base = image_of(leader.database)
            with outside() as other:
                ask(other, "open", str(directory / "data.db"))
                assert ask(other, "run", "INSERT INTO t VALUES(600, 'one')") == "[]"
                assert ask(other, "run", "INSERT INTO t SELECT 601, randomblob(9000)") == "[]"
                theirs = ask(other, "run", "SELECT id, length(body) FROM t WHERE id >= 600")
                if closed:
                    ask(other, "close")  # copies everything into the file and deletes the -wal
                again = FollowerNode(directory)
                assert not again.follower.sound
                if not closed:
                    assert ask(other, "run", "INSERT INTO t VALUES(700, 'late')").endswith("locked")
            kept = rows_of(
                directory,
                only(directory),
                base,
                tmp_path / "orphan.db",
                "SELECT id, length(body) FROM t WHERE id >= 600",
            )
            assert repr(kept) == theirs
            await again.stop()
            again = FollowerNode(directory)
            assert len(list_orphans(directory)) == 1, "found again, kept once"
            shown = asyncio.ensure_future(again.follower.until_acknowledged())
            await again.follower.run_between_batches(lambda: None)
            assert not shown.done()
            await again.seed(leader.leader.pin_snapshot)
            await shown
            assert scanned(again.database) == leader.tip.checksum
            await leader_goes_on(leader, again)
            await again.stop()
            _, _, replica = open_replica(directory, "b")
            assert replica is not None
            assert replica.foreign is None
            replica.close()

    @pytest.mark.parametrize("crashed", [False, True], ids=["stopped", "crashed"])
    async def test_an_untouched_copy_is_not_compared_page_by_page(
        self, tmp_path: Path, crashed: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A start must not cost a scan of the database."""
        async with stopped(tmp_path, crashed) as (leader, directory):
            with caplog.at_level(logging.WARNING):
                _, _, replica = open_replica(directory, "b")
            assert replica is not None
            assert "comparing every page" not in caplog.text
            assert scanned(replica.database) == leader.tip.checksum
            assert list_orphans(directory) == []
            replica.close()

    @pytest.mark.parametrize("crashed", [False, True], ids=["stopped", "crashed"])
    async def test_a_program_that_only_reads_leaves_no_trace(self, tmp_path: Path, crashed: bool) -> None:
        """Its close may copy our frames into the file and delete the -wal: the pages are history all the same."""
        async with stopped(tmp_path, crashed) as (leader, directory):
            changed_by_others(directory / "data.db", "SELECT count(*) FROM t")
            _, _, replica = open_replica(directory, "b")
            assert replica is not None
            assert scanned(replica.database) == leader.tip.checksum
            assert list_orphans(directory) == []
            replica.close()

    @pytest.mark.parametrize("when", ["let go", "emptied", "new generation", "copied back"])
    async def test_a_crash_around_the_emptying_of_the_wal_is_no_foreign_write(
        self, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with cluster(tmp_path, setup=SETUP) as (leader, follower):
            replayer = follower.follower._replayer
            assert replayer is not None
            for number in range(10):
                leader.commit(f"INSERT INTO t VALUES({number}, randomblob(3000))")
                await follower.catch_up(leader)
            image = tmp_path / "image"
            if when == "let go":
                real: Callable[[], None] = replayer._let_go

                def let_go() -> None:
                    real()
                    crash_image(follower.directory, image)

                monkeypatch.setattr(replayer, "_let_go", let_go)
            assert await follower.follower.run_between_batches(lambda: replayer._empty(5.0))
            if when in ("new generation", "copied back"):
                leader.commit("INSERT INTO t VALUES(100, 'x')")
                await follower.catch_up(leader)
            if when == "copied back":
                follower.database.connect_writer().wal_checkpoint()
            if when != "let go":
                crash_image(follower.directory, image)
            with caplog.at_level(logging.WARNING):
                _, _, replica = open_replica(image, "b")
            assert replica is not None
            assert "comparing every page" not in caplog.text
            assert scanned(replica.database) == leader.tip.checksum
            replica.close()
