"""Transactions that mostly read, opened for every request as ORMs do: they must not wait for one another (R21).

32 clients through the proxy of three nodes, ack 1; what each does: `bench.transactions_load`. The sides differ in one
word: BEGIN, which takes nothing until a statement needs it, and BEGIN IMMEDIATE, which takes the write turn at once.
That is what every BEGIN would be if a stream that opens a transaction were simply given the writer. The same with one
client is the floor of the latency: its transactions wait for nobody.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import Cpu, Figure, Report, Sample, alternate, compare
from bench.processes import address, cluster, pipeline

CLIENTS = 32
TABLE = "CREATE TABLE counters (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)"
ROWS = f"INSERT INTO counters WITH RECURSIVE c(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM c WHERE i < {CLIENTS}) SELECT i, 0 FROM c"  # noqa: E501


@dataclass(slots=True)
class Load:
    url: str
    cpu: Cpu
    writes: int = 0
    errors: list[str] = field(default_factory=list)

    def measure(self, clients: int, seconds: float, begin: str) -> Sample:
        """transactions/s; CPU by process; the latency of those that only read in `extra`."""
        command = [sys.executable, "-m", "bench.transactions_load", *address(self.url)]
        command += [str(clients), str(seconds), begin]
        with self.cpu.measured():
            result = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
        self.writes += result["writes"]
        if result["errors"]:
            self.errors.append(f"{begin}: {result['errors']} wrong answers, the last: {result['last_error']}")
        extra = {"p50_ms": result["p50_ms"], "p99_ms": result["p99_ms"]}
        return Sample(result["rate"], self.cpu.per_operation(result["transactions"]), extra)


def run(directory: Path, *, quick: bool) -> Report:
    rounds, seconds = (2, 1.0) if quick else (5, 2.0)
    report = Report("transactions that mostly read")
    with cluster(directory / "three", followers=2, ack=1) as three:
        load = Load(three.proxy, Cpu(three.pids()))
        pipeline(load.url, TABLE)
        pipeline(load.url, ROWS)
        load.measure(CLIENTS, 0.5, "BEGIN")  # warm
        samples = alternate(
            {
                "deferred": lambda: load.measure(CLIENTS, seconds, "BEGIN"),
                "immediate": lambda: load.measure(CLIENTS, seconds, "BEGIN IMMEDIATE"),
                "alone": lambda: load.measure(1, seconds / 2, "BEGIN"),
            },
            rounds=rounds,
        )
        [[total]] = pipeline(load.url, "SELECT sum(n) FROM counters")
        report.check(total == load.writes, f"{load.writes} updates were committed and the rows hold {total}")
    report.errors += load.errors
    words = {
        "deferred": f"BEGIN, {CLIENTS} clients",
        "immediate": f"BEGIN IMMEDIATE, {CLIENTS} clients",
        "alone": "BEGIN, 1 client",
    }
    for side, name in words.items():
        report.figures.append(Figure.of(name, "tx/s", samples[side]))
        for key, label in (("p50_ms", "p50"), ("p99_ms", "p99")):
            taken = [Sample(sample.extra[key]) for sample in samples[side]]
            report.figures.append(Figure.of(f"{name}, one that only reads, {label}", "ms", taken))
    report.ratios += [
        compare(f"tx/s at {CLIENTS} clients: BEGIN / BEGIN IMMEDIATE", samples, "deferred", "immediate", goal=5.0),
        compare(f"tx/s with BEGIN: {CLIENTS} clients / 1 client", samples, "deferred", "alone", goal=None),
    ]
    return report
