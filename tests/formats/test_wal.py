"""The -wal codec against SQLite itself: it recovers what we write, we read what it writes, both end at one frame."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walship.errors import CorruptWal
from walship.formats.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    CommitFrame,
    WalFrameHeader,
    WalHeader,
    WalScanner,
    build_frames,
    checksum,
    frame_offset,
    read_frames,
    valid_frames,
)
from walship.formats.wal_checksum import checksum_direct, checksum_fold, page_sums_fold

PAGE_SIZES = (512, 4096, 65536)
U32 = st.integers(0, 0xFFFFFFFF)
PAIRS = st.tuples(U32, U32)


def connect(path: Path, page_size: int) -> apsw.Connection:
    """A WAL database that is left with its -wal when closed: no checkpoint, ever, unless asked."""
    connection = apsw.Connection(str(path))
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    for pragma in (f"page_size={page_size}", "journal_mode=wal", "wal_autocheckpoint=0", "synchronous=off"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


def recovered_frames(connection: apsw.Connection) -> int:
    """mxFrame as SQLite sees it; 0 without a -wal."""
    frames = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()[0][1]
    assert isinstance(frames, int)
    return max(frames, 0)


def checkpoint(path: Path) -> int:
    """Let SQLite recover and truncate the -wal; returns how many frames its recovery kept."""
    connection = apsw.Connection(str(path))
    try:
        frames = recovered_frames(connection)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0] == 0
    finally:
        connection.close()
    return frames


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def split(wal: bytes) -> tuple[WalHeader, bytes]:
    return WalHeader.parse(wal), wal[WAL_HEADER_SIZE:]


def image_of(pages: dict[int, bytes], commit: int) -> bytes:
    return b"".join(pages[pgno] for pgno in range(1, commit + 1))


def pages_of(image: bytes, page_size: int) -> dict[int, bytes]:
    return {at // page_size + 1: image[at : at + page_size] for at in range(0, len(image), page_size)}


def busy_database(path: Path, page_size: int) -> None:
    """Ten transactions that grow, delete, shrink by VACUUM and change the schema."""
    rows = 20 if page_size < 65536 else 3
    connection = connect(path, page_size)
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)")
    for n in range(6):
        connection.execute("BEGIN")
        for i in range(rows):
            connection.execute("INSERT INTO t(a, b) VALUES (?, randomblob(?))", (i, page_size // 2))
        connection.execute("COMMIT")
        if n == 3:
            connection.execute("DELETE FROM t WHERE id % 2")
            connection.execute("VACUUM")
            connection.execute("CREATE INDEX i ON t(a)")
    connection.close()


@pytest.fixture(params=PAGE_SIZES)
def page_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def database(tmp_path: Path, page_size: int) -> Path:
    """A database file with everything still in its -wal."""
    path = tmp_path / "source.db"
    busy_database(path, page_size)
    return path


# the checksum


def numpy_checksum() -> Callable[..., tuple[int, int]]:
    module = pytest.importorskip("walship.formats.wal_checksum_numpy")
    function: Callable[..., tuple[int, int]] = module.checksum_numpy
    return function


@given(
    data=st.integers(0, 200).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n)),
    seed=PAIRS,
    big_endian=st.booleans(),
)
def test_fold_and_numpy_agree_with_the_definition(data: bytes, seed: tuple[int, int], big_endian: bool) -> None:
    """engine.md 6: both shortcuts are the running checksum, in both word orders and at every length."""
    expected = checksum_direct(data, seed, big_endian=big_endian)
    assert checksum_fold(data, seed, big_endian=big_endian) == expected
    assert numpy_checksum()(data, seed, big_endian=big_endian) == expected


@pytest.mark.parametrize("fill", [b"\xff", b"\0", b"\x01"])
def test_extreme_words_do_not_overflow_a_lane(page_size: int, fill: bytes) -> None:
    """The bound in `_fold` is exact: all bits set fills a lane to its last value, never beyond."""
    data, seed = fill * page_size, (0xFFFFFFFF, 0xFFFFFFFF)
    expected = checksum_direct(data, seed)
    assert checksum_fold(data, seed) == expected
    assert numpy_checksum()(data, seed) == expected


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("big_endian", [False, True])
def test_sums_of_many_pages_are_those_of_each(page_size: int, count: int, big_endian: bool) -> None:
    """A page's sum is its checksum from (0, 0), whichever way it is computed and however many come at once."""
    size = FRAME_HEADER_SIZE + page_size
    frames = random.Random(1).randbytes(size * count)
    expected = [
        checksum_direct(frames[at + FRAME_HEADER_SIZE : at + size], (0, 0), big_endian=big_endian)
        for at in range(0, len(frames), size)
    ]
    vector = pytest.importorskip("walship.formats.wal_checksum_numpy")
    assert list(page_sums_fold(frames, page_size, big_endian=big_endian)) == expected
    assert list(vector.page_sums_numpy(frames, page_size, big_endian=big_endian)) == expected


