"""LTX files: what is written is read back, what is damaged is refused, what would restore wrongly is not written."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import lz4.block
import pytest
from fastcrc import crc64
from hypothesis import given, settings
from hypothesis import strategies as st

from walship.errors import CorruptLtx
from walship.formats.checksum import FLAG, lock_pgno
from walship.formats.ltx import (
    HEADER_SIZE,
    TRAILER_SIZE,
    LtxDecoder,
    LtxEncoder,
    LtxHeader,
    LtxTrailer,
    PageIndex,
    ReadAt,
    decode,
    encode,
    merge,
    merge_header,
    merge_index,
    open_index,
    page_index,
    read_page,
)

Pages = list[tuple[int, bytes]]
DELTA = LtxHeader(512, 9, 5, 7, 1_700_000_000_000, 32, 1072, (1, 2), 3)


def page(pgno: int, version: int = 0, size: int = 512) -> bytes:
    """A half compressible page that no other (pgno, version) shares."""
    return (random.Random(pgno * 1000 + version).randbytes(size // 2) + b"text" * size)[:size]


def delta_file() -> bytes:
    return encode(DELTA, [(pgno, page(pgno)) for pgno in (2, 3, 9)], previous_commit=8)


def reader(data: bytes) -> ReadAt:
    return lambda offset, size: data[offset : offset + size]


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def seal(data: bytes) -> bytes:
    """`data` with a file checksum that fits: for damage that only a semantic check can find."""
    decoded, at = bytearray(data[:HEADER_SIZE]), HEADER_SIZE
    page_size = int.from_bytes(data[8:12], "big")
    while data[at : at + 6] != bytes(6):
        size = int.from_bytes(data[at + 6 : at + 10], "big")
        decoded += data[at : at + 10] + lz4.block.decompress(data[at + 10 : at + 10 + size], page_size)
        at += 10 + size
    decoded += data[at:-8]
    return data[:-8] + struct.pack(">Q", FLAG | crc64.go_iso(bytes(decoded)))


@st.composite
def files(draw: st.DrawFn) -> tuple[LtxHeader, Pages]:
    """A small delta or snapshot, any page size."""
    page_size = 1 << draw(st.integers(9, 16))
    commit = draw(st.integers(1, 6))
    first = draw(st.integers(1, 3))
    every = first == 1
    pgnos = range(1, commit + 1) if every else sorted(draw(st.sets(st.integers(1, commit))))
    offset = draw(st.integers(0, 1 << 40))
    header = LtxHeader(
        page_size,
        commit,
        first,
        draw(st.integers(first, (1 << 64) - 1)),
        draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        offset,
        draw(st.integers(0, 1 << 40)) if offset else 0,
        (draw(st.integers(0, (1 << 32) - 1)), 7) if offset else (0, 0),
        draw(st.integers(0, (1 << 64) - 1)),
    )
    return header, [(pgno, page(pgno, draw(st.integers(0, 9)), page_size)) for pgno in pgnos]


@given(files(), st.integers(1, 3000))
@settings(deadline=None)
def test_a_file_is_read_back_however_it_is_cut(file: tuple[LtxHeader, Pages], chunk: int) -> None:
    header, pages = file
    data = encode(header, pages)
    decoder = LtxDecoder()
    found: Pages = []
    for piece in chunked(data, chunk):
        decoder.receive_data(piece)
        found += decoder.pages()
    assert decoder.finish().to_bytes() == data[-TRAILER_SIZE:]
    assert (decoder.header, found) == (header, pages)
    assert decode(data) == (header, pages)


def test_bytes_are_those_of_the_specification() -> None:
    """docs/format.md section 4, put together by hand; the LZ4 block itself may be any encoder's."""
    head = struct.pack(">4sIIIQQqQqqIIQ20x", b"LTX1", 2, 512, 200, 5, 7, 1_700_000_000_000, 0, 32, 1072, 1, 2, 3)
    content = page(200)
    block = lz4.block.compress(content, store_size=False)
    frame_head = struct.pack(">IHI", 200, 1, len(block))
    size = len(frame_head) + len(block)
    assert 128 <= size < 1 << 14, "two bytes as a varint"
    index = bytes([0xC8, 0x01, HEADER_SIZE, size & 0x7F | 0x80, size >> 7, 0])
    tail = bytes(6) + index + struct.pack(">QQ", len(index), 0)
    checksum = FLAG | crc64.go_iso(head + frame_head + content + tail)
    expected = head + frame_head + block + tail + struct.pack(">Q", checksum)
    assert encode(replace(DELTA, commit=200), [(200, content)]) == expected


