"""Real clusters for tests: real processes on free ports in a directory of their own.

`Cluster` runs nodes and a proxy one by one, so that each can be killed; `Up` runs the one command a user runs. Every
wait has a bound and says what it waited for. A test that fails shows the end of every log (conftest.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import apsw

from tests.cluster.client import Client, Failure
from walship.engine.seed import scan_file

__all__ = [
    "Cluster",
    "Process",
    "Up",
    "checksum_of",
    "content_of",
    "eventually",
    "file_hash",
    "integrity_of",
    "same_files",
    "say",
]

START_SECONDS = 40.0  # a node's start on a machine that runs other tests too; alone it takes 0.5 s
STOP_SECONDS = 30.0
_WALSHIP = (sys.executable, "-m", "walship")

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, *, timeout_seconds: float = 30.0) -> T:
    """The first truthy value of `look`; what a server refuses meanwhile counts as not yet."""
    deadline = time.monotonic() + timeout_seconds
    seen: object = None
    while True:
        try:
            value = look()
            if value:
                return value
            seen = value
        except (*Failure, OSError) as error:
            seen = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what} (last seen: {seen!r})")
        time.sleep(0.02)


class Process:
    """One walship process, its output in a log file that outlives restarts."""

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.url = ""
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def start(self, words: list[str], *, prefix: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> None:
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [*prefix, *_WALSHIP, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environ or {})},
            )

    def first_line(self, timeout_seconds: float = START_SECONDS) -> str:
        """The line it prints when it is ready. Raises AssertionError with its log when it ends or says nothing."""
        assert self._popen is not None
        assert self._popen.stdout is not None
        out, data = self._popen.stdout.fileno(), b""
        deadline = time.monotonic() + timeout_seconds
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(out, 65536) if ready else b""
            if not piece:
                raise AssertionError(f"{self.name} did not get ready; its log ends:\n{self.log_tail()}")
            data += piece
        return data.decode()

    def kill(self) -> None:
        """kill -9."""
        assert self._popen is not None
        self._popen.kill()
        self._popen.wait(STOP_SECONDS)
        self._close()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop and wait; its exit code."""
        assert self._popen is not None
        self._popen.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self._popen is not None
        code = self._popen.wait(STOP_SECONDS)
        self._close()
        return code

    def end(self) -> None:
        """Whatever state it is in: gone. For the end of a test."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(STOP_SECONDS)
            self._close()

    def log_tail(self, lines: int = 40) -> str:
        text = self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _close(self) -> None:
        if self._popen is not None and self._popen.stdout is not None:
            self._popen.stdout.close()


class Cluster:
    """Nodes n1 (which founds, and leads first), n2, ... and one proxy, each a process of its own under `root`."""

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 3,
        ack: int = 1,
        database: Path | None = None,
        node_words: tuple[str, ...] = (),
        proxy_words: tuple[str, ...] = (),
        store: str | None = None,
    ) -> None:
        self.root = root
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.processes = {name: Process(name, root / f"{name}.log") for name in [*self.names, "proxy"]}
        self.node_words = node_words
        self._last_leader = self.names[0]
        self.prefix_of: Callable[[str], tuple[str, ...]] = lambda _name: ()  # what a node is run under, as strace
        self._proxy_words = proxy_words
        self._store = store or f"file://{root}/store"
        self._found = ["--init", "--voters", ",".join(self.names), "--ack", str(ack)]
        if database is not None:
            self._found += ["--database", str(database)]

    @property
    def leader(self) -> str:
        """The node that leads now by its own word, in the newest term; while none does, the one that led last."""
        terms = {}
        for name in self.names:
            with contextlib.suppress(*Failure, OSError):
                if self.processes[name].alive and (status := self.status(name))["role"] == "leader":
                    terms[status["term"]] = name
        if terms:
            self._last_leader = terms[max(terms)]
        return self._last_leader

    @property
    def followers(self) -> list[str]:
        leader = self.leader
        return [name for name in self.names if name != leader]

    def kill_leader(self) -> str:
        """kill -9 of the leader; its name, for whoever starts it again."""
        name = self.leader
        self.processes[name].kill()
        return name

    @property
    def url(self) -> str:
        return self.processes["proxy"].url

    def start(self) -> Cluster:
        for name in self.names:
            self.start_node(name)
        self.start_proxy()
        self.wait_healthy()
        return self

    def start_node(self, name: str) -> None:
        node = self.processes[name]
        words = ["node", "--name", name, "--data", str(self.root / name), "--cluster", self._store, *self.node_words]
        if name == self.names[0] and not (self.root / name).exists():
            words += self._found
        node.start(words, prefix=self.prefix_of(name))
        node.url = json.loads(node.first_line())["url"]

    def start_proxy(self) -> None:
        proxy = self.processes["proxy"]
        seen = proxy.log_path.stat().st_size if proxy.log_path.exists() else 0
        proxy.start(["proxy", "--listen", "127.0.0.1:0", "--cluster", self._store, *self._proxy_words])

        def listening() -> str | None:
            assert proxy.alive, f"the proxy ended; its log ends:\n{proxy.log_tail()}"
            with proxy.log_path.open("rb") as log:
                log.seek(seen)
                found = re.search(r"listen url=(\S+)", log.read().decode("utf-8", "replace"))
            return found and found[1]

        proxy.url = eventually(listening, "the proxy listens", timeout_seconds=START_SECONDS)

    def client(self, at: str = "proxy", timeout_seconds: float = 30.0) -> Client:
        return Client(self.processes[at].url, timeout_seconds)

    def status(self, name: str = "proxy") -> dict[str, Any]:
        with self.client(name, 5.0) as client:
            status: dict[str, Any] = client.get("/status")
        return status

    def wait_healthy(self) -> None:
        def whole() -> bool:
            for name in self.names:
                assert self.processes[name].alive, f"{name} ended; its log ends:\n{self.processes[name].log_tail()}"
            status = self.status()
            healthy = {node["name"] for node in status["nodes"] if node["healthy"]}
            return status["leader"] is not None and healthy == set(self.names)

        eventually(whole, "all nodes are healthy and one leads", timeout_seconds=START_SECONDS)

    def wait_level(self, timeout_seconds: float = 60.0) -> dict[str, dict[str, Any]]:
        """Every node's /status once all have applied what the leader has, with equal checksums."""
        seen: dict[str, dict[str, Any]] = {}

        def level() -> bool:
            seen.update({name: self.status(name) for name in self.names})
            leaders = {status["positions"]["captured"] for status in seen.values() if status["role"] == "leader"}
            positions = {status["positions"]["applied"] for status in seen.values() if status["role"] != "leader"}
            return (
                len(leaders) == 1
                and positions <= leaders
                and len({(status["log"]["tip"], status["log"]["checksum"]) for status in seen.values()}) == 1
            )

        eventually(level, "all nodes are level", timeout_seconds=timeout_seconds)
        return seen

    def database(self, name: str) -> Path:
        return Path(self.status(name)["database"])

    def stop(self) -> list[Path]:
        """Stop all in order, each with exit code 0; returns the database files of the nodes."""
        databases = [self.database(name) for name in self.names]
        leader = self.leader
        for name in ["proxy", *[name for name in self.names if name != leader], leader]:
            code = self.processes[name].stop()
            assert code == 0, f"{name} ended with {code}; its log ends:\n{self.processes[name].log_tail()}"
        return databases

    def end(self) -> None:
        for process in self.processes.values():
            process.end()


