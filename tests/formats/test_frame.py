"""Frames and snapshots: a header that contradicts itself cannot be, a damaged frame does not exist."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walship.errors import CorruptRecord
from walship.formats.checksum import FLAG
from walship.formats.frame import (
    MAX_FRAME_TOKENS,
    MAX_SNAPSHOT_TOKENS,
    PART_BYTES,
    CommitToken,
    FrameAssembler,
    FrameComplete,
    FrameEncoder,
    FrameEnd,
    FrameFlags,
    FrameHeader,
    FramePart,
    FrameStarted,
    SnapshotAssembler,
    SnapshotComplete,
    SnapshotEncoder,
    SnapshotHeader,
    SnapshotStarted,
    encode_frame,
)
from walship.formats.position import Position, Tip
from walship.formats.record import MAX_BODY, RECORD_HEADER_SIZE, RECORD_OVERHEAD, Kind, Record, RecordReader

CLUSTER = bytes(range(16))
U64 = st.integers(0, (1 << 64) - 1)
CHECKSUMS = U64.map(lambda value: value | FLAG)

FRAME = FrameHeader(
    flags=FrameFlags(0),
    cluster=CLUSTER,
    database=1,
    term=3,
    min_txid=10,
    max_txid=12,
    previous=Position(3, 9),
    previous_checksum=FLAG | 1,
    checksum=FLAG | 2,
    commit=7,
    page_size=4096,
    time_ms=1_700_000_000_000,
    acked=Position(3, 8),
    tokens=(CommitToken(0xABC, 5, 11, 2, -3, True), CommitToken(0xABC, 6, 12, 0, None, False)),
)
TERM_START = replace(
    FRAME,
    flags=FrameFlags.TERM_START,
    term=4,
    max_txid=9,
    checksum=FRAME.previous_checksum,
    tokens=(),
)
SNAPSHOT = SnapshotHeader(
    cluster=CLUSTER,
    database=1,
    position=Position(3, 12),
    checksum=FLAG | 2,
    commit=7,
    page_size=4096,
    time_ms=1_700_000_000_000,
    complete_since=Position(1, 4),
    tokens=FRAME.tokens,
)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    """Any header that the rules allow, term starts among them."""
    term = draw(st.integers(1, (1 << 64) - 1))
    starts = draw(st.booleans())
    previous = Position(draw(st.integers(0, term - starts)), draw(st.integers(0, (1 << 64) - 2)))
    last = previous.txid if starts else draw(st.integers(previous.txid + 1, (1 << 64) - 1))
    before = draw(CHECKSUMS)
    token = st.builds(
        CommitToken,
        U64,
        U64,
        st.integers(0, last),
        U64,
        st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
        st.booleans(),
        st.booleans(),
    )
    return FrameHeader(
        flags=FrameFlags.TERM_START if starts else draw(st.sampled_from([FrameFlags(0), FrameFlags.REBUILT])),
        cluster=draw(st.binary(min_size=16, max_size=16)),
        database=1,
        term=term,
        min_txid=previous.txid + 1,
        max_txid=last,
        previous=previous,
        previous_checksum=before,
        checksum=before if starts else draw(CHECKSUMS),
        commit=draw(st.integers(1, (1 << 32) - 1)),
        page_size=1 << draw(st.integers(9, 16)),
        time_ms=draw(st.integers(0, (1 << 63) - 1)),
        acked=Position(draw(st.integers(0, term)), draw(st.integers(0, last))),
        tokens=() if starts else tuple(draw(st.lists(token, max_size=4))),
    )


def records_of(data: bytes) -> list[Record]:
    """All records; a torn or damaged rest is left out."""
    reader = RecordReader()
    reader.receive_data(data)
    found = []
    try:
        while (record := reader.next_record()) is not None:
            found.append(record)
    except CorruptRecord:
        pass
    return found


def assemble(records: list[Record]) -> tuple[FrameHeader, bytes, FrameComplete]:
    assembler = FrameAssembler()
    started, *parts, complete = [assembler.feed(record) for record in records]
    assert isinstance(started, FrameStarted)
    assert isinstance(complete, FrameComplete)
    payload = b"".join(part.data for part in parts if isinstance(part, FramePart))
    return started.header, payload, complete


@given(headers())
def test_a_header_is_read_back_from_its_bytes(header: FrameHeader) -> None:
    assert FrameHeader.parse(header.to_body()) == header


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_corrupt_record(data: bytes, lead_in: bool) -> None:
    for kind, magic in ((FrameHeader, b"WSF1"), (SnapshotHeader, b"WSS2")):
        with pytest.raises(CorruptRecord):
            kind.parse(magic * lead_in + data[:60])
        with suppress(CorruptRecord):
            kind.parse(magic * lead_in + data)
    for parse in (FrameEnd.parse, CommitToken.parse):
        with suppress(CorruptRecord):
            parse(data[:41])


@given(st.integers(0, len(FRAME.to_body()) * 8 - 1))
def test_a_flipped_bit_of_a_header_is_another_valid_header_or_corrupt(bit: int) -> None:
    """The record's checksum finds the flip; the header's own checks must cope with any bytes all the same."""
    body = bytearray(FRAME.to_body())
    body[bit // 8] ^= 1 << bit % 8
    try:
        header = FrameHeader.parse(bytes(body))
    except CorruptRecord:
        return
    assert header.to_body() == bytes(body)


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": b"short"},
        {"database": 2},
        {"min_txid": 11},
        {"min_txid": 9},
        {"max_txid": 9},
        {"term": 2, "acked": Position(2, 8)},
        {"previous_checksum": 1},
        {"checksum": 2},
        {"commit": 0},
        {"page_size": 4095},
        {"page_size": 256},
        {"page_size": 131072},
        {"time_ms": -1},
        {"acked": Position(4, 1)},
        {"acked": Position(3, 13)},
        {"flags": FrameFlags.TERM_START},
        {"tokens": (CommitToken(1, 1, 13, 0, 0, False),)},
        {"tokens": (CommitToken(1, 1, 10, 0, 0, False),) * (MAX_FRAME_TOKENS + 1)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_header_that_contradicts_itself_cannot_be_built(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptRecord):
        replace(FRAME, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"term": 3},
        {"max_txid": 10},
        {"checksum": FLAG | 2},
        {"tokens": (CommitToken(1, 1, 9, 0, 0, False),)},
        {"flags": FrameFlags.TERM_START | FrameFlags.REBUILT},
        {"page_size": 0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_term_start_holds_no_commits(changes: dict[str, object]) -> None:
    """R11: (t, P) -> (t+1, P), same checksum, no payload, no TXID."""
    with pytest.raises(CorruptRecord):
        replace(TERM_START, **changes)  # type: ignore[arg-type]


def test_unknown_flags_are_refused_not_ignored() -> None:
    body = bytearray(FRAME.to_body())
    body[7] = 4
    with pytest.raises(CorruptRecord, match="newer"):
        FrameHeader.parse(bytes(body))


def test_a_header_knows_the_state_it_leads_to() -> None:
    assert FRAME.position == Position(3, 12)
    assert FRAME.tip == Tip(Position(3, 12), FLAG | 2, 7)
    assert TERM_START.tip == Tip(Position(4, 9), FRAME.previous_checksum, 7)
    assert (FRAME.is_term_start, TERM_START.is_term_start) == (False, True)


def test_values_are_readable() -> None:
    assert str(FRAME) == "frame 3.9 -> 3.12 (7 pages of 4096)"
    assert str(TERM_START) == "start of term 4 after 3.9"
    assert str(SNAPSHOT).startswith("snapshot of 3.12")


def test_the_bytes_of_a_frame_do_not_change_by_accident() -> None:
    """A golden frame: logs and peers of other builds must read it. Changing it means a new format version."""
    digest = hashlib.sha256(encode_frame(FRAME, b"payload")).hexdigest()
    assert digest == "f12d87d8951c2bf3de3b7f2ad0f8df696e7180c91cdf45552444097bb4d76f0d"
    encoder = SnapshotEncoder(SNAPSHOT)
    digest = hashlib.sha256(encoder.header_record() + encoder.part(b"payload") + encoder.end()).hexdigest()
    assert digest == "34d1e7eb65a4214400496a9f5517a36318e64f4688e3646a6556c900f255d3eb"


@pytest.mark.parametrize("size", [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5])
def test_a_frame_comes_back_whatever_its_size(size: int) -> None:
    payload = bytes(range(251)) * (size // 251 + 1)
    payload = payload[:size]
    header, found, complete = assemble(records_of(encode_frame(FRAME, payload)))
    assert header == complete.header == FRAME
    assert found == payload
    assert (complete.end.parts, complete.end.payload_bytes) == (-(-size // PART_BYTES), size)


@given(st.lists(st.integers(0, PART_BYTES + 3), min_size=1, max_size=4).filter(any))
@settings(max_examples=20, deadline=None)
def test_the_bytes_of_a_frame_do_not_depend_on_how_it_was_fed(sizes: list[int]) -> None:
    payload = bytes(sum(sizes))
    encoder = FrameEncoder(FRAME)
    pieces = [encoder.header_record(), *(encoder.part(bytes(size)) for size in sizes), encoder.end()]
    assert b"".join(pieces) == encode_frame(FRAME, payload)


def test_a_payload_byte_is_found_by_arithmetic() -> None:
    """docs/format.md section 6: what the log relies on to read single pages."""
    payload = bytes(i * 7 % 256 for i in range(PART_BYTES)) + b"second part"
    data = encode_frame(FRAME, payload)
    first = RECORD_OVERHEAD + len(FRAME.to_body())
    for at in (0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 10):
        place = first + at // PART_BYTES * (PART_BYTES + RECORD_OVERHEAD) + RECORD_HEADER_SIZE + at % PART_BYTES
        assert data[place] == payload[at]


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_frame_never_completes(data: st.DataObject) -> None:
    """R6: any byte changed or cut, and the frame does not exist."""
    frame = bytearray(encode_frame(FRAME, b"some payload"))
    if data.draw(st.booleans()):
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
    assembler = FrameAssembler()
    for record in records_of(bytes(frame)):
        assert not isinstance(assembler.feed(record), FrameComplete)


@pytest.mark.parametrize("order", ["hqpe", "hpe", "hppqe", "hpqpe", "hpqq", "hpqh", "he", "pe", "hqe", "e"])
def test_parts_lost_moved_or_repeated_are_seen(order: str) -> None:
    """The end record's checksum covers every record before it, in order."""
    header, first, second, end = records_of(encode_frame(FRAME, bytes(PART_BYTES) + b"rest"))
    by_letter = {"h": header, "p": first, "q": second, "e": end}
    with pytest.raises(CorruptRecord):
        assemble([by_letter[letter] for letter in order])


