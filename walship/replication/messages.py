"""What leader and follower say to each other besides frames and snapshots.

Talk that happens once a connection (hello, welcome, refusal, goodbye) is JSON: readable in a capture, and a later
version can add a key that this one ignores. What comes many times a second (heartbeat, ack) is fixed binary. Each
value is the body of one record (docs/format.md section 7); each checks itself when it is made, so that neither side
can say, or be told, something that contradicts itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Self, TypeVar

import msgspec

from walship.errors import ProtocolViolation
from walship.formats.position import Position, Tip

__all__ = [
    "ACK_LAYOUT",
    "HEARTBEAT_LAYOUT",
    "MAX_HISTORY",
    "PROTOCOL",
    "Ack",
    "AckFlags",
    "Goodbye",
    "GoodbyeReason",
    "Heartbeat",
    "Hello",
    "Refusal",
    "RefusalReason",
    "StreamSource",
    "Welcome",
]

PROTOCOL = 3
MAX_HISTORY = 4096  # newest terms a welcome tells of; well inside one record
_MAX_NAME = 128
_MAX_TEXT = 4096
_U64 = 1 << 64
_NOTHING = Position(0, 0)

HEARTBEAT_LAYOUT = struct.Struct(">QQQQqQQQ")
ACK_LAYOUT = struct.Struct(">QQQQIQ")


class StreamSource(StrEnum):
    """What follows a welcome: frames from the log, or a whole snapshot first, or (PAGES) the follower's page checksums
    and then a snapshot of only what differs."""

    LOG = "log"
    SNAPSHOT = "snapshot"
    PAGES = "pages"


class RefusalReason(StrEnum):
    """Why a leader (or a node that is none) ends the talk after a hello."""

    WRONG_CLUSTER = "wrong_cluster"
    NOT_LEADER = "not_leader"
    STALE_TERM = "stale_term"
    DUPLICATE_NODE = "duplicate_node"
    BAD_PROTOCOL = "bad_protocol"
    BUSY = "busy"
    DRAINING = "draining"


class GoodbyeReason(StrEnum):
    """Why a side closes a connection on purpose."""

    STOPPING = "stopping"
    TERM_ENDED = "term_ended"
    REPLACED = "replaced"
    LOG_TRUNCATED = "log_truncated"


class AckFlags(IntFlag):
    """What a follower wants known with an ack.

    SEEDING: it takes or installs a snapshot; the positions mean nothing, it only says that it lives. APPLY_LAGS: the
    ack was held back because apply lags (R13). DISK_SHORT: it stopped acking for want of disk (R5).
    """

    SEEDING = 1
    APPLY_LAGS = 2
    DISK_SHORT = 4


_NO_FLAGS = AckFlags(0)


@dataclass(frozen=True, slots=True)
class Hello:
    """A follower's first word: who it is and where its log ends.

    `cluster`, `node_id` are hex; `boot_nonce` tells two processes with one id apart (R3). `tip` is None when the
    follower wants a snapshot: because it is empty, or because of what `reseed` says. `page_size` is 0 when unknown.
    `comparable`: its copy is sound and its page checksums are known, so a snapshot may leave out what it has.
    """

    protocol: int
    cluster: str
    node_id: str
    name: str
    boot_nonce: str
    tip: Tip | None
    promised: int
    voter: bool
    page_size: int
    reseed: str | None = None
    comparable: bool = False

    def __post_init__(self) -> None:
        _check_texts(self.cluster, self.node_id, self.name, self.boot_nonce, most=_MAX_NAME)
        _check_texts(self.reseed)
        _check_numbers(self.promised, self.page_size)
        if not (self.node_id and self.boot_nonce):
            raise ProtocolViolation("a hello needs a node id and a boot nonce")
        if self.tip is not None:
            _check_numbers(self.tip.checksum, self.tip.commit)
            _check_positions(self.tip.position)

    def to_body(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a HELLO body. Raises ProtocolViolation for anything else."""
        return _decode(cls, body)

    def __str__(self) -> str:
        stands = f"at {self.tip}" if self.tip else f"asking for a snapshot ({self.reseed or 'empty'})"
        return f"hello of {self.name} ({self.node_id[:8]}, {'voter' if self.voter else 'non-voter'}) {stands}"


