"""Page frames of an LTX file: one page, packed as an LZ4 block, and the order in which pages may come."""

from __future__ import annotations

import struct

import lz4.block

from walship.errors import CorruptLtx
from walship.formats.checksum import Buffer, lock_pgno
from walship.formats.ltx.header import LtxHeader

__all__ = [
    "END_OF_PAGES",
    "PAGE_HEADER_SIZE",
    "PAGE_LAYOUT",
    "PageOrder",
    "pack_page",
    "read_page_header",
    "unpack_page",
]

PAGE_LAYOUT = struct.Struct(">IHI")
PAGE_HEADER_SIZE = PAGE_LAYOUT.size
END_OF_PAGES = bytes(6)  # pgno and page flags, both zero
_HAS_SIZE = 1  # page flag: the compressed length follows; what every writer sets today

_compress = lz4.block.compress


def pack_page(pgno: int, data: Buffer) -> tuple[bytes, bytes]:
    """Return page header and LZ4 block; together they are the page frame."""
    packed: bytes = _compress(data, store_size=False)
    return PAGE_LAYOUT.pack(pgno, _HAS_SIZE, len(packed)), packed


def read_page_header(data: Buffer, at: int, page_size: int) -> tuple[int, int]:
    """Return (pgno, size of the whole page frame in bytes); pgno 0 is the end of the pages.

    PAGE_HEADER_SIZE bytes must be there. Raises CorruptLtx for what nobody writes, legacy page frames among it.
    """
    pgno, flags, length = PAGE_LAYOUT.unpack_from(data, at)
    if not pgno and not flags:
        return 0, len(END_OF_PAGES)
    if not pgno or flags != _HAS_SIZE or not 0 < length <= _most_compressed(page_size):
        raise CorruptLtx(f"page {pgno} has flags {flags:#x} and {length} bytes; nobody writes that")
    return pgno, PAGE_HEADER_SIZE + length


def unpack_page(pgno: int, packed: Buffer, page_size: int) -> bytes:
    """Return the page in an LZ4 block. Raises CorruptLtx when it is not exactly one page."""
    try:
        page: bytes = lz4.block.decompress(packed, uncompressed_size=page_size)
    except lz4.block.LZ4BlockError as error:
        raise CorruptLtx(f"page {pgno} does not decompress to {page_size} bytes") from error
    if len(page) != page_size:
        raise CorruptLtx(f"page {pgno} decompresses to {len(page)} bytes instead of {page_size}")
    return page


def _most_compressed(page_size: int) -> int:
    """LZ4's own bound for a block that does not compress."""
    return page_size + page_size // 255 + 16


class PageOrder:
    """Judges the pages of a file as they come, and at the end whether one is missing."""

    __slots__ = ("_commit", "_due", "_known", "_last", "lock")

    def __init__(self, header: LtxHeader, previous_commit: int | None) -> None:
        self._commit = header.commit
        self.lock = lock_pgno(header.page_size)
        # Pages up to `known` may be absent. The first file of all is complete in itself, whatever was before.
        self._known = 0 if header.is_snapshot else header.commit if previous_commit is None else previous_commit
        self._due = self._next(self._known)
        self._last = 0

    def _next(self, pgno: int) -> int:
        return pgno + 2 if pgno + 1 == self.lock else pgno + 1

    def admit(self, pgno: int) -> None:
        """Take the next page. Raises CorruptLtx when it may not come, or another should have come before it."""
        if not self._last < pgno <= self._commit or pgno == self.lock:
            raise CorruptLtx(f"page {pgno} after page {self._last} in a file for {self._commit} pages")
        if pgno > self._known:
            if pgno != self._due:
                raise self._missing()
            self._due = self._next(pgno)
        self._last = pgno

    def finish(self) -> None:
        """Raise CorruptLtx when a page by which the database grows did not come."""
        if self._due <= self._commit:
            raise self._missing()

    def _missing(self) -> CorruptLtx:
        why = "a reader would restore old content there" if self._known else "a file from TXID 1 on is a snapshot"
        return CorruptLtx(
            f"page {self._due} is missing, but the file grows the database from {self._known} to {self._commit} pages "
            f"({why})"
        )
