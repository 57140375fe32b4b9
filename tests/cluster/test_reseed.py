"""A follower that has nothing, too little, or something broken ends equal to the leader (R8, R9; issue 3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, content_of, eventually, same_files
from tests.cluster.load import Load

PAGE = 4096
ROWS = 300  # of 2,000 random bytes: two to a page, some 160 pages


def test_a_follower_down_for_longer_than_the_log_keeps_is_seeded_anew(start_cluster: Callable[..., Cluster]) -> None:
    """R9: beyond --log-max nothing is kept for it."""
    cluster = start_cluster(node_words=("--log-max", "8MiB", "--log-keep-seconds", "1"))
    fill(cluster)
    cluster.wait_level()
    txid = cluster.status("n3")["txid"]
    assert cluster.processes["n3"].stop() == 0
    with cluster.client() as client:
        for _ in range(24):
            client.execute("INSERT INTO w (v) SELECT randomblob(1000000)")
    eventually(lambda: oldest_kept(cluster, "n1") > txid, "the leader's log goes past n3", timeout_seconds=60)
    cluster.start_node("n3")
    check(cluster, seeded="n3")


def test_a_follower_that_lost_everything_is_seeded_under_load(start_cluster: Callable[..., Cluster]) -> None:
    """R9: the snapshot pins the log at its position, so that writes going on meanwhile are there when it is done."""
    cluster = start_cluster()
    fill(cluster)
    cluster.processes["n2"].kill()
    (cluster.root / "n2").rename(cluster.root / "n2-lost")
    with Load(cluster.url, clients=4) as load:
        load.wait_acked(20)
        cluster.start_node("n2")
        load.wait_acked(50)
    check(cluster, seeded="n2")


@pytest.mark.parametrize("pages", [[3, 20, 21, 90], [1]], ids=["some pages", "page 1"])
def test_a_follower_with_damaged_pages_is_seeded_anew(start_cluster: Callable[..., Cluster], pages: list[int]) -> None:
    """R8: the scrub after its start compares every page with what history gave."""
    cluster = start_cluster()
    fill(cluster)
    cluster.wait_level()
    database = cluster.database("n2")
    assert cluster.processes["n2"].stop() == 0
    damage(database, [(pgno - 1) * PAGE for pgno in pages])
    cluster.start_node("n2")
    fill(cluster)
    check(cluster, seeded="n2")


def test_a_follower_whose_log_is_damaged_in_the_middle_is_seeded_anew(start_cluster: Callable[..., Cluster]) -> None:
    """R5: a bad record with good ones after it is corruption, never a torn tail."""
    cluster = start_cluster()
    fill(cluster)
    cluster.wait_level()
    assert cluster.processes["n2"].stop() == 0
    segment = max((cluster.root / "n2" / "log").iterdir(), key=lambda path: path.stat().st_size)
    damage(segment, [segment.stat().st_size // 2], size_bytes=64)
    cluster.start_node("n2")
    fill(cluster)
    check(cluster, seeded="n2")
    assert list((cluster.root / "n2").glob("log-damaged-*")), "what was damaged is kept for whoever looks into it"


def fill(cluster: Cluster) -> None:
    with cluster.client() as client:
        client.execute("CREATE TABLE IF NOT EXISTS w (id INTEGER PRIMARY KEY, v)")
        for _ in range(10):
            client.execute(
                f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS // 10}) "
                "INSERT INTO w (v) SELECT randomblob(2000) FROM n"
            )


def damage(path: Path, offsets: list[int], size_bytes: int = PAGE) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(os.urandom(size_bytes))


def oldest_kept(cluster: Cluster, name: str) -> int:
    """TXID before the oldest frame that the node's log keeps."""
    return int(cluster.status(name)["log"]["base"].split(".")[1])


def check(cluster: Cluster, *, seeded: str) -> None:
    """The follower that needed it was seeded once since it started, all are level, files byte-identical."""
    eventually(lambda: cluster.status(seeded)["replication"]["seeds"] == 1, f"{seeded} is seeded")
    statuses = cluster.wait_level()
    assert statuses[seeded]["replication"]["seeds"] == 1
    files = cluster.stop()
    same_files(files)
    assert content_of(files[1], "SELECT count(*) FROM w")[0][0] >= ROWS
