"""Linearizability of a register by search (Wing and Gong 1993, with Lowe's memo): it trusts nothing but values and
times. tests/cluster/linearizable.py judges long histories by zones, and the two judge each other.

Positions are judged by themselves: that of a reply covers what it did or shows, but may lie beyond it (a write's is the
end of its group commit, a read's the newest that it may have seen), so their order is no linearization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MAX_SEARCH", "RegisterOperation", "judge_by_search", "judge_positions"]

MAX_SEARCH = 2000


@dataclass(frozen=True, slots=True)
class RegisterOperation:
    """One operation. Times in seconds of one clock. A write that nobody answered has an infinite `end` and no position;
    it may have happened at any time after `begin`, or never. What was refused must be left out."""

    writes: bool
    value: int
    begin: float
    end: float
    position: tuple[int, int] | None = None  # (term, txid) of the reply


def judge_positions(operations: Sequence[RegisterOperation]) -> list[str]:
    """Does the position of each reply cover those of all replies that came before its request was sent (I11, I12)?

    Only for histories at `linearizable`. A newer term never begins below what an older one acknowledged, so both
    numbers must not fall.
    """
    complaints = []
    answered = [each for each in operations if each.position is not None]
    ends = sorted(answered, key=lambda each: each.end)
    at, highest = 0, (0, 0)
    for each in sorted(answered, key=lambda each: each.begin):
        while at < len(ends) and ends[at].end < each.begin:
            term, txid = ends[at].position or (0, 0)
            highest = (max(highest[0], term), max(highest[1], txid))
            at += 1
        assert each.position is not None
        if each.position[0] < highest[0] or each.position[1] < highest[1]:
            complaints.append(f"its position does not cover {highest}, which was answered before it began: {each}")
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
