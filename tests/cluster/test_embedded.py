"""Embedded replicas with the unmodified client: PyPI `libsql` keeps a local copy through the proxy (hrana.md 4)."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import apsw
import pytest

from tests.cluster.harness import Cluster, content_of, eventually, integrity_of

pytest.importorskip("libsql")
pytestmark = pytest.mark.timeout(180)

CHILD = Path(__file__).with_name("embedded_client.py")


class Replica:
    """The client process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, words: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client ended: {words}"
        return json.loads(line)

    def count(self) -> int:
        return int(self.ask("read SELECT count(*) FROM e")[0][0])


@contextmanager
def replica_of(url: str, path: Path) -> Iterator[Replica]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(CHILD), url, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Replica(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0
        finally:
            process.kill()


def fetch(url: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST when there is something to send."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def insert(cluster: Cluster, rows: int) -> None:
    with cluster.client() as client:
        for row in range(rows):
            client.execute("INSERT INTO e(v) VALUES (?)", f"row {row} " + "x" * (row % 300))


def test_a_local_copy_bootstraps_follows_writes_through_and_crosses_generations(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start_cluster()
    with cluster.client() as client:
        client.execute("CREATE TABLE e(id INTEGER PRIMARY KEY, v TEXT)")
    insert(cluster, 50)
    local = tmp_path / "local.db"
    with replica_of(cluster.url, local) as replica:
        assert replica.ask("sync") == "synced"
        assert replica.count() == 50
        insert(cluster, 200)
        assert replica.ask("sync") == "synced"
        assert replica.count() == 250
        assert replica.ask("write INSERT INTO e(v) VALUES ('through')") == "written"
        assert replica.ask("read SELECT count(*) FROM e WHERE v = 'through'") == [[1]]
        assert replica.ask("reopen") == "reopened"
        assert replica.count() == 251
        # The leader dies and begins a new term, and with it a generation.
        cluster.start_node(cluster.kill_leader())
        cluster.wait_healthy()
        insert(cluster, 20)

        def level() -> bool:
            return replica.ask("sync") == "synced" and replica.count() == 271

        eventually(level, "the local copy crosses into the new generation")
    assert json.loads(local.with_name(local.name + "-info").read_text())["generation"] >= 3
    cluster.wait_level()
    leader = cluster.stop()[0]
    assert integrity_of(local) == "ok"
    assert content_of(local, "SELECT * FROM e ORDER BY id") == content_of(leader, "SELECT * FROM e ORDER BY id")


def test_followers_serve_frames_and_every_refusal_is_typed(start_cluster: Callable[..., Cluster]) -> None:
    """Frames come from followers too; ranges that do not exist, old images and pushes are refused in words."""
    cluster = start_cluster()
    with cluster.client() as client:
        client.execute("CREATE TABLE e(id INTEGER PRIMARY KEY, v TEXT)")
        generation = client.get("/info")["current_generation"]
        client.execute("INSERT INTO e(v) VALUES ('a')")
    cluster.wait_level()
    for name in cluster.names:
        url = cluster.processes[name].url
        # A follower hears of acknowledgments with the next heartbeat.
        eventually(lambda at=url: fetch(at, f"/sync/{generation}/1/129")[0] == 200, f"{name} serves frames")
        status, body = fetch(url, f"/sync/{generation}/1/129")
        assert status == 200, (name, body)
        assert len(body) % (4096 + 24) == 0
        beyond = len(body) // (4096 + 24) + 1
        assert fetch(url, f"/sync/{generation}/{beyond}/{beyond + 128}") == (
            400,
            json.dumps({"generation": generation}, separators=(",", ":")).encode(),
        )
        assert fetch(url, "/sync/99/1/129")[0] == 404
        assert fetch(url, f"/sync/{generation}/5/5")[0] == 404
        assert fetch(url, "/export/99")[0] == 404
        assert fetch(url, f"/sync/{generation}/1/2", b"frames")[0] == 403
    assert fetch(cluster.processes[cluster.followers[0]].url, "/info")[0] == 503
    status, body = fetch(cluster.url, f"/export/{generation}")
    assert status == 200
    assert body.startswith(b"SQLite format 3")


def test_another_page_size_is_refused_in_words(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    database = tmp_path / "small.db"
    connection = apsw.Connection(str(database))
    for statement in ("PRAGMA page_size=1024", "PRAGMA journal_mode=WAL", "CREATE TABLE e(v)"):
        connection.execute(statement).fetchall()
    connection.close()
    cluster = start_cluster(nodes=1, ack=0, database=database)
    status, body = fetch(cluster.url, "/info")
    assert status == 501
    assert b"4096" in body
