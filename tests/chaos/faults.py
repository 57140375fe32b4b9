"""Faults, each with the way back. A fault happens at once; `heal` undoes it, and starts again whoever died of it."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.cluster import ETCD, ChaosCluster
from tests.netns import HOST, Network

__all__ = ["Fault", "Injector", "NETWORK_FAULTS", "PROCESS_FAULTS", "STORE_FAULTS", "kill_leader", "mass_kill"]

MASS_KILL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done, and how to undo it."""

    what: str
    heal: Callable[[], object]
    stops_writes: bool = False  # by design, until it is healed: a fault of the store, or of all nodes


def kill_leader(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    return _killed(cluster, cluster.leader())


def stop_leader(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    return _paused(cluster, cluster.leader())


def kill_follower(cluster: ChaosCluster, chance: random.Random) -> Fault:
    return _killed(cluster, chance.choice(cluster.followers()))


def stop_follower(cluster: ChaosCluster, chance: random.Random) -> Fault:
    return _paused(cluster, chance.choice(cluster.followers()))


def stop_proxy(cluster: ChaosCluster, chance: random.Random) -> Fault:
    return _paused(cluster, chance.choice(cluster.proxies))


def mass_kill(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """All nodes, in any order, within MASS_KILL_SECONDS. Their followers' logs hold what was acknowledged (I5)."""
    order = chance.sample(cluster.nodes, len(cluster.nodes))
    begin = time.monotonic()
    for name in order:
        cluster.signal(name, signal.SIGKILL)
        if name != order[-1]:
            time.sleep(chance.uniform(0, MASS_KILL_SECONDS / len(order)))
    took = time.monotonic() - begin
    cluster.kill(*order)
    return Fault(f"killed {' '.join(order)} within {took * 1e3:.0f} ms", cluster.start_dead, stops_writes=True)


def isolate_leader(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """From everybody, the store included: a lost machine."""
    del chance
    name = cluster.leader()
    _network(cluster).isolate(name)
    return Fault(f"isolated {name}", _network(cluster).heal)


def isolate_follower(cluster: ChaosCluster, chance: random.Random) -> Fault:
    name = chance.choice(cluster.followers())
    _network(cluster).isolate(name)
    return Fault(f"isolated {name}", _network(cluster).heal)


def cut_halves(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """The leader and one proxy on one side; the other nodes, the other proxies and the store on the other."""
    name, proxy = cluster.leader(), chance.choice(cluster.proxies)
    others = [each for each in [*cluster.nodes, *cluster.proxies, ETCD] if each not in (name, proxy)]
    _network(cluster).cut([name, proxy], others)
    return Fault(f"halves: {name} {proxy} | {' '.join(others)}", _network(cluster).heal)


def deafen_leader(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """One way: what followers send does not reach the leader; the store and the proxies reach it."""
    del chance
    name = cluster.leader()
    for follower in cluster.nodes:
        if follower != name:
            _network(cluster).cut_one_way(follower, name)
    return Fault(f"followers do not reach {name}", _network(cluster).heal)


def mute_leader(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """One way: what the leader sends reaches no follower."""
    del chance
    name = cluster.leader()
    for follower in cluster.nodes:
        if follower != name:
            _network(cluster).cut_one_way(name, follower)
    return Fault(f"{name} does not reach followers", _network(cluster).heal)


def cut_proxy(cluster: ChaosCluster, chance: random.Random) -> Fault:
    """One proxy from the leader, which is fine and stays."""
    name, proxy = cluster.leader(), chance.choice(cluster.proxies)
    _network(cluster).cut([proxy], [name])
    return Fault(f"cut {proxy} from {name}", _network(cluster).heal)


def cut_leader_from_store(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    name = cluster.leader()
    _network(cluster).cut([name], [ETCD])
    return Fault(f"cut {name} from the store", _network(cluster).heal)


def isolate_store(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    _network(cluster).isolate(ETCD, but=[HOST])
    return Fault("isolated the store", _network(cluster).heal, stops_writes=True)


def stop_store(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    assert cluster.etcd is not None
    cluster.etcd.pause()
    return Fault("stopped the store", cluster.etcd.resume, stops_writes=True)


def kill_store(cluster: ChaosCluster, chance: random.Random) -> Fault:
    del chance
    etcd = cluster.etcd
    assert etcd is not None
    etcd.kill()
    return Fault("killed the store", lambda: etcd.start_member(0), stops_writes=True)


Injector = Callable[[ChaosCluster, random.Random], Fault]
PROCESS_FAULTS: tuple[Injector, ...] = (kill_leader, stop_leader, kill_follower, stop_follower, stop_proxy, mass_kill)
NETWORK_FAULTS: tuple[Injector, ...] = (
    isolate_leader,
    isolate_follower,
    cut_halves,
    deafen_leader,
    mute_leader,
    cut_proxy,
    cut_leader_from_store,
    isolate_store,
)
STORE_FAULTS: tuple[Injector, ...] = (stop_store, kill_store)


def _killed(cluster: ChaosCluster, name: str) -> Fault:
    cluster.kill(name)
    return Fault(f"killed {name}", cluster.start_dead)


def _paused(cluster: ChaosCluster, name: str) -> Fault:
    cluster.pause(name)
    return Fault(f"stopped {name}", lambda: cluster.resume(name))


def _network(cluster: ChaosCluster) -> Network:
    assert cluster.network is not None, "this fault needs a cluster with a network"
    return cluster.network