class Up:
    """`walship up` as one process; `root` is its data directory."""

    def __init__(self, root: Path, *words: str) -> None:
        self.root = root
        self.process = Process("up", root.with_name(root.name + ".up.log"))
        self.words = ["up", *words, "--data", str(root), "--listen", "127.0.0.1:0", "--json"]
        self.ready: dict[str, Any] = {}

    def start(self) -> Up:
        self.process.start(self.words)
        self.ready = json.loads(self.process.first_line(90.0))
        self.process.url = self.ready["proxy"]["url"]
        return self

    @property
    def url(self) -> str:
        return self.process.url

    def client(self) -> Client:
        return Client(self.url)

    def databases(self) -> list[Path]:
        return [Path(node["database"]) for node in self.ready["nodes"]]

    def wait_level(self) -> None:
        def level() -> bool:
            with self.client() as client:
                return {node["lag_txids"] for node in client.get("/status")["nodes"]} == {0}

        eventually(level, "all nodes are level")

    def logs(self) -> Iterator[Path]:
        yield self.process.log_path
        yield from sorted((self.root / "logs").glob("*.log"))

    def end(self) -> None:
        if self.process.alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.stop()  # a clean end: its children are its own to stop
        self.process.end()


def file_hash(path: Path) -> str:
    """SHA-256 of a database file of a stopped node. Its -wal must be empty: all is in the file."""
    wal = path.with_name(path.name + "-wal")
    assert not wal.exists() or wal.stat().st_size == 0, f"{wal} still holds frames after a clean stop"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_files(paths: list[Path]) -> None:
    """Assert that the database files of stopped nodes are byte-identical and sound."""
    assert len({file_hash(path) for path in paths}) == 1, f"files differ: {[(p, file_hash(p)) for p in paths]}"
    assert integrity_of(paths[0]) == "ok"


def integrity_of(path: Path) -> str:
    return str(content_of(path, "PRAGMA integrity_check")[0][0])


def content_of(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a query on a file, by plain SQLite that knows nothing of walship."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        return list(connection.execute(sql))
    finally:
        connection.close()


def checksum_of(path: Path, page_size: int) -> str:
    """Rolling checksum of a stopped node's file, computed from its bytes alone."""
    return f"{scan_file(path, page_size).rolling:016x}"


def say(figure: object) -> None:
    """A figure for whoever runs the test with -s, or reads the report of a failure."""
    sys.stdout.write(f"{figure}\n")