@pytest.mark.parametrize("function", [checksum_direct, checksum_fold, checksum])
def test_half_a_pair_of_words_is_refused(function: Callable[..., tuple[int, int]]) -> None:
    with pytest.raises(CorruptWal, match="multiples of 8"):
        function(bytes(100), (0, 0))


def test_without_numpy_the_fold_is_used() -> None:
    """numpy is an optional extra: the codec must import and work without it."""
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "from walship.formats import wal\n"
        "print(wal.checksum.__name__, wal.page_sums.__name__)\n"
        "frames, last = wal.build_frames([(1, bytes(512))], 1, page_size=512, salts=(1, 2), seed=(3, 4))\n"
        "print(len(list(wal.read_frames(frames, page_size=512, salts=(1, 2), seed=(3, 4)))))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.split() == ["checksum_fold", "page_sums_fold", "1"]


# against SQLite


def test_sqlite_recovers_a_wal_that_we_built(database: Path, page_size: int, tmp_path: Path) -> None:
    """Our frames over the old file give SQLite the new content, byte for byte after its checkpoint."""
    old = tmp_path / "copy.db"
    connection = connect(old, page_size)
    connection.execute("CREATE TABLE old(x)")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    checkpoint(database)
    new = database.read_bytes()
    pages = [*pages_of(new, page_size).items()]
    header = WalHeader.new(page_size, 7, (0xDEADBEEF, 0x80000001))
    half = len(pages) // 2
    first, seed = build_frames(pages[:half], 0, page_size=page_size, salts=header.salts, seed=header.checksum)
    second, _ = build_frames(pages[half:], len(pages), page_size=page_size, salts=header.salts, seed=seed)
    wal_of(old).write_bytes(header.to_bytes() + first + second)
    assert checkpoint(old) == len(pages)
    assert old.read_bytes() == new


def test_we_read_every_frame_that_sqlite_wrote(database: Path, page_size: int) -> None:
    """The chain holds to the last frame, each COMMIT is one commit frame, and the pages make SQLite's own image."""
    header, frames = split(wal_of(database).read_bytes())
    image = pages_of(database.read_bytes(), page_size)
    commits = []
    for frame, page in read_frames(frames, page_size=page_size, salts=header.salts, seed=header.checksum):
        image[frame.pgno] = bytes(page)
        if frame.is_commit:
            commits.append(frame.commit)
    assert checkpoint(database) == len(frames) // (FRAME_HEADER_SIZE + page_size)
    assert image_of(image, commits[-1]) == database.read_bytes()
    assert len(commits) == 10
    assert commits != sorted(commits)  # VACUUM shrank it


def test_sqlite_accepts_a_big_endian_wal_and_so_do_we(database: Path, page_size: int) -> None:
    """Magic ...83: a hot WAL from a big-endian host (engine.md T15)."""
    header, data = split(wal_of(database).read_bytes())
    swapped = WalHeader.new(page_size, header.checkpoint_sequence, header.salts, big_endian=True)
    size, chain, frames = FRAME_HEADER_SIZE + page_size, swapped.checksum, bytearray()
    for at in range(0, len(data), size):
        page = data[at + FRAME_HEADER_SIZE : at + size]
        chain = checksum(data[at : at + 8] + page, chain, big_endian=True)
        frames += data[at : at + 16] + struct.pack(">II", *chain) + page
    wal_of(database).write_bytes(swapped.to_bytes() + frames)
    extent = valid_frames(WalHeader.parse(wal_of(database).read_bytes()), [frames])
    assert extent.frames == len(frames) // size
    assert checkpoint(database) == extent.frames


