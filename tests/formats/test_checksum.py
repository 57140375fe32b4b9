"""Page checksums and the rolling database checksum: a model recomputes them, SQLite supplies real pages."""

from __future__ import annotations

import random
from functools import reduce
from operator import xor
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.errors import CorruptData
from walship.formats.checksum import FLAG, PageChecksums, lock_pgno, page_checksum
from walship.formats.wal import WAL_HEADER_SIZE, WalHeader, read_frames

PAGE_SIZE = 512


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_SIZE)


def crc64_bit_by_bit(data: bytes) -> int:
    """CRC-64/GO-ISO from its definition: reflected polynomial 0x1b, all ones in and out."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def state_of(pages: dict[int, bytes]) -> PageChecksums:
    state = PageChecksums(PAGE_SIZE)
    state.apply(pages.items(), len(pages))
    return state


def rolling_of(pages: dict[int, bytes]) -> int:
    """The definition (docs/format.md 3), from all pages."""
    return FLAG | reduce(xor, (page_checksum(pgno, data) for pgno, data in pages.items()), 0)


@st.composite
def commits(draw: st.DrawFn) -> list[tuple[dict[int, bytes], int]]:
    """A history: each commit rewrites some pages, grows (with every new page, as the growth rule asks) or shrinks."""
    history, size = [], 0
    for _ in range(draw(st.integers(1, 6))):
        commit = draw(st.integers(1, 12))
        rewritten = draw(st.sets(st.integers(1, max(1, min(size, commit)))))
        numbers = {*rewritten, *range(size + 1, commit + 1)}
        history.append(({pgno: page(draw(st.integers(0, 50))) for pgno in numbers}, commit))
        size = commit
    return history


def test_page_checksum_is_crc64_of_number_and_page() -> None:
    """ltx.md 2: and the published check value of the CRC holds for our reference."""
    assert crc64_bit_by_bit(b"123456789") == 0xB90956C775A41001
    data = page(1)
    assert page_checksum(258, data) == FLAG | crc64_bit_by_bit(b"\0\0\1\2" + data)
    assert page_checksum(258, memoryview(data)) == page_checksum(258, data)


@pytest.mark.parametrize(("page_size", "pgno"), [(512, 2097153), (4096, 262145), (65536, 16385)])
def test_lock_page_is_the_one_at_one_gibibyte(page_size: int, pgno: int) -> None:
    assert lock_pgno(page_size) == pgno


def test_empty_database_is_the_flag_alone() -> None:
    state = PageChecksums(PAGE_SIZE)
    assert (state.rolling, state.commit, state.get(1)) == (FLAG, 0, 0)


@given(history=commits())
def test_rolling_checksum_is_that_of_the_whole_content(history: list[tuple[dict[int, bytes], int]]) -> None:
    """Growing, rewriting and shrinking in place gives what a scan of the result gives."""
    state, model = PageChecksums(PAGE_SIZE), dict[int, bytes]()
    for pages, commit in history:
        model = {pgno: data for pgno, data in (model | pages).items() if pgno <= commit}
        assert state.apply(pages.items(), commit) == state.rolling == rolling_of(model)
        assert state == state_of(model)


@given(history=commits())
def test_preview_tells_and_changes_nothing(history: list[tuple[dict[int, bytes], int]]) -> None:
    """A follower checks a frame's promise before it applies it."""
    state = PageChecksums(PAGE_SIZE)
    for pages, commit in history:
        before = state.copy()
        sums = {pgno: page_checksum(pgno, page) for pgno, page in pages.items()}
        promised = state.preview_many(sums, commit)
        assert (state, state.rolling) == (before, before.rolling)
        assert state.apply(pages.items(), commit) == promised


def test_last_version_of_a_page_counts() -> None:
    """One transaction may write a page twice (ltx.md 3)."""
    state = PageChecksums(PAGE_SIZE)
    assert state.apply([(1, page(1)), (1, page(2))], 1) == rolling_of({1: page(2)})


def test_pages_beyond_the_end_are_passed_over() -> None:
    """A transaction may write a page and then shrink below it."""
    state = PageChecksums(PAGE_SIZE)
    assert state.apply([(1, page(1)), (2, page(2))], 1) == rolling_of({1: page(1)})


def test_growth_by_a_missing_page_is_refused_and_nothing_applied() -> None:
    """Growth rule (ltx.md 3, rule 5): a hole means lost frames, never silence."""
    state = state_of({1: page(1)})
    before = state.copy()
    with pytest.raises(CorruptData, match="grows from 1 to 4 pages, but 1 of the new pages are missing"):
        state.apply([(1, page(9)), (2, page(2)), (4, page(4))], 4)
    assert (state, state.rolling) == (before, before.rolling)


@pytest.mark.parametrize("bad", [(1, bytes(511)), (0, bytes(512)), (1 << 32, bytes(512))])
def test_an_impossible_page_is_refused_and_nothing_applied(bad: tuple[int, bytes]) -> None:
    state = state_of({1: page(1)})
    before = state.copy()
    with pytest.raises(CorruptData, match=f"page {bad[0]} has"):
        state.apply([(1, page(9)), bad], 1)
    assert (state, state.rolling) == (before, before.rolling)


