"""How connections of publisher and subscriber begin, fall silent and end, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import pytest

from tests.replication.replicas import CLUSTER, Followers, Leader, Replica, caught_up, node_id
from tests.waiting import eventually
from walship.errors import Unavailable
from walship.formats.position import Position
from walship.replication.messages import PROTOCOL, Ack, Goodbye, GoodbyeReason, Heartbeat, Hello, Welcome
from walship.replication.protocol import FollowerProtocol
from walship.replication.publisher import FeedLimits
from walship.replication.subscriber import Identity, Link, Subscriber, SubscriberLimits
from walship.replication.upgrade import connect


async def test_a_leader_whose_term_ended_says_goodbye(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(), Followers(leader).following(south) as [subscriber]:
        await eventually(lambda: caught_up(leader, south))
        leader.term = 0
        await eventually(lambda: "goodbye" in (subscriber.statistics().last_error or ""))
        await eventually(lambda: leader.publisher.statistics().refusals.get("not_leader"))


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


async def test_news_of_another_leader_during_an_attempt_is_not_forgotten_in_the_pause_after_it(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")

    async def locate() -> tuple[str, int] | None:
        return leader.url, leader.term

    with socket.create_server(("127.0.0.1", 0)) as stopped:
        leader.url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        subscriber = Subscriber(
            south,
            locate,
            Identity(CLUSTER, node_id(south), "south", "n1"),
            limits=SubscriberLimits(connect_seconds=3600),
            uniform=lambda _low, _high: 3600,
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(subscriber.run())
            await eventually(lambda: subscriber.link is Link.CONNECTING)
            async with leader.serving():
                subscriber.wake(leader.url)
                await eventually(lambda: caught_up(leader, south))
                running.cancel()


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
