"""How a follower that says hello is brought up to date: from the log, by a snapshot, or not at all.

A pure decision. The log is asked one question, whether one of its frames ends at exactly the follower's position with
exactly its checksum (R11). Anything but a clear yes means a snapshot: a follower is never fed frames on a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from walship.errors import HistoryMismatch, LogTruncated
from walship.formats.position import Position
from walship.replication.messages import PROTOCOL, Hello, Refusal, RefusalReason

__all__ = ["MAX_COMPARED_PAGES", "FromLog", "FromSnapshot", "LeaderView", "Locator", "Plan", "plan"]


MAX_COMPARED_PAGES = 8 << 20  # 64 MiB of page checksums in memory; a larger copy is replaced whole
_MAX_WHY = 1000  # well below what a welcome may carry; the reason of the reason of a reason helps nobody


class Locator(Protocol):
    """The one thing asked of the log."""

    def locate(self, position: Position, checksum: int) -> Position:
        """Return `position` if a frame kept ends there with `checksum`, or the oldest one starts there.

        Raises LogTruncated when it is older than the log, HistoryMismatch when it is not in its history.
        """
        ...


@dataclass(frozen=True, slots=True)
class LeaderView:
    """What the decision depends on, at the moment of the hello.

    `term` is 0 when this node does not lead; `connected` maps the node ids served now to their boot nonces;
    `room` is false when the bound on followers is reached; `page_size` is 0 when unknown.
    """

    cluster: str
    term: int
    log: Locator
    page_size: int = 0
    leader_url: str | None = None
    connected: Mapping[str, str] = field(default_factory=dict)
    room: bool = True
    draining: bool = False


@dataclass(frozen=True, slots=True)
class FromLog:
    """Ship the frames after `position`."""

    position: Position


@dataclass(frozen=True, slots=True)
class FromSnapshot:
    """Ship a snapshot first; `why` goes into the welcome and the follower's log.

    `sparse`: only of the pages that the follower has not. `differs`: its tip is not in this leader's history.
    """

    why: str
    sparse: bool = False
    differs: bool = False


Plan = FromLog | FromSnapshot | Refusal


def plan(hello: Hello, view: LeaderView) -> Plan:
    """Decide how to answer `hello`. Refusals come first, in the order of what the follower should fix first."""
    refusal = _refusal(hello, view)
    if refusal is not None:
        return refusal
    sparse = hello.comparable and hello.page_size == view.page_size > 0
    if hello.tip is None:
        return FromSnapshot((hello.reseed or "the follower has no log")[:_MAX_WHY], sparse)
    if hello.page_size and view.page_size and hello.page_size != view.page_size:
        return FromSnapshot(f"the follower has pages of {hello.page_size} bytes, the leader of {view.page_size}")
    try:
        return FromLog(view.log.locate(hello.tip.position, hello.tip.checksum))
    except LogTruncated as error:
        return FromSnapshot(f"the log does not reach back to {hello.tip.position}: {error}"[:_MAX_WHY], sparse)
    except HistoryMismatch as error:
        return FromSnapshot(f"{hello.tip} is not in the leader's history: {error}"[:_MAX_WHY], sparse, differs=True)


def _refusal(hello: Hello, view: LeaderView) -> Refusal | None:
    if hello.protocol != PROTOCOL:
        return Refusal(
            RefusalReason.BAD_PROTOCOL,
            f"this node speaks replication protocol {PROTOCOL}, {hello.name} speaks {hello.protocol}. "
            "Run versions of walship that know a common one",
        )
    if hello.cluster != view.cluster:
        return Refusal(
            RefusalReason.WRONG_CLUSTER,
            f"this node belongs to cluster {view.cluster}, {hello.name} to {hello.cluster}. Check --cluster and --data",
        )
    if view.draining:
        return Refusal(RefusalReason.DRAINING, "this node is shutting down", view.leader_url)
    if not view.term:
        return Refusal(RefusalReason.NOT_LEADER, "this node does not lead", view.leader_url)
    if hello.promised > view.term:
        return Refusal(
            RefusalReason.STALE_TERM,
            f"{hello.name} has promised term {hello.promised}; this node leads only in term {view.term}",
        )
    holder = view.connected.get(hello.node_id)
    if holder is not None and holder != hello.boot_nonce:
        return Refusal(
            RefusalReason.DUPLICATE_NODE,
            f"node id {hello.node_id} is connected from another process. "
            "Two nodes must not share a copied data directory (R3)",
        )
    if holder is None and not view.room:
        return Refusal(RefusalReason.BUSY, "this node serves as many followers as it may")
    return None
