"""Is a history of one register linearizable? For registers whose every written value is written once.

Then each read names its write, and the question is cheap (Gibbons and Korach, 1997): put a write and its reads
together as a *cluster*, with the zone between the earliest end and the latest begin of its operations. A zone that
runs forward (an operation ended before another of the same value began) is a time in which the register must have
held that value. The history is linearizable iff no read ends before its write begins, no two forward zones overlap,
and no backward zone lies inside a forward one.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Operation", "violation"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on the register. `end` is infinite for a write whose outcome nobody knows."""

    writes: bool
    value: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class _Zone:
    value: int
    low: float
    high: float
    forward: bool


def violation(operations: Sequence[Operation], initial: int) -> str | None:
    """Why the history is not linearizable, or None when it is. `initial` is the value before all of it."""
    clusters: dict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        clusters[operation.value].append(operation)
    clusters[initial].append(Operation(True, initial, -math.inf, -math.inf))
    zones = []
    for value, members in clusters.items():
        writes = [operation for operation in members if operation.writes]
        if len(writes) != 1:
            return f"{value} was read, and written {len(writes)} times"
        if len(members) == 1 and math.isinf(writes[0].end) and writes[0].end > 0:
            continue  # nobody saw it: it never happened
        if early := [read for read in members if read.end < writes[0].begin]:
            return f"{value} was read until {early[0].end}, before its write began at {writes[0].begin}"
        first_end, last_begin = min(each.end for each in members), max(each.begin for each in members)
        zones.append(_Zone(value, min(first_end, last_begin), max(first_end, last_begin), first_end < last_begin))
    return _conflict(zones)


def _conflict(zones: Iterable[_Zone]) -> str | None:
    zones = list(zones)
    forward = sorted((zone for zone in zones if zone.forward), key=lambda zone: zone.low)
    for one, other in itertools.pairwise(forward):
        if other.low < one.high:
            return f"the register must have held {one.value} and {other.value} at the same time"
    for zone in zones:
        if not zone.forward:
            for held in forward:
                if held.low < zone.low and zone.high < held.high:
                    return f"{zone.value} was there while the register must have held {held.value}"
    return None
