"""`python -m tests.simulation SEED [--count N] [--mutant NAME] [--verbose]`: replay a seed, or run many."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from .cluster import simulate
from .mutants import MUTANTS
from .world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    failed, elections, writes, began = [], 0, 0, time.monotonic()
    for seed in range(options.seed, options.seed + options.count):
        rules = MUTANTS[options.mutant]() if options.mutant else None
        try:
            cluster = simulate(seed, rules, verbose=options.verbose)
            elections += cluster.judge.elections
            writes += len(cluster.judge.acked)
        except Violation as error:
            failed.append(seed)
            print(f"seed {seed}: {error}")
        except Exception:
            failed.append(seed)
            print(f"seed {seed}:")
            traceback.print_exc()
        if len(failed) >= 10:
            break
    seconds = time.monotonic() - began
    print(f"{options.count} seeds, {len(failed)} failed, {elections} terms, {writes} writes acked, {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
