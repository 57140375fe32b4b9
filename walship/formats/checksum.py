"""The rolling database checksum: one number for the whole content, kept current at the price of one CRC a page.

It is the XOR of all page checksums, so a commit replaces the old values of the pages it changed by the new ones, and
the old pages need not be read: `PageChecksums` remembers 8 bytes for each page (2 MB a GB). The same array tells
which pages two states differ in (R7, R8). Source of the definitions: LTX (docs/format.md 3).
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import xor
from typing import Self

from fastcrc import crc64

from walship.errors import CorruptData
from walship.formats.wal import check_page_size
from walship.formats.wal_checksum import Buffer

__all__ = ["FLAG", "PAGE_CHECKSUMS_LAYOUT", "Buffer", "PageChecksums", "lock_pgno", "page_checksum"]

FLAG = 1 << 63  # set in every checksum, so that 0 means "none"
_LOCK_BYTE = 0x40000000  # SQLite locks bytes from here on; the page that holds them is never used
_MAX_PGNO = 0xFFFFFFFE
_BLOCK = 512  # entries compared at once by `differing`

PAGE_CHECKSUMS_LAYOUT = struct.Struct(">4sIIQ")
_MAGIC = b"WSC1"
_CRC = struct.Struct(">Q")

_crc = crc64.go_iso


def page_checksum(pgno: int, page: Buffer) -> int:
    """Checksum of one page: CRC-64/GO-ISO of its number (u32, big-endian) and content, with FLAG."""
    return FLAG | int(_crc(page, _crc(pgno.to_bytes(4, "big"))))


def lock_pgno(page_size: int) -> int:
    """Number of the page at byte 0x40000000, which SQLite never writes and no frame ever holds."""
    return _LOCK_BYTE // page_size + 1


class PageChecksums:
    """The checksum of every page of one database state, and their XOR.

    It belongs to one thread. A method that raises leaves it as it was.
    """

    __slots__ = ("_array", "_lock_pgno", "_xor", "page_size")

    def __init__(self, page_size: int) -> None:
        """The empty database. `page_size` in bytes. Raises CorruptData for one that SQLite cannot have."""
        check_page_size(page_size)
        self.page_size = page_size
        self._lock_pgno = lock_pgno(page_size)
        self._array = array("Q")  # entry pgno-1; 0 for the lock page
        self._xor = 0

    @property
    def commit(self) -> int:
        """Size of the database in pages."""
        return len(self._array)

    @property
    def rolling(self) -> int:
        """The rolling database checksum; FLAG alone when the database is empty."""
        return FLAG | self._xor

    def get(self, pgno: int) -> int:
        """Checksum of page `pgno` (from 1); 0 for the lock page and beyond the end."""
        return self._array[pgno - 1] if 0 < pgno <= len(self._array) else 0

    def apply(self, pages: Iterable[tuple[int, Buffer]], commit: int) -> int:
        """Go to the state after `pages` (number, content) were written and the size became `commit` pages.

        Returns the new rolling checksum. Of a page given twice the last counts; the lock page and pages above
        `commit` are passed over. Raises CorruptData when a page has the wrong size or number, or when the database
        grows by a page that is not there (growth rule, ltx.md 3): then frames were lost.
        """
        return self.set_many(self._checksums(pages), commit)

    def set_many(self, checksums: Mapping[int, int], commit: int) -> int:
        """`apply` for page checksums already computed, by page number."""
        after = self._xor_after(checksums, commit)
        pages = self._array
        if commit > len(pages):
            pages.frombytes(bytes(8 * (commit - len(pages))))
        else:
            del pages[commit:]
        for pgno, checksum in checksums.items():
            if pgno <= commit and pgno != self._lock_pgno:
                pages[pgno - 1] = checksum
        self._xor = after
        return FLAG | after

    def preview_many(self, checksums: Mapping[int, int], commit: int) -> int:
        """What `set_many` would return, changing nothing."""
        return FLAG | self._xor_after(checksums, commit)

    def copy(self) -> PageChecksums:
        """An independent copy of this state."""
        twin = PageChecksums(self.page_size)
        twin._array = self._array[:]
        twin._xor = self._xor
        return twin

    def differing(self, other: PageChecksums) -> Iterator[int]:
        """Numbers of the pages that are not equal in both states, ascending; those only one of them has included."""
        if other.page_size != self.page_size:
            raise CorruptData(f"pages of {self.page_size} and {other.page_size} bytes cannot be compared")
        mine, theirs = self._array, other._array
        common = min(len(mine), len(theirs))
        for start in range(0, common, _BLOCK):
            ours, others = mine[start : min(start + _BLOCK, common)], theirs[start : min(start + _BLOCK, common)]
            if ours != others:
                yield from (start + i + 1 for i, (a, b) in enumerate(zip(ours, others, strict=True)) if a != b)
        longest = max(len(mine), len(theirs))
        yield from (pgno for pgno in range(common + 1, longest + 1) if pgno != self._lock_pgno)

    def to_bytes(self) -> bytes:
        """The state as a self-checking record (docs/format.md 3)."""
        header = PAGE_CHECKSUMS_LAYOUT.pack(_MAGIC, self.page_size, len(self._array), self.rolling)
        body = header + _big_endian(self._array).tobytes()
        return body + _CRC.pack(FLAG | _crc(body))

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read `to_bytes` back. Raises CorruptData when a byte is missing, changed or too many."""
        view = memoryview(data)
        start, end = PAGE_CHECKSUMS_LAYOUT.size, len(view) - _CRC.size
        if end < start:
            raise CorruptData(f"a page checksum record has at least {start + _CRC.size} bytes, {len(view)} are there")
        magic, page_size, commit, rolling = PAGE_CHECKSUMS_LAYOUT.unpack_from(view)
        if magic != _MAGIC:
            raise CorruptData(f"not a page checksum record: magic {magic!r}")
        if end != start + 8 * commit:
            raise CorruptData(f"a page checksum record of {commit} pages does not have {len(view)} bytes")
        if _CRC.unpack_from(view, end)[0] != FLAG | _crc(view[:end]):
            raise CorruptData(
                "the checksum of the page checksum record does not agree with its bytes; scan the database"
            )
        state = cls(page_size)
        state._array.frombytes(view[start:end])
        state._array = _big_endian(state._array)
        state._xor = reduce(xor, state._array, 0) & ~FLAG
        if state.rolling != rolling:
            raise CorruptData("the page checksum record contradicts its own rolling checksum; scan the database")
        return state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageChecksums):
            return NotImplemented
        return self.page_size == other.page_size and self._array == other._array

    def __repr__(self) -> str:
        return f"<PageChecksums of {self.commit} pages of {self.page_size} bytes, rolling {self.rolling:016x}>"

    def _checksums(self, pages: Iterable[tuple[int, Buffer]]) -> dict[int, int]:
        checksums = {}
        for pgno, page in pages:
            if len(page) != self.page_size or not 0 < pgno <= _MAX_PGNO:
                raise CorruptData(
                    f"page {pgno} has {len(page)} bytes; expected a page number and {self.page_size} bytes"
                )
            checksums[pgno] = page_checksum(pgno, page)
        return checksums

    def _xor_after(self, checksums: Mapping[int, int], commit: int) -> int:
        """The XOR after a change, FLAG cleared. Raises CorruptData when the growth rule is broken."""
        pages, size, lock = self._array, len(self._array), self._lock_pgno
        result = reduce(xor, pages[commit:], self._xor) if commit < size else self._xor
        grown = 0
        for pgno, checksum in checksums.items():
            if pgno > commit or pgno == lock:
                continue
            result ^= checksum
            if pgno <= size:
                result ^= pages[pgno - 1]
            else:
                grown += 1
        missing = max(0, commit - size) - (size < lock <= commit) - grown
        if missing:
            raise CorruptData(
                f"the database grows from {size} to {commit} pages, but {missing} of the new pages are missing: "
                "frames were lost; nothing was applied"
            )
        return result & ~FLAG


def _big_endian(values: array[int]) -> array[int]:
    """A copy in (or from) big-endian order, whatever this machine has."""
    values = values[:]
    if sys.byteorder == "little":
        values.byteswap()
    return values
