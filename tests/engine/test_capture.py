"""Capture beside foreign writers: nothing they commit is missed, however they treat the -wal (engine.md 8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import ask, assert_same_files, cluster, outside, read, rows, scanned
from walship.engine.writer import WriterLimits

SETUP = ("CREATE TABLE hammer(id INTEGER PRIMARY KEY, body)", "CREATE TABLE t(id INTEGER PRIMARY KEY, body)")
KINDS = ("plain", "opening", "spilling", "vacuum", "checkpoints", "journal")
ALLOWED_ERRORS = {"database is locked", "database table is locked", "cannot VACUUM from within a transaction"}


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=[*KINDS, "all"])
async def test_every_foreign_commit_is_captured_and_replayed(
    tmp_path: Path, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """engine.md 11.10: hostile programs on SQLite 3.40 beside our own clients; the follower's file is equal at the
    end, and no comparison of pages was ever needed."""
    monkeypatch.setattr("walship.engine.leader.CHECKPOINT_BYTES", 300 << 10)
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        writer = leader.start_writer(limits=WriterLimits(foreign_poll_seconds=0.005))
        generations = {leader.database.index.header().salts}
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(outside()) for _ in kinds]
            for other, kind in zip(others, kinds, strict=True):
                assert ask(other, "hammer", str(leader.directory / "data.db"), kind) == "ok"
            loop = asyncio.get_running_loop()
            end = loop.time() + (1.0 if len(kinds) == 1 else 2.0)
            mine, slowest = 0, 0.0
            while loop.time() < end:
                began = loop.time()
                # Against programs that hold WRITE nearly all the time a client may get SQLITE_BUSY, after two seconds.
                with contextlib.suppress(apsw.BusyError):
                    await writer.submit(lambda c: c.execute("INSERT INTO t(body) VALUES(randomblob(300))").fetchall())
                    mine += 1
                slowest = max(slowest, loop.time() - began)
                generations.add(leader.database.index.header().salts)
                await follower.ship(leader)
            reports = [json.loads(ask(other, "enough")) for other in others]
        position = await writer.run(lambda: leader.leader.commit_group().position)
        await follower.ship(leader)
        await follower.applied(position)
        assert leader.failures == []
        assert {error for report in reports for error in report["errors"]} <= ALLOWED_ERRORS
        assert sum(report["commits"] for report in reports) > 5
        assert read(follower.database, "SELECT count(*) FROM t") == [(mine,)]
        for table in ("hammer", "t"):
            sql = f"SELECT count(*), total(length(body)), max(id) FROM {table}"
            assert read(follower.database, sql) == read(leader.database, sql)
        assert scanned(leader.database) == scanned(follower.database) == leader.tip.checksum
        assert mine > 0
        assert len(generations) > 1
        assert slowest < 3.0
    assert_same_files(tmp_path / "leader", tmp_path / "follower")


async def test_a_foreign_program_killed_inside_a_transaction_leaves_nothing(tmp_path: Path) -> None:
    """Its spilled frames lie past mxFrame and are overwritten by the next commit."""
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        for _ in range(3):
            with outside() as other:
                ask(other, "open", str(leader.directory / "data.db"))
                ask(other, "run", "PRAGMA cache_size=5")
                ask(other, "run", "BEGIN IMMEDIATE")
                for _ in range(40):
                    ask(other, "run", "INSERT INTO hammer(body) VALUES(randomblob(3000))")
                other.kill()
                other.wait()
            leader.commit("INSERT INTO t(body) VALUES(randomblob(2000))")
            await follower.catch_up(leader)
        assert read(follower.database, "SELECT count(*) FROM hammer") == [(0,)]
        assert scanned(leader.database) == scanned(follower.database) == leader.tip.checksum


async def test_a_foreign_backup_restored_into_the_file_is_one_transaction(tmp_path: Path) -> None:
    async with cluster(tmp_path, setup=SETUP) as (leader, follower):
        leader.commit(*(f"INSERT INTO t VALUES({n}, randomblob(900))" for n in range(200)))
        await follower.catch_up(leader)
        source = apsw.Connection(str(tmp_path / "source.db"))
        source.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, body)")
        source.execute("INSERT INTO t VALUES(7, 'restored')")
        with leader.connection.backup("main", source, "main") as backup:
            backup.step()
        source.close()
        before = leader.tip.position.txid
        assert leader.leader.commit_group().position.txid == before + 1
        await follower.catch_up(leader)
        assert rows(follower.database.connect_reader(), "SELECT * FROM t") == [(7, "restored")]
        assert scanned(follower.database) == leader.tip.checksum


async def test_commits_without_frames_have_no_txid(tmp_path: Path) -> None:
    """engine.md T14: an update to the same value writes no page."""
    async with cluster(tmp_path, setup=SETUP) as (leader, _):
        tip = leader.commit("INSERT INTO t VALUES(1, 'x')")
        assert leader.commit("UPDATE t SET body = 'x' WHERE id = 1") == tip
        assert leader.commit("BEGIN IMMEDIATE", "COMMIT") == tip
