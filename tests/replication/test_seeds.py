"""When a follower is given a snapshot, and what becomes of it, on real sockets, with real logs on both sides."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.replication.replicas import CLUSTER, Followers, Leader, Replica, ReplicaSeed, caught_up, node_id
from tests.waiting import eventually
from walship.engine.log import LogLimits
from walship.errors import StorageFailed
from walship.formats.checksum import FLAG
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position
from walship.replication.messages import AckFlags
from walship.replication.subscriber import Identity, Link, Subscriber, SubscriberLimits


async def test_a_follower_that_the_log_no_longer_reaches_is_seeded(tmp_path: Path) -> None:
    """R9: beyond what the log keeps, the laggard is seeded again, and its old log replaced."""
    limits = LogLimits(max_bytes=1, segment_bytes=10_000)
    leader, south = Leader(tmp_path / "l", log_limits=limits), Replica(tmp_path / "f")
    async with leader.serving():
        async with Followers(leader).following(south):
            await eventually(lambda: caught_up(leader, south))
        for _ in range(20):
            leader.commit()
        assert leader.log.prune(keep_from=leader.publisher.keep_from(), now_ms=0) > 0
        again = Replica(tmp_path / "f")
        async with Followers(leader).following(again, nonce="n2"):
            await eventually(lambda: caught_up(leader, again))
            leader.commit()
            await eventually(lambda: caught_up(leader, again))
            assert again.replay() == leader.writer.database.pages
        assert leader.snapshots_opened == 2


async def test_a_follower_of_another_history_is_loud_and_seeded_anew(tmp_path: Path) -> None:
    """R11: same position, other checksum: never fed on a guess."""
    leader = Leader(tmp_path / "l")
    wrong = replace(leader.log.tip, checksum=FLAG | 12345)
    south = Replica(tmp_path / "f", base=wrong)
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages
        assert subscriber.statistics().seeds == 1


async def test_a_frame_that_does_not_extend_the_tip_is_loud_and_ends_in_a_seed(tmp_path: Path) -> None:
    """A leader that ships the wrong frame: the follower keeps its log, says so, and asks for a snapshot."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        [feed] = leader.publisher._feeds.values()
        before = south.tip
        leader.commit(durable=False)
        feed.sent = leader.log.tip.position  # as if it had been sent
        leader.commit()
        await eventually(lambda: south.mismatches)
        assert before is not None
        assert str(before.position) in str(south.mismatches[0])
        await eventually(lambda: caught_up(leader, south))
        assert subscriber.statistics().seeds == 2
        leader.cut_connections()  # and from here on the log is enough again
        leader.commit()
        await eventually(lambda: caught_up(leader, south))
        assert subscriber.statistics().seeds == 2
        assert south.replay() == leader.writer.database.pages


async def test_a_voter_takes_no_snapshot_below_what_it_holds(tmp_path: Path) -> None:
    """R9: it stops loudly instead, and keeps its log."""
    leader = Leader(tmp_path / "l")
    ahead = replace(leader.log.tip, position=Position(1, 50))
    south = Replica(tmp_path / "f", base=ahead)
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: len(south.mismatches) >= 2)
        assert "nothing below it" in str(south.mismatches[0])
        assert subscriber.statistics().seeds == 0
    assert south.tip == ahead
    assert leader.all_acks == []


async def test_a_snapshot_that_fails_its_check_leaves_the_old_state(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    south = Replica(tmp_path / "f", base=replace(leader.log.tip, checksum=FLAG | 1))
    old = south.tip
    leader.writer.tip = replace(leader.writer.tip, checksum=FLAG | 77)  # the snapshot will promise what it is not
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: "CorruptDatabase" in (subscriber.statistics().last_error or ""))
        assert south.tip == old
        assert leader.all_acks == []


async def test_nothing_is_acknowledged_while_a_snapshot_is_installed(tmp_path: Path) -> None:
    """An ack of the old history must not count for the new one (PHASES)."""
    leader = Leader(tmp_path / "l")
    south = Replica(tmp_path / "f", base=replace(leader.log.tip, checksum=FLAG | 12345))
    south.install_gate.clear()
    fast = SubscriberLimits(ack_seconds=0.01)
    async with leader.serving(), Followers(leader, fast).following(south):
        await eventually(lambda: leader.publisher.statistics().followers)
        leader.commit()
        await eventually(lambda: leader.publisher.statistics().followers[0].phase == "installing")
        await eventually(lambda: leader.publisher.statistics().followers[0].flags == AckFlags.SEEDING)
        assert leader.all_acks == []
        assert south.frames == []
        south.install_gate.set()
        await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages


