"""Streams that survive: an idle time past expiry, a proxy and a leader that are killed and come back (hrana.md 1.4).

Real clients hold one connection through all three. What was in autocommit goes on as if nothing had been; an open
transaction is reported lost, once, and the same connection goes on.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.cluster.harness import Cluster

SCRIPT = str(Path(__file__).with_name("stream_clients.py"))
EXPIRY_SECONDS = 1.0
NAMES = ("libsql_autocommit", "turso_autocommit", "libsql_transaction", "turso_transaction")


class PausingClient:
    """One client process; `wait_paused` and `go_on` by turns."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(
            [sys.executable, SCRIPT, name, url, name], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def wait_paused(self) -> None:
        assert self._popen.stdout is not None
        if self._popen.stdout.readline() != "paused\n":
            self.wait_done()
            raise AssertionError(f"{self.name} ended too early")

    def go_on(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()

    def wait_done(self) -> None:
        _, errors = self._popen.communicate(timeout=30)
        assert self._popen.returncode == 0, f"{self.name}:\n{errors}"

    def end(self) -> None:
        self._popen.kill()
        self._popen.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def test_connections_survive_idleness_a_killed_proxy_and_a_killed_leader(start_cluster: Callable[..., Cluster]) -> None:
    words = ("--stream-idle-seconds", str(EXPIRY_SECONDS))
    listen = ("--listen", f"127.0.0.1:{free_port()}")  # a proxy that comes back is where its clients left it
    cluster = start_cluster(node_words=words, proxy_words=(*words, *listen))

    def idle() -> None:
        time.sleep(2.5 * EXPIRY_SECONDS)  # the one thing under test is time passing

    def restart_proxy() -> None:
        cluster.processes["proxy"].kill()
        cluster.start_proxy()

    def restart_leader() -> None:
        cluster.start_node(cluster.kill_leader())
        cluster.wait_healthy()

    with ExitStack() as stack:
        clients = [PausingClient(name, cluster.url) for name in NAMES]
        for client in clients:
            stack.callback(client.end)
        for trouble in (idle, restart_proxy, restart_leader):
            for client in clients:
                client.wait_paused()
            trouble()
            for client in clients:
                client.go_on()
        for client in clients:
            if client.name.endswith("autocommit"):
                client.wait_paused()
                client.go_on()
            client.wait_done()
