"""Records: what is read back is what was written, or nothing."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.errors import CorruptRecord
from walship.formats.record import MAX_BODY, RECORD_OVERHEAD, Kind, Record, RecordReader, encode_record

KINDS = st.sampled_from(list(Kind))
BODIES = st.binary(max_size=300)
RECORDS = st.lists(st.tuples(KINDS, BODIES), max_size=6)


def crc64_bitwise(data: bytes) -> int:
    """CRC-64/GO-ISO by its definition, one bit at a time."""
    state = (1 << 64) - 1
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0xD800000000000000 if state & 1 else 0)
    return state ^ (1 << 64) - 1


def read_all(chunks: list[bytes]) -> list[Record]:
    reader = RecordReader()
    found = []
    for chunk in chunks:
        reader.receive_data(chunk)
        while (record := reader.next_record()) is not None:
            found.append(record)
    return found


def read_until_corrupt(data: bytes) -> tuple[list[Record], RecordReader]:
    reader = RecordReader()
    reader.receive_data(data)
    found = []
    try:
        while (record := reader.next_record()) is not None:
            found.append(record)
    except CorruptRecord:
        pass
    return found, reader


def test_bytes_are_those_of_the_specification() -> None:
    """docs/format.md section 5, by hand: head, body, FLAG | crc of both."""
    head = struct.pack(">BBHI", 20, 1, 0, 3)
    expected = head + b"abc" + struct.pack(">Q", 1 << 63 | crc64_bitwise(head + b"abc"))
    assert encode_record(Kind.ACK, b"abc") == expected
    assert Record(Kind.ACK, b"abc").to_bytes() == expected


@given(RECORDS, st.lists(st.integers(0, 2000), max_size=8))
def test_records_are_read_back_however_the_bytes_are_cut(records: list[tuple[Kind, bytes]], cuts: list[int]) -> None:
    data = b"".join(encode_record(kind, body) for kind, body in records)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert [(record.kind, record.body) for record in read_all(chunks)] == records


@given(RECORDS.filter(bool), st.data())
def test_a_flipped_bit_ends_the_good_records_before_it(records: list[tuple[Kind, bytes]], data: st.DataObject) -> None:
    """R5: nothing at or behind the damage is returned, everything before it is."""
    encoded = [encode_record(kind, body) for kind, body in records]
    damaged = bytearray(b"".join(encoded))
    at = data.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[at // 8] ^= 1 << at % 8
    good, end = 0, 0
    while end + len(encoded[good]) <= at // 8:
        end += len(encoded[good])
        good += 1
    found, reader = read_until_corrupt(bytes(damaged))
    assert [(record.kind, record.body) for record in found] == records[:good]
    assert reader.consumed_bytes == end


@given(RECORDS.filter(bool), st.data())
def test_a_cut_record_never_comes_out(records: list[tuple[Kind, bytes]], data: st.DataObject) -> None:
    """R6: a torn end looks as if the record had never been written."""
    encoded = b"".join(encode_record(kind, body) for kind, body in records)
    cut = data.draw(st.integers(0, len(encoded)))
    found, reader = read_until_corrupt(encoded[:cut])
    whole = b"".join(record.to_bytes() for record in found)
    assert encoded.startswith(whole)
    assert len(whole) == reader.consumed_bytes
    assert reader.pending_bytes == cut - len(whole)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_corrupt_record(data: bytes) -> None:
    read_until_corrupt(data)


def test_a_length_above_the_bound_is_refused_before_its_body_comes() -> None:
    """A damaged length must not make a reader wait for, or hold, a gigabyte."""
    reader = RecordReader()
    reader.receive_data(struct.pack(">BBHI", Kind.FRAME_PART, 1, 0, MAX_BODY + 1))
    with pytest.raises(CorruptRecord):
        reader.next_record()


@pytest.mark.parametrize("head", [(14, 1, 0), (0, 1, 0), (20, 2, 0), (20, 0, 0), (20, 1, 1)], ids=str)
def test_what_a_later_version_may_write_is_refused_not_guessed(head: tuple[int, int, int]) -> None:
    """Unknown kind, other version, non-zero reserved field: each with a checksum that fits."""
    data = struct.pack(">BBHI", *head, 1) + b"x"
    reader = RecordReader()
    reader.receive_data(data + struct.pack(">Q", 1 << 63 | crc64_bitwise(data)))
    with pytest.raises(CorruptRecord):
        reader.next_record()


def test_a_body_above_the_bound_is_not_written() -> None:
    assert len(encode_record(Kind.FRAME_PART, bytes(MAX_BODY))) == MAX_BODY + RECORD_OVERHEAD
    with pytest.raises(ValueError, match="bound"):
        encode_record(Kind.FRAME_PART, bytes(MAX_BODY + 1))


def test_after_damage_a_reader_stays_at_its_error() -> None:
    """Good bytes that come later must not be taken for a continuation."""
    damaged = bytearray(encode_record(Kind.ACK, b"x"))
    damaged[-1] ^= 1
    reader = RecordReader()
    reader.receive_data(damaged)
    for _ in range(2):
        with pytest.raises(CorruptRecord, match="at byte 0"):
            reader.next_record()
        reader.receive_data(encode_record(Kind.ACK, b"y"))


def test_a_long_stream_is_read_in_small_pieces() -> None:
    """The reader gives back the memory of what was consumed, also when it never runs empty."""
    record = encode_record(Kind.FRAME_PART, bytes(1 << 20))
    reader = RecordReader()
    reader.receive_data(record[:100])
    for _ in range(12):
        reader.receive_data(record[100:] + record[:100])
        assert reader.next_record() is not None
    assert reader.next_record() is None
    assert reader.pending_bytes == 100
    assert reader.consumed_bytes == 12 * len(record)
