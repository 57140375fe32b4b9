"""A network on one machine: a namespace with an address of its own for each host, cut and healed at will.

Needs root, iproute2 and nftables; `missing()` says what is not there. Packets are dropped where they arrive, silently,
as a network does: nobody gets an error, connections only fall silent. The kernel here has no netem, so no delays.

    with Network(["a", "b", "etcd"]) as network:
        subprocess.Popen([*network.prefix("a"), "walship", "node", "--listen", f"{network.address('a')}:9000", ...])
        network.isolate("a")
        network.heal()
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

__all__ = ["HOST", "Network", "missing"]

HOST = "host"  # this process's own namespace, at the bridge: test clients are there
_NETWORKS = 512  # the /24s of 198.18.0.0/15, which RFC 2544 keeps for tests: no machine is found there
_MOST_HOSTS = 200
_LOCK = Path("/run/walship-test-networks.lock")


@functools.cache
def missing() -> str | None:
    """Why there can be no `Network` here, or None. Tests skip with it."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if lacking := [tool for tool in ("ip", "nft", "nsenter") if shutil.which(tool) is None]:
        return f"network namespaces need {', '.join(lacking)} (apt-get install iproute2 nftables util-linux)"
    try:
        with Network(["probe"]):
            return None
    except (OSError, RuntimeError) as error:
        return f"no network namespaces here: {error}"


class Network:
    """Hosts on one bridge. Made whole by the constructor; `close` removes everything, and ends what runs inside.

    What a killed test run left behind is removed by the next one: the bridge names its owner.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: list[str] = []
        with _LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else one run's sweep could remove what another has just made
            _sweep()
            self._number = _take_number()
        try:
            _ip("address", "add", f"{self.address(HOST)}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            self._filter(HOST)
            for name in names:
                self.add(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def add(self, name: str) -> str:
        """One more host; its address."""
        assert name not in (*self._names, HOST)
        assert len(self._names) < _MOST_HOSTS
        self._names.append(name)
        space, outer = self._space(name), f"{self._bridge}v{len(self._names)}"
        _ip("netns", "add", space)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", space, "link", "set", link, "up")
        self._filter(name)
        return self.address(name)

    def address(self, name: str) -> str:
        last = 1 if name == HOST else 2 + self._names.index(name)
        return f"198.{18 + self._number // 256}.{self._number % 256}.{last}"

    def prefix(self, name: str) -> tuple[str, ...]:
        """Words before a command that make it run on that host. They exec: the process keeps its id."""
        return () if name == HOST else ("nsenter", f"--net=/run/netns/{self._space(name)}", "--")

    def cut_one_way(self, source: str, target: str) -> None:
        """Nothing that `source` sends reaches `target`; the other way is as it was."""
        self._drop(target, [source])

    def cut(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """No packet between any of the ones and any of the others, either way."""
        ones, others = list(ones), list(others)
        for targets, sources in ((ones, others), (others, ones)):
            for target in targets:
                self._drop(target, sources)

    def isolate(self, name: str, *, but: Iterable[str] = ()) -> None:
        """Cut one host off from all others and from this process, except from `but`."""
        spared = {name, *but}
        self.cut([name], [each for each in (HOST, *self._names) if each not in spared])

    def heal(self, *names: str) -> None:
        """All packets pass again; with names, those that these hosts receive."""
        for name in names or (HOST, *self._names):
            self._nft(name, f"flush set ip {self._bridge} cut")

    def close(self) -> None:
        _remove_bridge(self._bridge)
        for name in self._names:
            _end_space(self._space(name))

    @property
    def _bridge(self) -> str:
        return f"wsnet{self._number}"

    def _space(self, name: str) -> str:
        return f"{self._bridge}-{name}"

    def _filter(self, name: str) -> None:
        """A set of source addresses whose packets are dropped. It hooks in before anything sees them."""
        self._nft(
            name,
            f"table ip {self._bridge} {{ set cut {{ type ipv4_addr; }}; chain arrive {{ "
            f"type filter hook prerouting priority -300; ip daddr {self.address(name)} ip saddr @cut drop; }}; }}",
        )

    def _drop(self, target: str, sources: list[str]) -> None:
        if sources:
            addresses = ", ".join(self.address(source) for source in sources)
            self._nft(target, f"add element ip {self._bridge} cut {{ {addresses} }}")

    def _nft(self, name: str, words: str) -> None:
        _run([*self.prefix(name), "nft", words])


def _take_number() -> int:
    """A free network, taken by making its bridge: test runs beside each other never share one."""
    for number in range(_NETWORKS):
        bridge = f"wsnet{number}"
        if not Path(f"/sys/class/net/{bridge}").exists():
            _ip("link", "add", bridge, "type", "bridge", "forward_delay", "0")
            _ip("link", "set", bridge, "alias", _owner(os.getpid()))
            return number
    raise RuntimeError("all test networks are taken")


def _sweep() -> None:
    """Remove the networks of test runs that were killed."""
    for link in json.loads(_ip("-json", "link", "show", "type", "bridge") or "[]"):
        bridge, alias = link.get("ifname", ""), link.get("ifalias", "")
        pid = alias.split(" ")[0]
        if bridge.startswith("wsnet") and pid.isdecimal() and alias != _owner(int(pid)):
            _remove_bridge(bridge)
            for space in Path("/run/netns").glob(f"{bridge}-*"):
                _end_space(space.name)


def _owner(pid: int) -> str:
    """A process told by its id and the time of its start (proc(5), stat field 22): ids are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return f"{pid} is gone"
    return f"{pid} {stat.rpartition(')')[2].split()[19]}"


def _end_space(space: str) -> None:
    with contextlib.suppress(RuntimeError):  # it may not have been made yet
        for pid in _ip("netns", "pids", space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", space)


def _remove_bridge(bridge: str) -> None:
    """Its links first: those of a deleted namespace live on while a connection that was cut off dies in it."""
    links = [path.name for path in Path("/sys/class/net").glob(f"{bridge}v*")]
    for words in (
        *(["ip", "link", "delete", link] for link in links),
        ["nft", f"delete table ip {bridge}"],
        ["ip", "link", "delete", bridge],
    ):
        with contextlib.suppress(RuntimeError):
            _run(words)


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30.0, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
