"""The wal-index layout, read from the live -shm of a SQLite that runs in another process.

Another process, because opening and closing a -shm beside SQLite in one process drops SQLite's locks (engine.md T1).
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.errors import CorruptWalIndex
from walship.formats.wal import WAL_HEADER_SIZE, WalFrameHeader, WalHeader, read_frames
from walship.formats.wal_checksum import checksum_direct
from walship.formats.wal_index import (
    BLOCK_SIZE,
    CHECKPOINT_OFFSET,
    COPY_OFFSETS,
    HASH_OFFSET,
    HASH_SLOTS,
    INDEX_HEADER_SIZE,
    READ_MARK_UNUSED,
    CheckpointInfo,
    WalIndexHeader,
    block_of,
    first_frame,
    pgno_offset,
    slot_hash,
)

U32 = st.integers(0, 0xFFFFFFFF)
PAIRS = st.tuples(U32, U32)
HEADERS = st.builds(
    WalIndexHeader,
    change=U32,
    big_endian=st.booleans(),
    page_size=st.sampled_from([0, *(1 << n for n in range(9, 17))]),
    mx_frame=U32,
    commit=U32,
    frame_checksum=PAIRS,
    salts=PAIRS,
)

# argv: path, page size, transactions, then statements; says "ready" and keeps the connection open until stdin closes
HOLDER = """
import sys, apsw
path, page_size, transactions, *statements = sys.argv[1:]
db = apsw.Connection(path)
for pragma in (f"page_size={page_size}", "journal_mode=wal", "wal_autocheckpoint=0", "synchronous=off"):
    db.execute("PRAGMA " + pragma).fetchall()
if int(transactions):
    db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, a)")
for n in range(int(transactions)):
    db.execute("INSERT INTO t(a) VALUES (zeroblob(?))", (n % 2000,))
cursors = [db.execute(statement).fetchall() for statement in statements]
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Live:
    """Copies of the -shm and -wal of a database that another process has open."""

    shm: bytes
    wal: bytes

    @property
    def wal_header(self) -> WalHeader:
        return WalHeader.parse(self.wal)

    def frames(self) -> list[WalFrameHeader]:
        header = self.wal_header
        data = self.wal[WAL_HEADER_SIZE:]
        chain = read_frames(data, page_size=header.page_size, salts=header.salts, seed=header.checksum)
        return [frame for frame, _ in chain]