@pytest.fixture(scope="module")
def residue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database whose -wal ends with spilled frames of a rolled-back transaction, all with current salts."""
    path = tmp_path_factory.mktemp("residue") / "residue.db"
    connection = connect(path, 512)
    connection.execute("PRAGMA cache_size=10").fetchall()
    connection.execute("CREATE TABLE t(a)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("BEGIN")
    for _ in range(100):
        connection.execute("INSERT INTO t VALUES (zeroblob(400))")
    connection.execute("ROLLBACK")
    connection.execute("INSERT INTO t VALUES (2)")
    connection.close()
    return path


def test_residue_of_a_rolled_back_transaction_does_not_belong(residue: Path) -> None:
    """ltx.md 3: frames after the last commit have the right salts; only the checksum chain tells."""
    header, frames = split(wal_of(residue).read_bytes())
    extent = valid_frames(header, [frames])
    assert extent.last_commit is not None
    after = WalFrameHeader.parse(frames, frame_offset(extent.frames + 1, 512) - WAL_HEADER_SIZE)
    assert (after.salt1, after.salt2) == header.salts
    assert extent.frames < len(frames) // 536 // 2
    with pytest.raises(CorruptWal, match=f"WAL frame {extent.frames + 1} breaks the chain"):
        list(read_frames(frames, page_size=512, salts=header.salts, seed=header.checksum))


def test_frames_of_an_open_transaction_are_no_commit(residue: Path) -> None:
    """A chain cut inside a transaction still ends at the commit before (R5: it exists once its end is there)."""
    header, frames = split(wal_of(residue).read_bytes())
    scanner = WalScanner(header)
    scanner.feed(frames)
    *_, before, last = scanner.take_commits()
    extent = valid_frames(header, [frames[: (last.frame - 1) * 536]])
    assert extent.last_commit == before


def damaged(wal: bytes) -> Iterator[bytes]:
    """Copies of `wal` with one bit flipped or its end cut, spread over it, the first frame's every byte among them."""
    chance = random.Random(5)
    for at in (*range(WAL_HEADER_SIZE + 30), *(chance.randrange(len(wal)) for _ in range(30))):
        yield wal[:at] + bytes([wal[at] ^ (1 << chance.randrange(8))]) + wal[at + 1 :]
    for _ in range(30):
        yield wal[: chance.randrange(len(wal))]


def test_we_and_sqlite_end_at_the_same_frame_of_a_damaged_wal(residue: Path, tmp_path: Path) -> None:
    """valid_frames is what recovery keeps: SQLite, opening the same damaged file, has the same mxFrame."""
    wal, copy = wal_of(residue).read_bytes(), tmp_path / "copy.db"
    for bad in damaged(wal):
        shutil.copy(residue, copy)
        wal_of(copy).write_bytes(bad)
        try:
            header, frames = split(bad)
        except CorruptWal:
            expected = 0
        else:
            extent = valid_frames(header, [frames])
            expected = extent.last_commit.frame if extent.last_commit else 0
        connection = apsw.Connection(str(copy))
        kept = recovered_frames(connection)
        connection.close()
        assert kept == expected


# headers, frames and the scanner by themselves


@given(page_size=st.sampled_from([1 << n for n in range(9, 17)]), sequence=U32, salts=PAIRS, big_endian=st.booleans())
def test_header_reads_back(page_size: int, sequence: int, salts: tuple[int, int], big_endian: bool) -> None:
    header = WalHeader.new(page_size, sequence, salts, big_endian=big_endian)
    assert WalHeader.parse(header.to_bytes()) == header


@given(pgno=U32, commit=U32, salts=PAIRS, chain=PAIRS)
def test_frame_header_reads_back(pgno: int, commit: int, salts: tuple[int, int], chain: tuple[int, int]) -> None:
    header = WalFrameHeader(pgno, commit, *salts, chain)
    assert WalFrameHeader.parse(b"xyz" + header.to_bytes(), 3) == header


