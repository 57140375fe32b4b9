"""The full numbers of issue 3: 10,000 writes read back at once, and 50 kills of each kind."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.harness import Cluster
from tests.cluster.test_consistency import check_own_writes
from tests.cluster.test_crashes import kill_followers, kill_leader


def test_ten_thousand_own_writes_are_read_back(start_cluster: Callable[..., Cluster]) -> None:
    check_own_writes(start_cluster(), writes=10_000)


def test_fifty_kills_of_followers(start_cluster: Callable[..., Cluster]) -> None:
    kill_followers(start_cluster(), kills=50)


def test_fifty_kills_of_the_leader(start_cluster: Callable[..., Cluster]) -> None:
    kill_leader(start_cluster(), kills=50)
