"""Voters and acknowledgments of a running cluster: changed under writes, and what the next election goes by."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.harness import Cluster, eventually


def voters(cluster: Cluster, *words: str, code: int = 0) -> Any:
    """`walship voters ...` against the proxy; its JSON, or what it said on stderr."""
    command = [sys.executable, "-m", "walship", "voters", *words, "--url", cluster.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def followed(cluster: Cluster, acks: int, names: set[str]) -> None:
    """Every node and the proxy know the rule."""

    def known() -> bool:
        statuses = [cluster.status(name) for name in cluster.names]
        return all(s["ack"] == acks and s["voter"] == (s["name"] in names) for s in statuses)

    eventually(known, f"all nodes know ack {acks} of {sorted(names)}")


@pytest.mark.timeout(240)
def test_voters_and_acks_change_under_writes_and_an_election_goes_by_them(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster()
    everybody = set(cluster.names)
    assert len(everybody) == 3
    leader = cluster.leader
    gone, stays = sorted(everybody - {leader})
    with cluster.client() as client:
        client.execute("CREATE TABLE v(id INTEGER PRIMARY KEY)")
    end, written, failed = threading.Event(), list[int](), list[Exception]()

    def write() -> None:
        with cluster.client() as client:
            number = 0
            while not end.is_set():
                number += 1
                try:
                    client.execute(f"INSERT INTO v VALUES ({number})")
                    written.append(number)
                except Exception as error:  # noqa: BLE001 - judged below
                    failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = voters(cluster, "list")
        assert set(found["voters"]) == everybody
        assert found["ack"] == 1
        assert voters(cluster, "ack", "all")["ack"] == 2
        followed(cluster, 2, everybody)
        found = voters(cluster, "remove", gone)
        assert set(found["voters"]) == everybody - {gone}
        assert (found["ack"], found["ack_all"]) == (1, True)
        assert any("Two voters" in note for note in found["notes"])
        followed(cluster, 1, everybody - {gone})
        assert "hand the lead over first" in voters(cluster, "remove", leader, code=1)
        assert "could never be met" in voters(cluster, "remove", stays, code=1)
        assert "no node named" in voters(cluster, "add", "nobody", code=1)
        assert "can never be met" in voters(cluster, "ack", "2", code=1)
        assert set(voters(cluster, "add", gone)["voters"]) == everybody
        followed(cluster, 2, everybody)
        assert voters(cluster, "ack", "1")["ack_all"] is False
        followed(cluster, 1, everybody)
        before = len(written)
        eventually(lambda: len(written) > before + 20, "writes go on")
    finally:
        end.set()
        writer.join()
    assert not failed, failed[:3]
    cluster.kill_leader()
    eventually(lambda: cluster.status("proxy")["leader"] not in (None, leader), "another leads")
    with cluster.client() as client:
        kept = {row[0] for row in client.execute("SELECT id FROM v").rows}
    assert set(written) <= kept
