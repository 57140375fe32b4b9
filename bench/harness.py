"""Alternated rounds, medians, spread, and the noise of the machine measured beside every ratio (perf.md 11).

A rate of this machine at this moment says little: two cores, shared. So every figure is a ratio of two sides measured
in one run, in turn, several times. The baseline is measured twice in every round, as two sides of the same code: how
far that A/A ratio is from 1 is the noise, printed beside the result. A side with errors has no rate.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Cpu", "Figure", "Ratio", "Report", "Sample", "alternate", "compare", "percentile"]

AGAIN = " again"  # the baseline's second measurement in a round, as a side of its own
AA_TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one side. value: in the unit of its benchmark. cpu_us: per operation, by process."""

    value: float
    cpu_us: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)


Samples = dict[str, list[Sample]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A side against its baseline: the median of the rounds' paired ratios, with the lowest and the highest.

    goal None: measured, not promised. aa: the baseline against itself in the same rounds.
    """

    name: str
    value: float
    low: float
    high: float
    goal: float | None
    at_most: bool = False
    aa: float | None = None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def noisy(self) -> bool:
        return self.aa is not None and abs(self.aa - 1) > AA_TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met, "noisy": self.noisy}


@dataclass(frozen=True, slots=True)
class Figure:
    """What one side did: median, lowest, highest, in `unit`."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    cpu_us: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, unit: str, samples: Sequence[Sample]) -> Figure:
        values = [sample.value for sample in samples]
        names = samples[0].cpu_us.keys()
        cpu = {process: statistics.median(sample.cpu_us[process] for sample in samples) for process in names}
        return cls(name, unit, statistics.median(values), min(values), max(values), cpu)


@dataclass(slots=True)
class Report:
    """Everything one benchmark found. `errors` make the run fail: a rate of wrong answers is no rate."""

    title: str
    ratios: list[Ratio] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, correct: bool, otherwise: str) -> None:
        if not correct:
            self.errors.append(f"{self.title}: {otherwise}")

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "ratios": [ratio.to_json() for ratio in self.ratios],
            "figures": [asdict(figure) for figure in self.figures],
            "errors": self.errors,
            "seconds": round(self.seconds, 1),
        }

    def show(self, console: Console) -> None:
        figures = Table(title=self.title, title_justify="left")
        for heading in ("side", "median", "lowest", "highest", "unit", "CPU us per operation"):
            figures.add_column(heading, justify="left" if heading in ("side", "unit") else "right")
        for figure in self.figures:
            cpu = "  ".join(f"{process} {spent:.0f}" for process, spent in figure.cpu_us.items())
            numbers = (_short(number) for number in (figure.value, figure.low, figure.high))
            figures.add_row(figure.name, *numbers, figure.unit, cpu)
        console.print(figures)
        ratios = Table()
        for heading in ("ratio", "value", "spread", "goal", "met", "A/A"):
            ratios.add_column(heading, justify="left" if heading == "ratio" else "right")
        for ratio in self.ratios:
            goal = "-" if ratio.goal is None else f"{'<=' if ratio.at_most else '>='} {ratio.goal:g}"
            met = {None: "-", True: "[green]yes[/]", False: "[red]no[/]"}[ratio.met]
            aa = "-" if ratio.aa is None else f"{ratio.aa:.2f}{' noisy' if ratio.noisy else ''}"
            ratios.add_row(
                ratio.name, f"[bold]{ratio.value:.2f}[/]", f"{ratio.low:.2f}-{ratio.high:.2f}", goal, met, aa
            )
        console.print(ratios)
        for error in self.errors:
            console.print(f"WRONG: {error}", style="red")


def alternate(sides: Mapping[str, Callable[[], Sample]], *, rounds: int, baseline: str | None = None) -> Samples:
    """Measure every side once a round, in turn; each round begins with another side.

    `baseline` is measured a second time in every round, as the side `baseline + AGAIN`.
    """
    measures = dict(sides)
    if baseline is not None:
        measures[baseline + AGAIN] = sides[baseline]
    order = list(measures)
    samples: Samples = {name: [] for name in order}
    for number in range(rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            samples[name].append(measures[name]())
    return samples


def compare(
    name: str,
    samples: Samples,
    side: str,
    baseline: str,
    *,
    goal: float | None,
    at_most: bool = False,
    of: Callable[[Sample], float] = lambda sample: sample.value,
) -> Ratio:
    """`side` / `baseline`, round by round. When the baseline was measured twice, against the mean of both."""
    again = samples.get(baseline + AGAIN)
    base = [of(sample) for sample in samples[baseline]]
    aa = None
    if again is not None:
        second = [of(sample) for sample in again]
        aa = statistics.median(b / a for a, b in zip(base, second, strict=True))
        base = [(a + b) / 2 for a, b in zip(base, second, strict=True)]
    paired = [of(sample) / under for sample, under in zip(samples[side], base, strict=True)]
    return Ratio(name, statistics.median(paired), min(paired), max(paired), goal, at_most, aa)


class Cpu:
    """CPU time of other processes by name, from /proc/PID/task/*/schedstat: it moves far less than wall time does."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self.spent_ns: dict[str, int] = {}

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        before = self._read()
        yield
        self.spent_ns = {name: now - before[name] for name, now in self._read().items()}

    def per_operation(self, operations: int) -> dict[str, float]:
        """Microseconds by process."""
        return {name: spent / 1000 / max(1, operations) for name, spent in self.spent_ns.items()}

    def _read(self) -> dict[str, int]:
        return {name: _cpu_ns(pid) for name, pid in self._pids.items()}


def _cpu_ns(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            total += int((task / "schedstat").read_text().split()[0])
    return total


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; share 0.99 is p99."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
