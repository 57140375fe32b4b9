"""The arithmetic behind every figure of the chaos report."""

from __future__ import annotations

import math

from tests.chaos.gaps import longest_gap, quantile, table


def test_the_gap_around_a_fault_is_found_and_those_before_and_after_are_not_counted() -> None:
    answered = [0.0, 5.0, 5.1, 5.2, 5.9, 6.0, 9.0]
    assert longest_gap(answered, fault=5.25, until=6.0) == 5.9 - 5.2
    assert longest_gap(answered, fault=5.25, until=6.5) == 3.0
    assert longest_gap(answered, fault=1.0, until=5.1) == 5.0


def test_writes_that_never_come_back_are_an_endless_gap() -> None:
    assert longest_gap([0.0, 1.0], fault=1.5, until=9.0) == math.inf
    assert longest_gap([], fault=1.5, until=9.0) == math.inf


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [0.001 * number for number in range(100, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)) == (0.05, 0.099, 0.1)
    assert table(values) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert table([]) == {}
