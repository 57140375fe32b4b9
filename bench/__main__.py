"""`python -m bench [--quick] [--json FILE] [NAME ...]`: measure the ratios, print them, exit 1 if an answer was wrong.

A goal that is not met, or a noisy machine, does not fail the run: they are printed, and are in the JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

NAMES = ("writes", "transactions", "apply", "visible", "snapshot")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--directory", type=Path, help="where databases are put; default the temporary directory")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark is named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    console = Console(width=None if sys.stdout.isatty() else 130)
    began, load = time.time(), os.getloadavg()
    reports = []
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory(prefix=f"walship-bench-{name}-", dir=options.directory) as directory:
            started = time.perf_counter()
            report = importlib.import_module(f"bench.{name}").run(Path(directory), quick=options.quick)
            report.seconds = time.perf_counter() - started
        report.show(console)
        reports.append(report)
    console.print(
        f"{sum(report.seconds for report in reports):.0f} s; load average {load[0]:.1f} at the start, "
        f"{os.getloadavg()[0]:.1f} at the end (it includes this run)"
    )
    if options.json:
        result = {
            "ratios": [ratio.to_json() for report in reports for ratio in report.ratios],
            "benchmarks": [report.to_json() for report in reports],
            "began": began,
            "quick": options.quick,
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(report.errors for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