def test_headers_have_the_documented_bytes() -> None:
    """docs/format.md 1, field by field."""
    header = WalHeader(65536, 2, 3, 4, True, (5, 6))
    assert header.to_bytes() == struct.pack(">8I", 0x377F0683, 3007000, 65536, 2, 3, 4, 5, 6)
    assert WalFrameHeader(1, 2, 3, 4, (5, 6)).to_bytes() == struct.pack(">6I", 1, 2, 3, 4, 5, 6)


@given(data=st.binary(max_size=80))
def test_arbitrary_bytes_are_no_header(data: bytes) -> None:
    """Only our own error, whatever comes."""
    with pytest.raises(CorruptWal):
        WalHeader.parse(data)


def test_a_header_of_a_newer_version_is_named_as_such() -> None:
    body = WalHeader.new(512, 0, (1, 2)).to_bytes()[:24]
    body = body[:4] + struct.pack(">I", 3007001) + body[8:]
    with pytest.raises(CorruptWal, match="version 3007001"):
        WalHeader.parse(body + struct.pack(">II", *checksum_direct(body, (0, 0))))


@pytest.mark.parametrize("size", [0, 256, 1000, 131072])
def test_an_impossible_page_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptWal, match="page size"):
        WalHeader.new(size, 0, (1, 2))


def test_headers_and_extents_read_well() -> None:
    """An operator meets them in messages and logs."""
    header = WalHeader.new(512, 3, (0xAB, 0xCD))
    assert str(header) == "WAL of 512-byte pages, sequence 3, salts 000000ab-000000cd, little-endian"
    assert str(WalFrameHeader(7, 0, 1, 2, (3, 4))) == "frame of page 7"
    assert str(WalFrameHeader(7, 9, 1, 2, (3, 4))) == "frame of page 7, commit of 9 pages"
    assert str(valid_frames(header, [])) == "0 intact frames, 0 commits, the last at frame 0"


def test_a_cut_frame_header_is_refused() -> None:
    with pytest.raises(CorruptWal, match="at offset 5, 20 are there"):
        WalFrameHeader.parse(bytes(25), 5)


PAGES = st.lists(st.tuples(st.integers(1, 0xFFFFFFFF), st.binary(min_size=512, max_size=512)), min_size=1, max_size=6)


@given(pages=PAGES, commit=st.integers(1, 0xFFFFFFFF), salts=PAIRS, seed=PAIRS)
@settings(max_examples=50)
def test_built_frames_read_back(
    pages: list[tuple[int, bytes]], commit: int, salts: tuple[int, int], seed: tuple[int, int]
) -> None:
    """Pages come back in order, only the last frame is a commit, and its checksum is the one returned."""
    data, last = build_frames(pages, commit, page_size=512, salts=salts, seed=seed)
    frames = list(read_frames(data, page_size=512, salts=salts, seed=seed))
    assert [(frame.pgno, bytes(page)) for frame, page in frames] == pages
    assert [frame.commit for frame, _ in frames] == [0] * (len(pages) - 1) + [commit]
    assert frames[-1][0].checksum == last


def test_frames_stand_where_the_layout_says(small: tuple[WalHeader, bytes, list[CommitFrame]]) -> None:
    """docs/format.md 1: frame n begins at 32 + (n - 1) * (24 + page size)."""
    header, frames, commits = small
    wal = header.to_bytes() + frames
    for frame, commit, chain in commits:
        found = WalFrameHeader.parse(wal, frame_offset(frame, 512))
        assert (found.commit, found.checksum) == (commit, chain)
    assert (frame_offset(1, 512), frame_offset(10, 512)) == (32, len(wal))


def test_no_pages_are_no_frames() -> None:
    assert build_frames([], 5, page_size=512, salts=(1, 2), seed=(3, 4)) == (bytearray(), (3, 4))


@pytest.mark.parametrize("page", [(1, bytes(511)), (0, bytes(512)), (1 << 32, bytes(512))])
def test_a_page_that_no_frame_can_hold_is_refused(page: tuple[int, bytes]) -> None:
    with pytest.raises(CorruptWal, match=f"page {page[0]} has"):
        build_frames([(1, bytes(512)), page], 5, page_size=512, salts=(1, 2), seed=(3, 4))


