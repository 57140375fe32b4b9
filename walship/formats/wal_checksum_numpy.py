"""The running checksum of the -wal file with numpy, many pages at once. Importing it needs numpy (an optional extra).

See `walship.formats.wal_checksum` for the arithmetic. The word weights are kept per page size; uint32 arithmetic wraps,
which is the modulus wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from walship.formats.wal_checksum import MASK, Buffer, Checksum, check_length, checksum_direct, power

__all__ = ["checksum_numpy", "page_sums_numpy"]

_SHORT = 64  # bytes; below this the plain loop is the fastest of all
_FRAME_HEADER_WORDS = 6
_FEW_WORDS = 4096  # below this einsum's set-up costs more than matmul's slower integers

Words = npt.NDArray[np.uint32]


@lru_cache(maxsize=32)
def _weights(words: int) -> tuple[Words, Words, Words]:
    """Weights of each word in s1 and in s2, and both as the columns of one matrix."""
    series = [0, 1]
    while len(series) <= words:
        series.append((series[-1] + series[-2]) & MASK)
    falling = np.array(series[::-1], dtype=np.uint32)
    first, second = falling[1:].copy(), falling[:-1].copy()
    return first, second, np.stack([first, second], axis=1)


def _words(data: Buffer, *, big_endian: bool) -> Words:
    if big_endian:
        return np.frombuffer(data, dtype=">u4").astype(np.uint32)
    return np.frombuffer(data, dtype="<u4").astype(np.uint32, copy=False)


def checksum_numpy(data: Buffer, seed: Checksum, *, big_endian: bool = False) -> Checksum:
    """Continue the checksum `seed` over `data`, a multiple of 8 bytes; words are little-endian unless told."""
    if len(data) <= _SHORT:
        return checksum_direct(data, seed, big_endian=big_endian)
    check_length(data)
    words = _words(data, big_endian=big_endian)
    first, second, _ = _weights(len(words))
    (s1, s2), (before, here, after) = seed, power(len(data))
    t1, t2 = int(words.dot(first)), int(words.dot(second))
    return (before * s1 + here * s2 + t1) & MASK, (here * s1 + after * s2 + t2) & MASK


def page_sums_numpy(frames: Buffer, page_size: int, *, big_endian: bool = False) -> Iterator[Checksum]:
    """For each whole frame in `frames`: the checksum of its page alone, from the seed (0, 0)."""
    row = _FRAME_HEADER_WORDS + page_size // 4
    pages = _words(frames, big_endian=big_endian).reshape(-1, row)[:, _FRAME_HEADER_WORDS:]
    first, second, both = _weights(page_size // 4)
    if pages.size <= _FEW_WORDS:
        return ((s1, s2) for s1, s2 in (pages @ both).tolist())
    return zip(np.einsum("ij,j->i", pages, first).tolist(), np.einsum("ij,j->i", pages, second).tolist(), strict=True)
