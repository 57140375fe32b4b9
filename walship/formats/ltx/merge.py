"""Several LTX files as one: of each page the latest wins, and what the last file cut off is gone."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from walship.errors import CorruptLtx
from walship.formats.checksum import Buffer
from walship.formats.ltx.decoder import LtxDecoder
from walship.formats.ltx.encoder import LtxEncoder
from walship.formats.ltx.header import LtxHeader
from walship.formats.ltx.index import PageIndex

__all__ = ["merge", "merge_header", "merge_index"]

T = TypeVar("T")


def merge_header(headers: Sequence[LtxHeader]) -> LtxHeader:
    """Return the header of the file that does what these do one after another.

    Raises CorruptLtx when they differ in page size or leave a gap (overlap is allowed).
    """
    if not headers:
        raise ValueError("nothing to merge")
    first, last = headers[0], headers[-1]
    for before, after in itertools.pairwise(headers):
        if after.page_size != before.page_size:
            raise CorruptLtx(f"the page size changes from {before.page_size} to {after.page_size}")
        if after.min_txid > before.max_txid + 1 or after.max_txid <= before.max_txid:
            raise CorruptLtx(f"{after} does not continue {before}")
    return LtxHeader(first.page_size, last.commit, first.min_txid, last.max_txid, last.timestamp_ms)


def merge_index(indexes: Sequence[tuple[LtxHeader, PageIndex]]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (pgno, which input, offset, size in bytes) for the pages that all inputs together leave, ascending.

    The latest input that holds a page wins; pages above the last commit are gone. Raises CorruptLtx, before the first
    page, when the inputs do not follow each other.
    """
    commit = merge_header([header for header, _ in indexes]).commit
    streams = [_ranked(which, _places(index)) for which, (_, index) in enumerate(indexes)]
    return ((pgno, which, *place) for pgno, which, place in _latest(streams) if pgno <= commit)


def merge(inputs: Sequence[Iterable[Buffer]], *, previous_commit: int | None = None) -> Iterator[bytes]:
    """Yield, in pieces, the file that does what `inputs` (whole files, each in chunks) do one after another.

    Each input is read once, its checksum judged on the way, and one chunk of each is in memory: when this raises
    CorruptLtx, what was yielded before must be thrown away. `previous_commit` as for LtxEncoder.
    """
    files = [_Input(chunks) for chunks in inputs]
    header = merge_header([file.header for file in files])
    encoder = LtxEncoder(header, previous_commit=previous_commit)
    yield encoder.header_bytes()
    for pgno, _, page in _latest([_ranked(which, file.pages()) for which, file in enumerate(files)]):
        if pgno <= header.commit:
            yield encoder.page(pgno, page)
    yield encoder.finish()


class _Input:
    """A decoder with its source: the header at once, the pages on the way, the checksum at the end."""

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._decoder = LtxDecoder()
        self._chunks = iter(chunks)
        while self._decoder.header is None:
            if (chunk := next(self._chunks, None)) is None:
                self._decoder.finish()
            else:
                self._decoder.receive_data(chunk)
        self.header = self._decoder.header

    def pages(self) -> Iterator[tuple[int, bytes]]:
        yield from self._decoder.pages()
        for chunk in self._chunks:
            self._decoder.receive_data(chunk)
            yield from self._decoder.pages()
        self._decoder.finish()


def _places(index: PageIndex) -> Iterator[tuple[int, tuple[int, int]]]:
    return ((pgno, (offset, size)) for pgno, offset, size in index)


def _ranked(which: int, pages: Iterator[tuple[int, T]]) -> Iterator[tuple[int, int, T]]:
    return ((pgno, -which, value) for pgno, value in pages)


def _latest(streams: list[Iterator[tuple[int, int, T]]]) -> Iterator[tuple[int, int, T]]:
    """Merge streams that ascend by page; of equal pages only the one from the latest stream comes out."""
    last = 0
    for pgno, rank, value in heapq.merge(*streams):  # (pgno, rank) is unique, so values are never compared
        if pgno != last:
            yield pgno, -rank, value
        last = pgno
