"""What an election is told and what it asks for: the events and actions of `election.Election`. Values only.

`now` is the node's CLOCK_BOOTTIME in seconds, read when the event is handed in. A position is what a node has on disk
in its log, never what it has applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from walship.coordination.record import LeaderRecord, Seen, TermStart
from walship.formats.position import Tip

__all__ = [
    "LOST",
    "UNKNOWN",
    "Action",
    "Announce",
    "Candidate",
    "Check",
    "Checked",
    "Claim",
    "Eligible",
    "Event",
    "HandOver",
    "Heard",
    "HolderDied",
    "Outcome",
    "Promise",
    "Promised",
    "Promote",
    "Promoted",
    "PromotionFailed",
    "Read",
    "RecordSeen",
    "Release",
    "Seal",
    "SealAnswer",
    "SealAnswered",
    "SealFailed",
    "SealRefused",
    "Sealed",
    "Serve",
    "Stand",
    "StepDown",
    "Swap",
    "SwapDone",
    "SwapFailure",
    "Tick",
    "Won",
]


@dataclass(frozen=True, slots=True)
class Candidate:
    """This process of this node. `nonce` is its boot nonce; implements `record.Heir`."""

    node_id: str
    name: str
    url: str
    nonce: str


@dataclass(frozen=True, slots=True)
class SealAnswer:
    """A voter promised the term, stepped down, and ends at `tip`. Implements `record.Heir`.

    Only a voter whose data is whole answers so. One without a database, in a seed or amid a rewind promises too, but
    its answer is a `SealFailed`: it stands for no acknowledgment, so it must not count for the quorum.
    """

    name: str
    node_id: str
    url: str
    nonce: str
    tip: Tip
    lag_txids: int = 0


@dataclass(frozen=True, slots=True)
class SealRefused:
    """A voter has promised a higher term."""

    name: str
    promised: int


@dataclass(frozen=True, slots=True)
class SealFailed:
    """A voter did not answer, or has nothing to answer with."""

    name: str


# --- outcomes of a compare-and-swap ---------------------------------------------------------------------------


class Swap(StrEnum):
    CLAIM = "claim"
    HAND = "hand over"
    ANNOUNCE = "announce"


@dataclass(frozen=True, slots=True)
class Won:
    seen: Seen[LeaderRecord]


class SwapFailure(StrEnum):
    LOST = "lost"  # CompareFailed, Fenced: nothing was changed
    UNKNOWN = "unknown"  # StoreUnavailable: it may have happened, and may still happen


LOST = SwapFailure.LOST
UNKNOWN = SwapFailure.UNKNOWN
Outcome = Won | SwapFailure


# --- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """`Election.wake_at` has come; harmless at any other time."""

    now: float


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """The store was read, or the watch told: also when nothing is new, since it shows that the store answers.

    None: there is no record.
    """

    now: float
    seen: Seen[LeaderRecord] | None


@dataclass(frozen=True, slots=True)
class HolderDied:
    """The kernel proved that the process with this boot nonce is dead. Never a guess."""

    now: float
    nonce: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat came from the leader of `term`, and the leader said that its lease is live."""

    now: float
    term: int


@dataclass(frozen=True, slots=True)
class Stand:
    """A proxy or a person asks this node to stand. It takes away the random delay, never a lease."""

    now: float
    why: str


@dataclass(frozen=True, slots=True)
class Eligible:
    """What this node could lead with now; None: nothing (no database, in a seed, rewinding, broken).

    `behind`: this node knows of a voter that holds more (an acknowledged position beyond its own tip).
    """

    now: float
    tip: Tip | None
    behind: bool = False


@dataclass(frozen=True, slots=True)
class SwapDone:
    """`Claim`, `HandOver` or `Announce` has ended."""

    now: float
    kind: Swap
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Promised:
    """`Promise(term)` is durable, and the log can only grow by this term: `tip` was read after that. None: no data.

    When the node has meanwhile promised more, hand in `Sealed` with that term instead.
    """

    now: float
    term: int
    tip: Tip | None
    lag_txids: int = 0


@dataclass(frozen=True, slots=True)
class Checked:
    """A voter says whether it heard the leader within half a lease (`Election.heard`), or leads under a live lease."""

    now: float
    name: str
    heard: bool


@dataclass(frozen=True, slots=True)
class SealAnswered:
    now: float
    term: int
    answer: SealAnswer | SealRefused | SealFailed


@dataclass(frozen=True, slots=True)
class Sealed:
    """This node, as a voter, is about to promise `term` to another candidate.

    Hand it in, and carry out a StepDown that comes back, before the promise is written and answered (R2).
    """

    now: float
    term: int


@dataclass(frozen=True, slots=True)
class Promoted:
    """The term-start frame and truth=wal are durable (R2)."""

    now: float
    term: int
    start: TermStart


@dataclass(frozen=True, slots=True)
class PromotionFailed:
    """`Promote(term)` failed, or `Promise(term)` could not be carried out."""

    now: float
    term: int
    reason: str


Event = (
    Tick
    | RecordSeen
    | HolderDied
    | Heard
    | Stand
    | Eligible
    | SwapDone
    | Promised
    | Checked
    | SealAnswered
    | Sealed
    | Promoted
    | PromotionFailed
)


# --- actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """Read the leader record; answer with RecordSeen, or with nothing when the store does not answer."""


@dataclass(frozen=True, slots=True)
class Check:
    """Ask these voters whether they heard a leader of `term` or later within half a lease; answer with Checked."""

    term: int
    voters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """`record.claim_next_term` on `seen`; answer with SwapDone(CLAIM)."""

    seen: Seen[LeaderRecord]


@dataclass(frozen=True, slots=True)
class Promise:
    """Make `promised = term` durable, stop taking frames of lower terms; answer with Promised."""

    term: int


@dataclass(frozen=True, slots=True)
class Seal:
    """Send SEAL(term) to these voters; answer each with SealAnswered. May come again for the same voters."""

    term: int
    voters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """`record.hand_over` with phase `claiming`; answer with SwapDone(HAND)."""

    claim: Seen[LeaderRecord]
    to: SealAnswer


@dataclass(frozen=True, slots=True)
class Promote:
    """Open the term on this node, in R2's order; answer with Promoted or PromotionFailed."""

    term: int


@dataclass(frozen=True, slots=True)
class Announce:
    """`record.announce_leader`; answer with SwapDone(ANNOUNCE)."""

    claim: Seen[LeaderRecord]
    start: TermStart


@dataclass(frozen=True, slots=True)
class Serve:
    """The record says that this node serves `term`: admit writes as long as the lease is valid."""

    term: int


@dataclass(frozen=True, slots=True)
class StepDown:
    """End this node's leadership of `term`, or its promotion to it, for ever. No answer."""

    term: int
    why: str


@dataclass(frozen=True, slots=True)
class Release:
    """`record.release`: this node gave its claim up and others need not wait. No answer; failures do not matter."""

    claim: Seen[LeaderRecord]


Action = Read | Check | Claim | Promise | Seal | HandOver | Promote | Announce | Serve | StepDown | Release
