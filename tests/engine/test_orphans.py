"""Orphan files: what is in them, that they are written whole or again, kept for a while, and can be looked into."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from tests.engine.nodes import changed_by_others, make_database
from walship.engine.divergence import base_of, holds
from walship.engine.log import Log, LogLimits
from walship.engine.orphan_export import export_database
from walship.engine.orphans import Manifest, Reason, list_orphans, prune_orphans, write_orphan
from walship.engine.seed import scan_file
from walship.errors import StorageFailed, UsageError
from walship.formats import ltx
from walship.formats.checksum import FLAG
from walship.formats.frame import FrameFlags, FrameHeader, encode_frame
from walship.formats.position import Position, TermHistory, Tip

CLUSTER = b"c" * 16
BASE = Tip(Position(2, 10), FLAG | 5, 3)


def write(
    directory: Path, *, term: int = 2, size: int = 1, reason: Reason = Reason.DEPOSED, txids: int = 2
) -> Manifest:
    return write_orphan(
        directory,
        [(pgno, os.urandom(2048) + bytes(2048) if size > 1 else b"x" * 4096) for pgno in range(1, size + 1)],
        cluster=CLUSTER,
        node="a",
        reason=reason,
        base=BASE,
        tip=Tip(Position(term, 10 + txids), FLAG | 6, 3 + max(size - 3, 0)),
        page_size=4096,
        acks_wanted=1,
        first_time_ms=1000,
        last_time_ms=2000,
    )


class TestFiles:
    def test_the_same_commits_give_the_same_files(self, tmp_path: Path) -> None:
        first = write(tmp_path)
        before = {path.name: path.read_bytes() for path in (tmp_path / "orphans").iterdir()}
        assert write(tmp_path) == first
        assert {path.name: path.read_bytes() for path in (tmp_path / "orphans").iterdir()} == before
        assert sorted(before) == ["2-11-12.json", "2-11-12.ltx"]
        header, pages = ltx.decode(before["2-11-12.ltx"])
        assert (header.min_txid, header.max_txid, header.commit) == (11, 12, 3)
        assert pages == [(1, b"x" * 4096)]
        assert list_orphans(tmp_path) == [first]

    def test_commits_that_nobody_counted_have_names_of_their_own(self, tmp_path: Path) -> None:
        one = write(tmp_path, txids=0, reason=Reason.FOREIGN)
        two = write(tmp_path, txids=0, size=2, reason=Reason.FOREIGN)
        assert one.name != two.name
        assert one.name.startswith("2-11-11-foreign-")
        assert one.transactions == 0
        assert {manifest.name for manifest in list_orphans(tmp_path)} == {one.name, two.name}

    def test_without_a_manifest_there_is_no_orphan_and_rubbish_is_passed_over(self, tmp_path: Path) -> None:
        assert list_orphans(tmp_path) == []
        write(tmp_path)
        (tmp_path / "orphans" / "2-11-12.json").unlink()
        (tmp_path / "orphans" / "3-1-2.json").write_text("{")
        assert list_orphans(tmp_path) == []

    def test_a_disk_that_refuses_is_said_before_anything_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "orphans").write_text("a file is in the way")
        with pytest.raises(StorageFailed, match="Nothing was replaced"):
            write(tmp_path)


class TestRetention:
    def test_old_ones_go_and_the_newest_stays(self, tmp_path: Path) -> None:
        names = [write(tmp_path, term=term).name for term in (2, 3, 4)]
        for age, name in zip((900, 500, 400), names, strict=True):
            os.utime(tmp_path / "orphans" / f"{name}.json", (10_000 - age, 10_000 - age))
        assert prune_orphans(tmp_path, keep_seconds=600, keep_bytes=1 << 30, now_seconds=10_000) == names[:1]
        assert prune_orphans(tmp_path, keep_seconds=1, keep_bytes=1 << 30, now_seconds=10_000) == names[1:2]
        assert [manifest.name for manifest in list_orphans(tmp_path)] == names[2:]
        assert sorted(path.suffix for path in (tmp_path / "orphans").iterdir()) == [".json", ".ltx"]

    def test_beyond_the_bytes_the_oldest_go(self, tmp_path: Path) -> None:
        manifests = [write(tmp_path, term=term, size=3) for term in (2, 3, 4)]
        for age, manifest in zip((900, 500, 400), manifests, strict=True):
            os.utime(tmp_path / "orphans" / f"{manifest.name}.json", (10_000 - age, 10_000 - age))
        room = manifests[1].size_bytes + manifests[2].size_bytes
        assert prune_orphans(tmp_path, keep_seconds=1e9, keep_bytes=room, now_seconds=10_000) == [manifests[0].name]
        assert prune_orphans(tmp_path, keep_seconds=1e9, keep_bytes=0, now_seconds=10_000) == [manifests[1].name]


class TestExport:
    def orphan(self, directory: Path) -> tuple[Manifest, Path, Path]:
        base, lost = directory / "base.db", directory / "later.db"
        make_database(base)
        lost.write_bytes(base.read_bytes())
        changed_by_others(lost, "CREATE TABLE lost(x)", "INSERT INTO lost SELECT randomblob(9000)")
        before, after = scan_file(base, 4096), scan_file(lost, 4096)
        data = lost.read_bytes()
        manifest = write_orphan(
            directory,
            [(pgno, data[(pgno - 1) * 4096 : pgno * 4096]) for pgno in after.differing(before)],
            cluster=CLUSTER,
            node="a",
            reason=Reason.DIVERGED,
            base=Tip(Position(1, 4), before.rolling, before.commit),
            tip=Tip(Position(1, 6), after.rolling, after.commit),
            page_size=4096,
            acks_wanted=0,
            first_time_ms=1,
            last_time_ms=2,
        )
        return manifest, base, lost

    def test_over_its_base_it_is_the_database_that_was_lost(self, tmp_path: Path) -> None:
        manifest, base, lost = self.orphan(tmp_path)
        out = tmp_path / "out.db"
        export_database(manifest, tmp_path / "orphans" / f"{manifest.name}.ltx", base, out)
        assert out.read_bytes() == lost.read_bytes()

    def test_over_anything_else_it_is_nothing(self, tmp_path: Path) -> None:
        manifest, base, lost = self.orphan(tmp_path)
        pages = tmp_path / "orphans" / f"{manifest.name}.ltx"
        with pytest.raises(UsageError, match="that very position"):
            export_database(manifest, pages, lost, tmp_path / "out.db")
        with pytest.raises(UsageError, match="other pages"):
            export_database(dataclasses.replace(manifest, page_size=8192), pages, base, tmp_path / "out.db")
        with pytest.raises(UsageError, match="exists already"):
            export_database(manifest, pages, base, lost)
        assert not (tmp_path / "out.db").exists()


class TestDivergence:
    @pytest.mark.parametrize(
        ("position", "held"),
        [
            (Position(1, 100), True),
            (Position(1, 101), False),  # term 3 began at 100
            (Position(2, 90), False),  # nothing of term 2 is in the leader's log
            (Position(3, 120), True),
            (Position(3, 121), False),
            (Position(5, 130), True),
            (Position(5, 131), False),  # the leader is at 130
            (Position(6, 130), False),
        ],
    )
    def test_a_position_is_held_or_not(self, position: Position, held: bool) -> None:
        history = TermHistory([(1, 0), (3, 100), (5, 120)])
        assert holds(history, Position(5, 130), position) is held

    def test_terms_older_than_any_that_is_remembered_are_judged_by_what_came_later(self) -> None:
        history = TermHistory([(3, 100), (5, 120)])
        assert holds(history, Position(5, 130), Position(1, 100))
        assert not holds(history, Position(5, 130), Position(1, 101))

    def test_the_newest_common_state_is_found_across_segments(self, tmp_path: Path) -> None:
        limits = LogLimits(max_bytes=1 << 30, segment_bytes=600)
        log = Log.open(tmp_path / "log", cluster=CLUSTER, base=Tip(Position(1, 1), FLAG, 1), limits=limits)
        for txid in range(2, 30):
            tip = log.tip
            header = FrameHeader(
                flags=FrameFlags(0),
                cluster=CLUSTER,
                database=1,
                term=1,
                min_txid=txid,
                max_txid=txid,
                previous=tip.position,
                previous_checksum=tip.checksum,
                checksum=FLAG | txid,
                commit=1,
                page_size=4096,
                time_ms=1,
                acked=Position(0, 0),
            )
            payload = ltx.encode(ltx.LtxHeader(4096, 1, txid, txid), [(1, bytes(4096))])
            log.append(header, encode_frame(header, payload))
        assert log.statistics().segments > 5
        for start in (1, 2, 11, 12, 28, 29):
            history = TermHistory([(1, 0), (2, start)])
            assert base_of(log, history, Position(2, 500)).position == Position(1, start)
        assert base_of(log, TermHistory([(2, 0)]), Position(2, 500)) == log.base
        log.close()
