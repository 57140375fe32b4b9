"""What a node tells about itself: `/status`, `/health`, `/metrics`, and the status that goes to proxies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter

from walship import __version__
from walship.formats import link
from walship.formats.position import Position
from walship.metrics import NodeMetrics
from walship.node.leading import boottime
from walship.node.role import Role

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Report"]


class Report:
    """Renders the state of one node; keeps none of its own but the metrics registry."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.numbers = NodeMetrics()
        self._counted: dict[Counter, int] = {}

    def unhealthy(self) -> str | None:
        return self._node.unready()

    def status(self) -> Mapping[str, object]:
        """The body of /status (docs/operations.md)."""
        node = self._node
        leader_name, leader_url, term = node.leader
        marks = node.watermarks
        positions = {
            name: str(getattr(marks, name))
            for name in ("captured", "durable", "acked", "logged", "publishing", "applied")
        }
        return {
            "cluster": node.cluster.hex(),
            "name": node.name,
            "node_id": node.node_id,
            "role": node.role.value,
            "voter": node.voter,
            "url": node.url,
            "zone": node.config.zone,
            "pid": os.getpid(),
            "version": __version__,
            "database": node.member.state.state.database_path,
            "term": term,
            "leader": leader_name,
            "leader_url": leader_url,
            "ack": node.member.record.acks,
            "txid": self.applied().txid,
            "durable_txid": self.durable().txid,
            "lag_txids": self.lag_txids(),
            "lag_seconds": self.lag_seconds(),
            "healthy": node.unready() is None,
            "unhealthy_reason": node.unready(),
            "since_ms": node.since_ms,
            "verified_ms": node.verified_ms,
            "positions": positions,
            "orphans": node.orphans.count(),
            "election": self._election(),
            **self._details(),
        }

    def metrics(self) -> bytes:
        """The body of /metrics."""
        self._refresh()
        return self.numbers.render()

    def observe_group(self, commits: int, sync_seconds: float) -> None:
        """A group commit of the leader, in its writer thread."""
        self.numbers.group_commits.observe(commits)
        self.numbers.fdatasync_seconds.labels("wal").observe(sync_seconds)

    def observe_log_sync(self, sync_seconds: float) -> None:
        """A follower's fsync of its log, in its intake thread."""
        self.numbers.fdatasync_seconds.labels("log").observe(sync_seconds)

    def observe_election_phase(self, phase: str, seconds: float) -> None:
        self.numbers.election_seconds.labels(phase).observe(seconds)

    def count_election(self, outcome: str) -> None:
        self.numbers.elections.labels(outcome).inc()

    def link_status(self) -> link.Status:
        """What proxies route by. `in_flight` is filled in by the link server."""
        node = self._node
        flags = link.StatusFlags.SERVING if node.unready() is None else link.StatusFlags.NONE
        if node.established:
            flags |= link.StatusFlags.LED
        elif node.sides.eligible() is not None:
            flags |= link.StatusFlags.CANDIDATE
        lag_seconds = self.lag_seconds()
        return link.Status(
            name=node.name,
            node_id=node.node_id,
            role=link.Role.LEADER if node.role is Role.LEADER else link.Role.FOLLOWER,
            term=node.leader[2],
            applied=self.applied(),
            durable=self.durable(),
            acked=node.watermarks.acked,
            lag_ms=None if lag_seconds is None else int(lag_seconds * 1000),
            flags=flags,
            history=node.watermarks.history.starts()[-link.MAX_HISTORY :],
        )

    def applied(self) -> Position:
        """What a reader here sees."""
        marks = self._node.watermarks
        return marks.captured if self._node.leading is not None else marks.applied

    def durable(self) -> Position:
        marks = self._node.watermarks
        return marks.durable if self._node.leading is not None else marks.logged

    def lag_txids(self) -> int | None:
        """Commits the leader is known to have and this node does not show; None while that is not known."""
        node = self._node
        if node.leading is not None:
            return 0
        follower = node.follower
        if follower is None or follower.leader_tip is None:
            return None
        return max(0, follower.leader_tip.txid - node.watermarks.applied.txid)

    def lag_seconds(self) -> float | None:
        node = self._node
        if node.leading is not None:
            return 0.0
        if node.follower is None or node.follower.leader_tip is None:
            return None
        return round(node.follower.lag_seconds(), 6)

    def _election(self) -> dict[str, Any]:
        """What `walship failover explain` tells."""
        elector = self._node.elector
        core = elector.core
        return {
            "state": core.state.value,
            "why": core.why,
            "voters": len(core.voters),
            "needed": max(1, len(core.voters) - core.acks),
            "last": elector.chronicle.last(boottime()),
        }

    def _details(self) -> dict[str, Any]:
        node = self._node
        details: dict[str, Any] = {}
        if node.replica is not None:
            log = node.replica.log.statistics()
            details["log"] = {
                "base": str(log.base.position),
                "tip": str(log.tip.position),
                "checksum": f"{log.tip.checksum:016x}",
                "frames": log.frames,
                "segments": log.segments,
                "size_bytes": log.size_bytes,
                "pruned_past_keep_from": log.pruned_past_keep_from,
            }
            details["wal_bytes"] = node.replica.database.wal_size_bytes()
            details["page_size"] = node.replica.database.page_size
        if node.writer is not None:
            writer = node.writer.statistics()
            details["writer"] = {
                "jobs": writer.jobs,
                "groups": writer.groups,
                "queued": writer.queued,
                "unacked_bytes": writer.unacked_bytes,
                "turns": writer.turns,
                "turns_expired": writer.turns_expired,
            }
        if node.publisher is not None:
            published = node.publisher.statistics()
            details["keep_from"] = published.keep_from
            details["followers"] = [
                {
                    "name": each.name,
                    "voter": each.voter,
                    "durable": str(each.durable),
                    "applied": str(each.applied),
                    "lag_txids": each.lag_txids,
                    "lag_bytes": each.lag_bytes,
                    "last_ack_age_seconds": round(each.last_ack_age_seconds, 3),
                }
                for each in published.followers
            ]
            details["refusals"] = published.refusals
        if node.service is not None:
            details["service"] = asdict(node.service.status())
        if node.subscriber is not None and node.follower is not None:
            subscribed = node.subscriber.statistics()
            details["replication"] = {
                "link": subscribed.link.value,
                "connections": subscribed.connections,
                "failures": subscribed.failures,
                "seeds": subscribed.seeds,
                "mismatches": subscribed.mismatches,
                "frames": subscribed.frames,
                "received_bytes": subscribed.received_bytes,
                "batches": node.follower.batches(),
                "last_error": subscribed.last_error,
            }
        return details

    def _refresh(self) -> None:
        """Gauges mirror the state at the moment they are asked for."""
        node, metrics = self._node, self.numbers
        metrics.term.set(node.leader[2])
        for role in Role:
            metrics.role.labels(role.value).set(role is node.role)
        marks = node.watermarks
        for name in ("captured", "durable", "acked", "logged", "publishing", "applied"):
            metrics.position_txid.labels(name).set(getattr(marks, name).txid)
        metrics.lag_txids.set(self.lag_txids() or 0)
        metrics.lag_seconds.set(self.lag_seconds() or 0.0)
        metrics.orphan_files.set(node.orphans.count())
        self._count_to(metrics.commits, self.applied().txid)
        if node.leading is not None:
            metrics.oldest_reader_seconds.set(node.leading.held_back_seconds())
        if node.follower is not None:
            metrics.oldest_reader_seconds.set(node.follower.held_back_seconds())
            metrics.lag_bytes.set(node.follower.lag_bytes())
        if (engine := node.leading or node.follower) is not None:
            self._count_to(metrics.checkpoints.labels("done"), engine.checkpoints.done)
            self._count_to(metrics.checkpoints.labels("held back"), engine.checkpoints.held_back)
        if node.subscriber is not None:
            subscribed = node.subscriber.statistics()
            self._count_to(metrics.history_mismatches, subscribed.mismatches)
            self._count_to(metrics.reconnects, subscribed.connections)
        if node.replica is not None:
            metrics.tokens.set(len(node.replica.log.tokens))
            metrics.log_bytes.set(node.replica.log.statistics().size_bytes)
            metrics.wal_bytes.set(node.replica.database.wal_size_bytes())
        if node.publisher is not None:
            followers = node.publisher.statistics().followers
            metrics.followers.set(len(followers))
            for each in followers:
                metrics.follower_lag_txids.labels(each.name).set(each.lag_txids)

    def _count_to(self, counter: Counter, value: int) -> None:
        """Move a counter to what its source counts; the first value seen is where this process began."""
        before = self._counted.setdefault(counter, value if counter is self.numbers.commits else 0)
        if value > before:
            counter.inc(value - before)
            self._counted[counter] = value
