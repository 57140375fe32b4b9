"""An embedded replica of size: PyPI `libsql` bootstraps 100 MB, follows 1,000 commits and crosses a generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("libsql")

from tests.cluster.harness import Cluster, content_of, eventually, integrity_of, say
from tests.cluster.test_embedded import replica_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

BLOCKS, BLOCK_BYTES = 100, 1 << 20
COMMITS = 1000


def test_a_copy_of_100_mb_follows_a_thousand_commits(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start_cluster(proxy_words=("--deadline-seconds", "120"))
    with cluster.client(timeout_seconds=120.0) as client:
        client.execute("CREATE TABLE e(id INTEGER PRIMARY KEY, v BLOB)")
        for _ in range(BLOCKS):
            client.execute(f"INSERT INTO e(v) VALUES (randomblob({BLOCK_BYTES}))")
    local = tmp_path / "local.db"
    begun = time.monotonic()
    with replica_of(cluster.url, local) as replica:
        assert replica.ask("sync") == "synced"
        assert replica.count() == BLOCKS
        say(f"bootstrap of {local.stat().st_size / 1e6:.0f} MB: {time.monotonic() - begun:.1f} s")
        with cluster.client() as client:
            for number in range(COMMITS):
                client.execute("INSERT INTO e(v) VALUES (?)", f"commit {number}")
        begun = time.monotonic()
        assert replica.ask("sync") == "synced"
        eventually(lambda: replica.ask("sync") == "synced" and replica.count() == BLOCKS + COMMITS, "it is level")
        say(f"pull of {COMMITS} commits: {time.monotonic() - begun:.1f} s")
        assert replica.ask("write INSERT INTO e(v) VALUES ('through')") == "written"
        assert replica.ask("read SELECT count(*) FROM e WHERE v = 'through'") == [[1]]
        assert replica.ask("reopen") == "reopened"
        cluster.start_node(cluster.kill_leader())
        cluster.wait_healthy()
        with cluster.client() as client:
            client.execute("INSERT INTO e(v) VALUES ('after')")
        eventually(lambda: replica.ask("sync") == "synced" and replica.count() == BLOCKS + COMMITS + 2, "it crosses")
    cluster.wait_level()
    leader = cluster.stop()[0]
    assert integrity_of(local) == "ok"
    assert content_of(local, "SELECT * FROM e ORDER BY id") == content_of(leader, "SELECT * FROM e ORDER BY id")
