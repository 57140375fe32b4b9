"""Linearizability of a register, twice: in the order of positions (cheap, trusts what the cluster said), and by search
(Wing and Gong 1993, with Lowe's memo), which trusts nothing but values and times. The first judges long histories, the
second judges the first. A third, by zones, is tests/cluster/linearizable.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MAX_SEARCH", "RegisterOperation", "judge_by_position", "judge_by_search"]

MAX_SEARCH = 2000

Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RegisterOperation:
    """One operation. Times in seconds of one clock. A write that nobody answered has an infinite `end` and no position;
    it may have happened at any time after `begin`, or never. What was refused must be left out."""

    writes: bool
    value: int
    begin: float
    end: float
    position: Position | None = None  # of the write itself, or of the state the read saw


def judge_by_position(operations: Sequence[RegisterOperation], initial: int) -> list[str]:
    """Is the order of positions a linearization? Each written value must be unique in the history.

    A write of unknown outcome is put right before the first read that shows it; one that no read shows never was.
    """
    complaints = []
    written = {each.value: each for each in operations if each.writes}
    counts = Counter(each.value for each in operations if each.writes)
    if twice := [value for value, count in counts.items() if count > 1]:
        raise ValueError(f"values were written twice by the test itself: {twice[:5]}")
    placed: dict[int, Position] = {value: each.position for value, each in written.items() if each.position is not None}
    reads = [each for each in operations if not each.writes]
    for read in reads:
        assert read.position is not None, f"a read without a position: {read}"
        if read.value == initial and read.value not in written:
            continue
        write = written.get(read.value)
        if write is None:
            complaints.append(f"from nowhere: {read}")
        elif write.position is None:
            placed[read.value] = min(placed.get(read.value, read.position), read.position)
    if complaints:
        return complaints
    taken = Counter(each.position for each in operations if each.writes and each.position is not None)
    complaints += [f"two writes at one position: {position}" for position, count in taken.items() if count > 1]
    order = sorted(
        (each for each in operations if not each.writes or each.value in placed),
        key=lambda each: (each.position or placed[each.value], not each.writes, each.begin),
    )
    value = initial
    for each in order:
        if each.writes:
            value = each.value
        elif each.value != value:
            complaints.append(f"at its position the register held {value}: {each}")
    earliest_end, ended = math.inf, None
    for each in reversed(order):
        if earliest_end < each.begin:
            complaints.append(f"ended before, yet comes after in history: {ended}; {each}")
        if each.end < earliest_end:
            earliest_end, ended = each.end, each
    return complaints


def judge_by_search(operations: Sequence[RegisterOperation], initial: int) -> bool:
    """True iff some order explains the history; positions are not looked at. Values may repeat.

    Raises ValueError beyond MAX_SEARCH operations: the search is exponential at worst.
    """
    if len(operations) > MAX_SEARCH:
        raise ValueError(f"{len(operations)} operations; the search takes at most {MAX_SEARCH}")
    order = sorted(operations, key=lambda each: each.begin)
    must = sum(1 << number for number, each in enumerate(order) if not math.isinf(each.end))
    seen: set[tuple[int, int]] = set()
    stack = [(0, initial)]
    while stack:
        done, value = stack.pop()
        if done & must == must:
            return True
        if (done, value) not in seen:
            seen.add((done, value))
            stack.extend(_next_states(order, done, value))
    return False


def _next_states(order: Sequence[RegisterOperation], done: int, value: int) -> list[tuple[int, int]]:
    """States one operation further. An operation may be next if nothing that is left had ended before it began."""
    states = []
    first_left = (~done & (done + 1)).bit_length() - 1
    earliest_end = math.inf
    for number in range(first_left, len(order)):
        each = order[number]
        if each.begin > earliest_end:
            break
        if not done >> number & 1:
            earliest_end = min(earliest_end, each.end)
            if each.writes:
                states.append((done | 1 << number, each.value))
            elif each.value == value:  # a read that fits now may go first: it changes nothing
                return [(done | 1 << number, value)]
    return states[::-1]
