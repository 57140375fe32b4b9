"""A reader is never blocked by replication and never blocks it (section 7)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import apsw
import pytest

from tests.cluster.client import Client
from tests.cluster.harness import Cluster, eventually, say
from tests.cluster.load import Load

SAMPLES = 40


@contextmanager
def outside_reader(path: Path) -> Iterator[apsw.Connection]:
    """A connection of another process than the node's, which knows nothing of walship."""
    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        yield connection


def count_of(connection: apsw.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM w").get)


def test_a_reader_on_a_follower_keeps_its_snapshot_while_another_sees_new_data_at_once(
    start_cluster: Callable[..., Cluster],
) -> None:
    """WAL append and publish: no reset under a reader, no wait for it. The delay counts from sending the write."""
    cluster = start_cluster()
    prepare(cluster)
    path = cluster.database("n2")
    with outside_reader(path) as long, outside_reader(path) as fresh, Load(cluster.url, clients=4) as load:
        load.wait_acked(100)
        long.execute("BEGIN")
        seen = count_of(long)
        delays = []
        with cluster.client() as client:
            for number in range(SAMPLES):
                delays.append(delay_of_one_write(client, fresh, -1 - number))
        load.wait_acked(200)
        assert count_of(long) == seen
        long.execute("COMMIT")
        assert count_of(long) >= seen + SAMPLES + 200 - 4 * 1
    say(
        f"write sent -> visible to a second reader: p50 {median(delays) * 1e3:.1f} ms, worst {max(delays) * 1e3:.1f} ms"
    )
    assert max(delays) < 1.0


def test_a_read_transaction_through_the_proxy_keeps_its_snapshot(start_cluster: Callable[..., Cluster]) -> None:
    """R21: BEGIN READONLY goes to a follower and stays there."""
    cluster = start_cluster()
    prepare(cluster)
    with cluster.client() as stream, cluster.client() as other, Load(cluster.url, clients=4) as load:
        load.wait_acked(50)
        stream.interactive("BEGIN READONLY")
        first = stream.interactive("SELECT count(*) FROM w")
        load.wait_acked(200)
        again = stream.interactive("SELECT count(*) FROM w")
        assert (again.value, again.served_by) == (first.value, first.served_by)
        assert first.served_by in cluster.followers
        assert other.execute("SELECT count(*) FROM w").value >= first.value + 150
        stream.interactive("COMMIT")
        assert stream.interactive("SELECT count(*) FROM w").value >= first.value + 150
        stream.end_stream()


def test_the_wal_shrinks_again_once_a_long_reader_has_ended(start_cluster: Callable[..., Cluster]) -> None:
    """Checkpoint policy of a follower: the -wal grows behind a reader, and is given back after it."""
    cluster = start_cluster()
    prepare(cluster)
    with outside_reader(cluster.database("n2")) as long, cluster.client() as client:
        long.execute("BEGIN")
        count_of(long)
        fill(client, 12)
        eventually(lambda: cluster.status("n2")["wal_bytes"] > 10 << 20, "the -wal has grown behind the reader")
        long.execute("COMMIT")
        fill(client, 6)
        eventually(lambda: fill(client, 1) or cluster.status("n2")["wal_bytes"] < 8 << 20, "the -wal is small again")


def prepare(cluster: Cluster) -> None:
    with cluster.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
    cluster.wait_level()


def fill(client: Client, megabytes: int) -> None:
    for _ in range(megabytes):
        client.execute("INSERT INTO w (v) SELECT randomblob(1000000)")


def delay_of_one_write(client: Client, reader: apsw.Connection, row: int) -> float:
    """Seconds from sending the write until `reader` sees it: more than apply-to-visible, never less."""
    start = time.perf_counter()
    client.execute("INSERT INTO w (id) VALUES (?)", row)
    while not reader.execute("SELECT count(*) FROM w WHERE id = ?", (row,)).get:
        if time.perf_counter() - start > 10:
            pytest.fail(f"row {row} is not visible on the follower after 10 s")
    return time.perf_counter() - start
