"""A transaction of 500 MB and a database past the lock page (1 GiB), in bounded memory (R6)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.harness import Cluster, checksum_of, content_of, eventually, same_files, say

MEGABYTE = 1_000_000
GROWTH_LIMIT_BYTES = 200 << 20
LOCK_PAGE = 262_145  # at 4096 bytes a page
_INSERT = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) "
    "INSERT INTO big (v) SELECT randomblob(10000) FROM n"
)


def test_half_a_gigabyte_in_one_transaction_and_a_database_past_the_lock_page(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(proxy_words=("--deadline-seconds", "600"))
    with cluster.client() as client:
        client.execute("CREATE TABLE big (id INTEGER PRIMARY KEY, v BLOB)")
    cluster.wait_level()
    before = {name: peak_bytes(cluster.processes[name].pid) for name in cluster.names}

    one = write(cluster, 500)
    level_seconds = wait_level(cluster)
    say(
        f"500 MB transaction: answered after {one:.1f} s, all level {level_seconds:.1f} s later; "
        f"{grown(cluster, before)}"
    )
    more = sum(write(cluster, 50) for _ in range(13))
    level_seconds = wait_level(cluster)
    say(
        f"650 MB more in 13 transactions: {more:.1f} s, all level {level_seconds:.1f} s later; {grown(cluster, before)}"
    )
    worst = growth(cluster, before)

    cluster.processes["n3"].kill()
    (cluster.root / "n3").rename(cluster.root / "n3-lost")
    cluster.start_node("n3")
    start = time.monotonic()
    fresh = {"n3": peak_bytes(cluster.processes["n3"].pid)}
    eventually(lambda: cluster.status("n3")["healthy"], "n3 has its snapshot", timeout_seconds=600)
    say(f"snapshot of the whole database: {time.monotonic() - start:.1f} s; {grown(cluster, fresh)}")
    wait_level(cluster)
    worst = max(worst, growth(cluster, before | fresh))

    checksum = cluster.status("n1")["log"]["checksum"]
    files = cluster.stop()
    assert files[0].stat().st_size // 4096 > LOCK_PAGE
    same_files(files)
    assert checksum_of(files[1], 4096) == checksum
    assert content_of(files[2], "SELECT count(*), sum(length(v)) FROM big") == [(115_000, 1_150 * MEGABYTE)]
    assert worst < GROWTH_LIMIT_BYTES


def write(cluster: Cluster, megabytes: int) -> float:
    """Seconds until the answer."""
    start = time.monotonic()
    with cluster.client(timeout_seconds=600) as client:
        client.execute(_INSERT.format(rows=megabytes * 100))
    return time.monotonic() - start


def wait_level(cluster: Cluster) -> float:
    start = time.monotonic()
    cluster.wait_level(timeout_seconds=600)
    return time.monotonic() - start


def peak_bytes(pid: int) -> int:
    """The most memory the process ever had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def growth(cluster: Cluster, before: dict[str, int]) -> int:
    return max(peak_bytes(cluster.processes[name].pid) - start for name, start in before.items())


def grown(cluster: Cluster, before: dict[str, int]) -> str:
    """Each node's peak above its start, in words."""
    parts = (
        f"{name} +{(peak_bytes(cluster.processes[name].pid) - start) >> 20} MiB above {start >> 20}"
        for name, start in before.items()
    )
    return ", ".join(parts)