def test_a_changed_byte_is_found_or_changes_nothing() -> None:
    """The checksum covers decompressed pages, so an LZ4 block may change and still mean the same page."""
    data = delta_file()
    for at, mask in itertools.product(range(len(data)), (1, 0x80, 0xFF)):
        damaged = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
        try:
            result = decode(damaged)
        except CorruptLtx:
            continue
        assert result == decode(data), at


def test_a_file_cut_anywhere_is_refused() -> None:
    data = delta_file()
    for size in range(len(data)):
        with pytest.raises(CorruptLtx):
            decode(data[:size])


def test_bytes_after_the_trailer_are_refused() -> None:
    with pytest.raises(CorruptLtx, match="after the trailer"):
        decode(delta_file() + b"\0")


@given(st.binary(max_size=400), st.integers(0, 3))
def test_arbitrary_bytes_raise_nothing_but_corrupt_ltx(data: bytes, kept: int) -> None:
    start = delta_file()[: (0, HEADER_SIZE, HEADER_SIZE + 10, 500)[kept]]
    for operation in (
        lambda: decode(start + data),
        lambda: open_index(reader(start + data), len(start + data)),
        lambda: page_index(data),
        lambda: PageIndex.parse(data),
        lambda: read_page(reader(data), 0, len(data), 512),
        lambda: LtxTrailer.parse(data),
        lambda: list(merge([[start + data]])),
    ):
        with suppress(CorruptLtx):
            operation()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 256},
        {"page_size": 131072},
        {"page_size": 4095},
        {"commit": 0},
        {"min_txid": 0},
        {"max_txid": 4},
        {"flags": 1},
        {"flags": 0},
        {"pre_apply": FLAG},
        {"wal_offset": -1},
        {"wal_size": -1},
        {"wal_offset": 0},
        {"wal_offset": 0, "wal_size": 0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_header_that_contradicts_itself_cannot_be_built(changes: dict[str, int]) -> None:
    """The rules of the ltx library's own header check."""
    with pytest.raises(CorruptLtx):
        replace(DELTA, **changes)  # type: ignore[arg-type]


def test_a_file_with_database_checksums_is_read_but_not_written() -> None:
    """A restore by litestream would fail on one; ours travels in the frame header."""
    header = replace(DELTA, flags=0, pre_apply=FLAG | 5)
    with pytest.raises(ValueError, match="checksums"):
        LtxEncoder(header)
    data = bytearray(delta_file())
    data[:HEADER_SIZE] = header.to_bytes()
    data[-TRAILER_SIZE:-8] = struct.pack(">Q", FLAG | 6)
    assert decode(seal(bytes(data)))[0] == header
    data[-TRAILER_SIZE:-8] = bytes(8)
    with pytest.raises(CorruptLtx, match="database checksum"):
        decode(seal(bytes(data)))


def test_reserved_header_bytes_are_not_looked_at() -> None:
    data = bytearray(delta_file())
    data[90] = 1
    assert decode(seal(bytes(data))) == decode(delta_file())


@pytest.mark.parametrize("pgnos", [(3, 2), (2, 2), (0,), (10,)], ids=str)
def test_pages_out_of_order_or_beyond_the_commit_are_not_written(pgnos: tuple[int, ...]) -> None:
    with pytest.raises(CorruptLtx, match="page"):
        encode(DELTA, [(pgno, page(pgno)) for pgno in pgnos])


def test_pages_out_of_order_are_not_read() -> None:
    """A delta like that decodes in Go and fails only when it is merged; here nobody gets so far."""
    header = replace(DELTA, commit=3)
    one, two = (encode(header, [(pgno, page(pgno))]) for pgno in (1, 2))
    first, second = (data[HEADER_SIZE : data.rindex(bytes(6), 0, -TRAILER_SIZE - 8)] for data in (one, two))
    swapped = header.to_bytes() + second + first + bytes(6)
    decoder = LtxDecoder()
    decoder.receive_data(swapped)
    with pytest.raises(CorruptLtx, match="page 1 after page 2"):
        list(decoder.pages())


def test_a_page_of_another_size_is_not_written() -> None:
    with pytest.raises(CorruptLtx, match="511 bytes"):
        encode(DELTA, [(1, bytes(511))])


@pytest.mark.parametrize("pgnos", [(), (2,), (7, 9), (8,), (6, 7, 8)], ids=str)
def test_a_missing_page_of_the_growth_is_not_written(pgnos: tuple[int, ...]) -> None:
    """Growth rule: a reader would bring back what stood there before an earlier shrink, in silence."""
    with pytest.raises(CorruptLtx, match="is missing"):
        encode(DELTA, [(pgno, page(pgno)) for pgno in pgnos], previous_commit=6)


@pytest.mark.parametrize("pgnos", [(7, 8, 9), (1, 6, 7, 8, 9)], ids=str)
def test_growth_with_all_its_pages_is_written(pgnos: tuple[int, ...]) -> None:
    pages = [(pgno, page(pgno)) for pgno in pgnos]
    assert decode(encode(DELTA, pages, previous_commit=6))[1] == pages


def test_a_shrink_needs_no_pages() -> None:
    assert decode(encode(DELTA, [], previous_commit=20))[1] == []


def test_a_snapshot_holds_every_page() -> None:
    """minTXID 1 means snapshot, for the writer and for the reader."""
    header = replace(DELTA, min_txid=1, commit=3)
    with pytest.raises(CorruptLtx, match="page 2 is missing"):
        encode(header, [(1, page(1)), (3, page(3))])
    data = bytearray(encode(replace(header, min_txid=2), [(1, page(1)), (2, page(2))]))
    data[:HEADER_SIZE] = header.to_bytes()
    with pytest.raises(CorruptLtx, match="page 3 is missing"):
        decode(seal(bytes(data)))


def test_the_lock_page_is_in_no_file() -> None:
    """It is left out when given, not missed by the growth rule, and refused when read."""
    size = 65536
    lock = lock_pgno(size)
    header = LtxHeader(size, lock + 1, 8, 8)
    pages = [(pgno, page(pgno, 0, size)) for pgno in (lock - 1, lock, lock + 1)]
    data = encode(header, pages, previous_commit=lock - 2)
    assert decode(data)[1] == [pages[0], pages[2]]
    decode(encode(header, pages, previous_commit=lock - 1))
    forged = data[: HEADER_SIZE + 3] + bytes([lock & 0xFF]) + data[HEADER_SIZE + 4 :]
    assert int.from_bytes(forged[HEADER_SIZE : HEADER_SIZE + 4], "big") == lock
    with pytest.raises(CorruptLtx, match=f"page {lock}"):
        decode(forged)


def test_a_database_that_ends_at_the_lock_page_is_complete_without_it() -> None:
    size = 65536
    lock = lock_pgno(size)
    header = LtxHeader(size, lock, 8, 8)
    assert decode(encode(header, [(lock - 1, bytes(size))], previous_commit=lock - 2))[0] == header


@pytest.mark.parametrize("count", [0, 1, 5, 3000])
def test_single_pages_are_read_through_the_index(count: int) -> None:
    """Also when the index is longer than the tail that is read at first."""
    header = replace(DELTA, commit=6001)
    pages = [(2 * number + 1, page(number)) for number in range(count)]
    data = encode(header, pages)
    found, index = open_index(reader(data), len(data))
    assert found == header
    assert len(index) == count
    assert [read_page(reader(data), offset, size, 512, expected_pgno=pgno) for pgno, offset, size in index] == pages
    for pgno, content in pages[:: max(1, count // 10)]:
        place = index.find(pgno)
        assert place is not None
        assert read_page(reader(data), *place, 512) == (pgno, content)
    assert index.find(2) is index.find(6001) is index.find(0) is None
    assert page_index(data[HEADER_SIZE:]) == index


def test_a_small_file_is_opened_with_one_read() -> None:
    """The applier opens thousands of them."""
    data = delta_file()
    reads = []

    def read_at(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return data[offset : offset + size]

    open_index(read_at, len(data))
    assert reads == [(0, len(data))]


def test_an_index_that_does_not_fit_its_file_is_refused() -> None:
    data = delta_file()
    _, index = open_index(reader(data), len(data))
    for damaged in (data[:-1], data + bytes(1), data[:HEADER_SIZE] + bytes(20) + data[HEADER_SIZE:]):
        with pytest.raises(CorruptLtx):
            open_index(reader(damaged), len(damaged))
    with pytest.raises(CorruptLtx, match="are there"):
        open_index(reader(data[:300]), len(data))
    below = LtxHeader(512, 8, 5, 7).to_bytes() + data[HEADER_SIZE:]
    with pytest.raises(CorruptLtx, match="page 9"):
        open_index(reader(below), len(below))
    assert len(index) == 3


def test_an_index_that_does_not_agree_with_its_pages_is_refused() -> None:
    """By the whole reader even when the file checksum fits, by the index reader when page frames would not join."""
    data = bytearray(delta_file())
    _, index = open_index(reader(bytes(data)), len(data))
    stored = index.to_bytes()
    at = data.index(stored, index.end)
    data[at] += 1  # page 2 becomes another page 3
    with pytest.raises(CorruptLtx, match="index"):
        decode(seal(bytes(data)))
    data[at] -= 1
    data[at + 1] += 1  # its offset
    for operation in (lambda: decode(seal(bytes(data))), lambda: open_index(reader(bytes(data)), len(data))):
        with pytest.raises(CorruptLtx, match="index"):
            operation()


def test_a_place_that_is_not_the_page_frame_is_refused() -> None:
    data = delta_file()
    _, index = open_index(reader(data), len(data))
    pgno, offset, size = list(index)[1]
    for wrong_offset, wrong_size, expected in (
        (offset + 1, size, pgno),
        (offset, size - 1, pgno),
        (offset, size, pgno + 1),
        (offset, 5, pgno),
        (len(data) - 5, size, pgno),
    ):
        with pytest.raises(CorruptLtx):
            read_page(reader(data), wrong_offset, wrong_size, 512, expected_pgno=expected)
    with pytest.raises(CorruptLtx, match="1024"):
        read_page(reader(data), offset, size, 1024)


# --- merging -----------------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[LtxHeader, Pages]]:
    """Files that follow each other and keep the growth rule; the first may be a snapshot."""
    commit, txid = 0, 0
    found = []
    if draw(st.booleans()):
        commit, txid = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    for _ in range(draw(st.integers(1, 6))):
        previous, commit = commit, draw(st.integers(1, 12))
        first, txid = txid + 1, txid + draw(st.integers(1, 3))
        must = set(range(previous + 1, commit + 1))
        pgnos = sorted(must | draw(st.sets(st.integers(1, commit))))
        header = LtxHeader(512, commit, first, txid, txid * 1000, 32, 24 + 512, (5, 6))
        found.append((header, [(pgno, page(pgno, txid)) for pgno in pgnos]))
    return found


def replay(history: list[tuple[LtxHeader, Pages]]) -> dict[int, bytes]:
    """The plain meaning of a history: write pages, cut at commit, again and again."""
    state: dict[int, bytes] = {}
    for header, pages in history:
        state |= dict(pages)
        state = {pgno: content for pgno, content in state.items() if pgno <= header.commit}
    return state


@given(histories(), st.integers(1, 2000))
@settings(deadline=None)
def test_a_merged_file_does_what_its_inputs_do(history: list[tuple[LtxHeader, Pages]], chunk: int) -> None:
    """Later wins, what the last commit cut off is gone."""
    data = [encode(header, pages) for header, pages in history]
    merged = b"".join(merge([chunked(file, chunk) for file in data]))
    header, pages = decode(merged)
    first, last = history[0][0], history[-1][0]
    assert header == LtxHeader(512, last.commit, first.min_txid, last.max_txid, last.timestamp_ms)
    expected = {pgno: content for pgno, content in replay(history).items() if pgno <= last.commit}
    assert dict(pages) == expected


@given(histories())
@settings(deadline=None)
def test_a_merged_index_finds_the_pages_of_the_merged_file(history: list[tuple[LtxHeader, Pages]]) -> None:
    """How a follower applies many frames as one commit without holding their pages."""
    data = [encode(header, pages) for header, pages in history]
    places = merge_index([open_index(reader(file), len(file)) for file in data])
    found = [
        read_page(reader(data[which]), offset, size, 512, expected_pgno=pgno) for pgno, which, offset, size in places
    ]
    assert found == decode(b"".join(merge([[file] for file in data])))[1]


@pytest.mark.parametrize(
    "second",
    [
        replace(DELTA, min_txid=9, max_txid=9),
        replace(DELTA, min_txid=6, max_txid=7),
        replace(DELTA, min_txid=8, max_txid=8, page_size=1024),
    ],
    ids=["gap", "nothing new", "page size"],
)
def test_files_that_do_not_follow_each_other_are_not_merged(second: LtxHeader) -> None:
    for operation in (
        lambda: merge_header([DELTA, second]),
        lambda: merge_index([(DELTA, PageIndex()), (second, PageIndex())]),
        lambda: list(merge([[encode(DELTA, [])], [encode(second, [])]])),
    ):
        with pytest.raises(CorruptLtx):
            operation()


def test_files_that_overlap_are_merged() -> None:
    """A compacted file may reach back over single ones."""
    after = replace(DELTA, min_txid=6, max_txid=9)
    assert merge_header([DELTA, after]) == LtxHeader(512, 9, 5, 9, DELTA.timestamp_ms)


def test_merging_judges_the_checksum_of_every_input() -> None:
    """Also where a later file hides the damaged page."""
    after = encode(replace(DELTA, min_txid=8, max_txid=8), [(pgno, page(pgno, 1)) for pgno in (2, 3, 9)])
    for at, damaged_after in itertools.product((30, 200, len(after) - 1), (False, True)):
        first, second = delta_file(), after
        target = bytearray(second if damaged_after else first)
        target[at] ^= 0x40
        inputs = [first, bytes(target)] if damaged_after else [bytes(target), second]
        with pytest.raises(CorruptLtx):
            list(merge([chunked(file, 64) for file in inputs]))


def test_merging_asserts_the_growth_rule_when_it_can() -> None:
    inputs = [[encode(DELTA, [(9, page(9))])]]
    list(merge(inputs, previous_commit=8))
    with pytest.raises(CorruptLtx, match="page 8 is missing"):
        list(merge(inputs, previous_commit=7))


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="nothing"):
        list(merge([]))


def test_values_are_readable() -> None:
    assert str(DELTA) == "LTX txids 5 to 7, 9 pages of 512"
    assert str(replace(DELTA, min_txid=1)) == "LTX snapshot 7, 9 pages of 512"
    assert DELTA.file_name == "0000000000000005-0000000000000007.ltx"
