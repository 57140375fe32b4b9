"""The running checksum of the -wal file, with the standard library alone.

SQLite's step over a pair of 32-bit words is `s1 += x0 + s2; s2 += x1 + s1` (mod 2^32). Its matrix is the square of
Fibonacci's, so the state after N words is a Fibonacci-weighted sum of them, and needs no loop over words:

    s1' = F(N-1)*s1 + F(N)*s2   + sum of F(N-1-j)*w[j]
    s2' = F(N)*s1   + F(N+1)*s2 + sum of F(N-j)*w[j]

`checksum_fold` computes the sums with a few products of big integers, about four times faster than
`checksum_direct`; `walship.formats.wal_checksum_numpy` does it tens of times faster, for many pages at once.
All give the same numbers. Source: the SQLite file format, section 4.2 "Checksum Algorithm".
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from functools import lru_cache

from walship.errors import CorruptWal

__all__ = ["MASK", "Buffer", "Checksum", "checksum_direct", "checksum_fold", "fibonacci", "page_sums_fold", "power"]

Buffer = bytes | bytearray | memoryview
Checksum = tuple[int, int]

MASK = 0xFFFFFFFF
_SHORT = 64  # bytes; below this the plain loop is the fastest of all
_FRAME_HEADER_SIZE = 24
_PAIRS = {False: struct.Struct("<II"), True: struct.Struct(">II")}


@lru_cache(maxsize=64)
def fibonacci(n: int) -> int:
    """F(n) mod 2^32, by doubling; F(0) = 0, F(1) = 1."""
    low, high = 0, 1
    for bit in f"{n:b}":
        low, high = low * (2 * high - low), low * low + high * high
        if bit == "1":
            low, high = high, low + high
    return low & MASK


@lru_cache(maxsize=64)
def power(size_bytes: int) -> tuple[int, int, int]:
    """The three weights that carry a state across `size_bytes`: F(N-1), F(N), F(N+1) for N words, N even."""
    words = size_bytes // 4
    after, here = fibonacci(words + 1), fibonacci(words)
    return (after - here) & MASK, here, after


def check_length(data: Buffer) -> None:
    """Raise CorruptWal unless `data` is whole pairs of words."""
    if len(data) % 8:
        raise CorruptWal(f"a WAL checksum covers multiples of 8 bytes, not {len(data)}")


def checksum_direct(data: Buffer, seed: Checksum, *, big_endian: bool = False) -> Checksum:
    """The definition itself: one step for each pair of words."""
    check_length(data)
    s1, s2 = seed
    for x0, x1 in _PAIRS[big_endian].iter_unpack(data):
        s1 = (s1 + x0 + s2) & MASK
        s2 = (s2 + x1 + s1) & MASK
    return s1, s2


def checksum_fold(data: Buffer, seed: Checksum, *, big_endian: bool = False) -> Checksum:
    """Continue the checksum `seed` over `data`, a multiple of 8 bytes; words are little-endian unless told."""
    if len(data) <= _SHORT:
        return checksum_direct(data, seed, big_endian=big_endian)
    check_length(data)
    (s1, s2), (before, here, after) = seed, power(len(data))
    t1, t2 = _fold(data, big_endian=big_endian)
    return (before * s1 + here * s2 + t1) & MASK, (here * s1 + after * s2 + t2) & MASK


def page_sums_fold(frames: Buffer, page_size: int, *, big_endian: bool = False) -> Iterator[Checksum]:
    """For each whole frame in `frames`: the checksum of its page alone, from the seed (0, 0)."""
    view = memoryview(frames)
    for start in range(_FRAME_HEADER_SIZE, len(view), _FRAME_HEADER_SIZE + page_size):
        yield _fold(view[start : start + page_size], big_endian=big_endian)


@lru_cache(maxsize=32)
def _plan(lanes: int) -> tuple[int, tuple[tuple[int, int, int, int, int], ...]]:
    """The lane mask for `lanes`, and for each halving: bits of a half, its mask, F(h-1), F(h), F(h+1)."""

    def mask(count: int) -> int:
        return int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * count, "little")

    steps = []
    half = lanes // 2
    while half:
        steps.append((64 * half, mask(half), *power(8 * half)))
        half //= 2
    return mask(lanes), tuple(steps)


def _fold(data: Buffer, *, big_endian: bool) -> Checksum:
    """Checksum from the seed (0, 0), as a value p + q*phi in the ring where phi^2 = phi + 1.

    A pair of words is x1 + x0*phi, and each later word multiplies by phi. All pairs sit side by side in 64-bit
    lanes of two big integers; the earlier half is multiplied by a power of phi and added to the later one until one
    lane is left. A lane never overflows: (2^32-1)^2 + 2*(2^32-1) = 2^64-1, which is why one of the two products is
    masked before the sum.
    """
    if big_endian:
        words = array("I", bytes(data))
        words.byteswap()
        data = words.tobytes()
    pairs = len(data) // 8
    lanes = 1 << (pairs - 1).bit_length()
    mask, steps = _plan(lanes)
    value = int.from_bytes(data, "little") << 64 * (lanes - pairs)  # zero words in front weigh nothing
    p, q = (value >> 32) & mask, value & mask
    for bits, mask, before, here, after in steps:
        low = (1 << bits) - 1
        p_early, q_early = p & low, q & low
        p = ((q_early * here & mask) + p_early * before + (p >> bits)) & mask
        q = ((p_early * here & mask) + q_early * after + (q >> bits)) & mask
    return q, (p + q) & MASK