@pytest.mark.parametrize("given_anyway", [False, True])
def test_lock_page_counts_nowhere(given_anyway: bool) -> None:
    """Growth across 1 GiB needs no lock page, and a value given for it changes nothing."""
    lock = lock_pgno(65536)
    checksums = {pgno: FLAG | pgno for pgno in range(1, lock + 3) if given_anyway or pgno != lock}
    state = PageChecksums(65536)
    state.set_many(checksums, lock + 2)
    assert state.rolling == FLAG | reduce(xor, (pgno for pgno in range(1, lock + 3) if pgno != lock))
    assert state.get(lock) == 0
    assert PageChecksums.parse(state.to_bytes()) == state
    assert lock not in set(state.differing(PageChecksums(65536)))


@given(first=commits(), second=commits())
def test_differing_names_exactly_the_pages_to_ship(
    first: list[tuple[dict[int, bytes], int]], second: list[tuple[dict[int, bytes], int]]
) -> None:
    """R7: a resync ships these pages and no others."""
    states = []
    for history in (first, second):
        state = PageChecksums(PAGE_SIZE)
        for pages, commit in history:
            state.apply(pages.items(), commit)
        states.append(state)
    mine, theirs = states
    expected = [n for n in range(1, max(mine.commit, theirs.commit) + 1) if mine.get(n) != theirs.get(n)]
    assert list(mine.differing(theirs)) == list(theirs.differing(mine)) == expected


def test_differing_finds_a_page_in_each_block_of_a_long_array() -> None:
    mine = PageChecksums(PAGE_SIZE)
    mine.set_many({pgno: FLAG | pgno for pgno in range(1, 2001)}, 2000)
    theirs = mine.copy()
    theirs.set_many({1: FLAG, 512: FLAG, 513: FLAG, 1999: FLAG}, 1999)
    assert list(mine.differing(theirs)) == [1, 512, 513, 1999, 2000]


def test_states_of_other_page_sizes_are_not_compared() -> None:
    with pytest.raises(CorruptData, match="cannot be compared"):
        list(PageChecksums(512).differing(PageChecksums(1024)))


@given(history=commits())
def test_record_reads_back(history: list[tuple[dict[int, bytes], int]]) -> None:
    """R8: the array is saved with each durable mark."""
    state = PageChecksums(PAGE_SIZE)
    for pages, commit in history:
        state.apply(pages.items(), commit)
    again = PageChecksums.parse(state.to_bytes())
    assert (again, again.rolling, again.page_size) == (state, state.rolling, PAGE_SIZE)


def test_record_has_the_documented_bytes() -> None:
    """docs/format.md 3, field by field."""
    state = state_of({1: page(1), 2: page(2)})
    body = b"WSC1" + (512).to_bytes(4, "big") + (2).to_bytes(4, "big") + state.rolling.to_bytes(8, "big")
    body += page_checksum(1, page(1)).to_bytes(8, "big") + page_checksum(2, page(2)).to_bytes(8, "big")
    assert state.to_bytes() == body + (FLAG | crc64_bit_by_bit(body)).to_bytes(8, "big")


def test_every_damage_to_a_record_is_noticed() -> None:
    """Any byte changed, cut or added: CorruptData, so that the caller scans the database instead."""
    good = state_of({1: page(1), 2: page(2)}).to_bytes()
    damaged = [good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :] for at in range(len(good))]
    damaged += [good[:at] for at in range(len(good))] + [good + b"\0", good + bytes(8)]
    for bad in damaged:
        with pytest.raises(CorruptData):
            PageChecksums.parse(bad)


def test_a_record_that_contradicts_itself_is_refused() -> None:
    """A right CRC over a wrong rolling checksum: written by a broken program, not by a broken disk."""
    body = bytearray(state_of({1: page(1)}).to_bytes()[:-8])
    body[19] ^= 1
    with pytest.raises(CorruptData, match="contradicts"):
        PageChecksums.parse(body + (FLAG | crc64_bit_by_bit(bytes(body))).to_bytes(8, "big"))


def test_a_state_reads_well_and_equals_no_stranger() -> None:
    state = PageChecksums(PAGE_SIZE)
    assert repr(state) == "<PageChecksums of 0 pages of 512 bytes, rolling 8000000000000000>"
    assert state != "a string"


@given(data=st.binary(max_size=100))
def test_arbitrary_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(CorruptData):
        PageChecksums.parse(data)


def test_following_the_wal_of_sqlite_equals_a_scan_of_its_file(tmp_path: Path) -> None:
    """The real thing: transaction by transaction from the -wal, with growth and VACUUM; then a look at the file."""
    path = tmp_path / "real.db"
    connection = apsw.Connection(str(path))
    for pragma in ("page_size=512", "journal_mode=wal", "wal_autocheckpoint=0"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, a)")
    for n in range(20):
        connection.execute("INSERT INTO t(a) VALUES (randomblob(?))", (n * 100,))
    connection.execute("DELETE FROM t WHERE id % 3")
    connection.execute("VACUUM")
    connection.close()
    wal = (tmp_path / "real.db-wal").read_bytes()
    header, state = WalHeader.parse(wal), PageChecksums(512)
    transaction: list[tuple[int, memoryview]] = []
    for frame, content in read_frames(wal[WAL_HEADER_SIZE:], page_size=512, salts=header.salts, seed=header.checksum):
        transaction.append((frame.pgno, content))
        if frame.is_commit:
            state.apply(transaction, frame.commit)
            transaction.clear()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    image = path.read_bytes()
    assert state == state_of({at // 512 + 1: image[at : at + 512] for at in range(0, len(image), 512)})
