"""Commits of other programs while a leader starts are history like any other; none falls between two of its steps.

Found by a loop of the sqlite3 shell on the leader's file while the leader was killed and started again.
"""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import (
    CLUSTER,
    changed_by_others,
    crash_image,
    filled,
    make_database,
    open_replica,
    open_state,
    read,
    scanned,
)
from walship.engine.database import Database
from walship.engine.durable_state import StateFile
from walship.engine.leader import Leader
from walship.engine.marks import Marks
from walship.engine.replica import Replica
from walship.engine.watermarks import Watermarks
from walship.node.promote import promote
from walship.node.recover import found_database


def recovered(directory: Path) -> tuple[StateFile, Replica]:
    state, _, replica = open_replica(directory, "a")
    assert replica is not None
    return state, replica


def others(database: Database, *statements: str, checkpoint: bool = False) -> None:
    """Another program's connection, in this process: it shares no state with ours but the files."""
    connection = database.connect_writer()
    for statement in statements:
        connection.execute(statement).fetchall()
    if checkpoint:
        connection.wal_checkpoint()
    connection.close()


def fence_is_lost(replica: Replica) -> None:
    """As no node does: what would be refused between recovery and promotion (R10) must be counted all the same."""
    with pytest.raises(apsw.BusyError):
        others(replica.database, "INSERT INTO t VALUES(99, 'refused')")
    replica.database.fence.release()


def lead(replica: Replica, state: StateFile, term: int) -> Leader:
    leader = promote(
        replica,
        state,
        Watermarks(replica.log.tip.position),
        cluster=CLUSTER,
        term=term,
        now_ms=lambda: 1,
        on_frame=lambda ref, data: None,
    )
    leader.unfence()
    return leader


def close(leader: Leader, replica: Replica) -> None:
    leader.abandon()
    replica.close()


@pytest.mark.parametrize("checkpoint", [False, True], ids=["append", "checkpoint"])
def test_what_others_commit_between_recovery_and_the_first_frame_is_captured(tmp_path: Path, checkpoint: bool) -> None:
    """R7: what the -wal is counted to at the start is what the term goes on from, not where it ends a moment later."""
    node = filled(tmp_path / "n")
    image = crash_image(tmp_path / "n", tmp_path / "image")
    node.close()
    state, replica = recovered(image)
    fence_is_lost(replica)
    others(replica.database, "INSERT INTO t VALUES(100, 'theirs')", checkpoint=checkpoint)
    others(replica.database, "INSERT INTO t VALUES(101, 'theirs')", checkpoint=checkpoint)
    before = replica.log.tip.position.txid
    leader = lead(replica, state, 2)
    leader.commit_group()
    assert leader.tip.position.txid == before + 2
    assert scanned(replica.database) == replica.log.tip.checksum
    close(leader, replica)


def test_what_others_commit_after_the_comparison_is_captured(tmp_path: Path) -> None:
    """R7: the rebuilt frame holds what was compared; a commit made since comes after it, also one that grows the
    file."""
    node = filled(tmp_path / "n")
    image = crash_image(tmp_path / "n", tmp_path / "image")
    node.close()
    changed_by_others(image / "data.db", "INSERT INTO t VALUES(90, 'theirs')")  # closing it deletes the -wal
    state, replica = recovered(image)
    assert replica.differing
    fence_is_lost(replica)
    others(replica.database, "INSERT INTO t SELECT id + 1000, randomblob(9000) FROM t")
    leader = lead(replica, state, 2)
    leader.commit_group()
    assert scanned(replica.database) == replica.log.tip.checksum
    close(leader, replica)


@pytest.mark.parametrize("point", ["leader.term_started", "leader.truth_wal"])
def test_what_others_commit_after_a_crash_inside_the_promotion_is_counted(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2, R7: until the next term has its own base, a restart counts from the last one."""
    node = filled(tmp_path / "n")
    image = crash_image(tmp_path / "n", tmp_path / "image")
    node.close()
    again = tmp_path / "again"

    def reach(name: str) -> None:
        if name == point:
            crash_image(image, again)

    with monkeypatch.context() as patch:
        patch.setattr("walship.engine.failpoints.reach", reach)
        state, first = recovered(image)
        close(lead(first, state, 2), first)
    database = Database.open(again / "data.db")
    others(database, "INSERT INTO t VALUES(100, 'theirs')")
    database.close()
    state, replica = recovered(again)
    leader = lead(replica, state, 3)
    leader.commit_group()
    assert read(replica.database, "SELECT body FROM t WHERE id = 100") == [("theirs",)]
    assert scanned(replica.database) == replica.log.tip.checksum
    close(leader, replica)


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_what_others_commit_while_their_database_is_adopted_is_counted(tmp_path: Path, closed: bool) -> None:
    """R1, R7: the first position is what was scanned; scanning a large file takes a while, and nobody waits for it."""
    state = open_state(tmp_path / "n", "a")
    make_database(tmp_path / "n" / "data.db", setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
    tip = found_database(state, Marks(tmp_path / "n", state))
    if closed:
        changed_by_others(tmp_path / "n" / "data.db", "INSERT INTO t VALUES(100, 'theirs')")
    else:
        database = Database.open(tmp_path / "n" / "data.db")
        others(database, "INSERT INTO t VALUES(100, 'theirs')")
        database.close()
    state, replica = recovered(tmp_path / "n")
    leader = lead(replica, state, 1)
    leader.commit_group()
    assert leader.tip.position.txid == tip.position.txid + 1
    assert scanned(replica.database) == replica.log.tip.checksum
    close(leader, replica)