@contextmanager
def live(path: Path, page_size: int, transactions: int, *statements: str) -> Iterator[Live]:
    command = [sys.executable, "-c", HOLDER, str(path), str(page_size), str(transactions), *statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Live(path.with_name(path.name + "-shm").read_bytes(), path.with_name(path.name + "-wal").read_bytes())
        process.communicate(timeout=20)


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_header_of_a_live_database_agrees_with_its_wal(tmp_path: Path, page_size: int) -> None:
    """engine.md 1: mxFrame, commit, salts, checksum and page size are those of the -wal's last commit frame."""
    with live(tmp_path / "a.db", page_size, 5) as files:
        header, frames = WalIndexHeader.read(files.shm), files.frames()
    last, wal = frames[-1], files.wal_header
    assert (header.mx_frame, header.commit, header.frame_checksum) == (len(frames), last.commit, last.checksum)
    assert (header.salts, header.page_size, header.big_endian) == (wal.salts, page_size, wal.big_endian)
    assert header.change == sum(frame.is_commit for frame in frames)
    assert header.to_bytes() * 2 == files.shm[: 2 * INDEX_HEADER_SIZE]


def test_header_before_the_first_frame_has_no_page_size(tmp_path: Path) -> None:
    """A fresh wal-index is valid and all zero but for its version: engine.md 2, step 3 begins from there."""
    with live(tmp_path / "a.db", 4096, 0, "SELECT * FROM sqlite_schema") as files:
        header = WalIndexHeader.read(files.shm)
    assert (header.mx_frame, header.page_size, header.commit) == (0, 0, 0)
    assert header.to_bytes() * 2 == files.shm[: 2 * INDEX_HEADER_SIZE]


def test_checkpoint_state_of_a_live_database(tmp_path: Path) -> None:
    """After a full PASSIVE checkpoint all frames are backfilled; read marks beyond the used ones are unused."""
    with live(tmp_path / "a.db", 4096, 5, "PRAGMA wal_checkpoint(PASSIVE)") as files:
        info, header = CheckpointInfo.parse(files.shm), WalIndexHeader.read(files.shm)
    assert info.n_backfill == info.n_backfill_attempted == header.mx_frame
    assert info.read_marks[0] == 0
    assert info.read_marks[2:] == (READ_MARK_UNUSED,) * 3
    assert CheckpointInfo.parse(files.shm[CHECKPOINT_OFFSET:136], 0) == info


def test_every_frame_is_where_the_layout_says(tmp_path: Path) -> None:
    """Page numbers and hash slots over three blocks: SQLite's own index is found by our arithmetic."""
    with live(tmp_path / "a.db", 512, 3000) as files:
        frames = files.frames()
    assert block_of(len(frames)) >= 2
    for ordinal, frame in enumerate(frames, 1):
        block = files.shm[block_of(ordinal) * BLOCK_SIZE :][:BLOCK_SIZE]
        assert struct.unpack_from("=I", block, pgno_offset(ordinal)) == (frame.pgno,)
    for number in range(block_of(len(frames)) + 1):
        first = first_frame(number)
        data = files.shm[number * BLOCK_SIZE :][:BLOCK_SIZE]
        slots = struct.unpack_from(f"={HASH_SLOTS}H", data, HASH_OFFSET)
        newest = {frames[first + slot - 2].pgno: 0 for slot in slots if slot}
        for pgno in newest:
            at, found = slot_hash(pgno), 0
            while slots[at]:
                if frames[first + slots[at] - 2].pgno == pgno:
                    found = max(found, slots[at])
                at = (at + 1) % HASH_SLOTS
            newest[pgno] = found
        indexed = frames[first - 1 : first_frame(number + 1) - 1]
        assert newest == {frame.pgno: ordinal for ordinal, frame in enumerate(indexed, 1)}


def test_blocks_change_at_the_documented_frames() -> None:
    """engine.md 11.5: block k ends at frame 4062 + 4096 k; numbers inside a block never meet its hash table."""
    for block in range(5):
        last = 4062 + 4096 * block
        assert (block_of(last), block_of(last + 1)) == (block, block + 1)
        assert first_frame(block + 1) == last + 1
        assert pgno_offset(last) == HASH_OFFSET - 4
        assert pgno_offset(last + 1) == 0
    assert (block_of(1), first_frame(0), pgno_offset(1)) == (0, 1, 136)


@given(header=HEADERS)
def test_header_reads_back(header: WalIndexHeader) -> None:
    assert WalIndexHeader.read(header.to_bytes() * 2) == header


def test_a_header_with_any_bit_flipped_is_refused() -> None:
    """All 48 bytes are covered by the checksum or are it."""
    good = WalIndexHeader(3, False, 4096, 7, 9, (1, 2), (3, 4)).to_bytes()
    for at in range(len(good)):
        bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        with pytest.raises(CorruptWalIndex):
            WalIndexHeader.parse(bad)


def test_copies_that_differ_are_torn() -> None:
    """engine.md T3: a writer between its two copies; both are whole, and still neither may be used."""
    old = WalIndexHeader(3, False, 4096, 7, 9, (1, 2), (3, 4))
    new = WalIndexHeader(4, False, 4096, 8, 9, (5, 6), (3, 4))
    torn = bytearray(old.to_bytes() * 2)
    torn[COPY_OFFSETS[1] :] = new.to_bytes()
    with pytest.raises(CorruptWalIndex, match="differ"):
        WalIndexHeader.read(torn)


def test_an_uninitialised_header_is_refused() -> None:
    """All zeros have a right checksum, but no SQLite has been here."""
    with pytest.raises(CorruptWalIndex, match="not initialised"):
        WalIndexHeader.read(bytes(96))


def test_a_header_of_another_version_is_refused() -> None:
    body = struct.pack("=I", 3007001) + WalIndexHeader(3, False, 4096, 7, 9, (1, 2), (3, 4)).to_bytes()[4:40]
    chain = checksum_direct(body, (0, 0), big_endian=sys.byteorder == "big")
    with pytest.raises(CorruptWalIndex, match="version 3007001"):
        WalIndexHeader.parse(body + struct.pack("=II", *chain))


def test_header_reads_well() -> None:
    header = WalIndexHeader(3, False, 4096, 7, 9, (1, 2), (3, 4))
    assert str(header) == "wal-index at frame 7, 9 pages, salts 00000003-00000004, change 3"


@given(data=st.binary(max_size=140))
def test_arbitrary_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(CorruptWalIndex):
        WalIndexHeader.read(data)


@pytest.mark.parametrize("size", [0, 39, 135])
def test_too_few_bytes_are_no_checkpoint_state(size: int) -> None:
    with pytest.raises(CorruptWalIndex, match="needs 40 bytes"):
        CheckpointInfo.parse(bytes(size))
