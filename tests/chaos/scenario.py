"""One scenario: a cluster under load, faults one after the other, figures after each, a verdict at the end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.checkers.sets import judge_set
from tests.chaos.cluster import HEAL_SECONDS, ChaosCluster
from tests.chaos.faults import Fault
from tests.chaos.gaps import longest_gap
from tests.chaos.report import Report
from tests.chaos.workload import Workload
from tests.cluster.harness import eventually, same_files

__all__ = ["Scenario", "scenario"]

LOOK_SECONDS = 60.0  # how long a scenario waits for writes to go on, before that is the complaint
AFTER_SECONDS = 0.5  # of writes going well, before a gap is over
ASK_HEAL_SECONDS = 60.0  # healing is waited for so long; beyond HEAL_SECONDS it is a complaint (I20)


@dataclass(slots=True)
class Scenario:
    """What the functions of scenarios.py work with."""

    cluster: ChaosCluster
    load: Workload
    report: Report
    chance: random.Random
    terms: list[int] = field(default_factory=list)

    def fault(self, inject: Callable[[ChaosCluster, random.Random], Fault], *, hold_seconds: float = 0.0) -> None:
        """One fault: inject, wait until writes go on and for `hold_seconds`, heal, wait until all is level."""
        self.load.wait_acked(int(self.chance.uniform(0.3, 1.0) * self.load.rate))
        before = time.monotonic()
        fault = inject(self.cluster, self.chance)
        try:
            time.sleep(hold_seconds)
            if not fault.stops_writes:
                self.wait_writes_go_on(time.monotonic())  # a leader whose lease runs out answers for a while yet
        finally:
            fault.heal()
        if fault.stops_writes:
            self.wait_writes_go_on(time.monotonic())
        self.gap(before, fault.what)
        self.heal(fault.what)

    def wait_writes_go_on(self, since: float) -> None:
        """Until a write that was sent after `since` is answered well, and more are for AFTER_SECONDS."""

        def going() -> bool:
            sent = [each.end for each in self.load.recent_writes() if each.begin > since]
            return bool(sent) and max(sent) - min(sent) > AFTER_SECONDS

        eventually(going, "writes go on", timeout_seconds=LOOK_SECONDS)

    def gap(self, since: float, what: str) -> float:
        seconds = longest_gap(self.load.answered, since, time.monotonic())
        self.report.gaps_seconds.append(seconds)
        self.report.runs += 1
        self.terms.append(self.cluster.term())
        self.report.say(f"{self.report.runs}: {what}; gap {seconds * 1e3:.0f} ms")
        return seconds

    def heal(self, what: str) -> None:
        """I20: one leader, all nodes healthy and level, within HEAL_SECONDS of healing."""
        begin = time.monotonic()
        try:
            self.cluster.wait_whole(ASK_HEAL_SECONDS)
        except AssertionError as error:
            self.report.complaints.append(f"after {what}: {error}; {self.cluster.statuses()}")
            raise
        took = time.monotonic() - begin
        self.report.heal_seconds.append(took)
        if took > HEAL_SECONDS:
            self.report.complaints.append(f"after {what}: healed only after {took:.1f} s")


@contextlib.contextmanager
def scenario(
    name: str,
    settings: Mapping[str, object],
    *,
    seed: int,
    rate: float = 200.0,
    reads: float = 20.0,
    say: Callable[[str], None] = lambda _: None,
    keep: Path | None = None,
) -> Iterator[Scenario]:
    """A begun cluster under load; at the end all is judged into the report. `settings` are the cluster's.

    `keep`: where the files of a cluster are copied when there are complaints.
    """
    report = Report(name, settings={"rate": rate, "seed": seed, **settings}, say=say)
    with tempfile.TemporaryDirectory(prefix=f"walship-chaos-{name}-") as root:
        cluster = ChaosCluster(Path(root), **settings)  # type: ignore[arg-type]
        with cluster:
            cluster.begin()
            load = Workload(cluster.urls, rate=rate, reads=reads)
            with load:
                found = Scenario(cluster, load, report, random.Random(seed))
                try:
                    yield found
                except AssertionError as error:
                    report.complaints.append(f"ended early: {error}")
            with contextlib.suppress(AssertionError):
                _judge(found)
            if report.complaints and keep is not None:
                shutil.copytree(root, keep / f"{name}-{os.getpid()}", ignore_dangling_symlinks=True)
        report.finish()


def _judge(found: Scenario) -> None:
    cluster, load, report = found.cluster, found.load, found.report
    report.writes = len(load.adds())
    report.acked = load.acked
    report.count_errors(load.errors())
    report.examples = load.examples()
    report.complaints += load.complaints[:10]
    if load.skipped:
        report.notes["not sent, too many waiting"] = load.skipped
    try:
        cluster.start_dead()
        cluster.wait_whole(ASK_HEAL_SECONDS)
        statuses = cluster.wait_level(ASK_HEAL_SECONDS)
    except AssertionError as error:
        report.complaints.append(f"not level at the end: {error}")
        raise
    if any(found.terms[at] > found.terms[at + 1] for at in range(len(found.terms) - 1)):
        report.complaints.append(f"terms went back: {found.terms}")
    verdict = judge_set(load.adds(), [row for (row,) in cluster.rows()])
    report.complaints += verdict.complaints()
    report.notes["lost"] = len(verdict.lost)
    report.notes["duplicates"] = len(verdict.duplicates)
    report.notes["outcome unknown, and done"] = len(verdict.recovered)
    report.notes["term"] = cluster.term()
    report.notes["seeds"] = {
        name: status["replication"]["seeds"] for name, status in statuses.items() if status.get("replication")
    }
    try:
        same_files(list(cluster.stop().values()))
    except AssertionError as error:
        report.complaints.append(str(error)[:2000])
