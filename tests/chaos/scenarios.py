"""The scenarios of `python -m tests.chaos NAME`. Each gives a Report; what they share is in scenario.py."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos import faults
from tests.chaos.cluster import ETCD, ChaosCluster
from tests.chaos.histories import Histories, tables
from tests.chaos.report import Report
from tests.chaos.scenario import Scenario, scenario
from tests.cluster.harness import eventually
from walship.engine import failpoints

__all__ = ["SCENARIOS", "Options"]

SOAK_PERIOD_SECONDS = 5.0
BUSY_PROCESSES = 16
REACH_SECONDS = 8.0  # of load, until an armed failpoint must have been reached
_OF_LEAVING = ("switchover.still", "switchover.handed_over", "leader.step_down_synced", "leader.truth_log")
_OF_A_LEADER = ("writer", "checkpoint", "generation", "leader", "switchover", "rewind", "orphan")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may say."""

    runs: int = 20
    lease: float = 3.0
    minutes: float = 1.0
    seed: int = 1
    rate: float = 200.0
    ack: int = 1
    say: Callable[[str], None] = lambda _: None
    keep: Path | None = None  # where files of a cluster that went wrong are copied

    def open(self, name: str, **settings: object) -> AbstractContextManager[Scenario]:
        settings = {"lease": self.lease, "ack": self.ack, **settings}
        return scenario(name, settings, seed=self.seed, rate=self.rate, say=self.say, keep=self.keep)


def kill_leader(options: Options) -> Report:
    """kill -9 of the leader; another one leads."""
    with options.open("kill-leader") as run:
        for _ in range(options.runs):
            run.fault(faults.kill_leader)
    return run.report


def kill_leader_etcd(options: Options) -> Report:
    """The same, the records being in an etcd."""
    with options.open("kill-leader-etcd", store=ETCD) as run:
        for _ in range(options.runs):
            run.fault(faults.kill_leader)
    return run.report


def stop_leader(options: Options) -> Report:
    """SIGSTOP of the leader until another one leads, then SIGCONT."""
    with options.open("stop-leader") as run:
        for _ in range(options.runs):
            run.fault(faults.stop_leader)
    return run.report


def cut_leader(options: Options) -> Report:
    """The leader's host is cut off from everybody, records being in an etcd on a host of its own."""
    with options.open("cut-leader", store=ETCD, network=True, proxies=2) as run:
        for _ in range(options.runs):
            run.fault(faults.isolate_leader)
    return run.report


def switchover(options: Options) -> Report:
    """A planned change of leader under 500 writes a second."""
    with replace(options, rate=500.0).open("switchover") as run:
        for _ in range(options.runs):
            _switch(run)
    return run.report


def mass_kill(options: Options) -> Report:
    """All nodes killed within 100 ms and started again."""
    with options.open("mass-kill") as run:
        for _ in range(options.runs):
            run.fault(faults.mass_kill)
    return run.report


def crash_points(options: Options) -> Report:
    """Each failpoint, `runs` times, in the leader and in a follower: it dies there and is started again."""
    with options.open("crash-points", node_words=("--log-max", "8MiB")) as run:
        for name, round_ in itertools.product(failpoints.NAMES, range(options.runs)):
            _crash(run, name, round_)
    return run.report


def partitions(options: Options) -> Report:
    """Each kind of cut in turn, for longer than a lease."""
    with options.open("partitions", store=ETCD, network=True, proxies=2) as run:
        for number in range(options.runs * len(faults.NETWORK_FAULTS)):
            run.fault(faults.NETWORK_FAULTS[number % len(faults.NETWORK_FAULTS)], hold_seconds=2 * options.lease)
    return run.report


def store_outage(options: Options) -> Report:
    """The etcd is stopped, or killed, for 10 x T: never a second leader, and recovery without hands (I17)."""
    with options.open("store-outage", store=ETCD) as run:
        for number in range(options.runs):
            term = run.cluster.term()
            run.fault(_outage(faults.STORE_FAULTS[number % 2], 10 * options.lease))
            if run.cluster.term() > term + 1:
                run.report.complaints.append(f"{run.cluster.term() - term} elections after one outage")
    return run.report


