"""Planned changes of leader that get in each other's way, with real processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.chaos.cluster import ChaosCluster
from tests.cluster.client import Failure
from tests.cluster.harness import eventually


def _order(url: str, to: str) -> tuple[int, str]:
    answer = httpx.post(f"{url}/admin/switchover", json={"to": to}, timeout=30.0)
    return answer.status_code, answer.text


def _wait_for_another(cluster: ChaosCluster, old: str) -> None:
    eventually(lambda: cluster.leader() != old, "another node leads")


def test_of_several_orders_at_once_one_is_carried_out_and_no_write_is_lost(tmp_path: Path) -> None:
    """Undoing one of them amid another would let writes in beyond the position that is handed over."""
    written: list[int] = []
    changes = 0
    stop = threading.Event()
    with ChaosCluster(tmp_path / "c").begin() as cluster:

        def write() -> None:
            with cluster.client() as client:
                number = 0
                while not stop.is_set():
                    number += 1
                    try:
                        client.execute(f"INSERT INTO w VALUES ({number})")
                    except Failure:
                        continue
                    written.append(number)

        with ThreadPoolExecutor(8) as pool:
            writer = pool.submit(write)
            try:
                for _ in range(4):
                    old = cluster.leader()
                    cluster.wait_whole()
                    url = cluster.processes[old].url
                    others = [name for name in cluster.nodes if name != old]
                    answers = [each.result() for each in [pool.submit(_order, url, to) for to in [*others, *others]]]
                    done = [text for status, text in answers if status == 200]
                    assert len(done) <= 1, answers
                    assert not any("meanwhile" in text for _, text in answers), answers
                    if not done:
                        continue  # on a loaded machine no node may have caught up in time
                    changes += 1
                    _wait_for_another(cluster, old)
            finally:
                stop.set()
            writer.result()
        cluster.wait_whole()
        cluster.wait_level()
        with cluster.client() as client:
            there = {int(row[0]) for row in client.execute("SELECT id FROM w").rows}
        assert set(written) <= there
        assert len(written) > 20
        assert changes > 0
