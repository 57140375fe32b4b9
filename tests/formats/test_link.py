"""The proxy-node link codec: what is written is read back, and nothing else ever comes out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walship import errors
from walship.errors import ProtocolViolation, WalshipError
from walship.formats.link import (
    MAX_MESSAGE,
    Chunk,
    CursorEnd,
    CursorHead,
    Grant,
    Leader,
    LinkReader,
    Message,
    Outcome,
    OutcomeBody,
    ReadLevel,
    Reason,
    Refusal,
    Reply,
    ReplyFlags,
    Request,
    RequestFlags,
    Role,
    Status,
    StatusFlags,
    Verb,
    error_of,
    refusal_of,
)
from walship.formats.position import Position

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
positions = st.builds(Position, u64, u64)
bodies = st.binary(max_size=200)
text = st.text(st.characters(codec="utf-8"), max_size=60)

requests = st.builds(
    Request,
    u64,
    st.sampled_from(Verb),
    bodies,
    st.integers(0, 255),
    st.sampled_from([RequestFlags.NONE, RequestFlags.READ_ONLY, RequestFlags.KEEP]),
    st.sampled_from(ReadLevel),
    u64,
    positions,
    u64,
    u32,
    st.integers(-1, 127),
    u64,
    u64,
    u64,
)
reply_flags = st.sampled_from([ReplyFlags.NONE, ReplyFlags.AUTOCOMMIT])
statuses = st.integers(0, 65535)
replies = st.builds(Reply, u64, bodies, positions, u64, reply_flags, statuses)
ends = st.builds(CursorEnd, u64, positions, u64, reply_flags, statuses)
refusals = st.builds(
    Refusal,
    u64,
    st.sampled_from(Reason),
    text,
    text,
    positions,
    st.none() | st.builds(Leader, text, st.none() | text, st.integers(0, 2**63 - 1)),
)
node_statuses = st.builds(
    Status,
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.sampled_from(Role),
    u64,
    positions,
    positions,
    positions,
    u32,
    st.none() | st.integers(0, 2**32 - 2),
    st.integers(0, 15).map(StatusFlags),
    st.lists(st.tuples(u64, u64), max_size=16).map(tuple),
)
messages = st.one_of(
    requests,
    replies,
    st.builds(Chunk, u64, bodies),
    st.builds(CursorHead, u64, positions),
    ends,
    refusals,
    node_statuses,
    st.builds(Grant, u64, u32),
)


@given(st.lists(messages, max_size=6), st.data())
def test_messages_survive_any_cut_of_the_stream(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(message.to_bytes() for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = LinkReader()
    received: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += reader.receive_data(stream[start:end])
    assert received == sent
    assert reader.pending_bytes == 0


@given(messages, st.data())
def test_a_flipped_byte_gives_our_error_or_a_message(message: Message, data: st.DataObject) -> None:
    """The link has TCP's checksum, not its own; but nothing may come out other than messages or ProtocolViolation."""
    stream = bytearray(message.to_bytes())
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        LinkReader().receive_data(bytes(stream))
    except ProtocolViolation:
        return


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_arbitrary_bytes_give_our_error_or_messages(noise: bytes) -> None:
    try:
        LinkReader().receive_data(noise)
    except ProtocolViolation:
        return


def test_an_impossible_length_is_refused_before_the_body_comes() -> None:
    with pytest.raises(ProtocolViolation, match="allowed are"):
        LinkReader().receive_data((MAX_MESSAGE + 1).to_bytes(4, "big") + b"\0" * 9)


def test_after_a_violation_nothing_more_is_read() -> None:
    reader = LinkReader()
    with pytest.raises(ProtocolViolation):
        reader.receive_data(b"\xff" * 13)
    with pytest.raises(ProtocolViolation, match="broken before"):
        reader.receive_data(Grant(1, 1).to_bytes())


def test_offsets_are_those_of_the_documentation() -> None:
    floor = Position(9, 10)
    request = Request(
        7, Verb.CURSOR, b"BODY", 3, RequestFlags.KEEP, ReadLevel.LINEARIZABLE, 8, floor, 11, 12, 1, 13, 14, 15
    )
    assert request.to_bytes() == bytes.fromhex(
        "0000004f 0000000000000007 01"
        "02 03 0002 02 0000000000000008 0000000000000009 000000000000000a 000000000000000b 0000000c 01"
        "000000000000000d 000000000000000e 000000000000000f"
        "424f4459"
    )


ERRORS: list[WalshipError] = [
    errors.NotReadOnly("a"),
    errors.Behind("b"),
    errors.NotLeader("n1", "http://n1", 4),
    errors.NotLeader(None, None, 0),
    errors.Overloaded("c"),
    errors.Draining("d"),
    errors.Fenced("e"),
    errors.Unavailable("f"),
    errors.ProtocolViolation("g"),
    errors.OutcomeUnknown("h"),
    errors.TransactionTimeout("i"),
    errors.StatementFailed("j", "STREAM_EXPIRED"),
    errors.WriteLost("k"),
    errors.StorageFailed("l"),
    errors.NotDone("m"),
    errors.CommittedResultLost("n"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_the_link_as_themselves(error: WalshipError) -> None:
    [refusal] = LinkReader().receive_data(refusal_of(3, error).to_bytes())
    assert isinstance(refusal, Refusal)
    again = error_of(refusal)
    assert (type(again), str(again), again.code) == (type(error), str(error), error.code)


def test_every_reason_stands_for_an_error() -> None:
    for reason in Reason:
        assert isinstance(error_of(Refusal(1, reason, "CODE", "words")), WalshipError)


def test_an_outcome_is_read_back() -> None:
    for sent in (OutcomeBody(Outcome.NOT_DONE), OutcomeBody(Outcome.DONE, 7, 2, -5, True)):
        assert OutcomeBody.parse(sent.to_bytes()) == sent
    for wrong in (b"", b"{}", b'{"outcome":"perhaps"}', b"\xff"):
        with pytest.raises(ProtocolViolation):
            OutcomeBody.parse(wrong)
