"""examples/compose.yaml without Docker: its services with its own words and environment, each in a network namespace
with an address of its own, finding each other by the names of the file. What an engine adds is not here: image, user,
read-only root, restarts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.client import Client
from tests.cluster.harness import START_SECONDS, Process, eventually
from tests.coordination.etcd import etcd_binary
from tests.netns import HOST, Network, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

COMPOSE = yaml.safe_load((Path(__file__).parents[2] / "examples" / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = [name for name in SERVICES if name.startswith("node")]
PROXIES = [name for name in SERVICES if name.startswith("proxy")]
TOKEN = "of-this-test"
PORT = 8080
# Of a mount namespace of its own, where /etc/hosts is ours; it execs, so the process keeps its id.
_WITH_HOSTS = ("unshare", "--mount", "--", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')


class Composed:
    """The services as processes, and etcd."""

    def __init__(self, root: Path) -> None:
        self.network = Network(SERVICES)
        self.root = root
        self._etcd: subprocess.Popen[bytes] | None = None
        self._hosts = root / "hosts"
        lines = [f"{self.network.address(name)} {name}" for name in SERVICES]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), "utf-8")
        self.processes = {name: Process(name, root / f"{name}.log") for name in [*NODES, *PROXIES]}
        for name, process in self.processes.items():
            process.url = f"http://{self.network.address(name)}:{PORT}"

    def start_etcd(self) -> None:
        _, *words = SERVICES["etcd"]["command"]
        words = [word.replace("/etcd-data", str(self.root / "etcd")) for word in words]
        with (self.root / "etcd.log").open("ab") as log:
            self._etcd = subprocess.Popen([*self._prefix("etcd"), etcd_binary(), *words], stdout=log, stderr=log)
        health = f"http://{self.network.address('etcd')}:2379/health"
        eventually(lambda: self._ok(health), "etcd is healthy", timeout_seconds=START_SECONDS)

    def start(self, *names: str) -> None:
        """Start services; does not wait."""
        for name in names:
            service = SERVICES[name]
            places = {}  # in the container -> here
            for source, place in (volume.split(":") for volume in service["volumes"]):
                places[place] = self.root / source
                places[place].mkdir(exist_ok=True)
            environ = {**service["environment"], "WALSHIP_AUTH_TOKEN": TOKEN}
            environ["TMPDIR"] = str(places[environ["TMPDIR"]])
            words = [str(places.get(word, word)) for word in service["command"]]
            self.processes[name].start(words, prefix=self._prefix(name), environ=environ)

    def wait_healthy(self, *names: str) -> None:
        """As the image's health check does."""
        for name in names:
            url = f"{self.processes[name].url}/health"
            eventually(lambda url=url: self._ok(url), f"{name} is healthy", timeout_seconds=START_SECONDS)  # type: ignore[misc]

    def start_all(self) -> None:
        self.start_etcd()
        self.start("node1")
        self.wait_healthy("node1")
        self.start(*NODES[1:], *PROXIES)
        self.wait_healthy(*NODES, *PROXIES)
        self.wait_whole(*PROXIES)

    def wait_whole(self, *proxies: str, timeout_seconds: float = START_SECONDS) -> str:
        """Until all of these proxies see one leader and every node healthy; its name."""

        def whole() -> str | None:
            seen = [self.status(name) for name in proxies]
            leaders = {status["leader"] for status in seen}
            healthy = all(node["healthy"] for status in seen for node in status["nodes"])
            return leaders.pop() if healthy and len(leaders) == 1 else None

        leader = eventually(whole, "one leader and healthy nodes", timeout_seconds=timeout_seconds)
        assert leader is not None
        return leader

    def client(self, name: str, timeout_seconds: float = 30.0) -> Client:
        return Client(self.processes[name].url, timeout_seconds, token=TOKEN)

    def status(self, name: str) -> dict[str, Any]:
        with self.client(name, 5.0) as client:
            status: dict[str, Any] = client.get("/status")
        return status

    def wait_level(self) -> None:
        def level() -> bool:
            logs = [self.status(name)["log"] for name in NODES]
            return len({(log["tip"], log["checksum"]) for log in logs}) == 1

        eventually(level, "all nodes stand at one position with one checksum", timeout_seconds=START_SECONDS)

    def end(self) -> None:
        for process in self.processes.values():
            process.end()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait(30)
        self.network.close()

    def _prefix(self, name: str) -> tuple[str, ...]:
        return (*self.network.prefix(name), *_WITH_HOSTS, str(self._hosts))

    def _ok(self, url: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=5.0, trust_env=False).status_code == 200
        return False


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    composed = Composed(tmp_path)
    try:
        yield composed
    finally:
        composed.end()


