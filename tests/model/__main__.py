"""`python -m tests.model [--deep] [WORD]`: run the models and print the table of docs/model.md.

WORD picks the runs that contain it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.model.runs import RUNS
from tests.model.spin import check, missing_tool


def main(arguments: list[str]) -> int:
    if why := missing_tool():
        sys.stderr.write(f"{why}\n")
        return 1
    words = [word for word in arguments if not word.startswith("-")]
    wrong = 0
    sys.stdout.write("| model | switches | rule | result | states | s |\n|---|---|---|---|---|---|\n")
    for run in RUNS:
        if (run.deep and "--deep" not in arguments) or not all(word in str(run) for word in words):
            continue
        with tempfile.TemporaryDirectory() as directory:
            verdict = check(run, Path(directory))
        right = bool(verdict.errors) == run.error and (run.error or not verdict.unfinished)
        wrong += not right
        found = "error found" if verdict.errors else verdict.unfinished or "0 errors"
        cells = (run.model, run.switches, run.rule, found if right else f"{found}: NOT as expected")
        sys.stdout.write(f"| {' | '.join(cells)} | {verdict.states:,} | {verdict.seconds:.1f} |\n")
        sys.stdout.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
