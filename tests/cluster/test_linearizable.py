"""The checker of register histories, against the definition."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.linearizable import Operation, violation

W, R = True, False


def by_definition(operations: list[Operation], initial: int) -> bool:
    """Is there an order that keeps who ended before whom, in which each read sees the write before it?"""
    unknown = [each for each in operations if each.writes and math.isinf(each.end)]
    known = [each for each in operations if each not in unknown]
    for mask in range(1 << len(unknown)):
        chosen = known + [each for bit, each in enumerate(unknown) if mask >> bit & 1]
        if any(_legal(order, initial) for order in permutations(chosen)):
            return True
    return False


def _legal(order: tuple[Operation, ...], initial: int) -> bool:
    value = initial
    for at, each in enumerate(order):
        if any(later.end < each.begin for later in order[at + 1 :]):
            return False
        if each.writes:
            value = each.value
        elif each.value != value:
            return False
    return True


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Up to six operations at distinct times; each value is written at most once."""
    count = draw(st.integers(1, 6))
    times = draw(st.permutations(range(2 * count)))
    operations, values = [], [0]
    for number in range(count):
        begin, end = sorted(times[2 * number : 2 * number + 2])
        if draw(st.booleans()):
            values.append(number + 1)
            operations.append(Operation(W, number + 1, begin, draw(st.sampled_from([end, math.inf]))))
        else:
            operations.append(Operation(R, -1, begin, end))
    return [
        each if each.writes else Operation(R, draw(st.sampled_from(values)), each.begin, each.end)
        for each in operations
    ]


@given(histories())
def test_the_checker_agrees_with_the_definition(operations: list[Operation]) -> None:
    assert (violation(operations, 0) is None) == by_definition(operations, 0)


@pytest.mark.parametrize(
    "operations",
    [
        [Operation(W, 1, 0, 1), Operation(R, 0, 2, 3)],
        [Operation(W, 1, 0, 10), Operation(R, 1, 1, 2), Operation(R, 0, 3, 4)],
        [Operation(W, 1, 0, 1), Operation(W, 2, 2, 3), Operation(R, 2, 4, 5), Operation(R, 1, 6, 7)],
        [Operation(R, 7, 0, 1)],
        [Operation(R, 1, 0, 1), Operation(W, 1, 2, 3)],
        [Operation(W, 1, 0, math.inf), Operation(R, 1, 1, 2), Operation(R, 0, 3, 4)],
    ],
    ids=[
        "a stale read",
        "back again",
        "an old value returns",
        "out of nowhere",
        "from the future",
        "unknown, then not",
    ],
)
def test_a_bad_history_is_caught(operations: list[Operation]) -> None:
    assert violation(operations, 0) is not None
