"""Reading whole LTX files, page by page, with every check that the format allows."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from fastcrc import crc64

from walship.errors import CorruptLtx
from walship.formats.checksum import FLAG, Buffer
from walship.formats.ltx.header import HEADER_SIZE, NO_CHECKSUM, TRAILER_SIZE, LtxHeader, LtxTrailer
from walship.formats.ltx.index import PageIndex
from walship.formats.ltx.page import END_OF_PAGES, PAGE_HEADER_SIZE, PageOrder, read_page_header, unpack_page

__all__ = ["LtxDecoder", "decode"]

_SIZE = struct.Struct(">Q")
_crc = crc64.go_iso


class LtxDecoder:
    """Reads a file from bytes cut anywhere: `receive_data()`, `next_page()`, and `finish()` at the end. No I/O.

    Pages come before the file checksum has been judged, so nothing may be kept that `finish()` has not agreed to.
    Memory is constant but for the page index. `header` is None until its bytes have come.
    """

    __slots__ = ("_at", "_buffer", "_checksum", "_index", "_order", "_tail", "header", "trailer")

    def __init__(self) -> None:
        self.header: LtxHeader | None = None
        self.trailer: LtxTrailer | None = None
        self._buffer = bytearray()
        self._at = 0
        self._checksum: int = 0
        self._index = PageIndex()
        self._order: PageOrder | None = None
        self._tail: bytes | None = None

    def receive_data(self, data: Buffer) -> None:
        """Take the next bytes of the file. Raises CorruptLtx when its header is malformed."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data
        if self.header is None and len(self._buffer) >= HEADER_SIZE:
            self.header = LtxHeader.parse(self._buffer)
            self._checksum = _crc(self._buffer[:HEADER_SIZE])
            self._order = PageOrder(self.header, None)
            self._at = HEADER_SIZE

    def next_page(self) -> tuple[int, bytes] | None:
        """Return the next page, or None until more bytes come, or after the last. Raises CorruptLtx."""
        header, order, at = self.header, self._order, self._at
        if header is None or order is None:
            return None
        if self._tail is not None:
            self._read_trailer(self._tail)
            return None
        if len(self._buffer) - at < PAGE_HEADER_SIZE:
            return None
        pgno, size = read_page_header(self._buffer, at, header.page_size)
        if not pgno:
            order.finish()
            index = self._index.to_bytes()
            self._tail = b"".join((END_OF_PAGES, index, _SIZE.pack(len(index))))
            self._read_trailer(self._tail)
            return None
        end = at + size
        if len(self._buffer) < end:
            return None
        order.admit(pgno)
        head = bytes(self._buffer[at : at + PAGE_HEADER_SIZE])
        page = unpack_page(pgno, self._buffer[at + PAGE_HEADER_SIZE : end], header.page_size)
        self._checksum = _crc(page, _crc(head, self._checksum))
        self._index.add(pgno, size)
        self._at = end
        return pgno, page

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield the pages that the bytes so far complete."""
        while (found := self.next_page()) is not None:
            yield found

    def finish(self) -> LtxTrailer:
        """Judge the file after its last byte. Raises CorruptLtx when it is cut, too long, or its checksum is wrong."""
        if self.next_page() is not None:
            raise ValueError("finish() was called before next_page() had returned every page")
        if self.trailer is None:
            raise CorruptLtx(f"the file is cut: it ends within its {self._section()}")
        if self._at != len(self._buffer):
            raise CorruptLtx(f"{len(self._buffer) - self._at} bytes come after the trailer")
        return self.trailer

    def _section(self) -> str:
        if self.header is None:
            return "header"
        return "pages" if self._tail is None else "page index or trailer"

    def _read_trailer(self, tail: bytes) -> None:
        """Compare end marker, index and its size with what the pages call for, then the file checksum."""
        header, at = self.header, self._at
        end = at + len(tail)
        if self.trailer is not None or header is None or len(self._buffer) < end + TRAILER_SIZE:
            return
        if self._buffer[at:end] != tail:
            raise CorruptLtx("the page index does not agree with the pages")
        trailer = LtxTrailer.parse(self._buffer[end : end + TRAILER_SIZE])
        if bool(trailer.post_apply) == bool(header.flags & NO_CHECKSUM):
            raise CorruptLtx(f"database checksum {trailer.post_apply:016x} in a file with flags {header.flags:#x}")
        computed = FLAG | _crc(_SIZE.pack(trailer.post_apply), _crc(tail, self._checksum))
        if computed != trailer.checksum:
            raise CorruptLtx(f"file checksum {trailer.checksum:016x} is stored, {computed:016x} is right")
        self.trailer = trailer
        self._at = end + TRAILER_SIZE


def decode(data: Buffer) -> tuple[LtxHeader, list[tuple[int, bytes]]]:
    """Return the header and all (pgno, page) of a whole file. Raises CorruptLtx for anything less."""
    decoder = LtxDecoder()
    decoder.receive_data(data)
    pages = list(decoder.pages())
    decoder.finish()
    assert decoder.header is not None
    return decoder.header, pages