def test_the_parts_of_two_frames_are_not_mixed() -> None:
    """Same sizes, same number, every record whole: only the checksum of the end can tell."""
    one = records_of(encode_frame(FRAME, b"payload one"))
    two = records_of(encode_frame(FRAME, b"payload two"))
    assembler = FrameAssembler()
    assembler.feed(one[0])
    assembler.feed(two[1])
    with pytest.raises(CorruptRecord):
        assembler.feed(one[2])


@pytest.mark.parametrize("size", [0, PART_BYTES + 1])
def test_a_part_of_another_size_is_refused(size: int) -> None:
    assembler = FrameAssembler()
    assembler.feed(Record(Kind.FRAME_HEADER, FRAME.to_body()))
    with pytest.raises(CorruptRecord):
        assembler.feed(Record(Kind.FRAME_PART, bytes(size)))


def test_records_of_other_kinds_are_refused() -> None:
    """What interleaves on the wire (R6) is taken out before; here it is an error."""
    assembler = FrameAssembler()
    with pytest.raises(CorruptRecord):
        assembler.feed(Record(Kind.SNAPSHOT_HEADER, SNAPSHOT.to_body()))
    assembler = FrameAssembler()
    assembler.feed(Record(Kind.FRAME_HEADER, FRAME.to_body()))
    with pytest.raises(CorruptRecord):
        assembler.feed(Record(Kind.HEARTBEAT, b""))


