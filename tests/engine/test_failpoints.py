"""Failpoints: every durable step is named once, and a process told so dies exactly there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from walship.engine import failpoints
from walship.errors import UsageError

ROOT = Path(__file__).parents[2]
CALL = re.compile(r"\breach\(\s*\"([a-z0-9_.]+)\"")
# Names registered before the module that reaches them exists: name's first word -> that module.
COMING = {"leader": "walship/node/node.py"}


def names_in_source() -> list[str]:
    return [
        name
        for folder in ("walship", "proxy")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "failpoints.py"
        for name in CALL.findall(path.read_text())
    ]


def test_every_name_in_the_source_is_registered() -> None:
    assert set(names_in_source()) <= set(failpoints.NAMES)


def test_every_registered_name_is_reached_somewhere() -> None:
    def expected(name: str) -> bool:
        module = COMING.get(name.partition(".")[0])
        return module is None or (ROOT / module).exists()

    missing = {name for name in failpoints.NAMES if expected(name)} - set(names_in_source())
    assert not missing


def test_names_are_unique() -> None:
    assert len(set(failpoints.NAMES)) == len(failpoints.NAMES)


def run(setting: str | None) -> subprocess.CompletedProcess[str]:
    script = """
from walship.engine import failpoints
try:
    for turn in range(1, 4):
        failpoints.reach("writer.committed")
        failpoints.reach("writer.synced")
        print(turn, flush=True)
finally:
    print("tidied up", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(failpoints.VARIABLE, None)
    if setting is not None:
        environment[failpoints.VARIABLE] = setting
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=20
    )


@pytest.mark.parametrize(("setting", "output"), [("writer.synced", ""), ("writer.synced:3", "1\n2\n")])
def test_the_process_dies_at_the_named_reach_and_tidies_nothing(setting: str, output: str) -> None:
    result = run(setting)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout == output


@pytest.mark.parametrize("setting", [None, "", "writer.acked", "writer.synced:4"])
def test_a_point_that_is_not_reached_changes_nothing(setting: str | None) -> None:
    result = run(setting)
    assert (result.returncode, result.stdout) == (0, "1\n2\n3\ntidied up\n")


@pytest.mark.parametrize("setting", ["writer.sinked", "writer.synced:", "writer.synced:0", "writer.synced:-1", ":1"])
def test_a_setting_that_would_crash_nowhere_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=failpoints.VARIABLE):
        failpoints.armed(setting)
