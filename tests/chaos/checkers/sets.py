"""The set checker: unique values were added, one final read; what is missing, twice there, or there though refused?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Outcome", "SetVerdict", "judge_set"]


class Outcome(Enum):
    """What a client was told about its write."""

    OK = "ok"
    NOT_DONE = "not done"  # a promise: it never happened, and never will
    UNKNOWN = "unknown"  # or no answer at all: it may have happened, once


@dataclass(frozen=True, slots=True)
class SetVerdict:
    """Values by what is wrong with them; all but `recovered` must be empty."""

    lost: frozenset[int]  # acknowledged, and neither there nor kept as an orphan
    duplicates: frozenset[int]  # there more than once, or there and an orphan too
    refused_but_done: frozenset[int]
    from_nowhere: frozenset[int]  # there, or an orphan, and nobody added it
    recovered: frozenset[int]  # outcome unknown, and there: allowed

    def complaints(self) -> list[str]:
        return [
            f"{len(values)} {what}: {sorted(values)[:10]}"
            for values, what in (
                (self.lost, "acknowledged and lost"),
                (self.duplicates, "done twice"),
                (self.refused_but_done, "refused as not done, and done"),
                (self.from_nowhere, "there, and added by nobody"),
            )
            if values
        ]


def judge_set(adds: Iterable[tuple[int, Outcome]], final: Iterable[int], orphans: Collection[int] = ()) -> SetVerdict:
    """`adds`: each value once, with what its client was told. `final`: the values there at the end, repeats included.

    `orphans`: values named in orphan files. With ack 0 an acknowledged write may be there instead of in history (I6);
    with ack n >= 1 pass none. Raises ValueError when a value was added twice: then nothing could be said.
    """
    told: dict[int, Outcome] = {}
    for value, outcome in adds:
        if value in told:
            raise ValueError(f"{value} was added twice by the test itself")
        told[value] = outcome
    counts = Counter(final)
    kept = set(orphans)
    there = set(counts)
    return SetVerdict(
        lost=frozenset(value for value, outcome in told.items() if outcome is Outcome.OK) - there - kept,
        duplicates=frozenset(value for value, count in counts.items() if count > 1) | (there & kept),
        refused_but_done=frozenset(value for value in there if told.get(value) is Outcome.NOT_DONE),
        from_nowhere=frozenset(value for value in there | kept if value not in told),
        recovered=frozenset(value for value in there if told.get(value) is Outcome.UNKNOWN),
    )
