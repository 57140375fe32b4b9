"""The -wal file: its header, its frames, and how far its checksum chain reaches.

Bytes in, values out; no file is opened here. Layouts: docs/format.md 1, after the SQLite file format, section 4, and
wal.c. A frame belongs to the WAL iff its salts are the header's, its pgno is not 0 and the running checksum, seeded
by the frame before it, agrees; a transaction exists iff its last frame (`commit` not 0) belongs. Salts alone prove
nothing: frames of a rolled-back transaction stay in the file with current salts (ltx.md 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from walship.errors import CorruptWal
from walship.formats.wal_checksum import MASK, Buffer, Checksum, checksum_direct, power

try:
    from walship.formats.wal_checksum_numpy import checksum_numpy as checksum
    from walship.formats.wal_checksum_numpy import page_sums_numpy as page_sums
except ImportError:  # numpy is an optional extra; the fold is 10 to 60 times slower and always there
    from walship.formats.wal_checksum import checksum_fold as checksum
    from walship.formats.wal_checksum import page_sums_fold as page_sums

__all__ = [
    "FRAME_HEADER_LAYOUT",
    "FRAME_HEADER_SIZE",
    "WAL_HEADER_LAYOUT",
    "WAL_HEADER_SIZE",
    "CommitFrame",
    "WalExtent",
    "WalFrameHeader",
    "WalHeader",
    "WalScanner",
    "build_frames",
    "check_page_size",
    "checksum",
    "frame_offset",
    "page_sums",
    "read_frames",
    "valid_frames",
]

WAL_HEADER_LAYOUT = struct.Struct(">IIIIIIII")
WAL_HEADER_SIZE = WAL_HEADER_LAYOUT.size
FRAME_HEADER_LAYOUT = struct.Struct(">IIIIII")
FRAME_HEADER_SIZE = FRAME_HEADER_LAYOUT.size

MAGIC = 0x377F0682  # bit 0 set: the checksum reads its words big-endian
FORMAT_VERSION = 3007000
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 512, 65536

_BATCH_BYTES = 1 << 20  # verified at once: enough to amortise the vector set-up, small enough to stay in cache
_PAIR = {False: struct.Struct("<II"), True: struct.Struct(">II")}


def check_page_size(page_size: int) -> None:
    """Raise CorruptWal unless `page_size` (bytes) is one SQLite can have: a power of two from 512 to 65536."""
    if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
        raise CorruptWal(f"page size {page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")


def frame_offset(frame: int, page_size: int) -> int:
    """Byte offset of the header of frame number `frame` (from 1) in a -wal file."""
    return WAL_HEADER_SIZE + (frame - 1) * (FRAME_HEADER_SIZE + page_size)


@dataclass(frozen=True, slots=True)
class WalHeader:
    """The first 32 bytes of a -wal file; one per generation. `checksum` seeds frame 1."""

    page_size: int
    checkpoint_sequence: int
    salt1: int
    salt2: int
    big_endian: bool
    checksum: Checksum

    @classmethod
    def new(cls, page_size: int, checkpoint_sequence: int, salts: tuple[int, int], *, big_endian: bool = False) -> Self:
        """A header with its checksum computed. Raises CorruptWal for an impossible page size."""
        check_page_size(page_size)
        body = _header_body(page_size, checkpoint_sequence, salts, big_endian=big_endian)
        seed = checksum_direct(body, (0, 0), big_endian=big_endian)
        return cls(page_size, checkpoint_sequence, *salts, big_endian, seed)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read and check the first 32 bytes of `data`.

        Raises CorruptWal when they are not a WAL header; SQLite takes such a file for an empty WAL (one with a newer
        version it refuses to open).
        """
        if len(data) < WAL_HEADER_SIZE:
            raise CorruptWal(f"a WAL header needs {WAL_HEADER_SIZE} bytes, {len(data)} are there")
        magic, version, page_size, sequence, salt1, salt2, sum1, sum2 = WAL_HEADER_LAYOUT.unpack_from(data)
        if magic & ~1 != MAGIC:
            raise CorruptWal(f"not a WAL header: magic {magic:08x}")
        check_page_size(page_size)
        if checksum_direct(data[: WAL_HEADER_SIZE - 8], (0, 0), big_endian=bool(magic & 1)) != (sum1, sum2):
            raise CorruptWal("the checksum of the WAL header does not agree with its bytes")
        if version != FORMAT_VERSION:
            raise CorruptWal(f"WAL format version {version} is unknown, expected {FORMAT_VERSION}")
        return cls(page_size, sequence, salt1, salt2, bool(magic & 1), (sum1, sum2))

    @property
    def salts(self) -> tuple[int, int]:
        """Both salts, as they compare with frames and with the wal-index header."""
        return self.salt1, self.salt2

    def to_bytes(self) -> bytes:
        body = _header_body(self.page_size, self.checkpoint_sequence, self.salts, big_endian=self.big_endian)
        return body + _PAIR[True].pack(*self.checksum)

    def __str__(self) -> str:
        order = "big" if self.big_endian else "little"
        salts = f"{self.salt1:08x}-{self.salt2:08x}"
        return f"WAL of {self.page_size}-byte pages, sequence {self.checkpoint_sequence}, salts {salts}, {order}-endian"


