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

__all__ = ["cluster_status", "refresh_gauges"]

NO_FAILOVER = (
    "not in this version: the node that founded the cluster leads; when it restarts it leads again in a new term"
)

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
        "failover": NO_FAILOVER,
        "nodes": nodes,
        "proxy": {"pid": os.getpid(), **proxy},
    }


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
        "problem": None if backend.usable else backend.last_failure,
    }


def refresh_gauges(metrics: ProxyMetrics, backends: Backends, streams: Streams, now: float) -> None:
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
