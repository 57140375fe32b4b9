"""Death at every named step, and at random ones: what was acknowledged is there afterwards, on both nodes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.crash_child import LIMITS, TOKENS_OF, ship_or_seed
from tests.engine.nodes import HERE, FollowerNode, LeaderNode, ask, assert_same_files, outside, read, scanned
from walship.engine import failpoints
from walship.formats.position import Position

# How often a point is passed before the death, where the first time would be too early to be interesting.
LATER = {
    "state.temp_written": (2, 5, 9),
    "state.renamed": (2, 5, 9),
    "log.segment_created": (2, 5),
    "follower.marked": (1, 2, 4, 7),
    "apply.header_copy0": (1, 20),
    "apply.header_copy1": (1, 20),
    "apply.frames_written": (1, 20),
    "seed.received": (1, 2),
    "seed.installing": (1, 2),
    "seed.installed": (1, 2),
    "generation.based": (1, 2),
    "writer.acked": (1, 30),
    "writer.synced": (1, 30),
    "writer.logged": (1, 30),
}
ELSEWHERE = (
    "leader.claimed",  # reached by the node's start, not by the engine
    "orphan.pages_kept",  # nothing parts here; test_rewind.py dies there
    "orphan.kept",
    "leader.step_down_synced",  # nobody hands the lead over here
    "leader.truth_log",
    "switchover.still",
    "switchover.handed_over",
    "voters.marked",  # nobody stands for election here, and no voter is added
    "voters.changed",
)
DEATHS = [
    (name, times, attached)
    for name in failpoints.NAMES
    if name not in ELSEWHERE
    for times in LATER.get(name, (1,))
    for attached in (False, True)
    if not (attached and name.startswith("seed.") and times > 1)  # a node that had its first snapshot sees one more
]


class Nursery:
    """`crash_child.py` as a process: children are forked from it, so that a death costs no second interpreter."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])},
        )

    def begin(self, directory: Path, *, failpoint: str = "", writes: int = 160) -> int:
        return int(
            ask(self.process, json.dumps({"directory": str(directory), "failpoint": failpoint, "writes": writes}))
        )

    def status(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def acked_ids(directory: Path) -> set[int]:
    path = directory / "acked"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return {int(line) for line in lines}


def judge_tokens(directory: Path, node: LeaderNode | FollowerNode) -> None:
    """R19: what this node would answer, were it the next leader, is true of its database: m5 on real files."""
    path, present, done = directory / "sent", ids(node), set()
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        ident, term, txid = (int(word) for word in line.split())
        found = node.replica.log.tokens.lookup((TOKENS_OF, ident))
        if found is not None and not found.token.part:
            assert ident in present, "an attempt that is not in the database would be answered done"
            done.add(ident)
        elif found is None and node.replica.log.tokens.covers(Position(term, txid)):
            assert ident not in present, "an attempt that is in the database would be answered not done"
    assert done <= present


def ids(node: LeaderNode | FollowerNode) -> set[int]:
    if not read(node.database, "SELECT 1 FROM sqlite_schema WHERE name = 't'"):
        return set()
    return {row[0] for row in read(node.database, "SELECT id FROM t")}


async def recover_and_judge(directory: Path) -> None:
    """Both nodes come back from what is on disk; nothing acknowledged is missing; they become equal again."""
    acked = acked_ids(directory)
    leader = LeaderNode(directory / "leader", limits=LIMITS)
    follower = FollowerNode(directory / "follower", limits=LIMITS)
    assert acked - ids(leader) == set(), "the leader lost acknowledged writes"
    if follower.follower.replica is not None:
        assert acked - ids(follower) == set(), "the follower lost writes that it had acknowledged"
    else:
        assert not acked
    assert scanned(leader.database) == leader.tip.checksum
    judge_tokens(directory, leader)
    if follower.follower.replica is not None:
        judge_tokens(directory, follower)
    await ship_or_seed(follower, leader)
    await follower.applied(leader.tip.position)
    leader.commit("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, b)", "INSERT INTO t VALUES(-1, 'after')")
    await follower.catch_up(leader)
    assert ids(follower) == ids(leader)
    assert scanned(follower.database) == scanned(leader.database) == leader.tip.checksum
    judge_tokens(directory, follower)
    leader.commit("DELETE FROM t WHERE id = -1")
    await follower.catch_up(leader)
    assert not leader.failures
    assert not follower.failures
    await leader.stop()
    await follower.stop()


@pytest.mark.parametrize(("name", "times", "attached"), DEATHS)
async def test_death_at_a_named_step_loses_nothing_acknowledged(
    tmp_path: Path, nursery: Nursery, name: str, times: int, attached: bool
) -> None:
    """R2, R5, R7, R8: SIGKILL at each durable step, alone or with another process that keeps the -wal alive."""
    for node in ("leader", "follower"):
        (tmp_path / node).mkdir()
    with outside() as one, outside() as two:
        if attached:
            nursery.begin(tmp_path, writes=16)
            assert nursery.status() == 0
            assert ask(one, "open", str(tmp_path / "leader" / "data.db")) == "ok"
            assert ask(two, "open", str(tmp_path / "follower" / "data.db")) == "ok"
        nursery.begin(tmp_path, failpoint=f"{name}:{times}")
        assert nursery.status() == -signal.SIGKILL
        await recover_and_judge(tmp_path)
        if attached:
            assert ask(one, "close") == ask(two, "close") == "ok"
    if not attached:
        assert_same_files(tmp_path / "leader", tmp_path / "follower")


@pytest.mark.parametrize("seed", range(4))
async def test_random_deaths_in_a_row_lose_nothing_acknowledged(tmp_path: Path, nursery: Nursery, seed: int) -> None:
    """The same two directories live and die again and again; a foreign process comes and goes, and may be the last
    to close, which empties and deletes the -wal before the node counts it (R7)."""
    numbers = random.Random(seed)
    for node in ("leader", "follower"):
        (tmp_path / node).mkdir()
    nursery.begin(tmp_path, writes=16)
    assert nursery.status() == 0
    for _ in range(8):
        with outside() as one, outside() as two:
            company = numbers.choice(("alone", "stays", "closes"))
            pid = nursery.begin(tmp_path, writes=20_000)
            if company != "alone":
                assert ask(one, "open", str(tmp_path / "leader" / "data.db")) == "ok"
                assert ask(two, "open", str(tmp_path / "follower" / "data.db")) == "ok"
            await asyncio.sleep(numbers.uniform(0.02, 0.25))  # the moment of the death is the random thing here
            os.kill(pid, signal.SIGKILL)
            assert nursery.status() == -signal.SIGKILL
            if company == "closes":
                assert ask(one, "close") == ask(two, "close") == "ok"
            if numbers.random() < 0.5:
                await recover_and_judge(tmp_path)
    await recover_and_judge(tmp_path)
    assert len(acked_ids(tmp_path)) > 50
    assert_same_files(tmp_path / "leader", tmp_path / "follower")