def _header_body(page_size: int, sequence: int, salts: tuple[int, int], *, big_endian: bool) -> bytes:
    """The 24 bytes of a WAL header that its checksum covers."""
    return WAL_HEADER_LAYOUT.pack(MAGIC | big_endian, FORMAT_VERSION, page_size, sequence, *salts, 0, 0)[:-8]


@dataclass(frozen=True, slots=True)
class WalFrameHeader:
    """The 24 bytes before each page. `commit` is the database size in pages, or 0 inside a transaction."""

    pgno: int
    commit: int
    salt1: int
    salt2: int
    checksum: Checksum

    @classmethod
    def parse(cls, data: Buffer, offset: int = 0) -> Self:
        """Read 24 bytes at `offset`. Nothing but their number can be checked without the frame before."""
        if len(data) < offset + FRAME_HEADER_SIZE:
            have = max(0, len(data) - offset)
            raise CorruptWal(f"a frame header needs {FRAME_HEADER_SIZE} bytes at offset {offset}, {have} are there")
        pgno, commit, salt1, salt2, sum1, sum2 = FRAME_HEADER_LAYOUT.unpack_from(data, offset)
        return cls(pgno, commit, salt1, salt2, (sum1, sum2))

    @property
    def is_commit(self) -> bool:
        return self.commit != 0

    def to_bytes(self) -> bytes:
        return FRAME_HEADER_LAYOUT.pack(self.pgno, self.commit, self.salt1, self.salt2, *self.checksum)

    def __str__(self) -> str:
        end = f", commit of {self.commit} pages" if self.commit else ""
        return f"frame of page {self.pgno}{end}"


def build_frames(
    pages: Sequence[tuple[int, Buffer]],
    commit: int,
    *,
    page_size: int,
    salts: tuple[int, int],
    seed: Checksum,
) -> tuple[bytearray, Checksum]:
    """Frames for `pages` (pgno, data) in that order, little-endian, and the checksum of the last one.

    Only the last frame carries `commit` (pages); give 0 for a chunk that does not end its transaction. `seed` is the
    checksum of the frame before, or of the WAL header. Raises CorruptWal for a page number or page of the wrong size.
    """
    pack = FRAME_HEADER_LAYOUT.pack
    parts: list[Buffer] = []
    for pgno, page in pages:
        if len(page) != page_size or not 0 < pgno <= MASK:
            raise CorruptWal(f"page {pgno} has {len(page)} bytes; a frame needs a page number and {page_size} bytes")
        parts += (pack(pgno, 0, *salts, 0, 0), page)
    frames = bytearray().join(parts)
    if not frames:
        return frames, seed
    size = FRAME_HEADER_SIZE + page_size
    FRAME_HEADER_LAYOUT.pack_into(frames, len(frames) - size, pages[-1][0], commit, *salts, 0, 0)
    before, here, after = power(page_size)
    unpack, put = _PAIR[False].unpack_from, _PAIR[True].pack_into
    s1, s2 = seed
    for at, (t1, t2) in zip(range(0, len(frames), size), page_sums(frames, page_size), strict=True):
        x0, x1 = unpack(frames, at)
        s1 += x0 + s2
        s2 += x1 + s1
        s1, s2 = (before * s1 + here * s2 + t1) & MASK, (here * s1 + after * s2 + t2) & MASK
        put(frames, at + 16, s1, s2)
    return frames, (s1, s2)


