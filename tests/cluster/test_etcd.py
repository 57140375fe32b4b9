"""Nodes and a proxy with their records in a real etcd: founding, writing, a killed leader, an etcd that is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, eventually
from tests.coordination.etcd import Etcd


@pytest.fixture
def etcd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Etcd]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # proxies of this test hold their locks there
    etcd = Etcd(tmp_path / "etcd")
    try:
        yield etcd.start()
    finally:
        etcd.end()


def test_a_cluster_at_an_etcd_writes_and_leads_again_after_kill_9(
    etcd: Etcd, start_cluster: Callable[..., Cluster]
) -> None:
    """The leader is killed and started again; one of the two leads then, and has what was acknowledged."""
    cluster = start_cluster(nodes=2, store=etcd.url("shop"))
    with cluster.client() as client:
        client.execute("CREATE TABLE t (v)")
        for number in range(20):
            client.execute(f"INSERT INTO t VALUES ({number})")
        before = cluster.status(cluster.leader)["term"]
        cluster.start_node(cluster.kill_leader())
        cluster.wait_healthy()
        client.execute("INSERT INTO t VALUES (20)")
        assert client.execute("SELECT count(*) * 1000 + sum(v) FROM t").value == 21210
    cluster.wait_level()
    assert cluster.status(cluster.leader)["term"] > before


def test_a_cluster_goes_on_while_its_etcd_is_away_and_its_parts_come_back_with_it(
    etcd: Etcd, start_cluster: Callable[..., Cluster]
) -> None:
    """Nobody needs the store to write or read. A proxy that starts waits for it."""
    cluster = start_cluster(nodes=2, store=etcd.url("shop"))
    with cluster.client() as client:
        client.execute("CREATE TABLE t (v)")
        etcd.kill()
        for number in range(5):
            client.execute(f"INSERT INTO t VALUES ({number})")
            assert client.execute("SELECT count(*) FROM t").value == number + 1
    cluster.processes["proxy"].kill()
    etcd.start_member(0)
    cluster.start_proxy()
    cluster.wait_healthy()
    with cluster.client() as client:
        assert client.execute("SELECT count(*) FROM t").value == 5
        client.execute("INSERT INTO t VALUES (5)")
    assert eventually(lambda: cluster.status("proxy")["proxy"]["name"], "the proxy says its name") == "proxy"
    cluster.stop()
