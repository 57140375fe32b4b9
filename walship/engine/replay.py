"""Turning frames of the log into one batch of pages: the newest image of each page, as one commit.

Used when a follower has several frames queued (fewer, larger commits) and when a node starts: everything from the
mark to the end of the log is applied again as one merged commit, since separate ones would show readers the past (R2).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from walship.engine.apply import Batch
from walship.engine.log import FrameRef, Log
from walship.formats import ltx

__all__ = ["merge_frames"]

# Up to this much payload is decoded at once and held. LZ4 packs an empty page about 150 times, so that is at most some
# 60 MiB of pages; more is read page by page from the log (R6).
_DECODED_AT_ONCE_BYTES = 256 << 10


def merge_frames(log: Log, refs: Sequence[FrameRef]) -> Batch | None:
    """One batch for `refs`, consecutive frames of `log`. None when they hold no commits (term-starts only).

    Raises CorruptLtx when a payload is malformed, LogTruncated when it was pruned meanwhile (pin it).
    """
    refs = [ref for ref in refs if not ref.header.is_term_start]
    if not refs:
        return None
    commit = refs[-1].header.commit
    page_size = refs[-1].header.page_size
    if sum(ref.payload_bytes for ref in refs) <= _DECODED_AT_ONCE_BYTES:
        pages: dict[int, bytes] = {}
        for ref in refs:
            payload = log.payload(ref)
            pages.update(ltx.decode(payload.read_at(0, payload.size_bytes))[1])
        pgnos = array("I", sorted(pgno for pgno in pages if pgno <= commit))
        return Batch(pgnos, lambda: (pages[pgno] for pgno in pgnos), commit)
    payloads = [log.payload(ref) for ref in refs]
    indexes = [ltx.open_index(payload.read_at, payload.size_bytes) for payload in payloads]
    pgnos, inputs, offsets, sizes = array("I"), array("I"), array("Q"), array("I")
    for pgno, which, offset, size in ltx.merge_index(indexes):
        pgnos.append(pgno)
        inputs.append(which)
        offsets.append(offset)
        sizes.append(size)

    def read() -> Iterator[bytes]:
        for pgno, which, offset, size in zip(pgnos, inputs, offsets, sizes, strict=True):
            yield ltx.read_page(payloads[which].read_at, offset, size, page_size, expected_pgno=pgno)[1]

    return Batch(pgnos, read, commit)