async def test_signs_of_life_keep_a_seeds_pin_alive(tmp_path: Path) -> None:
    """R9: a pin silent for 60 s is dropped, however long an install takes."""
    now = [0.0]
    leader, south = Leader(tmp_path / "l", clock=lambda: now[0]), Replica(tmp_path / "f")
    south.install_gate.clear()
    fast = SubscriberLimits(ack_seconds=0.005)
    async with leader.serving(), Followers(leader, fast).following(south) as [subscriber]:
        await eventually(lambda: subscriber.link is Link.SEEDING and leader.log.statistics().pins == 1)
        for _ in range(4):
            now[0] += 40
            await eventually(lambda: leader.log._pins[0].last_heard == now[0])
            leader.log.prune(keep_from=None, now_ms=0)
        assert leader.log.statistics().pins == 1
        south.install_gate.set()
        await eventually(lambda: caught_up(leader, south))


async def test_a_seed_pins_the_log_until_the_follower_has_caught_up(tmp_path: Path) -> None:
    """R9, with a log that would keep nothing."""
    limits = LogLimits(max_bytes=1, segment_bytes=10_000)
    leader, south = Leader(tmp_path / "l", log_limits=limits), Replica(tmp_path / "f")
    south.install_gate.clear()
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: subscriber.link is Link.SEEDING)
        await eventually(lambda: leader.publisher.statistics().followers[0].phase == "installing")
        for _ in range(20):
            leader.commit(offer=False)
        assert leader.log.prune(keep_from=None, now_ms=0) == 0
        south.install_gate.set()
        await eventually(lambda: caught_up(leader, south))
        await eventually(lambda: leader.log.statistics().pins == 0)
        assert leader.log.prune(keep_from=None, now_ms=0) > 0
        assert leader.snapshots_opened == 1
        assert south.replay() == leader.writer.database.pages


async def test_a_lost_connection_does_not_stop_an_install_halfway(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    south.install_gate.clear()
    fast = SubscriberLimits(ack_seconds=0.005)
    async with leader.serving(), Followers(leader, fast).following(south) as [subscriber]:
        await eventually(lambda: south.installing)
        leader.cut_connections()
        await eventually(lambda: not leader.publisher.statistics().followers)
        south.install_gate.set()
        await eventually(lambda: caught_up(leader, south))
        assert (south.aborted_seeds, subscriber.statistics().seeds) == (0, 1)


class SlowSeed(ReplicaSeed):
    """Its disk holds up one write; `calls` says what came in which order."""

    async def write(self, ltx: bytes) -> None:
        calls = self.replica.calls
        calls.append("write")
        try:
            await self.replica.install_gate.wait()
            await super().write(ltx)
        finally:
            calls.append("written")

    async def abort(self) -> None:
        self.replica.calls.append("abort")
        await super().abort()


async def test_a_lost_connection_throws_a_snapshot_away_only_after_the_write_under_way(tmp_path: Path) -> None:
    """R25: the write runs in a thread, and the descriptor it writes to is closed, and its number used again."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")

    async def seed(header: SnapshotHeader) -> ReplicaSeed:
        return SlowSeed(south, header)

    south.seed = seed  # type: ignore[method-assign]
    south.install_gate.clear()
    fast = SubscriberLimits(ack_seconds=0.005)
    async with leader.serving(), Followers(leader, fast).following(south):
        await eventually(lambda: south.calls == ["write"])
        leader.cut_connections()
        await eventually(lambda: not leader.publisher.statistics().followers)
        await asyncio.sleep(0.05)
        assert south.calls == ["write"]
        south.install_gate.set()
        await eventually(lambda: caught_up(leader, south))
        assert south.calls[:3] == ["write", "written", "abort"]


async def test_a_disk_that_fails_ends_the_follower(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")

    async def locate() -> tuple[str, int] | None:
        return leader.url, leader.term

    async def seed(header: SnapshotHeader) -> ReplicaSeed:
        raise StorageFailed("no space left")

    south.seed = seed  # type: ignore[method-assign]
    identity = Identity(CLUSTER, node_id(south), south.name, "n1")
    async with leader.serving(), asyncio.timeout(5):
        with pytest.raises(StorageFailed, match="no space left"):
            await Subscriber(south, locate, identity).run()


async def test_a_cut_inside_a_snapshot_throws_it_away_and_begins_again(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    leader.commit_before_serving(5 << 20)
    leader.hold_chunks_after = 10
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: subscriber.statistics().received_bytes > 1 << 20)
        leader.cut_connections()
        await eventually(lambda: south.aborted_seeds == 1)
        leader.hold_chunks_after = None
        leader.chunk_gate.set()
        await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages
