"""`walship up` for real: a cluster of processes that starts, resumes, heals, adopts and stops in order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import httpx
import pytest


class Cluster:
    """A running `walship up --json` and what it said when it was ready."""

    def __init__(self, process: subprocess.Popen[str], status: dict[str, Any]) -> None:
        self.process, self.ready = process, status
        self.url: str = status["proxy"]["url"]

    def sql(self, sql: str) -> list[list[Any]]:
        """Rows of one statement, through the proxy; raises on an error of any kind."""
        body = {"requests": [{"type": "execute", "stmt": {"sql": sql}}]}
        reply = httpx.post(f"{self.url}/v2/pipeline", json=body, timeout=20).raise_for_status().json()
        (result,) = reply["results"]
        assert result["type"] == "ok", result
        return [[cell.get("value") for cell in row] for row in result["response"]["result"]["rows"]]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = httpx.get(f"{self.url}/status", timeout=20).raise_for_status().json()
        return status

    def node(self, role: str) -> dict[str, Any]:
        found: dict[str, Any] = next(node for node in self.status()["nodes"] if node["role"] == role)
        return found

    def stop(self) -> str:
        """SIGTERM; asserts exit code 0; returns what it said on stderr."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return said


@contextlib.contextmanager
def up(data: Path, *arguments: str, settings: dict[str, str] | None = None) -> Iterator[Cluster]:
    command = [sys.executable, "-m", "walship", "up", *arguments, "--data", str(data), "--json"]
    environment = os.environ | {"WALSHIP_LISTEN": "127.0.0.1:0", "WALSHIP_LOG_MAX": "64MiB"} | (settings or {})
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield Cluster(process, json.loads(line))
        finally:
            process.terminate()
            process.wait(60)


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_up_serves_stops_with_exit_code_0_and_resumes(tmp_path: Path) -> None:
    """design.md 6: run again on the same data it resumes; the same leader, in a new term."""
    data = tmp_path / "data"
    with up(data) as cluster:
        assert [node["name"] for node in cluster.ready["nodes"]] == ["node1", "node2", "node3"]
        assert all(node["healthy"] for node in cluster.ready["nodes"])
        assert cluster.ready["leader"] == "node1"
        assert cluster.ready["ack"] == 1
        cluster.sql("CREATE TABLE t (x)")
        cluster.sql("INSERT INTO t VALUES (1), (2)")
        pids = [node["pid"] for node in cluster.status()["nodes"]]
        assert cluster.stop() == ""
        assert not any(alive(pid) for pid in pids)
    with up(data, settings={"WALSHIP_ACK": "1"}) as cluster:  # meant for `up`; a node would refuse it
        assert cluster.ready["term"] == 2
        assert cluster.sql("SELECT count(*) FROM t") == [["2"]]


def test_up_adopts_a_database_in_place_and_keeps_to_it(tmp_path: Path) -> None:
    """R1: `up DATABASE` adopts the given file as node 1's database; another one on the same data is refused."""
    path = tmp_path / "app.db"
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("CREATE TABLE t (x); INSERT INTO t VALUES (41)")
    with up(tmp_path / "data", str(path), "--followers", "1") as cluster:
        assert cluster.sql("SELECT x FROM t") == [["41"]]
        cluster.sql("INSERT INTO t VALUES (42)")
        assert "is a walship node that serves it already" in refused(tmp_path / "second", str(path))
        assert cluster.node("leader")["database"] == str(path)
        assert f"{path} is now in WAL mode" in cluster.stop()
    with contextlib.closing(apsw.Connection(str(path))) as db:
        assert [x for (x,) in db.execute("SELECT x FROM t")] == [41, 42]
    for wrong, words in (
        ([str(tmp_path / "other.db")], "holds a cluster with"),
        (["--followers", "2"], "was founded with 1"),
        (["--ack", "0"], "was founded with --ack 1"),
    ):
        assert words in refused(tmp_path / "data", *wrong)


def refused(data: Path, *arguments: str) -> str:
    """What an `up` that must not start says; asserts exit code 2."""
    command = [sys.executable, "-m", "walship", "up", *arguments, "--listen", "127.0.0.1:0", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_a_killed_node_comes_back_and_nothing_is_lost(tmp_path: Path, role: str) -> None:
    with up(tmp_path / "data", "--followers", "1") as cluster:
        cluster.sql("CREATE TABLE t (x)")
        cluster.sql("INSERT INTO t VALUES (1)")
        victim = cluster.node(role)
        os.kill(victim["pid"], signal.SIGKILL)

        def back() -> bool:
            nodes = {node["name"]: node for node in cluster.status()["nodes"]}
            again = nodes[victim["name"]]
            return again["pid"] != victim["pid"] and all(node["healthy"] for node in nodes.values())

        eventually(back)
        cluster.sql("INSERT INTO t VALUES (2)")
        assert cluster.sql("SELECT count(*) FROM t") == [["2"]]
        assert "ended (SIGKILL); starting it again" in cluster.stop()


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    with up(tmp_path / "data", "--followers", "1") as cluster:
        pids = [node["pid"] for node in cluster.status()["nodes"]] + [cluster.status()["proxy"]["pid"]]
        assert all(alive(pid) for pid in pids)
        cluster.process.kill()
        eventually(lambda: not any(alive(pid) for pid in pids))


def test_the_leader_stops_last(tmp_path: Path) -> None:
    """So that followers have everything: each has said goodbye before the leader begins to stop; the proxy first."""
    with up(tmp_path / "data", "--followers", "2") as cluster:
        cluster.stop()
    logs = tmp_path / "data" / "logs"
    leader = (logs / "node1.log").read_text()
    assert 0 < leader.rindex("detach follower=") < leader.index("role=stopping")
    assert leader.count("detach follower=") == 2
    ends = {path.stem: path.stat().st_mtime_ns for path in logs.glob("*.log")}
    assert min(ends, key=lambda name: ends[name]) == "proxy"


def test_ctrl_c_stops_it_with_exit_code_0(tmp_path: Path) -> None:
    with up(tmp_path / "data", "--followers", "0") as cluster:
        assert cluster.ready["ack"] == 0
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(60) == 0


def test_a_node_that_cannot_start_ends_it_with_the_reason(tmp_path: Path) -> None:
    """The child says that its settings cannot work (exit code 2); its own words reach the terminal, once."""
    data = tmp_path / "data"
    with up(data, "--followers", "1") as cluster:
        cluster.stop()
    (data / "node1").rename(data / "aside")
    (data / "node2").rename(data / "node1")
    (data / "aside").rename(data / "node2")
    said = refused(data)
    assert "cannot start. Its last lines in" in said
    assert "belongs to node" in said
