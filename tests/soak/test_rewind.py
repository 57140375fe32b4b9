"""A deposed leader of 200 MB rejoins with a few pages (R12); the same in small: tests/cluster/test_rewind.py."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.harness import Cluster
from tests.cluster.rewinding import depose_and_return


def test_a_deposed_leader_of_200_mb_rewinds_by_pages(start_cluster: Callable[..., Cluster]) -> None:
    depose_and_return(start_cluster(ack=0), 200_000_000)
