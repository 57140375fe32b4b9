"""Supervising real processes: restarts with backoff, giving up on a crash loop, stopping with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.waiting import eventually
from walship.cli.children import LOG_MAX_BYTES, Child, CrashLoop
from walship.errors import Unavailable, UsageError

STAYS = 'import json, os, time; print(json.dumps({"ready": True, "url": f"http://{os.getpid()}"}), flush=True); '
STAYS += "time.sleep(600)"
DEAF = 'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("hello", flush=True); ' + STAYS
FOLLOWS = """
import sys, time
from walship.cli.part import _begin
_begin("info")
print("following", flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], env={**os.environ, "WALSHIP_PARENT": str(os.getpid())},
    stdout=subprocess.PIPE, text=True, start_new_session=True,
)
print(child.pid, child.stdout.readline(), flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def supervised(tmp_path: Path, script: str) -> AsyncIterator[tuple[Child, asyncio.Task[None], list[str]]]:
    said: list[str] = []
    child = Child("node1", [sys.executable, "-c", script], log_path=tmp_path / "node1.log", say=said.append)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(child.supervise(os.environ))
        try:
            yield child, task, said
        finally:
            await child.stop(5)


async def failure(tmp_path: Path, script: str) -> BaseException:
    with pytest.raises(ExceptionGroup) as caught:
        async with supervised(tmp_path, script) as (_, task, _said):
            await asyncio.wait({task}, timeout=30)
    return caught.value.exceptions[0]


def test_restarts_come_later_and_later_and_then_not_at_all() -> None:
    crashes = CrashLoop()
    assert [crashes.died(now) for now in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0.1, pytest.approx(0.3), 0.9, 2.7, None]


def test_deaths_that_lie_far_apart_are_no_crash_loop() -> None:
    crashes = CrashLoop()
    assert {crashes.died(31.0 * n) for n in range(20)} == {0.1}


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    async with supervised(tmp_path, STAYS) as (child, _, said):
        await eventually(lambda: child.url is not None)
        first = child.url
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await eventually(lambda: child.url not in (first, None))
        assert child.restarts == 1
        assert said == ["node1 ended (SIGKILL); starting it again in 0.1 s"]


async def test_a_crash_loop_ends_with_the_childs_last_words(tmp_path: Path) -> None:
    error = await failure(tmp_path, "import sys; sys.exit('the disk is on fire')")
    assert isinstance(error, Unavailable)
    assert "node1 ended 5 times within 30 s (last time exit code 1)" in str(error)
    assert "the disk is on fire" in str(error)


async def test_a_usage_error_of_a_child_is_not_tried_again(tmp_path: Path) -> None:
    error = await failure(tmp_path, "import sys; print('--ack is wrong', file=sys.stderr); sys.exit(2)")
    assert isinstance(error, UsageError)
    assert "--ack is wrong" in str(error)
    assert (tmp_path / "node1.log").read_text().count("wrong") == 1


async def test_stop_ends_a_child_and_its_task(tmp_path: Path) -> None:
    async with supervised(tmp_path, STAYS) as (child, task, _):
        await eventually(lambda: child.url is not None)
        assert await child.stop(5)
        await asyncio.wait_for(task, 5)
        assert child.pid is None


async def test_a_child_that_does_not_hear_is_killed_after_the_deadline(tmp_path: Path) -> None:
    async with supervised(tmp_path, DEAF) as (child, task, said):
        await eventually(lambda: child.url is not None)
        assert not await child.stop(0.1)
        await asyncio.wait_for(task, 5)
        assert said == ["node1 did not stop within 0 s and is killed"]


async def test_stop_during_the_backoff_does_not_wait_for_it(tmp_path: Path) -> None:
    async with supervised(tmp_path, "raise SystemExit(1)") as (child, task, said):
        await eventually(lambda: len(said) >= 3)
        assert await child.stop(5)
        await asyncio.wait_for(task, 2)


async def test_other_output_goes_to_the_log_and_a_large_log_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "node1.log").write_bytes(b"")
    os.truncate(tmp_path / "node1.log", LOG_MAX_BYTES + 1)
    async with supervised(tmp_path, DEAF) as (child, _, _said):
        await eventually(lambda: child.url is not None)
        assert (tmp_path / "node1.log").read_text() == "hello\n"
        assert (tmp_path / "node1.log.1").stat().st_size == LOG_MAX_BYTES + 1
        await child.stop(0.1)


def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """kill -9 of `walship up` itself: the kernel tells the children (PR_SET_PDEATHSIG)."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, FOLLOWS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, word = parent.stdout.readline().split()
        assert word == "following"
        child = os.pidfd_open(int(pid))
        parent.kill()
        try:
            asyncio.run(asyncio.wait_for(_ended(child), 10))
        finally:
            os.close(child)


async def _ended(pidfd: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
