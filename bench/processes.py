"""Real processes for the benchmarks: clusters by `walship up`, and other modules of this package."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

__all__ = ["Cluster", "cluster", "module", "pipeline"]

STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as its proxy's /status shows it at the start."""

    status: dict[str, Any]

    @property
    def proxy(self) -> str:
        return str(self.status["proxy"]["url"])

    @property
    def leader(self) -> str:
        return str(next(node["url"] for node in self.status["nodes"] if node["role"] == "leader"))

    def pids(self) -> dict[str, int]:
        """leader, follower 1 .. n, proxy."""
        followers = [node["pid"] for node in self.status["nodes"] if node["role"] != "leader"]
        leader = next(node["pid"] for node in self.status["nodes"] if node["role"] == "leader")
        numbered = {f"follower {number}": pid for number, pid in enumerate(followers, 1)}
        return {"proxy": self.status["proxy"]["pid"], "leader": leader, **numbered}


@contextlib.contextmanager
def cluster(directory: Path, *, followers: int, ack: int) -> Iterator[Cluster]:
    """`walship up` in a fresh directory, stopped cleanly at the end."""
    command = [sys.executable, "-m", "walship", "up", "--data", str(directory), "--listen", "127.0.0.1:0", "--json"]
    command += ["--followers", str(followers), "--ack", str(ack), "--log-level", "warning"]
    with _running(command) as stdout:
        try:
            line = stdout.readline()
            if not line:
                raise RuntimeError("walship up ended before it was ready; its words and logs are above")
            yield Cluster(json.loads(line))
        except BaseException:
            for path in sorted((directory / "logs").glob("*.log")):
                print(f"--- {path.name}\n{path.read_text()[-4000:]}", file=sys.stderr)
            raise


@contextlib.contextmanager
def module(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A module of this package as a process; yields it and the first line it prints. Ended by SIGTERM."""
    command = [sys.executable, "-m", name, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        _stop(process)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[IO[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def pipeline(url: str, sql: str) -> list[list[Any]]:
    """The rows of one statement on a stream of its own."""
    body = {"requests": [{"type": "execute", "stmt": {"sql": sql}}, {"type": "close"}]}
    request = urllib.request.Request(f"{url}/v3/pipeline", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        result = json.load(response)["results"][0]
    if result["type"] != "ok":
        raise RuntimeError(f"{sql}: {result['error']['message']}")
    rows = result["response"]["result"]["rows"]
    return [[int(cell["value"]) if cell["type"] == "integer" else cell.get("value") for cell in row] for row in rows]


def address(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return str(parts.hostname), str(parts.port)