def _intact(
    frames: memoryview, page_size: int, salts: tuple[int, int], seed: Checksum, *, big_endian: bool
) -> Iterator[tuple[int, int, int, Checksum]]:
    """(offset, pgno, commit, checksum) of each whole frame in `frames` until one does not belong (module docstring)."""
    size = FRAME_HEADER_SIZE + page_size
    step = max(1, _BATCH_BYTES // size) * size
    before, here, after = power(page_size)
    unpack, words = FRAME_HEADER_LAYOUT.unpack_from, _PAIR[big_endian].unpack_from
    s1, s2 = seed
    for start in range(0, len(frames), step):
        batch = frames[start : start + step]
        for at, (t1, t2) in zip(
            range(0, len(batch), size), page_sums(batch, page_size, big_endian=big_endian), strict=True
        ):
            pgno, commit, salt1, salt2, sum1, sum2 = unpack(batch, at)
            x0, x1 = words(batch, at)
            s1 += x0 + s2
            s2 += x1 + s1
            s1, s2 = (before * s1 + here * s2 + t1) & MASK, (here * s1 + after * s2 + t2) & MASK
            if sum1 != s1 or sum2 != s2 or (salt1, salt2) != salts or not pgno:
                return
            yield start + at, pgno, commit, (s1, s2)


def read_frames(
    data: Buffer,
    *,
    page_size: int,
    salts: tuple[int, int],
    seed: Checksum,
    big_endian: bool = False,
    first_frame: int = 1,
) -> Iterator[tuple[WalFrameHeader, memoryview]]:
    """Each frame of `data` (whole frames, every one expected to belong) as its header and a view of its page.

    `seed` is the checksum of the frame before; `first_frame` the number of the first one, for messages. Raises
    CorruptWal at the first frame that does not belong, after yielding those before it: for frames at or below mxFrame
    that is damage. To find out how far an unknown -wal reaches, use `WalScanner`.
    """
    view = memoryview(data)
    size = FRAME_HEADER_SIZE + page_size
    if len(view) % size:
        raise CorruptWal(f"{len(view)} bytes are not whole frames of {size} bytes")
    done = 0
    for at, pgno, commit, chain in _intact(view, page_size, salts, seed, big_endian=big_endian):
        yield WalFrameHeader(pgno, commit, *salts, chain), view[at + FRAME_HEADER_SIZE : at + size]
        done += 1
    if done * size < len(view):
        raise CorruptWal(
            f"WAL frame {first_frame + done} breaks the chain: its page number, salts or checksum do not continue "
            f"frame {first_frame + done - 1}"
        )


class CommitFrame(NamedTuple):
    """The last frame of a transaction: its number, the database size in pages, the running checksum."""

    frame: int
    commit: int
    checksum: Checksum


class WalScanner:
    """Follows the checksum chain of a -wal of any size, chunk by chunk, and finds its commit frames.

    Start at the beginning of a generation, or after frame number `frame` whose checksum is `checksum`. Feed it the
    bytes from there on, cut anywhere. The chain ends at the first frame that does not belong; nothing after counts.
    """

    __slots__ = ("_commits", "_header", "_rest", "checksum", "commit_count", "frame", "intact", "last_commit")

    def __init__(self, header: WalHeader, *, frame: int = 0, checksum: Checksum | None = None) -> None:
        if frame and checksum is None:
            raise ValueError("to start after a frame its checksum is needed")
        self._header = header
        self._rest = b""
        self._commits: list[CommitFrame] = []
        self.frame = frame
        self.checksum = header.checksum if checksum is None else checksum
        self.intact = True
        self.commit_count = 0
        self.last_commit: CommitFrame | None = None

    def feed(self, data: Buffer) -> bool:
        """Take the next bytes; True while the chain holds. An incomplete frame waits for its rest."""
        if not self.intact:
            return False
        header, size = self._header, FRAME_HEADER_SIZE + self._header.page_size
        view = memoryview(self._rest + data if self._rest else data)
        whole = len(view) - len(view) % size
        self._rest = bytes(view[whole:])
        first = self.frame
        frames = _intact(view[:whole], header.page_size, header.salts, self.checksum, big_endian=header.big_endian)
        for _, _, commit, chain in frames:
            self.frame += 1
            self.checksum = chain
            if commit:
                self.commit_count += 1
                self.last_commit = CommitFrame(self.frame, commit, chain)
                self._commits.append(self.last_commit)
        self.intact = (self.frame - first) * size == whole
        return self.intact

    def take_commits(self) -> list[CommitFrame]:
        """The commit frames found since the last call, in order. Take them now and then: they are kept until then."""
        taken, self._commits = self._commits, []
        return taken


@dataclass(frozen=True, slots=True)
class WalExtent:
    """How far a -wal reaches: frames whose chain holds, and the last commit frame, where SQLite's recovery ends."""

    frames: int
    commit_count: int
    last_commit: CommitFrame | None

    def __str__(self) -> str:
        last = self.last_commit.frame if self.last_commit else 0
        return f"{self.frames} intact frames, {self.commit_count} commits, the last at frame {last}"


def valid_frames(header: WalHeader, chunks: Iterable[Buffer]) -> WalExtent:
    """What SQLite's recovery would keep of a -wal: `header`, then the bytes after it in `chunks`, cut anywhere."""
    scanner = WalScanner(header)
    for chunk in chunks:
        if not scanner.feed(chunk):
            break
        scanner.take_commits()
    return WalExtent(scanner.frame, scanner.commit_count, scanner.last_commit)
