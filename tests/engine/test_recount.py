"""A leader's restart: which transactions the -wal holds is counted again, with the same numbers (R2, R7, R8)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import CLUSTER, LeaderNode, changed_by_others, crash_image, filled, open_replica, read, scanned
from walship.engine.durable_state import FileStamp, StateFile, Truth
from walship.engine.log import FrameRef
from walship.engine.replica import Replica
from walship.engine.watermarks import Watermarks
from walship.errors import CorruptData, CorruptLog
from walship.formats.frame import FrameFlags
from walship.formats.position import Position
from walship.node.promote import promote


def recovered(directory: Path) -> tuple[StateFile, Replica]:
    state, _, replica = open_replica(directory, "a")
    assert replica is not None
    assert scanned(replica.database) == replica.checksums.rolling or replica.differing
    return state, replica


def frames(replica: Replica) -> list[FrameRef]:
    return list(replica.log.frames_after(replica.log.base.position))


def rebuilt(replica: Replica) -> list[tuple[int, int]]:
    return [
        (ref.header.min_txid, ref.header.max_txid) for ref in frames(replica) if ref.header.flags & FrameFlags.REBUILT
    ]


class TestBaseContinues:
    def test_commits_that_the_log_lacks_become_one_rebuilt_frame_each(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        tip = leader.tip.position
        leader.write(*(f"INSERT INTO t VALUES({number}, 'late')" for number in range(100, 103)))
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert rebuilt(replica) == [(tip.txid + n, tip.txid + n) for n in (1, 2, 3)]
        assert all(ref.header.term == 1 for ref in frames(replica)[-3:])
        assert replica.log.tip.position == Position(1, tip.txid + 3)
        replica.close()
        leader.close()

    def test_txids_are_the_same_as_without_the_crash(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        leader.write(*(f"INSERT INTO t VALUES({number}, 'late')" for number in range(100, 107)))
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert leader.leader.commit_group() == replica.log.tip
        replica.close()
        leader.close()

    def test_nothing_new_adds_no_frame(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert rebuilt(replica) == []
        assert replica.log.tip == leader.tip
        replica.close()
        leader.close()

    def test_spilled_and_rolled_back_frames_are_not_counted(self, tmp_path: Path) -> None:
        """engine.md 11.13: a cache spill writes frames before its commit; half of them are rolled back."""
        leader = filled(tmp_path / "n")
        leader.connection.execute("PRAGMA cache_size=5").fetchall()
        leader.connection.execute("PRAGMA cache_spill=5").fetchall()
        for number in range(8):
            leader.write("BEGIN", *(f"INSERT INTO t(body) VALUES(randomblob(3000)) -- {n}" for n in range(40)))
            leader.write("COMMIT" if number % 2 else "ROLLBACK")
        leader.write("BEGIN", *(f"INSERT INTO t(body) VALUES(randomblob(3000)) -- {n}" for n in range(40)))
        before = leader.replica.log.tip.position.txid
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert replica.log.tip.position.txid == before + 4
        assert read(replica.database, "SELECT count(*) FROM t") == [(5 + 4 * 40,)]
        replica.close()
        leader.write("ROLLBACK")
        assert leader.leader.commit_group().position.txid == before + 4
        leader.close()

    def test_commits_that_others_appended_while_the_node_was_down_count(self, tmp_path: Path) -> None:
        """R10: foreign commits on the leader are history at n = 0."""
        leader = filled(tmp_path / "n")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        foreign = apsw.Connection(str(image / "data.db"))
        foreign.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        foreign.execute("INSERT INTO t VALUES(500, 'foreign')")
        _, replica = recovered(image)
        assert rebuilt(replica) == [(leader.tip.position.txid + 1,) * 2]
        foreign.close()
        replica.close()
        leader.close()

    def test_the_frame_checksum_must_fit_the_base(self, tmp_path: Path) -> None:
        """Equal salts alone do not make it the -wal that was counted: then pages are compared."""
        leader = filled(tmp_path / "n")
        leader.write("INSERT INTO t VALUES(100, 'late')")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        state = StateFile.open(image)
        assert state.state.base is not None
        state.update(base=dataclasses.replace(state.state.base, frame_checksum=(1, 2)))
        _, replica = recovered(image)
        assert rebuilt(replica) == []
        assert replica.differing
        replica.close()
        leader.close()


class TestNewGeneration:
    def test_a_generation_nobody_saw_begin_is_counted_from_next_base(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        assert leader.leader.checkpoint()
        tip = leader.tip.position
        leader.write("INSERT INTO t VALUES(100, 'new')", "INSERT INTO t VALUES(101, 'generation')")
        assert leader.state.state.next_base == tip.txid
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert rebuilt(replica) == [(tip.txid + 1,) * 2, (tip.txid + 2,) * 2]
        replica.close()
        leader.close()

    def test_a_generation_that_was_seen_to_begin_is_counted_from_its_own_base(self, tmp_path: Path) -> None:
        """Its base is durable before the log goes past `next_base`, so any number of groups later it still counts."""
        leader = filled(tmp_path / "n")
        assert leader.leader.checkpoint()
        first = leader.state.state.base
        for number in range(200, 205):
            leader.commit(f"INSERT INTO t VALUES({number}, 'logged')")
        assert leader.state.state.base != first
        tip = leader.tip.position
        leader.write("INSERT INTO t VALUES(300, 'late')", "INSERT INTO t VALUES(301, 'late')")
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert rebuilt(replica) == [(tip.txid + 1,) * 2, (tip.txid + 2,) * 2]
        assert not replica.differing
        replica.close()
        leader.close()

    def test_a_clean_stop_is_believed_without_reading_every_page(self, tmp_path: Path) -> None:
        """`next_base` and the file's stamp fit after a stop, also with a reader of another program attached."""
        leader = filled(tmp_path / "n")
        leader.close()
        state = StateFile.open(tmp_path / "n").state
        status = (tmp_path / "n" / "data.db").stat()
        assert state.next_base == leader.recovered_tip.position.txid + 5
        assert state.next_base_file == FileStamp(status.st_size, status.st_mtime_ns)

    def test_an_empty_wal_after_a_clean_stop_adds_nothing(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        tip = leader.tip
        leader.close()
        assert leader.state.state.truth is Truth.WAL
        _, replica = recovered(tmp_path / "n")
        assert replica.log.tip == tip
        assert rebuilt(replica) == []
        assert not replica.differing
        replica.close()

    def test_a_checkpointed_wal_that_nobody_reset_still_counts_from_its_base(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        assert leader.leader.checkpoint()
        _, replica = recovered(crash_image(tmp_path / "n", tmp_path / "image"))
        assert replica.log.tip == leader.tip
        assert not replica.differing
        replica.close()
        leader.close()


class TestUnknownWal:
    def test_equal_pages_go_on(self, tmp_path: Path) -> None:
        """The -wal was emptied by others after everything in it was logged."""
        leader = filled(tmp_path / "n")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        changed_by_others(image / "data.db", "SELECT count(*) FROM t")
        _, replica = recovered(image)
        assert replica.log.tip == leader.tip
        assert not replica.differing
        replica.close()
        leader.close()

    def lost_count(self, directory: Path) -> Path:
        """A leader whose last three commits are in the file, not in the log, with the -wal gone."""
        leader = filled(directory / "n")
        leader.write(
            "INSERT INTO t VALUES(100, 'x')",
            "INSERT INTO t(body) SELECT randomblob(2000) FROM t",
            "CREATE TABLE other AS SELECT * FROM t",
        )
        image = crash_image(directory / "n", directory / "image")
        changed_by_others(image / "data.db", "SELECT count(*) FROM t")
        leader.close()
        return image

    def lead(self, directory: Path, term: int) -> tuple[StateFile, Replica]:
        state, replica = recovered(directory)
        leader = promote(
            replica,
            state,
            Watermarks(replica.log.tip.position),
            cluster=CLUSTER,
            term=term,
            now_ms=lambda: 1,
            on_frame=lambda ref, data: None,
        )
        leader.abandon()
        return state, replica

    @pytest.mark.parametrize("stopped", [False, True], ids=["crash", "stop"])
    def test_a_file_that_others_wrote_to_is_never_taken_for_next_base(self, tmp_path: Path, stopped: bool) -> None:
        """The log's tip is `next_base` and the -wal is empty, yet the file has a commit more: its stamp says so."""
        leader = filled(tmp_path / "n")
        assert leader.leader.checkpoint()
        if stopped:
            leader.close()
            changed_by_others(tmp_path / "n" / "data.db", "INSERT INTO t VALUES(100, 'lost')")
            image = tmp_path / "n"
        else:
            leader.write("INSERT INTO t VALUES(100, 'lost')")
            image = crash_image(tmp_path / "n", tmp_path / "image")
            changed_by_others(image / "data.db", "SELECT count(*) FROM t")
            leader.close()
        _, replica = recovered(image)
        assert replica.differing
        replica.close()

    def test_differing_pages_become_one_rebuilt_frame_of_the_next_term(self, tmp_path: Path) -> None:
        image = self.lost_count(tmp_path)
        _, replica = self.lead(image, 2)
        start, difference = frames(replica)[-2:]
        assert start.header.is_term_start
        assert difference.header.flags & FrameFlags.REBUILT
        assert difference.header.term == 2
        assert difference.header.max_txid == difference.header.min_txid == start.header.max_txid + 1
        assert scanned(replica.database) == replica.log.tip.checksum == difference.header.checksum
        replica.close()

    def test_the_difference_survives_a_crash_before_the_next_term(self, tmp_path: Path) -> None:
        """R7: until it is in the log, no restart may take the log for the truth."""
        image = self.lost_count(tmp_path)
        _, first = recovered(image)
        again = crash_image(image, tmp_path / "again")
        first.close()
        _, replica = recovered(again)
        assert replica.differing
        replica.close()

    @pytest.mark.parametrize("point", ["leader.term_started", "leader.truth_wal"])
    def test_the_difference_survives_a_crash_inside_the_promotion(
        self, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = self.lost_count(tmp_path)
        images: list[Path] = []

        def reach(name: str) -> None:
            if name == point and not images:
                images.append(crash_image(image, tmp_path / "again"))

        with monkeypatch.context() as patch:
            patch.setattr("walship.engine.failpoints.reach", reach)
            _, first = self.lead(image, 2)
        expected = scanned(first.database)
        first.close()
        (again,) = images
        _, replica = self.lead(again, 3)
        assert scanned(replica.database) == replica.log.tip.checksum == expected
        replica.close()


class TestChecksumArray:
    def array(self, directory: Path) -> Path:
        (path,) = directory.glob("checksums-*")
        return path

    @pytest.mark.parametrize("damage", ["missing", "flipped"])
    def test_without_it_a_leader_scans_and_counts_on(self, tmp_path: Path, damage: str) -> None:
        """R8: a full scan when it is missing or in doubt."""
        leader = filled(tmp_path / "n")
        leader.write("INSERT INTO t VALUES(100, 'late')", "INSERT INTO t VALUES(101, 'late')")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        self.damage(self.array(image), damage)
        _, replica = recovered(image)
        assert replica.log.tip == leader.leader.commit_group()
        assert replica.checksums.rolling == replica.log.tip.checksum
        replica.close()
        leader.close()

    @pytest.mark.parametrize("damage", ["missing", "flipped"])
    def test_without_it_a_stopped_node_scans(self, tmp_path: Path, damage: str) -> None:
        leader = filled(tmp_path / "n")
        tip = leader.tip
        leader.close()
        StateFile.open(tmp_path / "n").update(truth=Truth.LOG, base=None, next_base=None)
        self.damage(self.array(tmp_path / "n"), damage)
        _, replica = recovered(tmp_path / "n")
        assert replica.log.tip == tip
        replica.close()

    def test_when_nothing_can_be_trusted_it_says_so_and_changes_nothing(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        leader.write("INSERT INTO t VALUES(100, 'late')")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        leader.close()
        changed_by_others(image / "data.db", "SELECT count(*) FROM t")
        self.array(image).unlink()
        before = (image / "data.db").read_bytes()
        with pytest.raises(CorruptData, match="Nothing was changed"):
            open_replica(image, "a")
        assert (image / "data.db").read_bytes() == before
        assert StateFile.open(image).state.truth is Truth.WAL

    def damage(self, path: Path, how: str) -> None:
        if how == "missing":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[-12] ^= 1
            path.write_bytes(data)


class TestDamage:
    def test_a_damaged_log_of_a_leader_is_for_the_operator(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        image = crash_image(tmp_path / "n", tmp_path / "image")
        leader.close()
        self.flip_early_record(image)
        with pytest.raises(CorruptLog):
            open_replica(image, "a")
        assert (image / "log").exists()

    def test_a_damaged_log_of_a_follower_is_set_aside_and_a_snapshot_asked_for(self, tmp_path: Path) -> None:
        leader = filled(tmp_path / "n")
        leader.close()
        StateFile.open(tmp_path / "n").update(truth=Truth.LOG)
        self.flip_early_record(tmp_path / "n")
        _, _, replica = open_replica(tmp_path / "n", "a")
        assert replica is None
        assert (tmp_path / "n" / "log-damaged-1").exists()

    def flip_early_record(self, directory: Path) -> None:
        path = min((directory / "log").glob("*.seg"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


def test_a_node_without_a_mark_needs_a_snapshot(tmp_path: Path) -> None:
    assert open_replica(tmp_path / "new", "b")[2] is None


def test_the_base_survives_promotion_on_a_wal_with_frames(tmp_path: Path) -> None:
    """R2: `base` names the frame of the follower's own -wal that the new leader starts from."""
    leader = filled(tmp_path / "n")
    image = crash_image(tmp_path / "n", tmp_path / "image")
    again = LeaderNode(image)
    base = again.state.state.base
    assert base is not None
    assert base.txid == again.recovered_tip.position.txid
    assert base.frame > 0
    again.commit("INSERT INTO t VALUES(700, 'x')")
    third = LeaderNode(crash_image(image, tmp_path / "third"))
    assert third.recovered_tip == again.tip
    for node in (third, again, leader):
        node.close()
