"""The failover rules hold in their models, and each rule is needed: without it Spin finds the loss.

Issue 5 and failover.md 3.14; docs/model.md has the results.
Where code must differ from a model, the model changes first.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model.runs import RUNS
from tests.model.spin import MODELS, Run, check, missing_tool, read

needs_spin = pytest.mark.skipif(bool(missing_tool()), reason=missing_tool() or "spin and gcc are here")


def marked(run: Run) -> object:
    return pytest.param(run, id=str(run).replace(" ", ","), marks=[pytest.mark.soak] if run.deep else [])


@needs_spin
@pytest.mark.parametrize("run", [marked(run) for run in RUNS if not run.error])
def test_with_all_rules_no_path_breaks_a_promise(run: Run, tmp_path: Path) -> None:
    verdict = check(run, tmp_path)
    assert verdict.errors == 0, f"{run}: {verdict.violated}; replay with spin -t -p -g in {tmp_path}"
    assert not verdict.unfinished, f"{run}: the search is not exhaustive ({verdict.unfinished})"


@needs_spin
@pytest.mark.parametrize("run", [marked(run) for run in RUNS if run.error])
def test_without_the_rule_a_path_breaks_a_promise(run: Run, tmp_path: Path) -> None:
    verdict = check(run, tmp_path)
    assert verdict.errors == 1, f"{run}: dropping this rule does no harm in {verdict.states:,} states: {run.rule}"
    assert verdict.violated.startswith("assertion violated")


def test_every_model_has_runs_with_all_rules_and_without_each() -> None:
    for path in sorted(MODELS.glob("*.pml")):
        verdicts = {run.error for run in RUNS if run.model == path.stem}
        assert verdicts == {True, False}, f"{path.name} lacks a run with all rules on, or one with a rule dropped"


def test_a_run_sets_only_switches_that_its_model_has() -> None:
    """A misspelt switch would drop no rule, and a positive run would prove what it does not say."""
    for run in RUNS:
        known = set(re.findall(r"#ifn?def (\w+)", (MODELS / f"{run.model}.pml").read_text("utf-8")))
        assert {switch.partition("=")[0] for switch in run.switches.split()} <= known, str(run)


def test_a_search_cut_short_is_not_a_pass() -> None:
    """Spin says `errors: 0` also when it ran out of depth."""
    output = (
        "error: max search depth too small\nState-vector 20 byte, depth reached 99, errors: 0\n  12 states, stored\n"
    )
    assert read(output).unfinished == "max search depth too small"
