"""A cluster of real processes that faults happen to: nodes and proxies on fixed ports, each killed, stopped, cut off
and started again by its name. No supervisor: who is dead stays dead until a scenario starts it again.

Records are in a directory ("file") or in a real etcd. With a `Network` each part has an address of its own, and packets
between them can be dropped; the test's clients are at HOST.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.client import Client, Failure
from tests.cluster.harness import START_SECONDS, Process, eventually
from tests.coordination.etcd import Etcd, free_ports
from tests.netns import Network

__all__ = ["ETCD", "ChaosCluster"]

ETCD = "etcd"
_PORT = 9000  # in a network of its own nobody else has it
HEAL_SECONDS = 10.0  # I20: after healing, one leader and equal nodes within this


class ChaosCluster:
    """Nodes n1, n2, ... and proxies p1, p2, ... under `root`. Use as a context: it ends everything, whatever happens.

    n1 founds the cluster; who leads later is found out by `leader`. `lease` is T in seconds.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 3,
        proxies: int = 1,
        ack: int = 1,
        lease: float | None = None,
        store: str = "file",
        network: bool = False,
        node_words: tuple[str, ...] = (),
        proxy_words: tuple[str, ...] = (),
    ) -> None:
        self.root = root
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.proxies = [f"p{number}" for number in range(1, proxies + 1)]
        parts = [*self.nodes, *self.proxies]
        self.processes = {name: Process(name, root / f"{name}.log") for name in parts}
        self.network = Network([*parts, ETCD]) if network else None
        self.etcd = self._make_etcd() if store == ETCD else None
        self._lease_words = ("--lease-seconds", f"{lease:g}") if lease is not None else ()
        self._node_words, self._proxy_words = node_words, proxy_words
        ports = dict.fromkeys(parts, _PORT) if network else dict(zip(parts, free_ports(len(parts)), strict=True))
        self._listen = {name: f"{self._address(name)}:{port}" for name, port in ports.items()}
        for name, listen in self._listen.items():
            self.processes[name].url = f"http://{listen}"
        self._found = ("--init", "--voters", ",".join(self.nodes), "--ack", str(ack))
        self._founded = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    @property
    def store_url(self) -> str:
        return self.etcd.url("chaos") if self.etcd is not None else f"file://{self.root}/store"

    @property
    def urls(self) -> list[str]:
        """Of the proxies: where clients go."""
        return [self.processes[name].url for name in self.proxies]

    # -- life of processes --

    def begin(self) -> Self:
        """All parts started, one leader, all nodes level, table `w` there."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self.etcd is not None:
            self.etcd.start()
        self.start(self.nodes[0])
        self.wait_answers(self.nodes[0])
        for name in [*self.nodes[1:], *self.proxies]:
            self.start(name)
        self.wait_whole(START_SECONDS)
        with self.client() as client:
            client.execute("CREATE TABLE w (id INTEGER)")
        self.wait_level()
        return self

    def start(self, name: str, *, environ: dict[str, str] | None = None) -> None:
        """Start a part; does not wait. `environ`: more variables, as WALSHIP_FAILPOINT."""
        process = self.processes[name]
        assert not process.alive, f"{name} runs"
        words = ["--name", name, "--listen", self._listen[name], "--cluster", self.store_url]
        if name in self.nodes:
            words = ["node", *words, "--data", str(self.root / name), *self._lease_words, *self._node_words]
            if not self._founded:
                words += self._found
                self._founded = True
        else:
            words = ["proxy", *words, *self._proxy_words]
        # Proxies at an etcd prove their death by locks in the temporary directory.
        process.start(words, prefix=self._prefix(name), environ={"TMPDIR": str(self.root), **(environ or {})})

    def wait_answers(self, name: str) -> None:
        process = self.processes[name]

        def answers() -> bool:
            assert process.alive, f"{name} ended; its log ends:\n{process.log_tail()}"
            return bool(self.status(name))

        eventually(answers, f"{name} answers", timeout_seconds=START_SECONDS)

    def kill(self, *names: str) -> None:
        """kill -9 of all of them: the signals go out together, then they are waited for."""
        for name in names:
            self.signal(name, signal.SIGKILL)
        for name in names:
            self.processes[name].kill()

    def signal(self, name: str, number: int) -> None:
        os.kill(self.processes[name].pid, number)

    def pause(self, name: str) -> None:
        self.signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)

    def stop_node(self, name: str) -> int:
        """SIGTERM; its exit code."""
        return self.processes[name].stop()

    def start_dead(self) -> list[str]:
        """Start again whoever is not running; their names."""
        dead = [name for name, process in self.processes.items() if not process.alive]
        for name in dead:
            self.start(name)
        return dead

    def switch_over(self, to: str | None = None) -> None:
        """Ask for a planned change of leader, by the command that a person uses."""
        words = [sys.executable, "-m", "walship", "switchover", self.processes[self.leader()].url]
        if to is not None:
            words += ["--to", to]
        done = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS, check=False)
        if done.returncode != 0:
            raise OSError(f"switchover: {done.stdout}{done.stderr}")

    def switch_over_soon(self, to: str, timeout_seconds: float = 10.0) -> None:
        """The same again and again until that node leads or is dead: it may not follow closely yet."""

        def done() -> bool:
            if self.processes[to].alive and self.leader() != to:
                self.switch_over(to)
            return True

        eventually(done, f"{to} leads", timeout_seconds=timeout_seconds)

    # -- what it says of itself --

    def client(self, name: str = "p1", timeout_seconds: float = 30.0) -> Client:
        return Client(self.processes[name].url, timeout_seconds)

    def status(self, name: str = "p1", timeout_seconds: float = 5.0) -> dict[str, Any]:
        with self.client(name, timeout_seconds) as client:
            status: dict[str, Any] = client.get("/status")
        return status

    def statuses(self, names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Of the nodes that answer."""
        found = {}
        for name in names or self.nodes:
            with contextlib.suppress(*Failure, OSError, json.JSONDecodeError):
                found[name] = self.status(name, 2.0)
        return found

    def leaders(self, names: Iterable[str] = ()) -> list[str]:
        return [name for name, status in self.statuses(names).items() if status["role"] == "leader"]

    def leader(self, timeout_seconds: float = 30.0) -> str:
        """The one node that says it leads, and that the first proxy writes to."""

        def found() -> str | None:
            leaders = self.leaders()
            return leaders[0] if len(leaders) == 1 and self.status()["leader"] == leaders[0] else None

        name = eventually(found, "one node leads", timeout_seconds=timeout_seconds)
        assert name is not None
        return name

    def followers(self) -> list[str]:
        leader = self.leader()
        return [name for name in self.nodes if name != leader]

    def term(self) -> int:
        return max(int(status["term"]) for status in self.statuses().values())

    def wait_whole(self, timeout_seconds: float = HEAL_SECONDS) -> str:
        """Until one node leads and all are healthy in the eyes of every proxy; the leader's name."""

        def whole() -> str | None:
            for name in self.nodes:
                assert self.processes[name].alive, f"{name} ended; its log ends:\n{self.processes[name].log_tail()}"
            seen = [self.status(name) for name in self.proxies]
            leaders = self.leaders()
            healthy = all(node["healthy"] for each in seen for node in each["nodes"])
            agreed = {each["leader"] for each in seen} == set(leaders)
            return leaders[0] if healthy and agreed and len(leaders) == 1 else None

        name = eventually(whole, "one node leads and all are healthy", timeout_seconds=timeout_seconds)
        assert name is not None
        return name

    def wait_level(self, timeout_seconds: float = HEAL_SECONDS) -> dict[str, dict[str, Any]]:
        """Every node's /status once all logs end at one position with one checksum and all is applied (I10, I20)."""

        def level() -> dict[str, dict[str, Any]] | None:
            seen = self.statuses()
            logs = [status.get("log") for status in seen.values()]  # a node without one is about to get its first copy
            tips = {(log["tip"], log["checksum"]) if log else None for log in logs}
            lags = len({status["txid"] for status in seen.values()}) != 1  # what is logged may not be applied yet
            return seen if len(seen) == len(self.nodes) and len(tips) == 1 and None not in tips and not lags else None

        found = eventually(level, "all nodes are level", timeout_seconds=timeout_seconds)
        assert found is not None
        return found

    def rows(self, sql: str = "SELECT id FROM w", name: str = "p1") -> list[tuple[Any, ...]]:
        with self.client(name) as client:
            return client.execute(sql).rows

    # -- the end --

    def stop(self) -> dict[str, Path]:
        """Stop all in order, each with exit code 0; the database files by node."""
        files = {name: Path(status["database"]) for name, status in self.statuses().items()}
        leader = self.leader()
        for name in [*self.proxies, *(name for name in self.nodes if name != leader), leader]:
            code = self.processes[name].stop()
            assert code == 0, f"{name} ended with {code}; its log ends:\n{self.processes[name].log_tail()}"
        return files

    def end(self) -> None:
        """Everything gone: processes, etcd, network."""
        for process in self.processes.values():
            process.end()  # SIGKILL ends a stopped process too
        if self.etcd is not None:
            self.etcd.end()
        if self.network is not None:
            self.network.close()

    def _address(self, name: str) -> str:
        return self.network.address(name) if self.network is not None else "127.0.0.1"

    def _prefix(self, name: str) -> tuple[str, ...]:
        return self.network.prefix(name) if self.network is not None else ()

    def _make_etcd(self) -> Etcd:
        return Etcd(self.root / ETCD, host=self._address(ETCD), prefix=self._prefix(ETCD))
