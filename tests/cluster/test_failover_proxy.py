"""Real processes: the leader disappears in every way, and clients of a proxy get no error (failover.md 3.7, 3.9)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import ETCD, ChaosCluster
from tests.cluster.client import Client, Failed
from tests.cluster.harness import eventually, say
from tests.cluster.load import Load
from tests.netns import missing


@contextlib.contextmanager
def running(root: Path, **settings: object) -> Iterator[ChaosCluster]:
    with ChaosCluster(root, **settings) as cluster:  # type: ignore[arg-type]
        yield cluster.begin()


class Reader:
    """Reads without a pause at one level, until told to stop; whatever fails is kept."""

    def __init__(self, url: str, level: str) -> None:
        self.reads = 0
        self.failures: list[str] = []
        self._url, self._level = url, level
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(60)

    def _run(self) -> None:
        with Client(self._url) as client:
            while not self._stopping.is_set():
                try:
                    client.sequence(f"PRAGMA walship_consistency = '{self._level}'", "SELECT count(*) FROM w")
                    self.reads += 1
                except Failed as error:
                    self.failures.append(f"{error.code}: {error}")


def check_rows(cluster: ChaosCluster, load: Load) -> None:
    """What was acknowledged is there once; nothing else is; no client saw an error."""
    assert dict(load.codes) == {}, "client errors"
    assert not load.unknown
    ids = [row[0] for row in cluster.rows("SELECT id FROM w ORDER BY id")]
    assert len(ids) == len(set(ids)), "a write was done twice"
    assert set(ids) == load.acked


def test_kill_9_of_one_leader_after_another_is_no_error(tmp_path: Path) -> None:
    with running(tmp_path / "c") as cluster:
        with cluster.client() as client:
            client.execute("ALTER TABLE w ADD COLUMN v")
        url = cluster.urls[0]
        with Load(url) as load, Reader(url, "any") as at_any, Reader(url, "session") as at_session:
            for _ in range(3):
                load.wait_acked(100)
                cluster.kill(cluster.leader())
                load.wait_acked(100)
                cluster.start_dead()
                cluster.wait_whole(60.0)
            load.stop()
        assert at_any.failures == []
        assert at_session.failures == []
        check_rows(cluster, load)
        last = cluster.status()["proxy"]["failover"]["last"]
        assert last["term"] == cluster.term()
        say(f"{len(load.acked)} writes, {at_any.reads + at_session.reads} reads, 3 kills: no error; last {last}")


def test_switchovers_and_sigterm_under_load_are_no_error(tmp_path: Path) -> None:
    with running(tmp_path / "c") as cluster:
        with cluster.client() as client:
            client.execute("ALTER TABLE w ADD COLUMN v")
        url = cluster.urls[0]
        with Load(url) as load, Reader(url, "any") as at_any, Reader(url, "session") as at_session:
            for _ in range(3):
                load.wait_acked(100)
                cluster.switch_over()
                load.wait_acked(100)
                cluster.wait_whole(60.0)
            assert cluster.stop_node(cluster.leader()) == 0
            load.wait_acked(100)
            load.stop()
        assert at_any.failures == []
        assert at_session.failures == []
        check_rows(cluster, load)


def test_transactions_of_a_killed_leader_are_told_and_idle_streams_go_on(tmp_path: Path) -> None:
    with running(tmp_path / "c") as cluster:
        with cluster.client() as open_one, cluster.client() as idle:
            idle.interactive("INSERT INTO w VALUES (1)")
            open_one.interactive("BEGIN IMMEDIATE")
            open_one.interactive("INSERT INTO w VALUES (2)")
            cluster.kill(cluster.leader())
            with pytest.raises(Failed) as told:
                open_one.interactive("COMMIT")
            assert told.value.code in ("TRANSACTION_TIMEOUT", "STREAM_EXPIRED")
            idle.interactive("INSERT INTO w VALUES (3)")
        assert cluster.rows("SELECT id FROM w ORDER BY id") == [(1,), (3,)]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_proxy_cut_from_the_leader_alone_writes_through_a_follower(tmp_path: Path) -> None:
    with running(tmp_path / "c", store=ETCD, network=True) as cluster:
        network, leader = cluster.network, cluster.leader()
        assert network is not None
        with cluster.client() as client:
            client.execute("ALTER TABLE w ADD COLUMN v")
        with Load(cluster.urls[0], clients=2) as load:
            load.wait_acked(20)
            network.cut(["p1"], [leader])
            load.wait_acked(20)

            def relayed() -> bool:
                nodes = {node["name"]: node for node in cluster.status()["nodes"]}
                return nodes[leader]["via"] in cluster.nodes

            eventually(relayed, "the leader is reached through a follower")
            assert cluster.term() == 1, "nobody was elected: the leader is fine"
            network.heal()
            eventually(lambda: not relayed(), "the direct way is taken again")
            load.wait_acked(20)
            load.stop()
        check_rows(cluster, load)
