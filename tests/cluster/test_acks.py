"""What is not acknowledged yet is not shown, whatever a node went through."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.client import Failed, NoReply
from tests.cluster.harness import Cluster, eventually


def test_a_restarted_follower_shows_nothing_before_it_is_acknowledged(start_cluster: Callable[..., Cluster]) -> None:
    """R2, R15: with two acknowledgments asked for, a start applies all of the log, and readers wait for the rule."""
    cluster = start_cluster(ack=2)

    def rows() -> list[tuple[int, ...]]:
        with cluster.client("n2", 5.0) as client:
            return client.execute("SELECT count(*) FROM w").rows

    with cluster.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY)")
    cluster.processes["n3"].kill()
    with cluster.client(timeout_seconds=0.5) as client, pytest.raises(NoReply):
        client.execute("INSERT INTO w VALUES (1)")
    logged = cluster.status(cluster.leader)["positions"]["captured"]
    eventually(lambda: cluster.status("n2")["positions"]["logged"] == logged, "n2 has logged it")
    assert rows() == [(0,)]
    cluster.processes["n2"].kill()
    cluster.start_node("n2")
    assert cluster.status("n2")["positions"]["applied"] == logged
    with pytest.raises(Failed, match="UNAVAILABLE"):
        rows()
    cluster.start_node("n3")
    eventually(lambda: rows() == [(1,)], "n2 shows it")
