"""Writing LTX files."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from fastcrc import crc64

from walship.errors import CorruptLtx
from walship.formats.checksum import FLAG, Buffer
from walship.formats.ltx.header import NO_CHECKSUM, LtxHeader
from walship.formats.ltx.index import PageIndex
from walship.formats.ltx.page import END_OF_PAGES, PageOrder, pack_page

__all__ = ["LtxEncoder", "encode"]

_SIZE = struct.Struct(">Q")
_crc = crc64.go_iso


class LtxEncoder:
    """Writes a file in pieces: `header_bytes()`, `page()` for each page in ascending order, `finish()`.

    Memory is constant but for the page index. `previous_commit`, the database size in pages before, makes it assert
    the growth rule; a snapshot asserts it always.
    """

    __slots__ = ("_checksum", "_header", "_index", "_order", "_page_size")

    def __init__(self, header: LtxHeader, *, previous_commit: int | None = None) -> None:
        if header.flags != NO_CHECKSUM:
            raise ValueError(f"{header}: only files without database checksums are written")
        self._header = header.to_bytes()
        self._page_size = header.page_size
        self._order = PageOrder(header, previous_commit)
        self._index = PageIndex()
        self._checksum: int = _crc(self._header)

    def header_bytes(self) -> bytes:
        """Return the first HEADER_SIZE bytes of the file."""
        return self._header

    def page(self, pgno: int, data: Buffer) -> bytes:
        """Return the frame of one page, nothing for the lock page. Raises CorruptLtx when the page may not come now."""
        if pgno == self._order.lock:
            return b""
        if len(data) != self._page_size:
            raise CorruptLtx(f"page {pgno} has {len(data)} bytes instead of {self._page_size}")
        self._order.admit(pgno)
        head, packed = pack_page(pgno, data)
        self._checksum = _crc(data, _crc(head, self._checksum))
        self._index.add(pgno, len(head) + len(packed))
        return head + packed

    def finish(self) -> bytes:
        """Return end marker, page index and trailer. Raises CorruptLtx when a page of the growth is missing."""
        self._order.finish()
        index = self._index.to_bytes()
        tail = b"".join((END_OF_PAGES, index, _SIZE.pack(len(index)), bytes(8)))
        return tail + _SIZE.pack(FLAG | _crc(tail, self._checksum))


def encode(header: LtxHeader, pages: Iterable[tuple[int, Buffer]], *, previous_commit: int | None = None) -> bytes:
    """Return a whole file. `pages` are (pgno, data), ascending. Raises CorruptLtx as LtxEncoder does."""
    encoder = LtxEncoder(header, previous_commit=previous_commit)
    page = encoder.page
    parts = [encoder.header_bytes()]
    parts += [page(pgno, data) for pgno, data in pages]
    parts.append(encoder.finish())
    return b"".join(parts)
