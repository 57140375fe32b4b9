"""`python -m tests.simulation SEED [--count N] [--mutant NAME] [--verbose]`: replay a seed, or run many."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.simulation.cluster import FOCUS, simulate
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import Violation


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--focus", choices=sorted(FOCUS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    failed, elections, writes, began = [], 0, 0, time.monotonic()
    for seed in range(options.seed, options.seed + options.count):
        mutant = MUTANTS.get(options.mutant)
        rules, focus = (mutant[0](), mutant[1]) if mutant else (None, options.focus)
        try:
            judge = simulate(seed, rules, focus=focus, verbose=options.verbose).judge
        except (Violation, Exception) as error:  # noqa: BLE001
            failed.append(seed)
            say(f"seed {seed}: {error if isinstance(error, Violation) else traceback.format_exc()}")
            if len(failed) == 10:
                break
        else:
            elections, writes = elections + judge.elections, writes + len(judge.acked)
    seconds = time.monotonic() - began
    say(f"{options.count} seeds, {len(failed)} failed, {elections} terms, {writes} writes acked, {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
