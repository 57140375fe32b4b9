"""The talk of leader and follower as two pure machines: what is accepted, and that nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replication.talk import (
    CLUSTER,
    HEARTBEAT,
    HELLO,
    SEED_ME,
    SEEDED,
    SNAPSHOT,
    TIP,
    WELCOME,
    Talk,
    frames_after,
    header_after,
    large_frame,
)
from walship.errors import CorruptRecord, Fenced, HistoryMismatch, ProtocolViolation
from walship.formats.checksum import FLAG
from walship.formats.frame import FrameFlags, encode_frame
from walship.formats.position import Position, TermHistory, Tip
from walship.formats.record import Kind, encode_record
from walship.replication.messages import Ack, AckFlags, Goodbye, GoodbyeReason, Refusal, RefusalReason
from walship.replication.protocol import (
    PHASES,
    WHOLE_FRAME_BYTES,
    FollowerProtocol,
    FrameBegan,
    FrameEnded,
    FramePartReceived,
    FrameReceived,
    LeaderProtocol,
    Phase,
    SnapshotBegan,
    SnapshotEnded,
    SnapshotPartReceived,
    Step,
    is_below,
)

OURS = (CorruptRecord, ProtocolViolation, HistoryMismatch, Fenced)
ACK = Ack(Position(3, 11), Position(3, 10), AckFlags.APPLY_LAGS)


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64, 1 << 20])
def test_a_whole_talk_is_the_same_however_the_link_cuts_it(piece_bytes: int) -> None:
    talk = Talk(piece_bytes=piece_bytes)
    assert talk.to_leader(talk.follower.send_hello()) == [HELLO]
    assert talk.to_follower(talk.leader.send_welcome(WELCOME)) == [WELCOME]
    frames = frames_after(TIP, 3)
    data = talk.leader.send_heartbeat(HEARTBEAT) + b"".join(talk.leader.send_frames(data) for _, data in frames)
    assert talk.to_follower(data) == [HEARTBEAT, *(FrameReceived(*frame) for frame in frames)]
    assert talk.to_leader(talk.follower.send_ack(ACK)) == [ACK]
    goodbye = Goodbye(GoodbyeReason.STOPPING, "it was nice")
    assert talk.to_follower(talk.leader.send_goodbye(goodbye)) == [goodbye]
    assert talk.leader.phase is talk.follower.phase is Phase.CLOSED


def test_a_cut_link_leaves_whole_frames_only() -> None:
    """R6: a frame exists once its end is there."""
    frames = frames_after(TIP, 3)
    data = b"".join(data for _, data in frames)
    ends = [sum(len(data) for _, data in frames[: n + 1]) for n in range(3)]
    for cut in range(len(data)):
        talk = Talk()
        talk.greet()
        assert len(talk.to_follower(data[:cut])) == sum(end <= cut for end in ends)


def test_a_frame_that_comes_twice_is_a_mismatch() -> None:
    talk = Talk()
    talk.greet()
    [(header, data)] = frames_after(TIP, 1)
    events = talk.follower.receive_data(data + data)
    assert next(events) == FrameReceived(header, data)
    with pytest.raises(HistoryMismatch, match=r"3\.10 -> 3\.11"):
        next(events)
    assert talk.follower.phase is Phase.CLOSED


def test_a_frame_after_a_gap_is_a_mismatch() -> None:
    talk = Talk()
    talk.greet()
    with pytest.raises(HistoryMismatch):
        talk.to_follower(frames_after(TIP, 2)[1][1])


def test_a_frame_after_another_checksum_is_a_mismatch() -> None:
    """R11: position and checksum, both."""
    talk = Talk()
    talk.greet()
    with pytest.raises(HistoryMismatch, match="asked for"):
        talk.to_follower(frames_after(replace(TIP, checksum=FLAG | 99), 1)[0][1])


def test_a_frame_of_another_cluster_is_a_violation() -> None:
    talk = Talk()
    talk.greet()
    stranger = header_after(TIP, cluster=bytes(16))
    with pytest.raises(ProtocolViolation, match="is of cluster"):
        talk.to_follower(encode_frame(stranger, b"x"))


def test_frames_of_older_terms_are_history_and_newer_ones_a_violation() -> None:
    """A follower two terms behind is fed what earlier leaders wrote, by one whose term it has promised."""
    old = Tip(Position(1, 5), FLAG | 5, 2)
    talk = Talk(replace(HELLO, tip=old))
    talk.greet(replace(WELCOME, position=old.position))
    first = header_after(old)
    start = replace(header_after(first.tip, term=3), flags=FrameFlags.TERM_START, max_txid=6, checksum=first.checksum)
    second = header_after(start.tip)
    data = encode_frame(first, b"x") + encode_frame(start) + encode_frame(second, b"y")
    assert [event.header for event in talk.to_follower(data) if isinstance(event, FrameReceived)] == [
        first,
        start,
        second,
    ]
    with pytest.raises(ProtocolViolation, match="stream of term 3"):
        talk.to_follower(encode_frame(header_after(second.tip, term=4), b"z"))


def test_a_welcome_below_the_promise_is_fenced() -> None:
    """I3."""
    talk = Talk(replace(HELLO, promised=4))
    with pytest.raises(Fenced, match="promised term 4"):
        talk.greet()


def test_a_welcome_from_another_position_is_a_violation() -> None:
    talk = Talk()
    with pytest.raises(ProtocolViolation):
        talk.greet(replace(WELCOME, position=Position(3, 9)))


def test_a_log_stream_for_one_who_asked_for_a_snapshot_is_a_violation() -> None:
    talk = Talk(SEED_ME)
    with pytest.raises(ProtocolViolation):
        talk.greet()


def test_a_refusal_ends_the_talk() -> None:
    talk = Talk()
    talk.to_leader(talk.follower.send_hello())
    refusal = Refusal(RefusalReason.NOT_LEADER, "ask north", "http://north:1")
    assert talk.to_follower(talk.leader.send_refusal(refusal)) == [refusal]
    with pytest.raises(ProtocolViolation):
        talk.leader.send_heartbeat(HEARTBEAT)


def test_a_large_frame_is_streamed_part_by_part_with_heartbeats_between() -> None:
    """R6: nothing holds a whole frame above the bound."""
    talk = Talk(piece_bytes=700_000)
    talk.greet()
    header, records = large_frame(TIP, WHOLE_FRAME_BYTES + (3 << 20))
    beat = talk.leader.send_heartbeat(HEARTBEAT)
    events = [event for record in records for event in talk.to_follower(record + beat)]
    assert all(
        beat == HEARTBEAT for beat in events if not isinstance(beat, FrameBegan | FramePartReceived | FrameEnded)
    )
    frame = [event for event in events if event != HEARTBEAT]
    assert frame[0] == FrameBegan(header)
    assert frame[-1] == FrameEnded(header, records[-1])
    assert [event.record for event in frame[1:-1] if isinstance(event, FramePartReceived)] == records[1:-1]
    assert events.index(frame[0]) < len(events) - 6
    assert talk.follower.tip == header.tip


def test_a_frame_just_within_the_bound_comes_in_one_piece() -> None:
    talk = Talk()
    talk.greet()
    header, records = large_frame(TIP, WHOLE_FRAME_BYTES - 1000)
    assert talk.to_follower(b"".join(records)) == [FrameReceived(header, b"".join(records))]


def seeding(*, voter: bool = True, own: Position | None = None) -> Talk:
    talk = Talk(replace(SEED_ME, voter=voter), own=own, piece_bytes=10_000)
    talk.greet(SEEDED)
    return talk


def test_a_snapshot_comes_in_parts_and_frames_continue_from_it() -> None:
    talk = seeding()
    ltx = bytes(range(256)) * 6000
    data = talk.leader.send_snapshot_header(SNAPSHOT) + talk.leader.send_snapshot_data(ltx)
    data += talk.leader.send_heartbeat(HEARTBEAT) + talk.leader.send_snapshot_end()
    events = talk.to_follower(data)
    assert events[0] == SnapshotBegan(SNAPSHOT)
    assert events[-1] == SnapshotEnded(SNAPSHOT)
    assert b"".join(event.data for event in events if isinstance(event, SnapshotPartReceived)) == ltx
    assert HEARTBEAT in events
    talk.to_leader(talk.follower.send_installed(Ack(SNAPSHOT.position, SNAPSHOT.position)))
    [(header, frame)] = frames_after(SNAPSHOT.tip, 1)
    assert talk.to_follower(talk.leader.send_frames(frame)) == [FrameReceived(header, frame)]


def test_a_leader_sends_no_frame_before_the_snapshot_is_installed() -> None:
    talk = seeding()
    data = talk.leader.send_snapshot_header(SNAPSHOT) + talk.leader.send_snapshot_data(b"x")
    talk.to_follower(data + talk.leader.send_snapshot_end())
    with pytest.raises(ProtocolViolation, match="frame has no place while installing"):
        talk.leader.send_frames(b"")


def test_an_ack_while_seeding_is_only_a_sign_of_life() -> None:
    """It could name a position of the history that the snapshot replaces."""
    talk = seeding()
    assert talk.to_leader(talk.follower.send_ack(Ack.seeding())) == [Ack.seeding()]
    with pytest.raises(ProtocolViolation):
        talk.follower.send_ack(ACK)
    with pytest.raises(ProtocolViolation):
        talk.to_leader(encode_record(Kind.ACK, ACK.to_body()))


def test_an_ordinary_ack_does_not_pass_for_installed() -> None:
    talk = seeding()
    talk.to_follower(
        talk.leader.send_snapshot_header(SNAPSHOT)
        + talk.leader.send_snapshot_data(b"x")
        + talk.leader.send_snapshot_end()
    )
    with pytest.raises(ProtocolViolation, match="must wait"):
        talk.follower.send_ack(ACK)


def test_a_voter_takes_no_snapshot_below_its_own_position() -> None:
    """R9."""
    header = talk_header = replace(SNAPSHOT, position=Position(3, 20))
    for own in (Position(3, 21), Position(4, 1)):
        talk = seeding(own=own)
        with pytest.raises(HistoryMismatch, match="nothing below it"):
            talk.to_follower(talk.leader.send_snapshot_header(header))
    for talk in (seeding(own=Position(3, 20)), seeding(voter=False, own=Position(3, 21)), seeding()):
        assert talk.to_follower(talk.leader.send_snapshot_header(talk_header)) == [SnapshotBegan(talk_header)]


@pytest.mark.parametrize(
    ("snapshot", "own", "below"),
    [
        (Position(3, 20), Position(3, 20), False),
        (Position(3, 19), Position(3, 20), True),
        (Position(2, 30), Position(3, 20), True),
        (Position(4, 30), Position(1, 12), False),  # term 2 began at 10: what 1.12 holds is an orphan (R12)
        (Position(1, 30), Position(1, 12), True),  # but no leader of term 1 can say so
        (Position(4, 30), Position(1, 10), False),
        (Position(4, 30), Position(3, 20), False),  # nothing is known of the terms after 3: no proof, so no
    ],
)
def test_a_voter_gives_up_only_what_a_later_term_proves_never_acknowledged(
    snapshot: Position, own: Position, below: bool
) -> None:
    assert is_below(snapshot, own, TermHistory([(1, 0), (2, 10)])) is below


def test_a_snapshot_of_a_newer_term_than_the_stream_is_a_violation() -> None:
    talk = seeding()
    with pytest.raises(ProtocolViolation):
        talk.to_follower(talk.leader.send_snapshot_header(replace(SNAPSHOT, position=Position(4, 20))))


def test_a_snapshot_of_another_cluster_is_a_violation() -> None:
    talk = seeding()
    with pytest.raises(ProtocolViolation):
        talk.to_follower(talk.leader.send_snapshot_header(replace(SNAPSHOT, cluster=bytes(16))))


@pytest.mark.parametrize("kind", list(Kind))
def test_what_a_side_never_says_is_a_violation(kind: Kind) -> None:
    said_by_follower = {Kind.HELLO, Kind.ACK, Kind.GOODBYE}
    said_by_leader = set(Kind) - {Kind.HELLO, Kind.ACK, Kind.SEGMENT}
    record = encode_record(kind, b"")
    if kind not in said_by_follower:
        with pytest.raises(ProtocolViolation):
            list(LeaderProtocol().receive_data(record))
    if kind not in said_by_leader:
        talk = Talk()
        talk.greet()
        with pytest.raises(ProtocolViolation):
            talk.to_follower(record)


def test_every_phase_can_be_reached_and_left() -> None:
    reached = {Phase.GREETING} | {to for steps in PHASES.values() for to in steps.values()}
    assert reached == set(Phase) == set(PHASES)
    assert all(steps.get(Step.GOODBYE) is Phase.CLOSED for phase, steps in PHASES.items() if phase is not Phase.CLOSED)
    assert {step for steps in PHASES.values() for step in steps} == set(Step)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), mask=st.integers(1, 255), piece_bytes=st.integers(1, 400))
def test_a_flipped_byte_is_an_error_of_ours_after_the_good_frames(at: int, mask: int, piece_bytes: int) -> None:
    frames = frames_after(TIP, 4)
    data = bytearray(b"".join(data for _, data in frames))
    at %= len(data)
    data[at] ^= mask
    whole = sum(sum(len(data) for _, data in frames[: n + 1]) <= at for n in range(4))
    talk = Talk()
    talk.greet()
    got = []
    try:
        for start in range(0, len(data), piece_bytes):
            got += list(talk.follower.receive_data(bytes(data[start : start + piece_bytes])))
    except OURS:
        assert talk.follower.phase is Phase.CLOSED
    assert got == [FrameReceived(*frame) for frame in frames[: len(got)]]
    assert len(got) <= whole


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(list(Kind)),
    body=st.one_of(st.binary(max_size=200), st.text(max_size=50).map(lambda text: f'{{"reason": "{text}"}}'.encode())),
    greeted=st.booleans(),
)
def test_no_record_raises_anything_but_our_errors(kind: Kind, body: bytes, greeted: bool) -> None:
    record = encode_record(kind, body)
    talk = Talk()
    if greeted:
        talk.greet()
    for side in (talk.leader, talk.follower):
        try:
            list(side.receive_data(record))
        except OURS:
            assert side.phase is Phase.CLOSED


def test_a_follower_keeps_the_cluster_it_was_made_for() -> None:
    assert FollowerProtocol(HELLO, own=None).tip == TIP
    assert HELLO.cluster == CLUSTER.hex()
