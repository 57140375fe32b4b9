"""The page index at the end of an LTX file: reading single pages without reading the file."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Self

from walship.errors import CorruptLtx
from walship.formats.checksum import Buffer
from walship.formats.ltx.header import HEADER_SIZE, TRAILER_SIZE, LtxHeader
from walship.formats.ltx.page import END_OF_PAGES, PAGE_HEADER_SIZE, read_page_header, unpack_page

__all__ = ["PageIndex", "ReadAt", "open_index", "page_index", "read_page"]

_SIZE = struct.Struct(">Q")
_FIXED_TAIL = _SIZE.size + TRAILER_SIZE
_TAIL_GUESS = 16 << 10  # one read of this much usually holds a small file, or a larger one's index, whole

ReadAt = Callable[[int, int], bytes]
"""`read_at(offset, n)` returns the n bytes at an offset of an LTX file."""


class PageIndex:
    """Where each page frame of a file lies; 12 bytes of memory a page.

    Frames follow each other without gaps, from HEADER_SIZE on, so the end of each is the start of the next.
    """

    __slots__ = ("_ends", "_pgnos")

    def __init__(self) -> None:
        self._pgnos = array("I")
        self._ends = array("Q", (HEADER_SIZE,))

    def __len__(self) -> int:
        return len(self._pgnos)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield (pgno, offset, size in bytes), ascending by pgno."""
        start = HEADER_SIZE
        for pgno, end in zip(self._pgnos, self._ends[1:], strict=True):
            yield pgno, start, end - start
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageIndex) and self._pgnos == other._pgnos and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    @property
    def end(self) -> int:
        """Offset just after the last page frame."""
        return self._ends[-1]

    @property
    def last_pgno(self) -> int:
        """The highest page, 0 when there is none."""
        return self._pgnos[-1] if self._pgnos else 0

    def add(self, pgno: int, size_bytes: int) -> None:
        """Note the next page frame."""
        self._pgnos.append(pgno)
        self._ends.append(self._ends[-1] + size_bytes)

    def find(self, pgno: int) -> tuple[int, int] | None:
        """Return (offset, size in bytes) of a page's frame, or None when the file does not hold the page."""
        at = bisect_left(self._pgnos, pgno)
        if at == len(self._pgnos) or self._pgnos[at] != pgno:
            return None
        return self._ends[at], self._ends[at + 1] - self._ends[at]

    def to_bytes(self) -> bytes:
        """Return the index as stored: three varints a page, then a zero."""
        out = bytearray()
        for entry in self:
            for value in entry:
                while value > 0x7F:
                    out.append(value & 0x7F | 0x80)
                    value >>= 7
                out.append(value)
        out.append(0)
        return bytes(out)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read what `to_bytes` wrote, all of it. Raises CorruptLtx when anything is out of order."""
        index = cls()
        at, last = 0, 0
        while True:
            pgno, at = _read_varint(data, at)
            if pgno == 0:
                break
            offset, at = _read_varint(data, at)
            size, at = _read_varint(data, at)
            if not last < pgno < 1 << 32 or offset != index.end or not PAGE_HEADER_SIZE < size < 1 << 20:
                raise CorruptLtx(f"page index: page {pgno} at {offset} with {size} bytes follows page {last}")
            index.add(pgno, size)
            last = pgno
        if at != len(data):
            raise CorruptLtx(f"page index: {len(data) - at} bytes after its end")
        return index


def _read_varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(at, min(at + 9, len(data))):  # noqa: B020 - nine groups hold 63 bits, more than any field needs
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if not byte and shift:
                break
            return value, at + 1
        shift += 7
    raise CorruptLtx(f"page index: no number at byte {at}")


def page_index(tail: Buffer) -> PageIndex:
    """Return the page index from the last bytes of a file; they must hold all of it. Raises CorruptLtx."""
    if len(tail) < _FIXED_TAIL:
        raise CorruptLtx(f"the end of an LTX file has at least {_FIXED_TAIL} bytes, {len(tail)} are there")
    end = len(tail) - _FIXED_TAIL
    (size,) = _SIZE.unpack_from(tail, end)
    if size > end:
        raise CorruptLtx(f"the page index has {size} bytes, {end} are there")
    return PageIndex.parse(tail[end - size : end])


def open_index(read_at: ReadAt, size_bytes: int) -> tuple[LtxHeader, PageIndex]:
    """Return header and page index of the file of `size_bytes` behind `read_at`, in two reads or three.

    Checks that header, index and size agree; not the file checksum, for which all of the file must be read: the
    caller has it from a frame's or a record's checksums. Raises CorruptLtx.
    """
    if size_bytes < HEADER_SIZE + len(END_OF_PAGES) + 1 + _FIXED_TAIL:
        raise CorruptLtx(f"a file of {size_bytes} bytes is too short for LTX")
    guess = min(size_bytes, _TAIL_GUESS)
    tail = _read(read_at, size_bytes - guess, guess)
    header = LtxHeader.parse(tail if guess == size_bytes else _read(read_at, 0, HEADER_SIZE))
    (size,) = _SIZE.unpack_from(tail, guess - _FIXED_TAIL)
    whole = len(END_OF_PAGES) + size + _FIXED_TAIL
    if HEADER_SIZE + whole > size_bytes:
        raise CorruptLtx(f"the page index has {size} bytes in a file of {size_bytes}")
    tail = tail[guess - whole :] if whole <= guess else _read(read_at, size_bytes - whole, whole)
    index = page_index(tail)
    if index.end != size_bytes - whole or tail[: len(END_OF_PAGES)] != END_OF_PAGES:
        raise CorruptLtx(f"the page index ends at {index.end}, but the pages end at {size_bytes - whole}")
    if index.last_pgno > header.commit:
        raise CorruptLtx(f"page {index.last_pgno} in a file for {header.commit} pages")
    return header, index


def read_page(
    read_at: ReadAt, offset: int, size: int, page_size: int, *, expected_pgno: int | None = None
) -> tuple[int, bytes]:
    """Return (pgno, page) of the page frame that an index places at `offset` with `size` bytes.

    Raises CorruptLtx when that is not a page frame, or not `expected_pgno`'s.
    """
    if size <= PAGE_HEADER_SIZE:
        raise CorruptLtx(f"a page frame of {size} bytes at {offset}; nobody writes that")
    frame = _read(read_at, offset, size)
    pgno, found = read_page_header(frame, 0, page_size)
    if not pgno or found != size:
        raise CorruptLtx(f"no page frame of {size} bytes at {offset}")
    if expected_pgno is not None and pgno != expected_pgno:
        raise CorruptLtx(f"page {pgno} at {offset}, where page {expected_pgno} should be")
    return pgno, unpack_page(pgno, memoryview(frame)[PAGE_HEADER_SIZE:], page_size)


def _read(read_at: ReadAt, offset: int, size: int) -> bytes:
    data = read_at(offset, size)
    if len(data) != size:
        raise CorruptLtx(f"{size} bytes are due at {offset}, {len(data)} are there")
    return data