def test_half_a_frame_is_refused() -> None:
    data, _ = build_frames([(1, bytes(512))], 1, page_size=512, salts=(1, 2), seed=(3, 4))
    with pytest.raises(CorruptWal, match="not whole frames"):
        list(read_frames(data[:-1], page_size=512, salts=(1, 2), seed=(3, 4)))


def test_frame_of_page_zero_does_not_belong() -> None:
    """As in wal.c: a frame for page 0 is invalid even when its checksum agrees."""
    header = WalHeader.new(512, 0, (1, 2))
    chain = checksum_direct(bytes(8) + bytes(512), header.checksum)
    frame = WalFrameHeader(0, 0, 1, 2, chain).to_bytes() + bytes(512)
    assert not WalScanner(header).feed(frame)


@pytest.fixture(scope="module")
def small() -> tuple[WalHeader, bytes, list[CommitFrame]]:
    """Nine frames of three transactions, and where these end."""
    header, chance = WalHeader.new(512, 0, (77, 88)), random.Random(9)
    frames, chain, commits = bytearray(), header.checksum, []
    for count, commit in ((1, 1), (5, 6), (3, 4)):
        pages = [(n + 1, chance.randbytes(512)) for n in range(count)]
        data, chain = build_frames(pages, commit, page_size=512, salts=header.salts, seed=chain)
        frames += data
        commits.append(CommitFrame(len(frames) // 536, commit, chain))
    return header, bytes(frames), commits


def test_a_flip_of_any_byte_ends_the_chain_before_its_frame(small: tuple[WalHeader, bytes, list[CommitFrame]]) -> None:
    """No byte of a frame is unprotected, and damage costs nothing that stands before it."""
    header, frames, _ = small
    for at in range(len(frames)):
        bad = frames[:at] + bytes([frames[at] ^ 0x40]) + frames[at + 1 :]
        assert valid_frames(header, [bad]).frames == at // 536


def test_a_flip_of_any_byte_of_the_header_is_refused(small: tuple[WalHeader, bytes, list[CommitFrame]]) -> None:
    good = small[0].to_bytes()
    for at in range(WAL_HEADER_SIZE):
        with pytest.raises(CorruptWal):
            WalHeader.parse(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


@given(cuts=st.lists(st.integers(0, 9 * 536), max_size=8), end=st.integers(0, 9 * 536))
def test_scanner_does_not_care_how_its_bytes_are_cut(
    small: tuple[WalHeader, bytes, list[CommitFrame]], cuts: list[int], end: int
) -> None:
    """Any prefix of a WAL, in any pieces, gives the commits that end inside it."""
    header, frames, commits = small
    edges = [0, *sorted(cut for cut in cuts if cut < end), end]
    scanner = WalScanner(header)
    for low, high in pairwise(edges):
        assert scanner.feed(frames[low:high])
    assert scanner.frame == end // 536
    expected = [commit for commit in commits if commit.frame * 536 <= end]
    assert (scanner.take_commits(), scanner.commit_count) == (expected, len(expected))
    assert scanner.last_commit == (expected[-1] if expected else None)


def test_scanner_goes_on_from_a_known_frame(small: tuple[WalHeader, bytes, list[CommitFrame]]) -> None:
    """R7: a -wal that continues the recorded base is counted from there; another base is noticed at once."""
    header, frames, (base, *rest) = small
    scanner = WalScanner(header, frame=base.frame, checksum=base.checksum)
    assert scanner.feed(frames[base.frame * 536 :])
    assert scanner.take_commits() == rest
    stranger = WalScanner(header, frame=base.frame, checksum=(1, 2))
    assert not stranger.feed(frames[base.frame * 536 :])
    assert stranger.commit_count == 0


def test_nothing_counts_after_the_chain_broke(small: tuple[WalHeader, bytes, list[CommitFrame]]) -> None:
    header, frames, commits = small
    scanner = WalScanner(header)
    assert not scanner.feed(frames[:536] + bytes(536))
    assert not scanner.feed(frames[536:])
    assert scanner.take_commits() == commits[:1]
    assert scanner.take_commits() == []


def test_a_start_inside_the_wal_needs_its_checksum() -> None:
    with pytest.raises(ValueError, match="checksum"):
        WalScanner(WalHeader.new(512, 0, (1, 2)), frame=3)
