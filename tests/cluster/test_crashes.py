"""kill -9 of a node at random moments under load: nothing acknowledged is lost, and history goes on where it was.

Every row is a transaction of its own, so the TXID is known exactly: the first content is 1, CREATE TABLE is 2.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.cluster.harness import Cluster, checksum_of, content_of, same_files, say
from tests.cluster.load import Load


def test_a_killed_follower_comes_back_level_while_writes_go_on(start_cluster: Callable[..., Cluster]) -> None:
    kill_followers(start_cluster(), kills=5)


def test_a_killed_leader_loses_no_acknowledged_write_and_followers_continue(
    start_cluster: Callable[..., Cluster],
) -> None:
    kill_leader(start_cluster(), kills=5)


def kill_followers(cluster: Cluster, *, kills: int) -> None:
    """Guarantees, "a follower, at any moment": it applies its log again and continues from the leader's, unseeded."""
    seeds = dict.fromkeys(cluster.followers, 1)  # by the present process: its first copy, and none after a restart
    with Load(prepared(cluster)) as load:
        for _ in range(kills):
            load.wait_acked(random.randint(1, 200))
            name = random.choice(cluster.followers)
            restart(cluster, name)
            seeds[name] = 0
        load.wait_acked(50)
    check(cluster, load, seeds=seeds)


def kill_leader(cluster: Cluster, *, kills: int) -> None:
    """R2, R7: another node takes over, and the one that was killed follows it, its tail cut off where need be."""
    with Load(prepared(cluster)) as load:
        for _ in range(kills):
            load.wait_acked(random.randint(1, 200))
            cluster.start_node(cluster.kill_leader())
        load.wait_acked(50)
    assert cluster.status()["term"] > kills
    check(cluster, load, seeds={})


def prepared(cluster: Cluster) -> str:
    with cluster.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
    return cluster.url


def restart(cluster: Cluster, name: str) -> None:
    cluster.processes[name].kill()
    cluster.start_node(name)


def check(cluster: Cluster, load: Load, *, seeds: dict[str, int]) -> None:
    """No acknowledged row is missing, none that was refused is there, all nodes are equal and none was seeded anew."""
    statuses = cluster.wait_level()
    files = cluster.stop()
    rows = {row for (row,) in content_of(files[0], "SELECT id FROM w")}
    say(
        f"{len(load.acked)} acknowledged, answers otherwise: {dict(load.codes)}; {len(rows - load.acked)} of those done"
    )
    assert load.acked - rows == set(), "acknowledged and lost"
    assert rows & load.not_done == set(), "refused as not done, and done"
    assert statuses[cluster.leader]["txid"] == 2 + len(rows)
    for name, expected in seeds.items():
        assert statuses[name]["replication"]["seeds"] == expected, name
        assert statuses[name]["replication"]["mismatches"] == 0, name
    same_files(files)
    assert checksum_of(files[0], statuses[cluster.leader]["page_size"]) == statuses[cluster.leader]["log"]["checksum"]
