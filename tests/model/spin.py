"""Run one Promela model with Spin: generate the verifier, compile it, search, read the verdict.

A rule of a model is a `#define` switch, 1 = on; a run sets switches and bounds by `-D`
and says what the search must find.
A search that ran out of depth or memory proves nothing, so it is an error here, never a pass.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).resolve().parent
MEMORY_LIMIT_MB = 6000
DEPTH = 1_000_000
"""Steps of one path. The longest seen is below 1,000; a cut-off search is refused (`unfinished`)."""


@dataclass(frozen=True, slots=True)
class Run:
    """One configuration of one model. `switches` is as given to `-D`: "MAXT=2 FENCE=0"."""

    model: str
    switches: str
    rule: str
    """What the run shows: the bounds' meaning when all rules are on, else the rule that is dropped and its source."""
    error: bool
    """True when the search must find a violated assertion; False when it must end with none."""
    deep: bool = False
    """Longer than a few seconds: run by `make soak` only."""
    optimise: int = 0
    """gcc's level. Compiling costs as much as a short search, so only a long search is optimised."""

    def __str__(self) -> str:
        return f"{self.model} {self.switches}".strip()


@dataclass(frozen=True, slots=True)
class Verdict:
    errors: int
    states: int
    seconds: float
    violated: str
    """The assertion that failed, as Spin prints it; empty when none did."""
    unfinished: str
    """Why the search is not exhaustive although it found nothing; empty when it is."""


def missing_tool() -> str:
    """Why models cannot be checked on this machine, or an empty string."""
    absent = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found: the models are not checked (apt-get install spin gcc)" if absent else ""


def check(run: Run, directory: Path, *, timeout_seconds: float = 900) -> Verdict:
    """Search `run` to its end or its first error, in the empty `directory`.

    Raises CalledProcessError when a tool fails.
    """
    defines = [f"-D{switch}" for switch in run.switches.split()]
    level = f"-O{2 if run.deep else run.optimise}"
    commands = (
        ["spin", "-a", *defines, str(MODELS / f"{run.model}.pml")],
        [
            "gcc",
            level,
            "-w",
            "-DSAFETY",
            "-DCOLLAPSE",
            "-DVECTORSZ=2048",
            f"-DMEMLIM={MEMORY_LIMIT_MB}",
            "-o",
            "pan",
            "pan.c",
        ],
        # -E: a process that cannot go on is no error here; the models are about safety.
        ["./pan", "-E", f"-m{DEPTH}", "-w24" if run.deep else "-w20"],
    )
    output = ""
    for command in commands:
        done = subprocess.run(
            ["nice", *command], cwd=directory, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        output = done.stdout + done.stderr
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, output)
    return read(output)


def read(output: str) -> Verdict:
    """The verdict in what `pan` printed. Raises ValueError when it printed none."""
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    if errors is None or states is None:
        raise ValueError(f"pan ended without a verdict:\n{output}")
    seconds = re.search(r"elapsed time ([\d.e+-]+) seconds", output)
    violated = re.search(r"pan:\d+: (assertion violated .*) \(at depth", output)
    cut = re.search(r"max search depth too small|reached -DMEMLIM bound|out of memory", output)
    return Verdict(
        errors=int(errors[1]),
        states=int(states[1]),
        seconds=float(seconds[1]) if seconds else 0.0,
        violated=violated[1] if violated else "",
        unfinished=cut[0] if cut else "",
    )
