"""What a proxy says of its cluster: `/status` (design.md 6) and the gauges of `/metrics`, from what it knows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from proxy.backends import Backend, Backends
from proxy.streams import Streams
from walship.coordination.record import ClusterRecord
from walship.formats.link import Role
from walship.metrics import ProxyMetrics

__all__ = ["cluster_status", "failover_possible", "refresh_gauges"]

Json = dict[str, object]


def cluster_status(
    backends: Backends,
    *,
    cluster: ClusterRecord | None,
    proxy: Json,
    clock: Callable[[], float],
    wall: Callable[[], float] = time.time,
) -> Json:
    """The `/status` of a proxy. `lag_txids` is against the leader; null where something is not known."""
    leader = backends.leader
    nodes = [_node(backend, leader, clock(), wall()) for backend in sorted(backends, key=lambda node: node.name)]
    return {
        "cluster": None if cluster is None else cluster.cluster_id,
        "term": max((backend.term for backend in backends), default=0),
        "leader": None if leader is None else leader.name,
        "ack": None if cluster is None else cluster.acks,
        "failover": failover_possible(backends),
        "nodes": nodes,
        "proxy": {"pid": os.getpid(), **proxy},
    }


def failover_possible(backends: Backends) -> str:
    """`possible`, or why another node could not take over and acknowledge writes if the leader were lost now (R16)."""
    cluster = backends.cluster_record
    if cluster is None:
        return "not known: the cluster's record was not read yet"
    if backends.store_problem is not None:
        return f"not possible now: {backends.store_problem}"
    voters, acks = len(cluster.voters), cluster.acks
    # Answers that together know every acknowledged write (3.4 E4), and followers enough for what the next one writes.
    needed = max(voters - acks, acks + 1) if acks else 1
    if needed > voters - 1:
        return (
            f"not possible: {voters} voter{'s' * (voters > 1)} with ack {acks} need {needed} that are left when one is "
            "lost; add voters"
        )
    leader = backends.leader
    there = [node.name for node in backends if node.name in cluster.voters and node is not leader and node.usable]
    if len(there) < needed:
        return f"not possible now: {needed} followers that vote are needed and {len(there)} can be reached"
    return "possible"


def _node(backend: Backend, leader: Backend | None, now: float, wall: float) -> Json:
    status, record = backend.status, backend.record
    known = status is not None
    lag_txids = max(leader.applied.txid - backend.applied.txid, 0) if known and leader is not None else None
    lag_ms = 0 if backend is leader else backend.lag_ms
    return {
        "name": backend.name,
        "role": backend.role.name.lower() if known else "unknown",
        "url": record.url,
        "zone": record.zone,
        "pid": record.pid,
        "database": record.database,
        "term": backend.term if known else None,
        "txid": backend.applied.txid if known else None,
        "durable_txid": status.durable.txid if status is not None else None,
        "lag_txids": lag_txids,
        "lag_seconds": None if lag_ms is None else lag_ms / 1000,
        "healthy": backend.usable and backend.role is not Role.STARTING,
        "since": round(wall - (now - backend.since), 3),
        "reads": backend.reads,
        "in_flight": 0 if backend.connection is None else backend.connection.in_flight,
        "via": backend.via,
        "problem": None if backend.usable else backend.last_failure,
    }


def refresh_gauges(metrics: ProxyMetrics, backends: Backends, streams: Streams, held: int, now: float) -> None:
    """Set what mirrors state; called when `/metrics` is asked for."""
    for backend in backends:
        metrics.in_flight.labels(backend.name).set(0 if backend.connection is None else backend.connection.in_flight)
        metrics.backend_seconds.labels(backend.name).set(backend.latency.at(now))
        metrics.backend_healthy.labels(backend.name).set(backend.usable)
    pinned = streams.pinned
    metrics.streams.labels("pinned").set(pinned)
    metrics.streams.labels("free").set(len(streams) - pinned)
    leader = backends.leader
    metrics.leader_term.set(0 if leader is None else leader.term)
    metrics.leader_unreachable.set(leader is not None and leader.via is not None)
    metrics.held_requests.set(held)
