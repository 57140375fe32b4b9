"""Every metric walship exports, declared here and nowhere else; docs/operations.md lists them and a test compares.

A process has one `NodeMetrics` or one `ProxyMetrics`, each with its own registry, so that several can live in one
test. Gauges that mirror state are set when `/metrics` is asked; counters and histograms where the thing happens.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE", "Metrics", "NodeMetrics", "ProxyMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fdatasync: a good NVMe answers in 20 us, a busy disk in 100 ms. Requests: a point read takes 0.2 ms on loopback.
_SYNC_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_REQUEST_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_HOLD_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_GROUP_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """A registry and its text form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def render(self) -> bytes:
        """The Prometheus text exposition; content type `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def names(self) -> list[str]:
        """The declared names as Prometheus shows them (counters end in `_total`), sorted."""
        return sorted(
            family.name + ("_total" if family.type == "counter" else "") for family in self.registry.collect()
        )

    def _gauge(self, name: str, words: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, words, labels, registry=self.registry)

    def _counter(self, name: str, words: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, words, labels, buckets=buckets, registry=self.registry)


class NodeMetrics(Metrics):
    """What one node reports."""

    def __init__(self) -> None:
        super().__init__()
        self.term = self._gauge("walship_term", "Newest term this node obeys")
        self.role = self._gauge("walship_role", "1 for the node's present role, 0 for the others", ["role"])
        self.position_txid = self._gauge(
            "walship_position_txid",
            "TXID of each watermark: captured, durable, acked on a leader; logged, publishing, applied on a follower",
            ["mark"],
        )
        self.lag_txids = self._gauge("walship_lag_txids", "Commits the leader has and this node has not applied")
        self.lag_seconds = self._gauge("walship_lag_seconds", "Time since this node was level, on its own clock")
        self.lag_bytes = self._gauge("walship_lag_bytes", "Logged bytes that are not applied yet")
        self.follower_lag_txids = self._gauge(
            "walship_follower_lag_txids",
            "On the leader: commits a connected follower has not made durable",
            ["follower"],
        )
        self.followers = self._gauge("walship_followers", "On the leader: connected followers")
        self.commits = self._counter("walship_commits", "Commits captured (leader) or applied (follower)")
        self.group_commits = self._histogram(
            "walship_group_commits", "Commits that shared one fdatasync of the -wal", _GROUP_BUCKETS
        )
        self.fdatasync_seconds = self._histogram(
            "walship_fdatasync_seconds",
            "Duration of fdatasync, by file: wal (leader), log (follower)",
            _SYNC_BUCKETS,
            ["file"],
        )
        self.log_bytes = self._gauge("walship_log_bytes", "Bytes the log holds")
        self.wal_bytes = self._gauge("walship_wal_bytes", "Size of the -wal file in bytes")
        self.oldest_reader_seconds = self._gauge(
            "walship_oldest_reader_seconds", "Age of the oldest read transaction; it keeps the -wal from restarting"
        )
        self.checkpoints = self._counter(
            "walship_checkpoints", "Attempts to empty the -wal, by result: done, held back", ["result"]
        )
        self.snapshots = self._counter("walship_snapshots", "Snapshots sent to or installed from a peer", ["direction"])
        self.history_mismatches = self._counter(
            "walship_history_mismatches", "Times this node's history differed from its leader's and it re-seeded"
        )
        self.tokens = self._gauge("walship_tokens", "Commit tokens this node knows, of the last two minutes")
        self.outcomes = self._counter(
            "walship_outcomes",
            "Answers of this leader to what became of a write: done, running, not_done, unknown",
            ["outcome"],
        )
        self.orphan_transactions = self._counter(
            "walship_orphan_transactions", "Commits that never became history and were kept as orphans"
        )
        self.orphan_files = self._gauge("walship_orphan_files", "Orphans in this node's directory")
        self.reconnects = self._counter("walship_reconnects", "Replication connections this follower had to open")
        self.election_seconds = self._histogram(
            "walship_election_seconds", "Seconds of each phase of this node's candidacies", _HOLD_BUCKETS, ["phase"]
        )
        self.elections = self._counter("walship_elections", "Candidacies of this node, by outcome", ["outcome"])


class ProxyMetrics(Metrics):
    """What one proxy reports."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self._counter("walship_requests", "Client requests, by kind and outcome", ["kind", "outcome"])
        self.request_seconds = self._histogram(
            "walship_request_seconds", "Duration of a client request in the proxy", _REQUEST_BUCKETS, ["kind"]
        )
        self.reads = self._counter("walship_reads", "Read requests, by the node that answered", ["node"])
        self.retries = self._counter("walship_retries", "Requests sent again to another node, by reason", ["reason"])
        self.waits = self._counter(
            "walship_waits", "Reads that waited for a follower to reach their floor", ["outcome"]
        )
        self.floor_requests = self._counter(
            "walship_floor_requests",
            "Questions to nodes how fresh a read must be, by level and outcome; many reads share one",
            ["level", "outcome"],
        )
        self.in_flight = self._gauge("walship_in_flight", "Requests sent to a node and not answered yet", ["node"])
        self.backend_seconds = self._gauge(
            "walship_backend_seconds", "Peak-EWMA latency of a node as the router sees it", ["node"]
        )
        self.backend_healthy = self._gauge("walship_backend_healthy", "1 when the link to the node is up", ["node"])
        self.streams = self._gauge("walship_streams", "Open client streams, by whether they are pinned", ["state"])
        self.leader_term = self._gauge(
            "walship_leader_term", "Term of the leader this proxy sends writes to, 0 if none"
        )
        self.held_requests = self._gauge(
            "walship_proxy_held_requests", "Writes that wait for a leader, or are sent to a new one again"
        )
        self.held_evicted = self._counter(
            "walship_proxy_held_evicted",
            "Writes given up while there was no leader, by reason: full (refused), window (waited too long)",
            ["reason"],
        )
        self.hold_seconds = self._histogram(
            "walship_proxy_hold_seconds",
            "How long a write was held, its run at the next leader included",
            _HOLD_BUCKETS,
        )
        self.outcomes = self._counter(
            "walship_proxy_outcomes",
            "Answers to the question what became of a write whose reply was lost, by outcome",
            ["outcome"],
        )
        self.failover_seconds = self._histogram(
            "walship_proxy_failover_seconds",
            "Phases of each time without a leader, as this proxy saw it: detect, hold, drain",
            _HOLD_BUCKETS,
            ["phase"],
        )
        self.stands = self._counter("walship_proxy_stands", "Nodes asked to stand for election, by node", ["node"])
        self.leader_unreachable = self._gauge(
            "walship_proxy_leader_unreachable",
            "1 while this proxy cannot connect to the leader and reaches it through a follower",
        )
