"""`python -m tests.chaos NAME...`: run scenarios, print their figures, write them as JSON; exit code 1 if anything
was lost, done twice or wrong. `all` runs each once, in the order of docs/chaos.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS, Options
from tests.cluster.harness import say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*SCENARIOS, "all"], metavar="NAME", help=", ".join(SCENARIOS))
    for name, kind in (
        ("runs", int),
        ("lease", float),
        ("minutes", float),
        ("seed", int),
        ("rate", float),
        ("ack", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Options(), name))
    parser.add_argument("--json", type=Path, help="directory that gets NAME-T.json for each scenario")
    parser.add_argument("--keep", type=Path, help="directory that gets the files of a cluster that went wrong")
    given = parser.parse_args()
    options = Options(given.runs, given.lease, given.minutes, given.seed, given.rate, given.ack, _say, given.keep)
    wrong = False
    for name in SCENARIOS if "all" in given.names else given.names:
        report = SCENARIOS[name](options)
        for line in report.lines():
            _say(line)
        if given.json is not None:
            given.json.mkdir(parents=True, exist_ok=True)
            report.write_json(given.json / f"{report.name}-T{given.lease:g}.json")
        wrong = wrong or bool(report.complaints)
    return int(wrong)


def _say(line: str) -> None:
    say(line)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
