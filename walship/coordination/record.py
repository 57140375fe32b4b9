"""The records of a cluster and the few changes they may go through.

| key             | record          | changed by                                                            |
|-----------------|-----------------|-----------------------------------------------------------------------|
| `cluster`       | `ClusterRecord` | created once (R1); voters and acks one at a time, with failover       |
| `leader`        | `LeaderRecord`  | compare-and-swap only; the term grows by one a claim, never falls     |
| `terms/<t>`     | `TermRecord`    | written once, when term t begins to serve                             |
| `nodes/<name>`  | `NodeRecord`    | its node, at each start                                               |
| `generations`   | `GenerationsRecord` | the leader, by compare-and-swap; numbers only grow               |

A record is JSON with its own `format` number, so that a newer walship's record is refused in words and not misread.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import msgspec

from walship.coordination.store import Store
from walship.errors import CompareFailed, CorruptState, Fenced, Refused, UsageError

__all__ = [
    "CLUSTER",
    "GENERATIONS",
    "LEADER",
    "NODES",
    "TERMS",
    "ClusterRecord",
    "Generation",
    "GenerationsRecord",
    "Heir",
    "LeaderRecord",
    "NodeRecord",
    "Phase",
    "Seen",
    "TermRecord",
    "TermStart",
    "announce_leader",
    "claim_next_term",
    "create_cluster",
    "decode",
    "encode",
    "hand_over",
    "node_key",
    "read_cluster",
    "read_generations",
    "read_leader",
    "read_nodes",
    "read_terms",
    "register_node",
    "release",
    "renew",
    "term_key",
]

CLUSTER = "cluster"
LEADER = "leader"
GENERATIONS = "generations"
TERMS = "terms/"
NODES = "nodes/"
FORMAT = 1
REGISTER_TRIES = 8  # compare-and-swap on one's own record loses only to a twin; more tries mean two live twins


class Phase(StrEnum):
    """What a leader record says of its holder: asking, leading, named by the leader before it, or gone."""

    CLAIMING = "claiming"
    SERVING = "serving"
    HANDOFF = "handoff"  # the leader before named it and is at `start`: the holder serves at once, without a seal
    VACANT = "vacant"  # the holder gave the term up: anybody may claim the next one at once


class TermStart(msgspec.Struct, frozen=True):
    """The position a term began at: end of the previous history, and the rolling checksum there (R11)."""

    prev_term: int
    prev_txid: int
    checksum: int


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a cluster one: its id (32 hex digits), its voters by name, the number of follower acks.

    `secret` is what its processes know each other by (`credential`); empty in a cluster founded before there was one.
    Voters and acks change one at a time (`membership`): `gen` counts the changes, `term` is the newest term that may
    make one.
    """

    format: int = FORMAT
    cluster_id: str
    created_ms: int
    voters: tuple[str, ...]
    acks: int
    database: str = ""  # path of the first node's database as given to `up`; for people, and to notice another one
    secret: str = ""  # random, 64 hex digits
    ack_all: bool = False  # acks follows the voters: all but the leader
    gen: int = 0
    term: int = 0

    def credential(self, purpose: str) -> str:
        """What a process of this cluster shows when it opens a connection of its own for `purpose`; empty: nothing.

        Derived, so that whoever sees one on the wire has neither the secret nor the credential of another purpose.
        """
        if not self.secret:
            return ""
        return hmac.digest(self.secret.encode(), f"walship {purpose} 1".encode(), "sha256").hex()

    def __repr__(self) -> str:
        return f"ClusterRecord({self.cluster_id}, voters={self.voters}, acks={self.acks})"  # never the secret


class LeaderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who leads. `holder` is a node id; `beat` counts renewals; `start` is None until the term serves.

    `nonce` is the boot nonce of the holder's process: a process leads, not a directory, and it is a process whose
    death can be proven. Empty in a record of an older walship.
    """

    format: int = FORMAT
    term: int
    holder: str
    name: str
    url: str
    phase: Phase
    start: TermStart | None = None
    lease_ms: int = 3000
    beat: int = 0
    nonce: str = ""

    def serves_as(self, other: LeaderRecord) -> bool:
        """Does this record say that the same process serves the same term as `other` does? Beats may differ."""
        same = (self.term, self.holder, self.nonce) == (other.term, other.holder, other.nonce)
        return same and self.phase is Phase.SERVING


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node is found. `boot_nonce` differs at each start of its process (R3)."""

    format: int = FORMAT
    node_id: str
    name: str
    url: str
    zone: str = ""
    pid: int = 0
    boot_nonce: str = ""
    database: str = ""
    voter: bool = True


class TermRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the cluster's history; immutable."""

    format: int = FORMAT
    term: int
    holder: str
    name: str
    start: TermStart


class Generation(msgspec.Struct, frozen=True):
    """A range of history that embedded replicas number from 1: it starts after position (term, txid).

    unnumbered: a machine lost its page cache inside it and rebuilt frames, so nodes may number them differently; a
    client that has not finished it must begin again.
    """

    number: int
    term: int
    txid: int
    unnumbered: bool = False


class GenerationsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The newest generations, ascending by one; the last is current."""

    format: int = FORMAT
    generations: tuple[Generation, ...]


class Heir(Protocol):
    """Whom a record can be handed to: a node, by the boot nonce of its running process."""

    @property
    def node_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def nonce(self) -> str: ...


R = TypeVar("R", ClusterRecord, LeaderRecord, NodeRecord, TermRecord, GenerationsRecord)


@dataclasses.dataclass(frozen=True, slots=True)
class Seen(Generic[R]):
    """A record and the version it was read or written at: what the next compare-and-swap has to name."""

    record: R
    version: int


class _Format(msgspec.Struct):
    format: int


def encode(record: ClusterRecord | LeaderRecord | NodeRecord | TermRecord | GenerationsRecord) -> bytes:
    """The record as JSON."""
    return msgspec.json.encode(record)


def decode(kind: type[R], key: str, data: bytes) -> R:
    """Read a record. Raises UsageError for a newer format, CorruptState when it is no record of that kind."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise UsageError(
                f"the record {key!r} has format {found}, this walship reads format {FORMAT}; "
                "nothing was changed; run the version that wrote it, or a newer one"
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptState(f"the record {key!r} of the coordination store cannot be read: {error}") from error


def term_key(term: int) -> str:
    """`terms/` and the term in 20 digits, so that keys sort as numbers."""
    return f"{TERMS}{term:020d}"


def node_key(name: str) -> str:
    return NODES + name


async def read_cluster(store: Store) -> Seen[ClusterRecord] | None:
    return await _read(store, ClusterRecord, CLUSTER)


async def read_leader(store: Store) -> Seen[LeaderRecord] | None:
    return await _read(store, LeaderRecord, LEADER)


async def read_generations(store: Store) -> Seen[GenerationsRecord] | None:
    return await _read(store, GenerationsRecord, GENERATIONS)


async def read_nodes(store: Store) -> dict[str, NodeRecord]:
    """All registered nodes by name."""
    found = await store.list(NODES)
    return {key.removeprefix(NODES): decode(NodeRecord, key, state.value) for key, state in found.items()}


async def read_terms(store: Store) -> list[TermRecord]:
    """The history of terms, ascending; a term that was claimed and never served is not in it."""
    return [decode(TermRecord, key, state.value) for key, state in (await store.list(TERMS)).items()]


async def create_cluster(store: Store, record: ClusterRecord) -> Seen[ClusterRecord]:
    """Found a cluster (R1). Raises CompareFailed when one is there already; the caller decides whether to join it."""
    if not record.voters or len(set(record.voters)) != len(record.voters):
        raise UsageError("a cluster needs at least one voter, and each name once")
    if not 0 <= record.acks < len(record.voters):
        raise UsageError(
            f"ack = {record.acks}: {len(record.voters)} voters can give 0 to {len(record.voters) - 1} acknowledgments "
            "(the leader does not count); add followers or lower --ack"
        )
    return Seen(record, await store.put_if(CLUSTER, encode(record), version=None))


async def claim_next_term(
    store: Store,
    seen: Seen[LeaderRecord] | None,
    *,
    holder: str,
    name: str,
    url: str,
    promised: int,
    nonce: str = "",
    lease_ms: int = 3000,
) -> Seen[LeaderRecord]:
    """Claim the term after the one in `seen`, the leader record the caller based its decision on (None: first term).

    Returns the claim, phase `claiming`: the term is the holder's, but it may act in it only after its term-start
    frame is durable and `announce_leader` succeeded (R2). Raises CompareFailed when the record is no longer `seen`,
    Fenced when its term lies below what this node `promised` (R1: the store was put back to an older state).
    """
    now = seen.record.term if seen else 0
    if now < promised:
        raise Fenced(
            f"the store's leader record is at term {now}, but this node promised to refuse all terms below {promised}: "
            "the store is older than the data (restored from a copy?). Nothing was changed; bring the newer store back"
        )
    claim = LeaderRecord(
        term=now + 1, holder=holder, name=name, url=url, phase=Phase.CLAIMING, lease_ms=lease_ms, nonce=nonce
    )
    return Seen(claim, await store.put_if(LEADER, encode(claim), version=seen.version if seen else None))