def test_frames_follow_each_other_through_one_assembler() -> None:
    assembler = FrameAssembler()
    after = replace(FRAME, min_txid=13, max_txid=13, previous=FRAME.position, tokens=())
    data = encode_frame(FRAME, b"a") + encode_frame(TERM_START) + encode_frame(after, b"b")
    events = [assembler.feed(record) for record in records_of(data)]
    assert [event.header for event in events if isinstance(event, FrameComplete)] == [FRAME, TERM_START, after]
    assert assembler.header is None


def test_a_term_start_has_no_payload_and_others_have_one() -> None:
    """R11."""
    with pytest.raises(ValueError, match="payload"):
        encode_frame(TERM_START, b"x")
    with pytest.raises(ValueError, match="payload"):
        encode_frame(FRAME)
    assembler = FrameAssembler()
    assembler.feed(records_of(encode_frame(TERM_START))[0])
    with pytest.raises(CorruptRecord, match="never"):
        assembler.feed(Record(Kind.FRAME_PART, b"x"))
    encoder = FrameEncoder(FRAME)
    assembler = FrameAssembler()
    header, end = records_of(encoder.header_record() + encoder.end())
    assembler.feed(header)
    with pytest.raises(CorruptRecord, match="without a payload"):
        assembler.feed(end)


