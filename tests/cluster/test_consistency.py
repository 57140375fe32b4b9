"""Reading one's own writes through the proxy, and files that are equal afterwards (issue 3, "It is done when")."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.harness import Cluster, checksum_of, content_of, same_files, say
from tests.cluster.load import read_own_writes


def test_every_client_reads_its_own_write_and_followers_serve_the_reads(start_cluster: Callable[..., Cluster]) -> None:
    check_own_writes(start_cluster(), writes=2_000)


def check_own_writes(cluster: Cluster, *, writes: int) -> None:
    """R18, session level: never misses a write acknowledged through this proxy. Afterwards all files are equal."""
    with cluster.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
    seen = read_own_writes(cluster.url, clients=16, writes=writes)
    say(seen)
    statuses = cluster.wait_level()
    files = cluster.stop()

    assert seen.misses == 0
    assert seen.share_of(cluster.followers) >= 0.9
    same_files(files)
    assert content_of(files[-1], "SELECT count(*) FROM w") == [(writes,)]
    for name, status in statuses.items():
        assert status["log"]["checksum"] == checksum_of(files[0], status["page_size"]), name
