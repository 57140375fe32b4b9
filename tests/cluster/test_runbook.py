"""The runbook of docs/operations.md, done: going on from a survivor when a quorum is lost for good."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.chaos.cluster import ChaosCluster
from tests.cluster.client import Client
from tests.cluster.harness import Process, eventually
from tests.coordination.etcd import free_ports


def test_a_new_cluster_goes_on_from_a_survivor_and_old_nodes_cannot_take_part_in_it(tmp_path: Path) -> None:
    with ChaosCluster(tmp_path / "old") as old:
        old.begin()
        with old.client() as client:
            for number in range(20):
                client.execute(f"INSERT INTO w VALUES ({number})")
        old.wait_level()
        old.kill("n1", "n2")
        with old.client() as client:
            rows = client.sequence("PRAGMA walship_consistency = 'any'", "SELECT count(*) FROM w")[
                -1
            ].value  # reads go on
        assert rows == 20
        status = old.status("n3")
        assert status["role"] == "follower"
        assert status["durable_txid"] == status["txid"]
        survivor = Path(status["database"])
        assert old.stop_node("n3") == 0
    rescue = tmp_path / "rescue"
    rescue.mkdir()
    for path in survivor.parent.glob(survivor.name + "*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, rescue)
    port, other = free_ports(2)
    store = f"file://{tmp_path}/store2"
    first, second = Process("a", tmp_path / "a.log"), Process("b", tmp_path / "b.log")
    try:
        found = ["--init", "--voters", "a,b", "--ack", "1", "--database", str(rescue / survivor.name)]
        words = ["--cluster", store, "--listen", f"127.0.0.1:{port}"]
        first.start(["node", "--name", "a", "--data", str(tmp_path / "a"), *words, *found])
        first.first_line()
        second.start(["node", "--name", "b", "--data", str(tmp_path / "b"), "--cluster", store])
        second.first_line()
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.execute("SELECT count(*), sum(id) FROM w").rows == [(20, 190)]
            eventually(lambda: client.execute("INSERT INTO w VALUES (20)").changes == 1, "a write is acknowledged")
        stray = Process("n2", tmp_path / "n2.log")
        listen = f"127.0.0.1:{other}"
        stray.start(
            ["node", "--name", "n2", "--data", str(tmp_path / "old" / "n2"), "--cluster", store, "--listen", listen]
        )
        assert stray.wait() == 2
        assert "belongs to cluster" in stray.log_tail()
    finally:
        first.end()
        second.end()
