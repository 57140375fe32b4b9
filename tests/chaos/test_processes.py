"""A slice of the scenarios, short enough for every run. The whole of them: `make chaos`, docs/chaos.md.

Bounds on gaps are those of a loaded machine; what may never be is asserted exactly.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.report import Report
from tests.chaos.scenarios import SCENARIOS, Options
from tests.cluster.harness import say
from tests.netns import missing

pytestmark = pytest.mark.timeout(180)


def judged(name: str, tmp_path: Path, *, runs: int, lease: float = 3.0, rate: float = 200.0) -> Report:
    """A scenario's report, nothing being lost, done twice or wrong, and no read at `any` having failed."""
    report = SCENARIOS[name](Options(runs=runs, lease=lease, rate=rate, say=say, keep=tmp_path))
    for line in report.lines():
        say(line)
    assert report.complaints == []
    assert report.runs == runs
    assert report.client_errors("any") == 0, report.errors
    return report


def test_a_killed_leader_is_replaced_before_its_lease_ends_and_no_client_hears_of_it(tmp_path: Path) -> None:
    report = judged("kill-leader", tmp_path, runs=3)
    assert report.client_errors("write") == 0, report.examples
    assert max(report.gaps_seconds) < 3.0


def test_a_stopped_leader_is_replaced_after_its_lease_and_no_client_hears_of_it(tmp_path: Path) -> None:
    report = judged("stop-leader", tmp_path, runs=2, lease=1.0)
    assert report.client_errors("write") == 0, report.examples


def test_a_planned_change_of_leader_fails_no_write(tmp_path: Path) -> None:
    report = judged("switchover", tmp_path, runs=2)
    assert report.client_errors("write") == 0, report.examples
    assert max(report.gaps_seconds) < 3.0


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_leader_that_is_cut_off_is_replaced_and_comes_back_as_a_follower(tmp_path: Path) -> None:
    report = judged("cut-leader", tmp_path, runs=1, lease=1.0)
    assert report.client_errors("write") == 0, report.examples


def test_all_nodes_killed_at_once_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Without a node nobody can read; what was asked meanwhile may be refused, and some outcomes nobody knows."""
    report = SCENARIOS["mass-kill"](Options(runs=1, lease=1.0, say=say, keep=tmp_path))
    for line in report.lines():
        say(line)
    assert report.complaints == []
    assert report.runs == 1
