"""A deposed leader rejoins by pages, and `walship orphans` tells what it lost."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.harness import Cluster
from tests.cluster.rewinding import depose_and_return


def test_a_deposed_leader_rewinds_by_pages_and_keeps_an_orphan(start_cluster: Callable[..., Cluster]) -> None:
    """R12; the same with 200 MB: tests/soak/test_rewind.py."""
    depose_and_return(start_cluster(ack=0), 12_000_000)
