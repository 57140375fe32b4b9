"""How long writes stopped: pure arithmetic on the times at which acknowledged writes were answered."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

__all__ = ["longest_gap", "quantile", "table"]


def longest_gap(answered: Sequence[float], fault: float, until: float) -> float:
    """The longest time, in seconds, between two acknowledged writes answered one after the other, of those pairs that
    end after `fault` and begin before `until`. `answered` is sorted. Infinite when nothing was answered after it."""
    first = max(0, bisect.bisect_right(answered, fault) - 1)
    last = bisect.bisect_left(answered, until)
    pairs = [answered[first + 1 + at] - answered[first + at] for at in range(min(last, len(answered) - 1) - first)]
    return max(pairs) if pairs and answered[-1] > fault else math.inf


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def table(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and max of times in seconds, as milliseconds."""
    if not values:
        return {}
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * quantile(values, part), 1) for name, part in parts.items()}
