"""The test network itself: who reaches whom, before, during and after a cut."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import HOST, Network, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

_ECHO = (
    "import socket\n"
    "server = socket.create_server(('0.0.0.0', 7))\n"
    "print(flush=True)\n"
    "while True:\n"
    "    connection, _ = server.accept()\n"
    "    connection.close()\n"
)
_ASK = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=0.5).recv(1)"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    servers = []
    with Network(["a", "b", "c"]) as network:
        for name in network.names:
            words = [*network.prefix(name), sys.executable, "-c", _ECHO]
            server = subprocess.Popen(words, stdout=subprocess.PIPE)
            assert server.stdout is not None
            assert server.stdout.readline() == b"\n"
            servers.append(server)
        yield network
    for server in servers:
        assert server.wait(10) == -9  # ended with its network
        assert server.stdout is not None
        server.stdout.close()


def reaches(network: Network, source: str, target: str) -> bool:
    words = [*network.prefix(source), sys.executable, "-c", _ASK, network.address(target)]
    return subprocess.run(words, capture_output=True, timeout=30, check=False).returncode == 0


def test_all_hosts_reach_each_other_and_this_process_reaches_them(network: Network) -> None:
    assert reaches(network, "a", "b")
    assert reaches(network, "b", "a")
    assert reaches(network, HOST, "c")


def test_a_cut_is_between_the_two_sides_only_and_heals(network: Network) -> None:
    network.cut(["a"], ["b"])
    assert not reaches(network, "a", "b")
    assert not reaches(network, "b", "a")
    assert reaches(network, "a", "c")
    assert reaches(network, HOST, "a")
    network.heal()
    assert reaches(network, "a", "b")


def test_an_isolated_host_reaches_itself_and_who_is_spared(network: Network) -> None:
    network.isolate("a", but=["c"])
    assert reaches(network, "a", "a")
    assert reaches(network, "a", "c")
    assert reaches(network, "c", "a")
    assert not reaches(network, "a", "b")
    assert not reaches(network, HOST, "a")
    network.heal()
    assert reaches(network, HOST, "a")


def test_a_one_way_cut_lets_the_other_way_pass(network: Network) -> None:
    """By UDP: a TCP connection needs both ways."""

    def arrives(source: str, target: str) -> bool:
        udp = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
        got = udp + "s.bind(('0.0.0.0', 9)); print(flush=True); s.settimeout(1); s.recv(9)"
        send = udp + "s.sendto(b'x', (sys.argv[1], 9))"
        receiver = subprocess.Popen(
            [*network.prefix(target), sys.executable, "-c", got], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert receiver.stdout is not None
        receiver.stdout.readline()
        subprocess.run([*network.prefix(source), sys.executable, "-c", send, network.address(target)], check=True)
        with receiver:
            return receiver.wait(10) == 0

    network.cut_one_way("a", "b")
    assert not arrives("a", "b")
    assert arrives("b", "a")
    network.heal("b")
    assert arrives("a", "b")


def test_networks_beside_each_other_have_their_own_addresses_and_leave_nothing_behind(network: Network) -> None:
    with Network(["a"]) as other:
        assert other.address("a") != network.address("a")
        socket.create_server((other.address(HOST), 0)).close()
        space = Path("/run/netns", other.prefix("a")[1].rpartition("/")[2])
        assert space.exists()
    assert not space.exists()
    with pytest.raises(OSError, match="assign"):
        socket.create_server((other.address(HOST), 0))


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    script = (
        "import os, tests.netns\n"
        "network = tests.netns.Network(['killed'])\n"
        "print(*network.prefix('killed'), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    space = Path(left.stdout.split()[1].partition("=")[2])
    assert space.exists()
    with Network(["a"]):
        assert not space.exists()
