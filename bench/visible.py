"""From a commit on the leader to a SELECT that shows it on a follower, against a bare asyncio TCP push.

Leader and follower are two real nodes in two processes, ack 1; a commit of one row every few milliseconds, one at a
time. Two floors: a push of as many bytes as a frame has, which touches no disk and no database; and the same push
with what the promise needs at least: fdatasync of the -wal before it, fdatasync of a log after it, then SQLite running
the INSERT (`bench.baselines.push`). Percentiles are taken in each round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import Figure, Report, Sample, alternate, compare, percentile
from bench.processes import module
from bench.stdio import ask

INTERVAL_SECONDS = 0.0025
Times = list[tuple[int, int]]


def run(directory: Path, *, quick: bool) -> Report:
    rounds, count = (3, 150) if quick else (7, 300)
    report = Report("from commit to visible on a follower")
    cluster_url = f"file://{directory}/store"
    with (
        module("bench.observed_node", "a", f"{directory}/a", cluster_url, "--init", "a,b") as (leader, _),
        module("bench.observed_node", "b", f"{directory}/b", cluster_url) as (follower, _),
        module("bench.baselines.push", "receive", f"{directory}/receiver") as (receiver, port),
        module("bench.baselines.push", "send", f"{directory}/sender", port) as (sender, _),
    ):
        acknowledged: list[float] = []

        def replicated() -> Sample:
            committed = ask(leader, "commit", count, INTERVAL_SECONDS)
            acknowledged.append(percentile([(acked - at) / 1000 for _, at, acked in committed], 0.5))
            rows: Times = [(row, at) for row, at, _ in committed]
            return _delays(rows, _seen(lambda: ask(follower, "seen"), rows[-1][0]), report)

        def pushed(kind: str) -> Sample:
            sent = ask(sender, kind, count, INTERVAL_SECONDS, frame_bytes)
            return _delays(sent, _seen(lambda: ask(receiver, "seen"), sent[-1][0]), report)

        frame_bytes = 1000
        for warm in (replicated, lambda: pushed("durable")):
            warm()
        before = ask(leader, "log_bytes")
        replicated()
        frame_bytes = (ask(leader, "log_bytes") - before) // count
        acknowledged.clear()
        samples = alternate(
            {"bare": lambda: pushed("bare"), "durable": lambda: pushed("durable"), "node": replicated},
            rounds=rounds,
            baseline="durable",
        )
    words = {
        "bare": f"push of {frame_bytes} bytes",
        "durable": "push with two fdatasyncs and SQLite",
        "node": "leader to follower",
    }
    for side, label in words.items():
        for share in ("p50", "p99"):
            values = [Sample(sample.extra[share]) for sample in samples[side]]
            report.figures.append(Figure.of(f"{label}, {share}", "us", values))
    report.figures.append(
        Figure.of("leader: commit to acknowledged (ack 1), p50", "us", [Sample(value) for value in acknowledged])
    )
    for share, goal in (("p50", None), ("p99", 3.0)):
        for floor, label in (("durable", "push with two fdatasyncs and SQLite"), ("bare", "bare push")):
            report.ratios.append(
                compare(
                    f"visible {share}: leader to follower / {label}",
                    samples,
                    "node",
                    floor,
                    goal=goal if floor == "durable" else None,
                    at_most=True,
                    of=lambda sample, share=share: sample.extra[share],  # type: ignore[misc]
                )
            )
    return report


def _seen(ask_seen: Callable[[], list[list[int]]], last: int) -> Times:
    """What the other side saw, once it has seen number `last`."""
    seen: Times = []
    until = time.monotonic() + 20
    while not seen or seen[-1][0] < last:
        if time.monotonic() > until:
            raise TimeoutError(f"number {last} was not seen within 20 s; the last was {seen[-1:]}")
        seen += [(number, at) for number, at in ask_seen()]
    return seen


def _delays(begun: Times, seen: Times, report: Report) -> Sample:
    """Microseconds until each number, or a later one, was seen."""
    delays: list[float] = []
    arrivals = iter(seen)
    number, at = next(arrivals)
    for row, started in begun:
        while number < row:
            number, at = next(arrivals)
        delays.append((at - started) / 1000)
    report.check(min(delays) > 0, "something was seen before it was committed")
    extra = {"p50": percentile(delays, 0.50), "p99": percentile(delays, 0.99)}
    return Sample(extra["p50"], extra=extra)
