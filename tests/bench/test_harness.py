"""The benchmark harness: rounds in turn, paired ratios, and the JSON that others read (perf.md 11)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import AGAIN, Ratio, Sample, alternate, compare, percentile
from bench.processes import module, pipeline
from bench.writes import BODY, TABLE


def test_sides_are_measured_in_turn_and_each_round_begins_with_another() -> None:
    calls: list[str] = []

    def side(name: str) -> Sample:
        calls.append(name)
        return Sample(1.0)

    samples = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2)
    assert calls == ["a", "b", "b", "a"]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 2, "b": 2}


def test_the_baseline_is_measured_twice_a_round_as_two_sides_of_the_same_code() -> None:
    samples = alternate({"base": lambda: Sample(1.0), "ours": lambda: Sample(2.0)}, rounds=3, baseline="base")
    assert len(samples["base" + AGAIN]) == 3
    ratio = compare("x", samples, "ours", "base", goal=2.0)
    assert (ratio.value, ratio.aa, ratio.met, ratio.noisy) == (2.0, 1.0, True, False)


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    """A slow second hits both sides of its round."""
    samples = {"base": [Sample(10), Sample(1), Sample(10)], "ours": [Sample(20), Sample(2), Sample(30)]}
    ratio = compare("x", samples, "ours", "base", goal=None)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 3.0)
    assert ratio.met is None


def test_a_machine_that_differs_from_itself_is_called_noisy() -> None:
    samples = {"base": [Sample(10)], "base" + AGAIN: [Sample(12)], "ours": [Sample(11)]}
    ratio = compare("x", samples, "ours", "base", goal=1.0)
    assert ratio.noisy
    assert ratio.value == 1.0  # against the mean of both


@pytest.mark.parametrize(("at_most", "met"), [(True, False), (False, True)])
def test_a_goal_is_a_floor_or_a_ceiling(at_most: bool, met: bool) -> None:
    assert Ratio("x", 2.0, 2.0, 2.0, 1.5, at_most).met is met


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (51.0, 100.0, 7.0)


def test_a_benchmark_writes_its_ratios_as_json(tmp_path: Path) -> None:
    """The shape of design.md 6: ratios with name, value, goal, met."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench", "--quick", "--json", str(out), "--directory", str(tmp_path), "snapshot"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    ratios = json.loads(out.read_text())["ratios"]
    assert len(ratios) == 2
    assert {"name", "value", "goal", "met"} <= ratios[0].keys()


def test_the_baseline_server_answers_as_a_node_does(tmp_path: Path) -> None:
    """It stands on a node's own front door, so it must keep up with it."""
    with module("bench.baselines.full_server", str(tmp_path / "full.db")) as (_, port):
        url = f"http://127.0.0.1:{port}"
        pipeline(url, TABLE)
        command = [sys.executable, "-m", "bench.load", "127.0.0.1", port, "4", "0.3"]
        loaded = json.loads(subprocess.run(command, input=BODY, capture_output=True, check=True).stdout)
        assert loaded["errors"] == 0
        assert pipeline(url, "SELECT count(*) FROM bench") == [[loaded["answered"]]]


def test_an_unknown_name_is_a_usage_error() -> None:
    result = subprocess.run([sys.executable, "-m", "bench", "speed"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no benchmark is named speed" in result.stderr