def soak(options: Options) -> Report:
    """A random fault every 5 s for `minutes`, with clients whose histories are judged."""
    with options.open("soak", store=ETCD, network=True, proxies=2) as run:
        with run.cluster.client() as client:
            for statement in tables():
                client.execute(statement)
        injectors = [*faults.PROCESS_FAULTS, *faults.NETWORK_FAULTS, *faults.STORE_FAULTS]
        until = time.monotonic() + 60 * options.minutes
        histories = Histories(run.cluster.urls, seed=options.seed)
        try:
            with histories:
                while time.monotonic() < until:
                    begin = time.monotonic()
                    run.fault(run.chance.choice(injectors), hold_seconds=run.chance.uniform(0, 2.0))
                    time.sleep(max(0.0, begin + SOAK_PERIOD_SECONDS - time.monotonic()))
        finally:
            run.report.complaints += histories.judge()
            run.report.notes["histories"] = histories.counts()
            run.report.notes["errors in histories"] = dict(histories.errors)
    return run.report


def busy(options: Options) -> Report:
    """16 busy processes beside the cluster for `minutes`: nobody may take the leader for dead."""
    with options.open("busy") as run:
        term = run.cluster.term()
        spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY_PROCESSES)]
        begin = time.monotonic()
        try:
            time.sleep(60 * options.minutes)
        finally:
            for each in spinners:
                each.kill()
                each.wait()
        run.gap(begin, f"{BUSY_PROCESSES} busy processes on {os.cpu_count()} cores")
        failovers = run.cluster.term() - term
        run.report.notes["false failovers"] = failovers
        if failovers:
            run.report.complaints.append(f"{failovers} failovers, and nobody had failed")
    return run.report


def _switch(run: Scenario) -> None:
    run.load.wait_acked(int(run.chance.uniform(0.5, 1.0) * run.load.rate))
    before, old = time.monotonic(), run.cluster.leader()
    run.cluster.switch_over()
    run.wait_writes_go_on(before)
    new = run.cluster.leader()
    run.gap(before, f"{old} handed over to {new}")
    if new == old:
        run.report.complaints.append(f"{old} still leads after a switchover")
    run.heal("a switchover")


def _outage(inject: faults.Injector, seconds: float) -> faults.Injector:
    """A fault of the store that is over by itself: writes may stop until then, and no longer."""

    def hold(cluster: ChaosCluster, chance: random.Random) -> faults.Fault:
        fault = inject(cluster, chance)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            leaders = cluster.leaders()
            assert len(leaders) <= 1, f"{leaders} lead at once while the store is away"
            time.sleep(0.2)
        fault.heal()
        return faults.Fault(f"{fault.what} for {seconds:g} s", lambda: None)

    return hold


def _crash(run: Scenario, name: str, round_: int) -> None:
    """A node is started anew with the failpoint armed, and has to get there within some seconds of load."""
    cluster, area = run.cluster, name.partition(".")[0]
    victim = run.chance.choice(cluster.followers())
    setting = f"{name}:{1 + round_}"
    before = time.monotonic()
    cluster.kill(victim)
    if area == "seed":  # a first copy is made where there is none
        shutil.rmtree(cluster.root / victim)
    cluster.start(victim, environ={failpoints.VARIABLE: setting})
    if area in _OF_A_LEADER:
        with contextlib.suppress(AssertionError):  # it may die of it, or before
            cluster.wait_answers(victim)
            cluster.switch_over_soon(victim)
            if name in _OF_LEAVING and cluster.processes[victim].alive:
                cluster.switch_over()
    try:
        eventually(lambda: not cluster.processes[victim].alive, f"{name} is reached", timeout_seconds=REACH_SECONDS)
        reached = "died"
    except AssertionError:
        cluster.kill(victim)
        reached = "did not get there"
    run.report.notes[name] = int(str(run.report.notes.get(name, 0))) + (reached == "died")
    try:
        run.wait_writes_go_on(time.monotonic())
    finally:
        cluster.start_dead()
    run.gap(before, f"{victim} {reached} at {setting}")
    run.heal(f"{victim} {reached} at {setting}")


SCENARIOS: dict[str, Callable[[Options], Report]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        kill_leader, kill_leader_etcd, stop_leader, cut_leader, switchover, mass_kill, crash_points, partitions,
        store_outage, soak, busy,
    )
}  # fmt: skip
