"""What a scenario found, as JSON for programs and as lines for people."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from tests.chaos.gaps import table

__all__ = ["Report"]


@dataclass(slots=True)
class Report:
    """One scenario's figures. `complaints` is what may not be: lost writes, duplicates, wrong reads, no healing."""

    name: str
    runs: int = 0
    settings: dict[str, object] = field(default_factory=dict)
    gaps_seconds: list[float] = field(default_factory=list)
    heal_seconds: list[float] = field(default_factory=list)  # from the part's return until all is level
    writes: int = 0
    acked: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # "kind: code" -> how many clients were told so
    examples: dict[str, str] = field(default_factory=dict)  # one message for each of them
    complaints: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    say: Callable[[str], None] = lambda _: None  # hears of each run as it ends

    def count_errors(self, found: Counter[str]) -> None:
        self.errors = dict(Counter(self.errors) + found)

    def client_errors(self, kind: str = "write") -> int:
        return sum(count for code, count in self.errors.items() if code.startswith(f"{kind}:"))

    def finish(self) -> None:
        self.seconds = round(time.time() - self.began, 1)

    def as_dict(self) -> dict[str, object]:
        figures = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "say"}
        figures["gaps_ms"] = table(figures.pop("gaps_seconds"))
        figures["heal_ms"] = table(figures.pop("heal_seconds"))
        figures["slowest_gaps_ms"] = [_ms(each) for each in sorted(self.gaps_seconds, reverse=True)[:5]]
        figures["load_average"] = [round(each, 1) for each in os.getloadavg()]
        return figures

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")

    def lines(self) -> list[str]:
        """For a terminal."""
        figures = self.as_dict()
        said = [
            f"{self.name}: {self.runs} runs in {self.seconds:g} s, {self.settings}, load {figures['load_average']}",
            f"  writes {self.writes}, acknowledged {self.acked}, errors {self.errors or 'none'}",
            f"  write gap ms {figures['gaps_ms']}, slowest {figures['slowest_gaps_ms']}; heal ms {figures['heal_ms']}",
        ]
        said += [f"  {code}: {message}" for code, message in self.examples.items()]
        said += [f"  {key}: {value}" for key, value in self.notes.items()]
        said += [f"  WRONG: {each[:1000]}" for each in self.complaints] or [
            "  nothing lost, nothing twice, nothing wrong"
        ]
        return said


def _ms(seconds: float) -> float:
    return seconds if math.isinf(seconds) else round(1e3 * seconds, 1)
