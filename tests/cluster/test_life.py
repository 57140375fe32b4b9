"""Stopping under load, and running the same command again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import httpx

from tests.cluster.harness import Cluster, Process, Up, content_of, eventually, same_files, say
from tests.cluster.load import Load

TYPED = {"WALSHIP_DRAINING", "WALSHIP_UNAVAILABLE", "WALSHIP_OVERLOADED", "WALSHIP_NOT_DONE", "WALSHIP_OUTCOME_UNKNOWN"}


def test_sigterm_under_load_finishes_what_runs_and_exits_0(start_up: Callable[..., Up]) -> None:
    """Section 7, "a client gets an answer or a typed error": a request whose connection closes unanswered was not run.

    HTTP has no way to tell an idle client that its next request comes too late, so those are allowed; the database
    says whether they happened.
    """
    up = start_up()
    with up.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
    with Load(up.url, clients=16) as load:
        load.wait_acked(300)
        assert up.process.stop() == 0
    files = up.databases()
    rows = {row for (row,) in content_of(files[0], "SELECT id FROM w")}
    say(f"{len(load.acked)} acknowledged; {dict(load.codes)}")
    assert set(load.codes) <= TYPED | {"no reply", "no connection"}
    assert load.acked - rows == set()
    assert rows & load.not_done == set()
    assert rows & load.silent == set(), "run, and its client heard nothing though the stop was orderly"
    same_files(files)


def test_up_run_again_resumes_with_the_same_data(start_up: Callable[..., Up]) -> None:
    up = start_up()
    with up.client() as client:
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
        client.execute("INSERT INTO w (v) VALUES ('first run')")
    first = up.ready
    assert up.process.stop() == 0
    up.start()
    with up.client() as client:
        assert client.execute("SELECT v FROM w").rows == [("first run",)]
        client.execute("INSERT INTO w (v) VALUES ('second run')")
    up.wait_level()
    assert up.ready["cluster"] == first["cluster"]
    assert up.ready["term"] == first["term"] + 1
    assert up.process.stop() == 0
    same_files(up.databases())
    assert content_of(up.databases()[2], "SELECT count(*) FROM w") == [(2,)]


def test_a_follower_with_a_proxy_connected_stops_without_waiting_for_its_deadline(
    start_cluster: Callable[..., Cluster],
) -> None:
    """A proxy that connects again while the node stops once held it up for all of --drain-seconds."""
    cluster = start_cluster(nodes=2, node_words=("--drain-seconds", "20"))
    start = time.monotonic()
    assert cluster.processes["n2"].stop() == 0
    assert time.monotonic() - start < 10


def test_a_node_stops_at_once_while_it_still_starts(tmp_path: Path) -> None:
    """Scanning a large file takes a while; SIGTERM then ended the process as if it had failed."""
    large = tmp_path / "large.db"
    database = apsw.Connection(str(large))
    database.execute("PRAGMA journal_mode=WAL").fetchall()
    database.execute("CREATE TABLE t AS SELECT randomblob(100000000) AS x")
    database.close()
    node = Process("n1", tmp_path / "n1.log")
    store, data = f"file://{tmp_path}/store", tmp_path / "n1"
    node.start(["node", "--name", "n1", "--data", str(data), "--cluster", store, "--database", str(large), "--init"])
    try:
        eventually(lambda: (data / "node.lock").exists(), "the node has begun")
        assert node.stop() == 0
    finally:
        node.end()


def test_a_node_whose_files_are_taken_away_ends_and_says_so(start_cluster: Callable[..., Cluster]) -> None:
    """engine.md T16: SQLite elsewhere would make new files by these names, and write where nobody looks."""
    cluster = start_cluster(nodes=2)
    node = cluster.processes["n2"]
    database = cluster.database("n2")
    database.with_name(database.name + "-wal").unlink()
    assert node.wait() == 1
    assert "was deleted or replaced" in node.log_tail()
    cluster.start_node("n2")
    with cluster.client() as client:
        client.execute("CREATE TABLE w (v)")
    cluster.wait_level()


def test_the_metrics_of_both_roles_move(start_cluster: Callable[..., Cluster]) -> None:
    """docs/operations.md, "Metrics": the disk is seen where it holds an acknowledgment up, on either side."""
    cluster = start_cluster(nodes=2)
    with cluster.client() as client:
        client.execute("CREATE TABLE w (v)")
        for _ in range(40):
            client.execute("INSERT INTO w SELECT randomblob(1000000)")
    cluster.wait_level()
    leader, follower = (httpx.get(cluster.processes[name].url + "/metrics").text for name in cluster.names)
    for text, file in ((leader, "wal"), (follower, "log")):
        assert re.search(rf'^walship_fdatasync_seconds_count{{file="{file}"}} [1-9]', text, re.MULTILINE)
        assert re.search(r'^walship_checkpoints_total{result="done"} [1-9]', text, re.MULTILINE)