def test_the_topology_starts_in_any_order_writes_and_reads_through_either_proxy_and_stops_cleanly(
    composed: Composed,
) -> None:
    """A node that is first ends with 2, which the engine answers with another start; all stop with 0."""
    composed.start_etcd()
    composed.start("node2")
    assert composed.processes["node2"].wait() == 2
    assert "has no cluster record" in composed.processes["node2"].log_tail()
    composed.start("node1")
    composed.wait_healthy("node1")
    composed.start("node2", "node3", *PROXIES)
    composed.wait_healthy(*NODES, *PROXIES)
    assert composed.wait_whole(*PROXIES) == "node1"
    with composed.client("proxy1") as first, composed.client("proxy2") as second:
        first.execute("CREATE TABLE t (v)")
        for number in range(20):
            writer, reader = (first, second) if number % 2 else (second, first)
            writer.execute(f"INSERT INTO t VALUES ({number})")
            assert reader.execute("SELECT count(*) FROM t").value == number + 1  # session covers the other proxy's
    composed.wait_level()
    found = {node["name"]: node["url"] for node in composed.status("proxy2")["nodes"]}
    assert found == {name: f"http://{name}:{PORT}" for name in NODES}
    for name in (*PROXIES, "node3", "node2", "node1"):
        assert composed.processes[name].stop() == 0, composed.processes[name].log_tail()


def test_without_the_token_nobody_gets_in(composed: Composed) -> None:
    composed.start_all()
    reply = httpx.post(f"{composed.processes['proxy1'].url}/v2/pipeline", json={"requests": []}, trust_env=False)
    assert reply.status_code == 401


def test_a_follower_that_is_cut_off_costs_no_write_and_catches_up_when_it_is_back(composed: Composed) -> None:
    composed.start_all()
    leader = composed.wait_whole(*PROXIES)
    cut = next(name for name in NODES if name != leader)
    with composed.client("proxy1") as client:
        client.execute("CREATE TABLE t (v)")
        composed.network.isolate(cut)
        for number in range(20):
            client.execute(f"INSERT INTO t VALUES ({number})")
        assert client.execute("SELECT count(*) FROM t").value == 20
    composed.network.heal()
    composed.wait_whole(*PROXIES)
    composed.wait_level()


def test_a_leader_that_is_cut_off_is_replaced_and_rejoins_when_it_is_back(composed: Composed) -> None:
    """Nothing acknowledged is lost; the write that was under way may be answered late, and is there once."""
    composed.start_all()
    old = composed.wait_whole(*PROXIES)
    with composed.client("proxy1", 60.0) as client:
        client.execute("CREATE TABLE t (v)")
        client.execute("INSERT INTO t VALUES (0)")
        composed.network.isolate(old)

        def written() -> bool:
            return client.execute("INSERT INTO t VALUES (1)").changes == 1

        eventually(written, "a write succeeds without the old leader", timeout_seconds=START_SECONDS)
        new = composed.status("proxy2")["leader"]
        assert new not in (None, old)
    composed.network.heal()
    assert composed.wait_whole(*PROXIES) != old
    composed.wait_level()
    with composed.client("proxy2") as client:
        assert [row[0] for row in client.execute("SELECT v FROM t ORDER BY v").rows][:2] == [0, 1]
    assert composed.status(old)["role"] == "follower"


def test_a_leader_that_is_killed_is_known_to_be_dead_at_once(composed: Composed) -> None:
    """By its lock in the volume of all parts, and not by the end of its lease."""
    composed.start_all()
    old = composed.wait_whole(*PROXIES)
    composed.processes[old].kill()

    def told() -> dict[str, Any] | None:
        seen = [composed.status(name) for name in NODES if name != old]
        return next((each["election"]["last"] for each in seen if each["role"] == "leader"), None)

    last = eventually(told, "another node leads")
    assert last is not None
    assert "is dead" in last["cause"]
    composed.start(old)
    composed.wait_whole(*PROXIES)
    composed.wait_level()


def test_a_proxy_that_was_killed_comes_back_under_its_name(composed: Composed) -> None:
    """All parts have one volume, in which a lock proves the death."""
    composed.start_all()
    composed.processes["proxy1"].kill()
    composed.start("proxy1")
    composed.wait_healthy("proxy1")
    assert composed.status("proxy1")["proxy"]["name"] == "proxy1"


def test_names_are_found_in_each_namespace(composed: Composed) -> None:
    words = [*composed._prefix("node1"), "getent", "hosts", "etcd"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    assert found.split()[0] == composed.network.address("etcd")
    assert HOST not in found
    assert not os.path.samefile("/etc/hosts", composed._hosts)
