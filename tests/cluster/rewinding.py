"""A leader whose last commits nobody took comes back to a cluster that went on without it (R12), in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.cluster.harness import Cluster, content_of, eventually, integrity_of, same_files, say

LOST = 3


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "walship", *words], check=False, capture_output=True, text=True, timeout=60
    )


def orphans(*words: str) -> list[dict[str, Any]]:
    done = command("orphans", "list", "--json", *words)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def depose_and_return(cluster: Cluster, size_bytes: int) -> None:
    """Fill, cut the followers off, commit on the leader alone, lose it, let the others go on; then it returns. Judges
    what it took, what it kept, and that all are equal in the end."""
    others = [name for name in cluster.names if name != "n1"]
    with cluster.client("n1") as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
        for _ in range(max(1, size_bytes // 4_000_000)):
            client.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) "
                "INSERT INTO w (v) SELECT randomblob(4000) FROM n"
            )
    cluster.wait_level()
    for name in others:
        assert cluster.processes[name].stop() == 0
    base = cluster.root / "base.db"
    with cluster.client("n1") as client:
        for number in range(LOST):
            client.execute(f"INSERT INTO w (id, v) VALUES ({-1 - number}, 'lost')")
    cluster.processes["n1"].kill()
    for name in others:
        cluster.start_node(name)
    leader = eventually(
        lambda: next((name for name in others if cluster.status(name)["role"] == "leader"), ""),
        "one of the others leads",
        timeout_seconds=60,
    )
    with cluster.client(leader) as client:
        eventually(lambda: client.execute("INSERT INTO w (v) VALUES ('kept')"), "writes go on", timeout_seconds=30)

    cluster.start_node("n1")
    status = eventually(lambda: level(cluster, leader), "n1 follows at the same state", timeout_seconds=90)
    with cluster.client(leader) as client:
        database_bytes = 4096 * client.execute("SELECT page_count FROM pragma_page_count").value
    say(f"rewound a database of {database_bytes >> 20} MiB with {status['replication']['received_bytes']} bytes")
    assert status["replication"]["seeds"] == 1
    assert status["replication"]["received_bytes"] < database_bytes // 10
    assert status["orphans"] == 1

    [manifest] = orphans("--data", str(cluster.root / "n1"))
    assert orphans("--url", cluster.processes["n1"].url) == [manifest]
    assert (manifest["reason"], manifest["transactions"]) == ("deposed leader", LOST)
    assert manifest["may_be_acknowledged"] is True  # --ack 0
    shown = command("orphans", "show", manifest["name"], "--url", cluster.processes["n1"].url)
    assert "deposed leader, maybe acknowledged" in shown.stdout
    target = cluster.root / "lost.ltx"
    done = command("orphans", "export", manifest["name"], str(target), "--url", cluster.processes["n1"].url)
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size == manifest["size_bytes"]

    databases = [cluster.database(name) for name in cluster.names]
    for name in [*(name for name in cluster.names if name != leader), leader]:
        cluster.processes[name].stop()
    same_files(databases)
    assert content_of(databases[0], "SELECT count(*) FROM w WHERE id < 0 OR v = 'kept'") == [(1,)]
    refused = command(
        "orphans",
        "export",
        manifest["name"],
        str(base),
        "--database",
        str(databases[0]),
        "--data",
        str(cluster.root / "n1"),
    )
    assert refused.returncode == 2
    assert "Give a copy of the database at that very position" in refused.stderr
    assert not base.exists()
    assert integrity_of(databases[0]) == "ok"


def level(cluster: Cluster, leader: str) -> dict[str, Any]:
    mine, theirs = cluster.status("n1"), cluster.status(leader)
    same = (mine["log"]["tip"], mine["log"]["checksum"]) == (theirs["log"]["tip"], theirs["log"]["checksum"])
    return mine if same and mine["role"] == "follower" else {}
