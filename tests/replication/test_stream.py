"""Publisher and subscriber on real sockets, with real logs on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from tests.replication.replicas import CLUSTER, Followers, Leader, Replica, ReplicaSeed, node_id
from tests.waiting import eventually
from walship.engine.log import LogLimits
from walship.errors import StorageFailed, Unavailable
from walship.formats.checksum import FLAG
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position
from walship.formats.record import Kind, encode_record
from walship.replication.feed import whole_records
from walship.replication.messages import PROTOCOL, Ack, AckFlags, Goodbye, GoodbyeReason, Heartbeat, Hello, Welcome
from walship.replication.protocol import FollowerProtocol
from walship.replication.publisher import FeedLimits
from walship.replication.subscriber import Identity, Link, Subscriber, SubscriberLimits
from walship.replication.upgrade import connect


def caught_up(leader: Leader, *replicas: Replica) -> bool:
    return all(leader.acks.get(node_id(each), (None,))[0] == leader.log.durable_tip.position for each in replicas)


async def test_an_empty_follower_is_seeded_and_then_gets_frames(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        leader.commit()
        await eventually(lambda: caught_up(leader, south))
        leader.commit()
        await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages
        assert subscriber.statistics().seeds == 1
        assert subscriber.link is Link.STREAMING
    assert leader.forgotten == [node_id(south)]


async def test_frames_reach_two_followers_byte_for_byte(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    replicas = [Replica(tmp_path / name, name) for name in ("south", "west")]
    async with leader.serving(), Followers(leader).following(*replicas):
        await eventually(lambda: caught_up(leader, *replicas))
        for _ in range(50):
            leader.commit()
        await eventually(lambda: caught_up(leader, *replicas))
        for replica in replicas:
            assert replica.log is not None
            ours = b"".join(leader.log.read(ref) for ref in leader.log.frames_after(leader.log.base.position))
            theirs = b"".join(replica.log.read(ref) for ref in replica.log.frames_after(replica.log.base.position))
            assert ours == theirs


async def test_what_is_offered_is_shipped_without_reading_the_log(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        for _ in range(20):
            leader.commit()
            await eventually(lambda: caught_up(leader, south))
        [feed] = leader.publisher._feeds.values()
        assert (feed.batches_from_tail, feed.batches_from_log) == (20, 0)


async def test_one_group_commit_is_one_batch(tmp_path: Path) -> None:
    """Frames that became durable together are shipped together (perf.md 8)."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        for _ in range(10):
            leader.commit(durable=False)
        leader.sync()
        await eventually(lambda: caught_up(leader, south))
        [feed] = leader.publisher._feeds.values()
        assert feed.batches_from_tail == 1


