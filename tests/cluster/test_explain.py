"""`walship failover explain` on real nodes: after an election, and when none can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.chaos.cluster import ChaosCluster
from tests.cluster.harness import eventually


def explain(url: str, *words: str) -> str:
    command = [sys.executable, "-m", "walship", "failover", "explain", url, "--timeout-seconds", "3", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_an_election_is_explained_and_so_is_why_there_is_none(tmp_path: Path) -> None:
    with ChaosCluster(tmp_path / "c") as cluster:
        cluster.begin()
        assert "No node has been a candidate since it started." in explain(cluster.urls[0])
        cluster.kill("n1")
        leader = eventually(lambda: next(iter(set(cluster.leaders()) - {"n1"}), None), "another node leads")
        told = explain(cluster.urls[0])
        assert told.startswith(f"{leader} leads in term 2.\nLast candidate: {leader}, for term 2")
        assert "because: the process of n1 that held term 1 is dead" in told
        assert "n1: does not answer" in told
        seen = json.loads(explain(cluster.urls[0], "--json"))["nodes"][leader]["election"]["last"]
        assert list(seen["phases"]) == ["detect", "claim", "seal", "open", "publish"]
        assert seen["outcome"].startswith("serving")
        assert leader in {answer["name"] for answer in seen["answers"]}
        cluster.kill(leader)
        (left,) = set(cluster.nodes) - {"n1", leader}
        eventually(
            lambda: "No election can succeed: 1 of 3 voters answer" in explain(cluster.processes[left].url),
            "it says that a voter is missing",
        )
