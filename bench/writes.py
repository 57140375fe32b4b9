"""Acknowledged writes: group commit against synchronous=FULL, one by one, behind the same HTTP shell.

Three sides, 64 closed-loop clients (one INSERT a request), and again one client for the latency:

- baseline: `bench.baselines.full_server`;
- node: a single node, ack 0, clients on its own port: on the leader's disk when answered;
- proxy: three nodes, ack 1, clients on the proxy: on two disks when answered. All five processes and the load share
  this machine's cores.

Every answer is checked, and at the end each database must hold exactly the rows that were acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import Cpu, Figure, Report, Sample, alternate, compare
from bench.processes import address, cluster, module, pipeline

CLIENTS = 64
SQL = "INSERT INTO bench (value) VALUES (?)"
BODY = json.dumps(
    {
        "requests": [
            {"type": "execute", "stmt": {"sql": SQL, "args": [{"type": "integer", "value": "42"}]}},
            {"type": "close"},
        ]
    }
).encode()
TABLE = "CREATE TABLE bench (id INTEGER PRIMARY KEY, value INTEGER)"


@dataclass(slots=True)
class Side:
    """A server under load, and how much it has acknowledged."""

    url: str
    cpu: Cpu
    acknowledged: int = 0
    errors: list[str] = field(default_factory=list)

    def measure(self, connections: int, seconds: float) -> Sample:
        """writes/s; CPU by process; the latency percentiles in `extra`."""
        command = [sys.executable, "-m", "bench.load", *address(self.url), str(connections), str(seconds)]
        with self.cpu.measured():
            result = json.loads(subprocess.run(command, input=BODY, capture_output=True, check=True, timeout=60).stdout)
        self.acknowledged += result["answered"]
        if result["errors"]:
            self.errors.append(f"{result['errors']} wrong answers, the last: {result['last_error']}")
        extra = {"p50_us": result["p50_us"], "p99_us": result["p99_us"]}
        return Sample(result["rate"], self.cpu.per_operation(result["answered"]), extra)


@contextlib.contextmanager
def sides(directory: Path) -> Iterator[dict[str, Side]]:
    with (
        module("bench.baselines.full_server", str(directory / "full.db")) as (process, port),
        cluster(directory / "single", followers=0, ack=0) as single,
        cluster(directory / "three", followers=2, ack=1) as three,
    ):
        single_pid = {"leader": single.pids()["leader"]}
        made = {
            "baseline": Side(f"http://127.0.0.1:{port}", Cpu({"server": process.pid})),
            "node": Side(single.leader, Cpu(single_pid)),
            "proxy": Side(three.proxy, Cpu(three.pids())),
        }
        for side in made.values():
            pipeline(side.url, TABLE)
        yield made


def run(directory: Path, *, quick: bool) -> Report:
    rounds, seconds = (3, 0.5) if quick else (9, 0.8)  # many short rounds: noise here comes in seconds
    report = Report("acknowledged writes")
    with sides(directory) as made:
        for side in made.values():
            side.measure(CLIENTS, 0.5)  # warm
        many = alternate(
            {name: lambda side=side: side.measure(CLIENTS, seconds) for name, side in made.items()},  # type: ignore[misc]
            rounds=rounds,
            baseline="baseline",
        )
        one = alternate(
            {name: lambda side=side: side.measure(1, seconds / 2) for name, side in made.items()},  # type: ignore[misc]
            rounds=rounds,
        )
        for name, side in made.items():
            report.errors += [f"{name}: {error}" for error in side.errors]
            [[count]] = pipeline(side.url, "SELECT count(*) FROM bench")
            report.check(count == side.acknowledged, f"{name} acknowledged {side.acknowledged} rows and holds {count}")
    names = {
        "baseline": "synchronous=FULL one by one",
        "node": "node, ack 0, group commit",
        "proxy": "proxy and 3 nodes, ack 1",
    }
    for side_name, words in names.items():
        report.figures.append(Figure.of(f"{words}, {CLIENTS} clients", "writes/s", many[side_name]))
    for side_name, words in names.items():
        for key, label in (("p50_us", "p50"), ("p99_us", "p99")):
            latencies = [Sample(sample.extra[key]) for sample in one[side_name]]
            report.figures.append(Figure.of(f"{words}, 1 client, {label}", "us", latencies))
    node_goal, proxy_goal = 5.0, 1.0
    report.ratios += [
        compare("writes/s at 64 clients: node ack 0 / FULL one by one", many, "node", "baseline", goal=node_goal),
        compare("writes/s at 64 clients: proxy ack 1 / FULL one by one", many, "proxy", "baseline", goal=proxy_goal),
        compare(
            "CPU per write at 64 clients: node ack 0 / FULL",
            many,
            "node",
            "baseline",
            goal=1.0,
            at_most=True,
            of=lambda sample: sum(sample.cpu_us.values()),
        ),
        compare(
            "CPU per write at 64 clients: proxy and 3 nodes / FULL",
            many,
            "proxy",
            "baseline",
            goal=None,
            at_most=True,
            of=lambda sample: sum(sample.cpu_us.values()),
        ),
        compare(
            "write p50 at 1 client: node ack 0 / FULL",
            one,
            "node",
            "baseline",
            goal=1.05,
            at_most=True,
            of=lambda sample: sample.extra["p50_us"],
        ),
        compare(
            "write p50 at 1 client: proxy ack 1 / FULL",
            one,
            "proxy",
            "baseline",
            goal=None,
            at_most=True,
            of=lambda sample: sample.extra["p50_us"],
        ),
    ]
    return report