async def announce_leader(
    store: Store, claim: Seen[LeaderRecord], *, start: TermStart, url: str | None = None
) -> Seen[LeaderRecord]:
    """Write `terms/<t>`, then phase `serving`. Call it after the term-start frame is durable (R2).

    In this order, so that a term seen serving is always in the history. Raises CompareFailed when the claim was
    overtaken: then the term has not served.
    """
    record = claim.record
    term = TermRecord(term=record.term, holder=record.holder, name=record.name, start=start)
    try:
        await store.put_if(term_key(record.term), encode(term), version=None)
    except CompareFailed:
        # Ours from an attempt whose answer was lost? Then go on. Anybody else's: the term is not ours.
        there = await _read(store, TermRecord, term_key(record.term))
        if there is None or there.record != term:
            raise
    serving = msgspec.structs.replace(record, phase=Phase.SERVING, start=start, url=url or record.url)
    return Seen(serving, await store.put_if(LEADER, encode(serving), version=claim.version))


async def renew(store: Store, seen: Seen[LeaderRecord]) -> Seen[LeaderRecord]:
    """Count one beat up: the holder says that it lives. Raises CompareFailed, StoreUnavailable (outcome unknown)."""
    return await _replace(store, seen, beat=seen.record.beat + 1)


async def release(store: Store, seen: Seen[LeaderRecord]) -> Seen[LeaderRecord]:
    """Give the term up: anybody may claim the next one at once. The holder must have stopped before.

    Raises CompareFailed, StoreUnavailable (outcome unknown).
    """
    return await _replace(store, seen, phase=Phase.VACANT)


async def hand_over(
    store: Store, seen: Seen[LeaderRecord], *, to: Heir, phase: Phase, start: TermStart | None = None
) -> Seen[LeaderRecord]:
    """Name another holder in one compare-and-swap.

    `claiming`: hand a claim over in the same term (R12a); `seen` is the claim. `handoff`: end the own term in favour
    of `to`, which begins the next one at `start`, the quiet leader's last position (failover.md 3.7 S6).
    Raises CompareFailed, StoreUnavailable: the outcome is unknown then, and the record may still change later, until
    a compare-and-swap of one's own that named the same version has succeeded (R12a).
    """
    if (phase is Phase.HANDOFF) != (start is not None) or phase not in (Phase.CLAIMING, Phase.HANDOFF):
        raise ValueError(f"phase {phase} with start {start}: a claim goes on without a start, a handoff has one")
    return await _replace(
        store,
        seen,
        term=seen.record.term + (phase is Phase.HANDOFF),
        holder=to.node_id,
        name=to.name,
        url=to.url,
        nonce=to.nonce,
        phase=phase,
        start=start,
        beat=0,
    )


async def register_node(
    store: Store, record: NodeRecord, *, alive: Callable[[NodeRecord], bool] = lambda _other: False
) -> Seen[NodeRecord]:
    """Write where this node is found. Raises Refused(`duplicate_node`) when another live process has the name (R3).

    `alive` says whether the process behind an older record still runs (on one host: its flock). Without proof of
    life the name is taken over, so that a node whose directory was lost can come back under its name.
    """
    key = node_key(record.name)
    for _ in range(REGISTER_TRIES):
        there = await _read(store, NodeRecord, key)
        if there is not None and there.record.boot_nonce != record.boot_nonce and alive(there.record):
            raise Refused(
                "duplicate_node",
                f"a node named {record.name!r} runs already (pid {there.record.pid}, {there.record.url}); "
                "stop it or choose another --name",
            )
        try:
            return Seen(record, await store.put_if(key, encode(record), version=there.version if there else None))
        except CompareFailed:
            continue
    raise Refused("duplicate_node", f"another process keeps rewriting the record of node {record.name!r}")


async def _replace(store: Store, seen: Seen[LeaderRecord], **changes: object) -> Seen[LeaderRecord]:
    record = msgspec.structs.replace(seen.record, **changes)
    return Seen(record, await store.put_if(LEADER, encode(record), version=seen.version))


async def _read(store: Store, kind: type[R], key: str) -> Seen[R] | None:
    state = await store.get(key)
    return None if state is None else Seen(decode(kind, key, state.value), state.version)
