"""Frames from publisher to subscriber, on real sockets, with real logs on both sides."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from tests.replication.replicas import Followers, Leader, Replica, caught_up, node_id
from tests.waiting import eventually
from walship.formats.record import Kind, encode_record
from walship.replication.feed import whole_records
from walship.replication.publisher import FeedLimits
from walship.replication.subscriber import Link, SubscriberLimits


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


def test_only_whole_records_are_written() -> None:
    """A heartbeat may go out between any two writes, so each must end with a record."""
    one, two = encode_record(Kind.FRAME_PART, bytes(16)), encode_record(Kind.FRAME_END, bytes(48))
    both = one + two
    for cut in range(len(both) + 1):
        expected = len(both) if cut == len(both) else len(one) if cut >= len(one) else 0
        assert whole_records(bytearray(both[:cut])) == expected
