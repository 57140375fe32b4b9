"""The follower's page checksums on their way to the leader: cut by the one, put together and judged by the other.

What travels is the page checksum record (docs/format.md 3), which checks itself, in pieces of PIECE_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator

from walship.errors import ProtocolViolation
from walship.formats.checksum import PAGE_CHECKSUMS_LAYOUT, PageChecksums
from walship.replication.catchup import MAX_COMPARED_PAGES

__all__ = ["PIECE_BYTES", "Comparison", "pieces"]

PIECE_BYTES = 1 << 20
_CRC_BYTES = 8


def pieces(record: bytes) -> Iterator[bytes]:
    """The record in pieces that fit in one message each."""
    return (record[at : at + PIECE_BYTES] for at in range(0, len(record), PIECE_BYTES))


class Comparison:
    """Collects the record of one follower. Memory is bounded by MAX_COMPARED_PAGES."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._size_bytes: int | None = None

    @property
    def complete(self) -> bool:
        return len(self._data) == self._size_bytes

    def receive(self, data: bytes) -> None:
        """Take the next bytes. Raises ProtocolViolation when they are more than the record has, or too many."""
        self._data += data
        if self._size_bytes is None and len(self._data) >= PAGE_CHECKSUMS_LAYOUT.size:
            pages = PAGE_CHECKSUMS_LAYOUT.unpack_from(self._data)[2]
            if pages > MAX_COMPARED_PAGES:
                raise ProtocolViolation(f"{pages} pages are to be compared; {MAX_COMPARED_PAGES} is the bound")
            self._size_bytes = PAGE_CHECKSUMS_LAYOUT.size + 8 * pages + _CRC_BYTES
        if len(self._data) > (self._size_bytes or PAGE_CHECKSUMS_LAYOUT.size):
            raise ProtocolViolation(f"a page checksum record of {self._size_bytes} bytes came with more")

    def result(self) -> PageChecksums:
        """The checksums. Takes milliseconds for each 100 MB of database. Raises CorruptData."""
        data, self._data = self._data, bytearray()
        return PageChecksums.parse(data)