@dataclass(frozen=True, slots=True)
class Welcome:
    """The leader's yes: its term, and what it will send.

    `position` is where the frames continue (source LOG) or, roughly, what the snapshot will be of (SNAPSHOT; its
    header has the exact one). `keep_from`: a txid; the log after it should be kept (R9). `history`: (term, start
    txid) pairs of the leader's log, ascending. `why` says why a snapshot comes although the follower has a log;
    `differs` that the follower's tip is not in the leader's history.
    """

    node_id: str
    name: str
    term: int
    source: StreamSource
    position: Position
    keep_from: int
    history: tuple[tuple[int, int], ...]
    acked: Position
    why: str = ""
    differs: bool = False

    def __post_init__(self) -> None:
        _check_texts(self.node_id, self.name, self.why)
        _check_numbers(self.term, self.keep_from)
        _check_positions(self.position, self.acked)
        if not self.term:
            raise ProtocolViolation("a welcome needs a term; only a leader welcomes")
        if len(self.history) > MAX_HISTORY:
            raise ProtocolViolation(f"a welcome tells of {len(self.history)} terms; {MAX_HISTORY} is the bound")
        for pair in self.history:
            _check_numbers(*pair)

    def to_body(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a WELCOME body. Raises ProtocolViolation for anything else."""
        return _decode(cls, body)

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"welcome by {self.name} in term {self.term}: {self.source} from {self.position}{why}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The leader's no. `leader` is the URL of the one to ask instead, if known."""

    reason: RefusalReason
    message: str
    leader: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self.message, self.leader)

    def to_body(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a REFUSAL body. Raises ProtocolViolation for anything else."""
        return _decode(cls, body)

    def __str__(self) -> str:
        return f"refusal ({self.reason}): {self.message}"


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Said by either side before it closes on purpose, so that the other need not guess."""

    reason: GoodbyeReason
    message: str

    def __post_init__(self) -> None:
        _check_texts(self.message)

    def to_body(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a GOODBYE body. Raises ProtocolViolation for anything else."""
        return _decode(cls, body)

    def __str__(self) -> str:
        return f"goodbye ({self.reason}): {self.message}"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where the leader stands, ten times a second.

    `tip` is the newest durable position; `leader_time_ms` its wall clock (display only); `monotonic_ms` its own
    monotonic clock. `round` is the newest of the rounds by which this leader proves that it still leads (rounds.py).
    """

    tip: Position
    acked: Position
    leader_time_ms: int
    keep_from: int
    monotonic_ms: int
    round: int = 0

    SIZE = HEARTBEAT_LAYOUT.size

    def to_body(self) -> bytes:
        tip, acked = self.tip, self.acked
        return HEARTBEAT_LAYOUT.pack(
            tip.term,
            tip.txid,
            acked.term,
            acked.txid,
            self.leader_time_ms,
            self.keep_from,
            self.monotonic_ms,
            self.round,
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a HEARTBEAT body. Raises ProtocolViolation when its size is wrong."""
        if len(body) != HEARTBEAT_LAYOUT.size:
            raise ProtocolViolation(f"a heartbeat has {len(body)} bytes instead of {HEARTBEAT_LAYOUT.size}")
        tip_term, tip_txid, acked_term, acked_txid, *numbers = HEARTBEAT_LAYOUT.unpack(body)
        return cls(Position(tip_term, tip_txid), Position(acked_term, acked_txid), *numbers)

    def __str__(self) -> str:
        return f"heartbeat at {self.tip}, acked {self.acked}"


@dataclass(frozen=True, slots=True)
class Ack:
    """What a follower holds: `durable` in its log after an fsync, `applied` visible to its readers.

    `round` is the newest round it heard of on this connection while it had promised no newer term.
    """

    durable: Position
    applied: Position
    flags: AckFlags = _NO_FLAGS
    round: int = 0

    SIZE = ACK_LAYOUT.size

    @classmethod
    def seeding(cls) -> Self:
        """A sign of life while a snapshot is taken: acknowledges nothing."""
        return cls(_NOTHING, _NOTHING, AckFlags.SEEDING)

    @property
    def is_seeding(self) -> bool:
        return bool(self.flags & AckFlags.SEEDING)

    def to_body(self) -> bytes:
        durable, applied = self.durable, self.applied
        return ACK_LAYOUT.pack(durable.term, durable.txid, applied.term, applied.txid, self.flags, self.round)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read an ACK body. Raises ProtocolViolation when its size is wrong."""
        if len(body) != ACK_LAYOUT.size:
            raise ProtocolViolation(f"an ack has {len(body)} bytes instead of {ACK_LAYOUT.size}")
        durable_term, durable_txid, applied_term, applied_txid, flags, number = ACK_LAYOUT.unpack(body)
        durable, applied = Position(durable_term, durable_txid), Position(applied_term, applied_txid)
        return cls(durable, applied, AckFlags(flags), number)

    def __str__(self) -> str:
        return "ack: seeding" if self.is_seeding else f"ack: durable {self.durable}, applied {self.applied}"


M = TypeVar("M")


def _decode(shape: type[M], body: bytes) -> M:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"not a {shape.__name__.lower()} this version understands: {error}") from error


def _check_texts(*texts: str | None, most: int = _MAX_TEXT) -> None:
    for text in texts:
        if text is not None and len(text) > most:
            raise ProtocolViolation(f"a text of {len(text)} characters is above the bound of {most}")


def _check_numbers(*numbers: int) -> None:
    for number in numbers:
        if not 0 <= number < _U64:
            raise ProtocolViolation(f"{number} does not fit in 64 bits without a sign")


def _check_positions(*positions: Position) -> None:
    for position in positions:
        _check_numbers(position.term, position.txid)
