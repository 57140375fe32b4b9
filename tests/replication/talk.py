"""Two pure protocols joined by a fake link, and frames to send over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from walship.formats.checksum import FLAG
from walship.formats.frame import FrameEncoder, FrameFlags, FrameHeader, SnapshotHeader, encode_frame
from walship.formats.position import Position, Tip
from walship.replication.messages import PROTOCOL, Heartbeat, Hello, StreamSource, Welcome
from walship.replication.protocol import FollowerEvent, FollowerProtocol, LeaderEvent, LeaderProtocol

CLUSTER = bytes(range(16))
TIP = Tip(Position(3, 10), FLAG | 10, 2)

HELLO = Hello(
    protocol=PROTOCOL,
    cluster=CLUSTER.hex(),
    node_id="bb" * 16,
    name="south",
    boot_nonce="n1",
    tip=TIP,
    promised=3,
    voter=True,
    page_size=4096,
)
SEED_ME = replace(HELLO, tip=None)
WELCOME = Welcome(
    node_id="aa" * 16,
    name="north",
    term=3,
    source=StreamSource.LOG,
    position=TIP.position,
    keep_from=8,
    history=((1, 0), (3, 7)),
    acked=Position(3, 9),
)
SEEDED = replace(WELCOME, source=StreamSource.SNAPSHOT, why="the follower has no log")
HEARTBEAT = Heartbeat(Position(3, 12), Position(3, 11), 1_700_000_000_000, 8, 5_000)
SNAPSHOT = SnapshotHeader(CLUSTER, 1, Position(3, 20), FLAG | 20, 5, 4096, 1000, Position(0, 0))


def header_after(tip: Tip, *, term: int | None = None, cluster: bytes = CLUSTER) -> FrameHeader:
    txid = tip.position.txid + 1
    return FrameHeader(
        flags=FrameFlags(0),
        cluster=cluster,
        database=1,
        term=tip.position.term if term is None else term,
        min_txid=txid,
        max_txid=txid,
        previous=tip.position,
        previous_checksum=tip.checksum,
        checksum=FLAG | (txid * 100),
        commit=3,
        page_size=4096,
        time_ms=1000,
        acked=Position(0, 0),
    )


def frames_after(tip: Tip, count: int, size_bytes: int = 50) -> list[tuple[FrameHeader, bytes]]:
    """`count` frames in a row: (header, all records)."""
    frames = []
    for _ in range(count):
        header = header_after(tip)
        frames.append((header, encode_frame(header, bytes([header.max_txid % 256]) * size_bytes)))
        tip = header.tip
    return frames


def large_frame(tip: Tip, size_bytes: int) -> tuple[FrameHeader, list[bytes]]:
    """A frame as (header, its records one by one)."""
    header = header_after(tip)
    encoder = FrameEncoder(header)
    records = [encoder.header_record()]
    for at in range(0, size_bytes, 1 << 20):
        records.append(encoder.part(bytes(min(1 << 20, size_bytes - at))))
    records.append(encoder.end())
    return header, [record for record in records if record]


def pieces(data: bytes, size_bytes: int) -> Iterable[bytes]:
    return (data[at : at + size_bytes] for at in range(0, len(data), size_bytes))


class Talk:
    """A leader and a follower; what one says reaches the other in pieces of `piece_bytes`."""

    def __init__(self, hello: Hello = HELLO, *, own: Position | None = None, piece_bytes: int = 1 << 30) -> None:
        self.leader = LeaderProtocol()
        self.follower = FollowerProtocol(hello, own=own)
        self.piece_bytes = piece_bytes

    def to_leader(self, data: bytes) -> list[LeaderEvent]:
        return [event for piece in pieces(data, self.piece_bytes) for event in self.leader.receive_data(piece)]

    def to_follower(self, data: bytes) -> list[FollowerEvent]:
        return [event for piece in pieces(data, self.piece_bytes) for event in self.follower.receive_data(piece)]

    def greet(self, welcome: Welcome = WELCOME) -> Welcome:
        """Hello and welcome; returns the welcome as the follower got it."""
        [_] = self.to_leader(self.follower.send_hello())
        [got] = self.to_follower(self.leader.send_welcome(welcome))
        assert isinstance(got, Welcome)
        return got