def test_a_snapshot_comes_back() -> None:
    encoder = SnapshotEncoder(SNAPSHOT)
    data = encoder.header_record() + encoder.part(bytes(PART_BYTES)) + encoder.part(b"rest") + encoder.end()
    assembler = SnapshotAssembler()
    started, first, second, complete = [assembler.feed(record) for record in records_of(data)]
    assert started == SnapshotStarted(SNAPSHOT)
    assert (first, second) == (FramePart(bytes(PART_BYTES)), FramePart(b"rest"))
    assert isinstance(complete, SnapshotComplete)
    assert complete.end.payload_bytes == PART_BYTES + 4


def test_a_snapshot_has_a_payload() -> None:
    encoder = SnapshotEncoder(SNAPSHOT)
    assembler = SnapshotAssembler()
    header, end = records_of(encoder.header_record() + encoder.end())
    assembler.feed(header)
    with pytest.raises(CorruptRecord, match="without a payload"):
        assembler.feed(end)


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": b""},
        {"database": 0},
        {"checksum": 1},
        {"commit": 0},
        {"page_size": 0},
        {"time_ms": -1},
        {"position": Position(3, 11)},
        {"tokens": FRAME.tokens * (MAX_SNAPSHOT_TOKENS // 2 + 1)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_snapshot_header_that_contradicts_itself_cannot_be_built(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptRecord):
        replace(SNAPSHOT, **changes)  # type: ignore[arg-type]


def test_headers_with_all_the_tokens_they_may_have_fit_in_a_record() -> None:
    """R19: the tokens of the last 120 s travel in snapshots; the bound keeps the header one record."""
    frame = replace(FRAME, tokens=FRAME.tokens * (MAX_FRAME_TOKENS // 2))
    snapshot = replace(SNAPSHOT, tokens=FRAME.tokens * (MAX_SNAPSHOT_TOKENS // 2))
    assert FrameHeader.parse(frame.to_body()) == frame
    assert SnapshotHeader.parse(snapshot.to_body()) == snapshot
    assert len(snapshot.to_body()) <= MAX_BODY