async def test_nothing_is_shipped_before_the_leaders_fdatasync(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        durable = leader.commit().header.position
        leader.commit(durable=False)
        heartbeats = len(south.heard_all)
        await eventually(lambda: len(south.heard_all) > heartbeats + 3)
        assert south.frames[-1].position == durable
        leader.sync()
        await eventually(lambda: caught_up(leader, south))


async def test_catching_up_from_the_log_stops_at_what_is_durable(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        durable = leader.commit(offer=False).header.position
        leader.commit(offer=False, durable=False)
        leader.cut_connections()
        await eventually(lambda: leader.acks[node_id(south)][0] == durable)
        heartbeats = len(south.heard_all)
        await eventually(lambda: len(south.heard_all) > heartbeats + 2)
        assert south.frames[-1].position == durable


async def test_after_a_cut_the_log_continues_without_a_snapshot(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        for _ in range(5):
            leader.cut_connections()
            leader.commit(offer=False)
            leader.commit()
            await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages
        assert (subscriber.statistics().seeds, leader.snapshots_opened) == (1, 1)


async def test_a_restarted_follower_continues_from_its_log(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving():
        async with Followers(leader).following(south):
            await eventually(lambda: caught_up(leader, south))
        for _ in range(100):
            leader.commit(100, offer=False)
        again = Replica(tmp_path / "f")
        again.base_pages = south.base_pages
        async with Followers(leader).following(again, nonce="n2") as [subscriber]:
            await eventually(lambda: caught_up(leader, again))
            assert again.replay() == leader.writer.database.pages
            assert subscriber.statistics().seeds == 0


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


async def test_history_of_older_terms_is_taken_from_a_leader_of_a_newer_one(tmp_path: Path) -> None:
    """The stream's term is what counts; frames in it may be older (protocol.py)."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving():
        async with Followers(leader).following(south):
            await eventually(lambda: caught_up(leader, south))
        leader.commit()
        leader.start_term(4)
        leader.commit()
        again = Replica(tmp_path / "f")
        again.base_pages = south.base_pages
        async with Followers(leader).following(again, nonce="n2"):
            await eventually(lambda: caught_up(leader, again))
            assert again.replay() == leader.writer.database.pages
        assert again.promises == [4]
        assert again.histories == [[(1, 0), (4, 2)]]


async def test_a_leader_whose_term_ended_says_goodbye(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        leader.term = 0
        await eventually(lambda: "goodbye" in (subscriber.statistics().last_error or ""))
        await eventually(lambda: leader.publisher.statistics().refusals.get("not_leader"))


async def test_a_promise_made_elsewhere_ends_the_stream(tmp_path: Path) -> None:
    """I3, I4: a newer promise stops frames and acks of the older term at once."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        held = leader.acks[node_id(south)][0]
        south.promised = 9
        leader.commit()
        await eventually(lambda: "Fenced" in (subscriber.statistics().last_error or ""))
        assert leader.acks[node_id(south)][0] == held
        assert south.tip is not None
        assert south.tip.position == held


async def test_a_second_process_with_the_same_id_is_refused(tmp_path: Path) -> None:
    """R3."""
    leader, south, copy = Leader(tmp_path / "l"), Replica(tmp_path / "f"), Replica(tmp_path / "c")
    followers = Followers(leader)
    async with leader.serving(), followers.following(south) as [first]:
        await eventually(lambda: caught_up(leader, south))
        async with followers.following(copy, nonce="n2") as [second]:
            await eventually(lambda: second.statistics().failures >= 2)
            assert "duplicate_node" in (second.statistics().last_error or "")
        assert (first.statistics().connections, first.link) == (1, Link.STREAMING)


async def greet(leader: Leader) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, FollowerProtocol]:
    """A follower by hand, at the leader's tip, welcomed."""
    reader, writer = await connect(leader.url, timeout_seconds=5)
    hello = Hello(PROTOCOL, CLUSTER.hex(), "dd" * 16, "hand", "n1", leader.log.tip, 0, voter=True, page_size=0)
    follower = FollowerProtocol(hello, own=leader.log.tip.position)
    writer.write(follower.send_hello())
    assert [type(event) for event in follower.receive_data(await reader.read(65536))] == [Welcome, Heartbeat]
    return reader, writer, follower


async def test_the_same_process_replaces_its_own_dead_connection(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    async with leader.serving():
        first, former, protocol = await greet(leader)
        _, writer, _ = await greet(leader)
        said = [event for event in protocol.receive_data(await first.read()) if isinstance(event, Goodbye)]
        assert [goodbye.reason for goodbye in said] == [GoodbyeReason.REPLACED]
        await eventually(lambda: leader.publisher.statistics().ended == {"closed": 1})
        assert len(leader.publisher.statistics().followers) == 1
        assert leader.forgotten == []
        former.close()
        writer.close()
        await eventually(lambda: leader.forgotten == ["dd" * 16])


async def test_more_followers_than_allowed_are_refused(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    replicas = [Replica(tmp_path / name, name) for name in ("south", "west")]
    async with leader.serving(max_followers=1), Followers(leader).following(*replicas):
        await eventually(lambda: leader.publisher.statistics().refusals.get("busy"))
        assert len(leader.publisher.statistics().followers) == 1


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


async def test_a_large_frame_is_streamed_with_heartbeats_between_its_parts(tmp_path: Path) -> None:
    """R6: nothing holds a whole frame above 16 MiB in memory."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    limits = FeedLimits(heartbeat_seconds=0.002)
    async with leader.serving(limits), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        leader.publisher._feeds.clear()  # not woken before memory is measured
        ref = leader.commit(40 << 20)
        assert ref.size_bytes > 40 << 20
        leader.cut_connections()
        leader.writer.database.pages.clear()
        tracemalloc.start()
        try:
            await eventually(lambda: caught_up(leader, south), timeout_seconds=30)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert south.streamed.count("part") == 41
    assert "heartbeat" in south.streamed[: south.streamed.index("end")]
    assert south.frames == []
    assert peak_bytes < 60 << 20  # the intake's own queue is 32 MiB


async def test_a_cut_inside_a_large_frame_abandons_it_and_sends_it_again(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        leader.commit(20 << 20)
        await eventually(lambda: "part" in south.streamed)
        leader.cut_connections()
        await eventually(lambda: caught_up(leader, south), timeout_seconds=30)
        assert south.replay() == leader.writer.database.pages
    assert "abandon" in south.streamed


async def test_a_follower_whose_queue_is_full_slows_its_stream_only(tmp_path: Path) -> None:
    """Back-pressure: what waits for a follower that does not read is bounded, and others are not held up."""
    leader = Leader(tmp_path / "l")
    south, west = Replica(tmp_path / "south", "south"), Replica(tmp_path / "west", "west")
    async with leader.serving(), Followers(leader).following(south, west):
        await eventually(lambda: caught_up(leader, south, west))
        south.receive_gate.clear()
        for _ in range(24):
            leader.commit(1 << 20)
            await eventually(lambda: caught_up(leader, west))
        slow = next(each for each in leader.publisher.statistics().followers if each.name == "south")
        assert slow.sent.txid < leader.log.tip.position.txid
        [waiting] = [feed for feed in leader.publisher._feeds.values() if feed.hello.name == "south"]
        assert waiting._writer.transport.get_write_buffer_size() < 8 << 20
        south.receive_gate.set()
        await eventually(lambda: caught_up(leader, south))
        assert south.replay() == leader.writer.database.pages


async def test_a_follower_that_reads_nothing_is_dropped(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    limits = FeedLimits(silence_seconds=0.3)
    async with leader.serving(limits), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        south.receive_gate.clear()
        while leader.publisher.statistics().ended.get("failed", 0) == 0:
            leader.commit(1 << 20)
            await asyncio.sleep(0)
        south.receive_gate.set()
        await eventually(lambda: caught_up(leader, south))


async def test_a_silent_leader_is_left(tmp_path: Path) -> None:
    """Heartbeats come ten times a second; without any the connection is closed and tried again."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    mute, brief = FeedLimits(heartbeat_seconds=3600), SubscriberLimits(silence_seconds=0.05)
    async with leader.serving(mute), Followers(leader, brief).following(south) as [subscriber]:
        await eventually(lambda: subscriber.statistics().connections >= 2)
        assert "nothing was heard" in (subscriber.statistics().last_error or "")


async def test_a_silent_follower_is_dropped(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    rare = SubscriberLimits(ack_seconds=3600)
    async with leader.serving(FeedLimits(silence_seconds=0.05)), Followers(leader, rare).following(south):
        await eventually(lambda: leader.publisher.statistics().ended.get("failed"))


async def test_a_move_of_the_acked_position_reaches_a_non_voter_at_once(tmp_path: Path) -> None:
    """R15: it waits for that before it applies, so it must not wait for the next heartbeat."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f", voter=False)
    slow = FeedLimits(heartbeat_seconds=3600)
    patient = SubscriberLimits(silence_seconds=30)
    async with leader.serving(slow), Followers(leader, patient).following(south):
        await eventually(lambda: caught_up(leader, south))
        position = leader.commit().header.position
        leader.watermarks.acked = position
        await eventually(lambda: south.heard_all[-1].acked == position)


async def test_keep_from_is_the_slowest_followers_and_reaches_all(tmp_path: Path) -> None:
    """R9."""
    leader = Leader(tmp_path / "l")
    south, west = Replica(tmp_path / "south", "south"), Replica(tmp_path / "west", "west")
    async with leader.serving(), Followers(leader).following(south, west):
        await eventually(lambda: caught_up(leader, south, west))
        south.receive_gate.clear()
        held = leader.log.tip.position.txid
        for _ in range(3):
            leader.commit()
        await eventually(lambda: caught_up(leader, west))
        assert leader.publisher.keep_from() == held
        await eventually(lambda: west.heard_all[-1].keep_from == held and west.heard_all[-1].tip.txid == held + 3)
        south.receive_gate.set()
        await eventually(lambda: leader.publisher.keep_from() == held + 3)


async def test_statistics_name_each_followers_lag(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        south.receive_gate.clear()
        refs = [leader.commit() for _ in range(3)]
        await eventually(lambda: leader.publisher.statistics().followers[0].sent == refs[-1].header.position)
        [seen] = leader.publisher.statistics().followers
        assert (seen.name, seen.voter, seen.lag_txids) == ("south", True, 3)
        assert seen.lag_bytes == sum(ref.size_bytes for ref in refs)
        south.receive_gate.set()
        await eventually(lambda: leader.publisher.statistics().followers[0].lag_bytes == 0)


async def test_closing_the_publisher_says_goodbye_and_refuses_newcomers(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        await leader.publisher.close()
        assert leader.publisher.statistics().followers == ()
        await eventually(lambda: "draining" in (subscriber.statistics().last_error or ""))


async def test_a_stopped_follower_says_goodbye(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving():
        async with Followers(leader).following(south):
            await eventually(lambda: caught_up(leader, south))
        await eventually(lambda: leader.forgotten)
        assert leader.publisher.statistics().ended == {"closed": 1}


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


async def test_a_follower_that_was_held_up_itself_does_not_blame_the_leader(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    brief = SubscriberLimits(silence_seconds=0.15)
    async with leader.serving(FeedLimits(heartbeat_seconds=0.02)), Followers(leader, brief).following(south) as [each]:
        await eventually(lambda: caught_up(leader, south))
        for _ in range(2):
            time.sleep(0.4)  # noqa: ASYNC251 - the point: the loop stands still
            south.heard_all.clear()
            await eventually(lambda: len(south.heard_all) > 2)
        assert (each.statistics().connections, each.statistics().failures) == (1, 0)


class Grudging(Replica):
    """Answers a cancellation with an error of its own."""

    async def progress(self, after: tuple[Position, Position] | None) -> tuple[Position, Position]:
        try:
            return await super().progress(after)
        except asyncio.CancelledError:
            raise Unavailable("not now") from None


async def test_a_cancelled_follower_stops_though_its_connection_fails_at_that_moment(tmp_path: Path) -> None:
    """A task group that is cancelled while a child fails raises the child's error alone (raise_if_cancelled)."""
    leader, south = Leader(tmp_path / "l"), Grudging(tmp_path / "f")
    slow = SubscriberLimits(ack_seconds=60)
    async with asyncio.timeout(5), leader.serving(), Followers(leader, slow).following(south):
        await eventually(lambda: caught_up(leader, south))


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


async def test_pauses_between_tries_grow_and_are_random(tmp_path: Path) -> None:
    """Full jitter: a cluster that lost its leader must not come back in step."""
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return 0.0

    async def locate() -> tuple[str, int] | None:
        return None

    south = Replica(tmp_path / "f")
    subscriber = Subscriber(south, locate, Identity(CLUSTER, node_id(south), "south", "n1"), uniform=uniform)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(subscriber.run())
        await eventually(lambda: len(asked) > 8)
        running.cancel()
    assert asked[:8] == [(0, pause) for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0)]


async def test_a_leader_that_does_not_answer_is_left_when_another_one_is_known(tmp_path: Path) -> None:
    """A stopped process: its kernel accepts connections, and nobody answers."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    patient = SubscriberLimits(connect_seconds=3600)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        leader.url = stopped_url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        async with Followers(leader, patient).following(south) as [subscriber]:
            await eventually(lambda: subscriber.link is Link.CONNECTING)
            async with leader.serving():
                subscriber.wake(stopped_url)
                subscriber.wake()
                await asyncio.sleep(0)
                assert subscriber.link is Link.CONNECTING  # news of the same leader, or of none, change nothing
                for _ in range(3):
                    subscriber.wake(leader.url)
                await eventually(lambda: caught_up(leader, south))


async def test_no_leader_and_an_unreachable_one_are_tried_again(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    leader.url = "http://127.0.0.1:9"  # the discard port: nobody listens
    async with Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: subscriber.statistics().failures >= 2)
        async with leader.serving():
            await eventually(lambda: caught_up(leader, south))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "did not open"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"", "cannot be reached"),
    ],
)
async def test_anything_but_an_upgrade_is_unavailable(answer: bytes, says: str) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        with pytest.raises(Unavailable, match=says):
            await connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_seconds=5)


async def test_an_ack_of_what_was_never_sent_is_not_counted(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    async with leader.serving():
        _, writer, follower = await greet(leader)
        writer.write(follower.send_ack(Ack(Position(1, 999), Position(1, 999))))
        await eventually(lambda: leader.publisher.statistics().ended == {"failed": 1})
        assert leader.all_acks == []
        writer.close()


async def test_garbage_instead_of_a_hello_is_dropped(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "l")
    async with leader.serving():
        reader, writer = await connect(leader.url, timeout_seconds=5)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        await eventually(lambda: leader.publisher.statistics().ended == {"before hello": 1})


def test_only_whole_records_are_written() -> None:
    """A heartbeat may go out between any two writes, so each must end with a record."""
    one, two = encode_record(Kind.FRAME_PART, bytes(16)), encode_record(Kind.FRAME_END, bytes(48))
    both = one + two
    for cut in range(len(both) + 1):
        expected = len(both) if cut == len(both) else len(one) if cut >= len(one) else 0
        assert whole_records(bytearray(both[:cut])) == expected
