"""Rewinding a deposed leader: only what differs is taken, what was no history is kept, a crash loses nothing (R12)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.nodes import (
    HERE,
    FollowerNode,
    LeaderNode,
    ask,
    assert_same_files,
    crash_image,
    outside,
    read,
    scanned,
)
from tests.engine.rewinding import part, rewind
from walship.engine.failpoints import VARIABLE
from walship.engine.orphans import Reason, list_orphans
from walship.engine.sparse import SparseSeedFile, open_chunks
from walship.errors import CorruptDatabase
from walship.formats import ltx
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.position import Position

LOST = "SELECT count(*) FROM t WHERE body LIKE 'lost%'"


def orphan_pages(directory: Path, name: str) -> dict[int, bytes]:
    return dict(ltx.decode((directory / "orphans" / f"{name}.ltx").read_bytes())[1])


class TestRewind:
    async def test_a_deposed_leader_takes_what_differs_and_keeps_what_was_lost(self, tmp_path: Path) -> None:
        leader, follower = await part(tmp_path)
        lost_tip = follower.replica.log.tip
        parted = Position(1, lost_tip.position.txid - 6)
        base = follower.replica.log.newest_where(lambda position: position.order() <= parted.order())
        assert base is not None
        changed = dict.fromkeys(
            pgno
            for ref in follower.replica.log.frames_after(base.position)
            for pgno, _ in ltx.decode(follower.replica.log.payload(ref).read_at(0, ref.payload_bytes))[1]
        )
        expected = {pgno: follower.replica.checksums.get(pgno) for pgno in changed}
        size_bytes = leader.tip.commit * 4096

        sent_bytes = await rewind(leader, follower)

        assert sent_bytes < size_bytes // 10
        assert follower.follower.tip == leader.tip
        assert scanned(follower.database) == leader.tip.checksum == follower.replica.checksums.rolling
        assert read(follower.database, LOST) == [(0,)]
        [manifest] = list_orphans(follower.directory)
        assert manifest.reason is Reason.DEPOSED
        assert (manifest.base, manifest.tip) == (str(parted), str(lost_tip.position))
        assert (manifest.base_checksum, manifest.tip_checksum) == (f"{base.checksum:016x}", f"{lost_tip.checksum:016x}")
        assert (manifest.transactions, manifest.acks_wanted, manifest.may_be_acknowledged) == (6, 1, False)
        pages = orphan_pages(follower.directory, manifest.name)
        assert {pgno: page_checksum(pgno, page) for pgno, page in pages.items()} == expected
        assert manifest.pages == len(expected)

        leader.commit("INSERT INTO t VALUES(20001, 'after')")
        await follower.catch_up(leader)
        await leader.stop()
        await follower.stop()
        assert_same_files(tmp_path / "new", tmp_path / "old")
        assert not (tmp_path / "old" / "incoming" / "seed.ltx").exists()

    async def test_live_readers_keep_what_they_see(self, tmp_path: Path) -> None:
        leader, follower = await part(tmp_path)
        reader = follower.database.connect_reader()
        reader.execute("BEGIN")
        assert reader.execute(LOST).fetchall() == [(4,)]
        with outside() as other:
            ask(other, "open", str(follower.directory / "data.db"))
            ask(other, "run", "BEGIN")
            assert ask(other, "run", LOST) == "[(4,)]"
            await rewind(leader, follower)
            assert reader.execute(LOST).fetchall() == [(4,)]
            assert ask(other, "run", LOST) == "[(4,)]"
            assert read(follower.database, LOST) == [(0,)]
            ask(other, "run", "COMMIT")
            assert ask(other, "run", LOST) == "[(0,)]"
            ask(other, "close")
        reader.close()
        await leader.stop()
        await follower.stop()

    async def test_with_acks_of_two_nothing_lost_is_shown_while_it_compares(self, tmp_path: Path) -> None:
        """R15: the acknowledged position of a newer term covers no orphan."""
        leader, follower = await part(tmp_path, acks=2)
        await rewind(leader, follower)
        assert [manifest.may_be_acknowledged for manifest in list_orphans(follower.directory)] == [False]
        await leader.stop()
        await follower.stop()

    async def test_at_n_0_the_manifest_says_that_a_client_may_have_been_told(self, tmp_path: Path) -> None:
        leader, follower = await part(tmp_path, acks=0)
        await rewind(leader, follower)
        assert [manifest.may_be_acknowledged for manifest in list_orphans(follower.directory)] == [True]
        await leader.stop()
        await follower.stop()

    async def test_a_follower_that_was_only_behind_leaves_no_orphan(self, tmp_path: Path) -> None:
        leader, follower = await part(tmp_path, lost=0)
        assert await rewind(leader, follower) < leader.tip.commit * 4096 // 10
        assert list_orphans(follower.directory) == []
        assert scanned(follower.database) == leader.tip.checksum
        await leader.stop()
        await follower.stop()

    @pytest.mark.parametrize("change", ["DELETE FROM t WHERE id > 20", "INSERT INTO t SELECT id + 50000, body FROM t"])
    async def test_the_database_may_shrink_and_grow_meanwhile(self, tmp_path: Path, change: str) -> None:
        leader, follower = await part(tmp_path)
        leader.commit(change, "VACUUM")
        await rewind(leader, follower)
        assert scanned(follower.database) == leader.tip.checksum
        assert follower.replica.checksums.commit == leader.tip.commit
        await leader.stop()
        await follower.stop()
        assert_same_files(tmp_path / "new", tmp_path / "old")

    async def test_pages_that_do_not_add_up_are_not_installed_and_the_next_copy_is_whole(self, tmp_path: Path) -> None:
        leader, follower = await part(tmp_path)

        def claim(have: PageChecksums) -> None:
            """The follower says that it has the leader's image of a page where it has another."""
            pgno = max(leader.replica.checksums.differing(have))
            have.set_many({pgno: leader.replica.checksums.get(pgno)}, have.commit)

        with pytest.raises(CorruptDatabase, match="whole snapshot"):
            await rewind(leader, follower, claim)
        assert not follower.follower.comparable
        assert follower.state.state.installing is None
        follower.follower.history(list(leader.replica.log.terms().starts()), differs=False)
        await follower.seed(leader.leader.pin_snapshot)
        assert follower.follower.comparable
        assert len(list_orphans(follower.directory)) == 1
        assert scanned(follower.database) == leader.tip.checksum
        await leader.stop()
        await follower.stop()


POINTS = [
    "orphan.pages_kept",
    "orphan.kept",
    "seed.received",
    "seed.installing",
    "apply.frames_written",
    "apply.index_written",
    "apply.header_copy1",
    "apply.header_copy0",
    "log.segment_created",
    "follower.marked",
    "seed.installed",
]


@pytest.mark.parametrize("point", POINTS)
async def test_death_at_any_step_of_a_rewind(tmp_path: Path, point: str) -> None:
    """The node starts again from what is on disk; the orphan is there before anything of it is gone."""
    leader, follower = await part(tmp_path)
    tip = leader.tip
    lost = follower.replica.log.tip
    await leader.stop()
    await follower.stop()
    environment = {**os.environ, VARIABLE: point, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(HERE / "rewinding.py"), str(tmp_path / "new"), str(tmp_path / "old")],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    leader, follower = LeaderNode(tmp_path / "new"), FollowerNode(tmp_path / "old")
    assert follower.replica is not None
    at = follower.follower.tip
    assert at is not None
    if at.position == lost.position:
        assert read(follower.database, LOST) == [(4,)]
    else:
        assert at.position.term > lost.position.term
        assert read(follower.database, LOST) == [(0,)]
        assert [manifest.tip for manifest in list_orphans(follower.directory)] == [str(lost.position)]
        assert scanned(follower.database) == at.checksum
    assert tip.position.term < leader.tip.position.term
    await rewind(leader, follower)
    [manifest] = list_orphans(follower.directory)
    lost_bytes = (follower.directory / "orphans" / f"{manifest.name}.ltx").read_bytes()
    assert len(lost_bytes) == manifest.size_bytes
    assert manifest.tip == str(lost.position)
    assert scanned(follower.database) == leader.tip.checksum
    leader.commit("INSERT INTO t VALUES(20001, 'after')")
    await follower.catch_up(leader)
    await leader.stop()
    await follower.stop()
    assert_same_files(tmp_path / "new", tmp_path / "old")


async def test_the_log_goes_over_the_mark_and_the_pages_over_the_log(tmp_path: Path) -> None:
    """A crash after the announcement, with frames applied since the mark that the comparison relied on."""
    leader, follower = await part(tmp_path)
    # The mark is where the first copy was installed; everything since was applied after it.
    have = PageChecksums.parse(await follower.follower.page_checksums())
    header, snapshot, chunks = open_chunks(leader.leader, leader.replica, have)
    seed = SparseSeedFile(follower.directory, header, follower.replica.log.tip, have)
    for chunk in chunks:
        seed.write(chunk)
    snapshot.close()
    seed.finish()
    seed.announce(follower.state, leader.replica.log.terms())
    seed.close()
    image = crash_image(follower.directory, tmp_path / "image")
    state = json.loads((image / "state").read_bytes().split(b"\n", 1)[1])
    assert state["installing"]["base"]["txid"] > state["mark"]["position"]["txid"]
    again = FollowerNode(image)
    assert again.follower.tip == leader.tip
    assert scanned(again.database) == leader.tip.checksum
    await again.stop()
    await follower.stop()
    await leader.stop()
