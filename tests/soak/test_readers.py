"""A reader that stays for a minute: its snapshot, the apply rate beside it, and how soon others see new data."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from tests.cluster.client import Client
from tests.cluster.harness import Cluster, say
from tests.cluster.load import Load
from tests.cluster.test_readers import count_of, delay_of_one_write, outside_reader, prepare

SECONDS_ALONE = 30.0
SECONDS_WITH_READER = 60.0
CHANGE = slice(8, 12)  # iChange of the wal-index header (WALINDEX format, walIndexHdr)
PAUSE_SECONDS = 0.05  # between two samples of the delay


def test_a_reader_of_a_minute_sees_one_snapshot_and_slows_nothing(start_cluster: Callable[..., Cluster]) -> None:
    """Issue 3: it keeps its snapshot, the follower applies at full rate, a second reader is 10 ms behind at most."""
    cluster = start_cluster()
    prepare(cluster)
    path = cluster.database("n2")
    with outside_reader(path) as long, outside_reader(path) as fresh, cluster.client() as client:
        idle = sample(client, fresh, 5.0, first=-1_000_000)
        published = after_publishing(cluster, path, fresh)
        with Load(cluster.url, clients=4) as load:
            load.wait_acked(500)
            without = applied_per_second(cluster, lambda: time.sleep(SECONDS_ALONE))
            long.execute("BEGIN")
            seen = count_of(long)
            delays: list[float] = []
            with_reader = applied_per_second(
                cluster, lambda: delays.extend(sample(client, fresh, SECONDS_WITH_READER, first=-1, check=long))
            )
            assert count_of(long) == seen
            lag = cluster.status("n2")["lag_txids"]
            wal_bytes = cluster.status("n2")["wal_bytes"]
            long.execute("COMMIT")
            assert count_of(long) > seen
    say(
        f"applied commits/s on the follower: {without:.0f} alone, {with_reader:.0f} beside a reader of "
        f"{SECONDS_WITH_READER:.0f} s (ratio {with_reader / without:.2f}); lag at its end {lag} txids, "
        f"-wal {wal_bytes / 1e6:.0f} MB"
    )
    say(
        f"write sent -> seen by a second reader, idle: {quantiles(idle)}; "
        f"under load, beside the reader: {quantiles(delays)}"
    )
    say(f"published in the wal-index -> seen by a second reader: {quantiles(published)}")
    assert with_reader / without > 0.6
    assert sorted(published)[len(published) * 9 // 10] < 0.01
    assert sorted(idle)[len(idle) // 2] < 0.1


def applied_per_second(cluster: Cluster, during: Callable[[], object]) -> float:
    first, start = cluster.status("n2")["txid"], time.monotonic()
    during()
    return float((cluster.status("n2")["txid"] - first) / (time.monotonic() - start))


def sample(
    client: Client, fresh: apsw.Connection, seconds: float, *, first: int, check: apsw.Connection | None = None
) -> list[float]:
    """Delays of single writes, one every PAUSE_SECONDS; `check` is a reader whose snapshot must not move."""
    delays: list[float] = []
    snapshot = None if check is None else count_of(check)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        delays.append(delay_of_one_write(client, fresh, first - len(delays)))
        assert check is None or count_of(check) == snapshot
        time.sleep(PAUSE_SECONDS)
    return delays


def after_publishing(cluster: Cluster, path: Path, reader: apsw.Connection, samples: int = 300) -> list[float]:
    """Seconds from the moment the follower published a commit in its wal-index until `reader` sees another state.

    The index is looked at five times a millisecond; its descriptor outlives `reader`, since closing one drops every
    lock this process holds on the file (POSIX).
    """
    index = mmap.mmap(os.open(path.with_name(path.name + "-shm"), os.O_RDONLY), 136, prot=mmap.PROT_READ)
    delays = []
    with Load(cluster.url, clients=1) as load:
        load.wait_acked(20)
        while len(delays) < samples:
            change, before = index[CHANGE], count_of(reader)
            if index[CHANGE] != change:
                continue  # `before` may be of either state
            while index[CHANGE] == change:
                time.sleep(0.0002)
            start = time.perf_counter()
            while count_of(reader) == before:
                assert time.perf_counter() - start < 10, "published, and not seen"
            delays.append(time.perf_counter() - start)
    return delays


def quantiles(delays: list[float]) -> str:
    ordered = sorted(delays)
    return ", ".join(f"p{q} {ordered[len(ordered) * q // 100] * 1e3:.1f} ms" for q in (50, 90, 99))
