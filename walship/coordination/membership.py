"""Changes of voters and acknowledgments: which are allowed, and in what order (failover.md 3.5; model m8).

The cluster record says who votes and how many acks a commit needs. A promotion asks voters - n of them, an
acknowledgment n beside the leader, so the two always meet. A change must keep that true at every moment, whoever dies:

1. The serving leader takes both rules, the old and the new: from then on a commit needs the acks of both.
2. It waits until everything it has acknowledged is covered under the new rule.
3. One compare-and-swap writes the new record. Until its outcome is known both rules stay in force.
4. Then the new rule alone is in force.

A candidate writes its term into the record (`mark_cluster`) after its claim, and before it asks any voter: it elects
by the rule it finds in that same write. So a change that a deposed leader sent before cannot land any more, and one
that landed is known. Without the mark a late change lets acknowledged commits be lost (m8, MARK=0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from walship.coordination.record import CLUSTER, ClusterRecord, Seen, encode, read_cluster
from walship.coordination.store import Store
from walship.errors import CompareFailed, CorruptState, Fenced, Refused

__all__ = ["Change", "Kind", "Standing", "changed", "consequences", "mark_cluster", "swap_cluster"]

MARK_TRIES = 8  # each is lost to another candidate's mark or one change; more would be a store that lies
MAX_VOTERS = 16


class Kind(StrEnum):
    """What is to change. `ack` also with None: all voters but the leader."""

    ADD = "add"
    REMOVE = "remove"
    ACK = "ack"


@dataclass(frozen=True, slots=True)
class Change:
    kind: Kind
    name: str = ""  # of add and remove
    acks: int | None = None  # of ack; None: all


@dataclass(frozen=True, slots=True)
class Standing:
    """How a node stands with the leader. `caught_up`: it streams, and lacks no more than a moment's commits."""

    caught_up: bool
    why: str = ""  # not caught up, in words


def changed(record: ClusterRecord, change: Change, *, leader: str, nodes: Mapping[str, Standing]) -> ClusterRecord:
    """The record after `change`; `record` itself when it changes nothing. Raises Refused with what to do instead.

    nodes: every registered node but the leader, by name.
    """
    if change.kind is Kind.ACK:
        return _with_acks(record, change.acks)
    if change.kind is Kind.ADD:
        return _with_voter(record, change.name, leader, nodes)
    return _without_voter(record, change.name, leader)


def consequences(record: ClusterRecord) -> list[str]:
    """What an operator should know of a rule, in sentences; empty when there is nothing to say."""
    voters, acks = len(record.voters), record.acks
    found = []
    if voters == 1:
        found.append("One voter: when it is gone nobody takes over.")
    elif acks == 0:
        found.append(
            "No acknowledgments: a write is told as done when the leader alone has it, and a failover may set the last "
            "of them aside as an orphan."
        )
    elif voters == 2:
        found.append(
            "Two voters with one ack: a survivor may take over, but acknowledges no write until the other is back. "
            "Three voters keep writing."
        )
    if voters > 2 and acks == voters - 1:
        found.append("Every voter must acknowledge: while one of them is away, no write is acknowledged.")
    return found


async def mark_cluster(store: Store, term: int) -> Seen[ClusterRecord]:
    """Write `term` into the cluster record, so that no change of an older term lands any more; returns the record.

    For a candidate after its claim, and for a leader before its first change. Idempotent. Raises Fenced when a newer
    term is marked already, StoreUnavailable when the outcome is not known: then nothing may be built on it, ask again.
    """
    for _ in range(MARK_TRIES):
        seen = await read_cluster(store)
        if seen is None:
            raise CorruptState("the cluster record is gone from the store. Bring the store back; nothing was changed")
        if seen.record.term > term:
            raise Fenced(f"term {seen.record.term} holds the cluster record; term {term} is over")
        if seen.record.term == term:
            return seen
        marked = msgspec.structs.replace(seen.record, term=term)
        try:
            return Seen(marked, await store.put_if(CLUSTER, encode(marked), version=seen.version))
        except CompareFailed:
            continue
    raise Fenced(f"the cluster record keeps changing; term {term} gives up")


async def swap_cluster(
    store: Store, seen: Seen[ClusterRecord], record: ClusterRecord, *, still: Callable[[], bool]
) -> Seen[ClusterRecord]:
    """The one compare-and-swap of a change. Raises CompareFailed, and Fenced when `still` (do I lead?) says no.

    StoreUnavailable: the outcome is not known, and the swap may land later; both rules stay in force.
    """
    if not still():
        raise Fenced("this node does not lead any more; nothing was changed")
    return Seen(record, await store.put_if(CLUSTER, encode(record), version=seen.version))


def _with_acks(record: ClusterRecord, acks: int | None) -> ClusterRecord:
    most = len(record.voters) - 1
    if acks is None:
        return _next(record, acks=most, ack_all=True)
    if not 0 <= acks <= most:
        raise Refused(
            "too_many_acks",
            f"ack {acks} can never be met: of {len(record.voters)} voters the leader does not count; allowed: 0 to "
            f"{most}, or all. Nothing was changed; add voters first",
        )
    return _next(record, acks=acks, ack_all=False)


def _with_voter(record: ClusterRecord, name: str, leader: str, nodes: Mapping[str, Standing]) -> ClusterRecord:
    if name in record.voters:
        return record
    if name not in nodes and name != leader:
        known = ", ".join(sorted(set(nodes) - set(record.voters))) or "none"
        raise Refused(
            "unknown_node",
            f"no node named {name!r} ever joined this cluster (nodes that do not vote: {known}). "
            f"Nothing was changed; start it first: walship node --name {name} --cluster ...",
        )
    if name != leader and not nodes[name].caught_up:
        raise Refused(
            "not_caught_up",
            f"{name} cannot vote yet: {nodes[name].why}. As a voter it would count for elections without having what "
            "was acknowledged. Nothing was changed; wait until it follows closely, then ask again",
        )
    if len(record.voters) >= MAX_VOTERS:
        raise Refused("too_many_voters", f"{MAX_VOTERS} voters are the most; more nodes can follow without a vote")
    return _next(record, voters=(*record.voters, name))


def _without_voter(record: ClusterRecord, name: str, leader: str) -> ClusterRecord:
    if name not in record.voters:
        return record
    if name == leader:
        raise Refused(
            "is_leader",
            f"{name} leads, and a leader does not take its own vote. Nothing was changed; hand the lead over first: "
            "walship switchover",
        )
    left = tuple(voter for voter in record.voters if voter != name)
    # `all` of one voter would be none: no acknowledgment is ever taken away but by an order that says so.
    if record.acks > len(left) - 1 and (not record.ack_all or len(left) == 1):
        raise Refused(
            "too_few_voters",
            f"without {name} there are {len(left)} voters, and ack {record.acks} could never be met. Nothing was "
            f"changed; lower it first, knowing what that promises less: walship voters ack {len(left) - 1}",
        )
    return _next(record, voters=left)


def _next(record: ClusterRecord, **fields: object) -> ClusterRecord:
    found = msgspec.structs.replace(record, **fields)
    if found.ack_all:
        found = msgspec.structs.replace(found, acks=len(found.voters) - 1)
    return record if found == record else msgspec.structs.replace(found, gen=record.gen + 1)
