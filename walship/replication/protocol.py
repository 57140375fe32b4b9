"""The talk between a leader and one follower, without any I/O.

Goals: both ends of the connection obey one table (PHASES), so that neither can be led where the other is not; nothing
is accepted that does not extend the follower's own tip (R11); nothing here holds a frame above WHOLE_FRAME_BYTES (R6).

The shells feed what the network brings to `receive_data` and handle the events it yields one by one; what `send_*`
returns goes to the network as it is. Events are decoded lazily: an error is raised only after every event before it
has been handled, so a follower keeps all good frames in front of a bad one.

Terms. A follower obeys the *stream's* term, the one in the welcome: it must not be below what the follower has
promised. Frames inside the stream may carry older terms (a follower that catches up reads the history of earlier
leaders) but never newer ones. After an error nothing more is accepted; the connection is to be closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

from walship.errors import Fenced, HistoryMismatch, ProtocolViolation
from walship.formats.frame import (
    FrameAssembler,
    FrameComplete,
    FrameHeader,
    FrameStarted,
    SnapshotAssembler,
    SnapshotComplete,
    SnapshotEncoder,
    SnapshotHeader,
    SnapshotStarted,
)
from walship.formats.position import Position, TermHistory
from walship.formats.record import Kind, Record, RecordReader, encode_record
from walship.replication.messages import Ack, Goodbye, Heartbeat, Hello, Refusal, StreamSource, Welcome

__all__ = [
    "PHASES",
    "WHOLE_FRAME_BYTES",
    "FollowerEvent",
    "FollowerProtocol",
    "FrameBegan",
    "FrameEnded",
    "FramePartReceived",
    "FrameReceived",
    "LeaderEvent",
    "LeaderProtocol",
    "PagesReceived",
    "Phase",
    "SnapshotBegan",
    "SnapshotEnded",
    "SnapshotPartReceived",
    "Step",
    "is_below",
]

WHOLE_FRAME_BYTES = 4 << 20
"""Records of a frame up to this size are handed over in one piece; above it they are streamed. R6 allows 16 MiB."""


class Phase(Enum):
    """Where the talk is. Each side has its own view; the slower one is at most what is in flight behind."""

    GREETING = auto()  # the follower's hello is due
    ANSWERING = auto()  # the leader's welcome or refusal is due
    STREAMING = auto()  # frames and acks flow
    COMPARING = auto()  # the follower says what it has; then comes a snapshot of the rest
    SEEDING = auto()  # a snapshot was promised; its header is due
    SNAPSHOT = auto()  # inside a snapshot
    INSTALLING = auto()  # the snapshot is complete; the follower verifies and installs it, frames wait
    CLOSED = auto()


class Step(Enum):
    """What moves the talk from phase to phase, whoever says it."""

    HELLO = auto()
    WELCOME_LOG = auto()
    WELCOME_SNAPSHOT = auto()
    WELCOME_PAGES = auto()
    REFUSAL = auto()
    FRAME = auto()
    PAGES = auto()
    SNAPSHOT_HEADER = auto()
    SNAPSHOT_PART = auto()
    SNAPSHOT_END = auto()
    HEARTBEAT = auto()
    ACK = auto()
    SEEDING_ACK = auto()
    GOODBYE = auto()


PHASES: dict[Phase, dict[Step, Phase]] = {
    Phase.GREETING: {Step.HELLO: Phase.ANSWERING, Step.GOODBYE: Phase.CLOSED},
    Phase.ANSWERING: {
        Step.WELCOME_LOG: Phase.STREAMING,
        Step.WELCOME_SNAPSHOT: Phase.SEEDING,
        Step.WELCOME_PAGES: Phase.COMPARING,
        Step.REFUSAL: Phase.CLOSED,
        Step.GOODBYE: Phase.CLOSED,
    },
    Phase.STREAMING: {
        Step.FRAME: Phase.STREAMING,
        Step.HEARTBEAT: Phase.STREAMING,
        Step.ACK: Phase.STREAMING,
        Step.GOODBYE: Phase.CLOSED,
    },
    Phase.COMPARING: {
        Step.PAGES: Phase.COMPARING,
        Step.SNAPSHOT_HEADER: Phase.SNAPSHOT,
        Step.HEARTBEAT: Phase.COMPARING,
        Step.SEEDING_ACK: Phase.COMPARING,
        Step.GOODBYE: Phase.CLOSED,
    },
    Phase.SEEDING: {
        Step.SNAPSHOT_HEADER: Phase.SNAPSHOT,
        Step.HEARTBEAT: Phase.SEEDING,
        Step.SEEDING_ACK: Phase.SEEDING,
        Step.GOODBYE: Phase.CLOSED,
    },
    Phase.SNAPSHOT: {
        Step.SNAPSHOT_PART: Phase.SNAPSHOT,
        Step.SNAPSHOT_END: Phase.INSTALLING,
        Step.HEARTBEAT: Phase.SNAPSHOT,
        Step.SEEDING_ACK: Phase.SNAPSHOT,
        Step.GOODBYE: Phase.CLOSED,
    },
    # The first real ack says that the snapshot is installed. Until then an ack could name a position of the history
    # that the snapshot replaces, and the leader would count it for commits this follower does not have.
    Phase.INSTALLING: {
        Step.HEARTBEAT: Phase.INSTALLING,
        Step.SEEDING_ACK: Phase.INSTALLING,
        Step.ACK: Phase.STREAMING,
        Step.GOODBYE: Phase.CLOSED,
    },
    Phase.CLOSED: {},
}

_WELCOMES = {
    StreamSource.LOG: Step.WELCOME_LOG,
    StreamSource.SNAPSHOT: Step.WELCOME_SNAPSHOT,
    StreamSource.PAGES: Step.WELCOME_PAGES,
}
_FRAME_KINDS = frozenset((Kind.FRAME_HEADER, Kind.FRAME_PART, Kind.FRAME_END))
_SNAPSHOT_STEPS = {
    Kind.SNAPSHOT_HEADER: Step.SNAPSHOT_HEADER,
    Kind.SNAPSHOT_PART: Step.SNAPSHOT_PART,
    Kind.SNAPSHOT_END: Step.SNAPSHOT_END,
}


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A whole frame: `data` is all its records, as they came, to be logged byte for byte."""

    header: FrameHeader
    data: bytes


@dataclass(frozen=True, slots=True)
class FrameBegan:
    """A frame above WHOLE_FRAME_BYTES has begun; its parts and its end follow, with heartbeats between."""

    header: FrameHeader


@dataclass(frozen=True, slots=True)
class FramePartReceived:
    """The next part record of a large frame, framing included."""

    record: bytes


@dataclass(frozen=True, slots=True)
class FrameEnded:
    """The end record of a large frame; with it the frame exists (R6)."""

    header: FrameHeader
    record: bytes


@dataclass(frozen=True, slots=True)
class SnapshotBegan:
    """A snapshot is coming."""

    header: SnapshotHeader


@dataclass(frozen=True, slots=True)
class SnapshotPartReceived:
    """The next LTX bytes of the snapshot."""

    data: bytes


@dataclass(frozen=True, slots=True)
class SnapshotEnded:
    """All parts came and agree with the end record. Call `installed` once the database is replaced."""

    header: SnapshotHeader


@dataclass(frozen=True, slots=True)
class PagesReceived:
    """The next bytes of the follower's page checksum record (docs/format.md 3)."""

    data: bytes


LeaderEvent = Hello | Ack | Goodbye | PagesReceived
FollowerEvent = (
    Welcome
    | Refusal
    | Heartbeat
    | Goodbye
    | FrameReceived
    | FrameBegan
    | FramePartReceived
    | FrameEnded
    | SnapshotBegan
    | SnapshotPartReceived
    | SnapshotEnded
)

E = TypeVar("E")


# --- the two sides -----------------------------------------------------------------------------------------------


class _Protocol(Generic[E]):
    """What both sides share: the phase, and records in."""

    def __init__(self) -> None:
        self.phase = Phase.GREETING
        self._reader = RecordReader()

    def receive_data(self, data: bytes) -> Iterator[E]:
        """Take bytes; return an iterator over the events they complete.

        Every event must be taken before more data is given. Raises CorruptRecord or ProtocolViolation (and on the
        follower HistoryMismatch, Fenced) while iterating, after the good events.
        """
        self._reader.receive_data(data)
        return iter(self._next_event, None)

    def _next_event(self) -> E | None:
        try:
            while (record := self._reader.next_record()) is not None:
                if (event := self._handle(record)) is not None:
                    return event
        except Exception:
            self.phase = Phase.CLOSED
            raise
        return None

    def _handle(self, record: Record) -> E | None:
        raise NotImplementedError

    def _step(self, step: Step) -> None:
        following = PHASES[self.phase].get(step)
        if following is None:
            raise ProtocolViolation(
                f"{step.name.lower()} has no place while {self.phase.name.lower()}; the connection ends, no data lost"
            )
        self.phase = following

    def send_goodbye(self, goodbye: Goodbye) -> bytes:
        """Return a GOODBYE; afterwards the connection is to be closed."""
        self._step(Step.GOODBYE)
        return encode_record(Kind.GOODBYE, goodbye.to_body())


class LeaderProtocol(_Protocol[LeaderEvent]):
    """The leader's side of one follower's connection."""

    def __init__(self) -> None:
        super().__init__()
        self._snapshot: SnapshotEncoder | None = None

    def _handle(self, record: Record) -> LeaderEvent:
        if record.kind is Kind.ACK:
            ack = Ack.parse(record.body)
            self._step(Step.SEEDING_ACK if ack.is_seeding else Step.ACK)
            return ack
        if record.kind is Kind.PAGE_CHECKSUMS:
            self._step(Step.PAGES)
            return PagesReceived(record.body)
        if record.kind is Kind.HELLO:
            self._step(Step.HELLO)
            return Hello.parse(record.body)
        if record.kind is Kind.GOODBYE:
            self._step(Step.GOODBYE)
            return Goodbye.parse(record.body)
        raise ProtocolViolation(f"a follower sent a {record}; the connection ends, no data lost")

    def send_welcome(self, welcome: Welcome) -> bytes:
        """Return the WELCOME; `welcome.source` decides what may follow."""
        self._step(_WELCOMES[welcome.source])
        return encode_record(Kind.WELCOME, welcome.to_body())

    def send_refusal(self, refusal: Refusal) -> bytes:
        """Return the REFUSAL; afterwards the connection is to be closed."""
        self._step(Step.REFUSAL)
        return encode_record(Kind.REFUSAL, refusal.to_body())

    def send_heartbeat(self, heartbeat: Heartbeat) -> bytes:
        self._step(Step.HEARTBEAT)
        return encode_record(Kind.HEARTBEAT, heartbeat.to_body())

    def send_frames(self, data: bytes) -> bytes:
        """Return `data`, whole records of frames as the log holds them, if frames may be sent now."""
        self._step(Step.FRAME)
        return data

    def send_snapshot_header(self, header: SnapshotHeader) -> bytes:
        self._step(Step.SNAPSHOT_HEADER)
        self._snapshot = SnapshotEncoder(header)
        return self._snapshot.header_record()

    def send_snapshot_data(self, ltx: bytes) -> bytes:
        """Take any amount of LTX bytes; return the part records that are complete, maybe none."""
        self._step(Step.SNAPSHOT_PART)
        return self._encoder().part(ltx)

    def send_snapshot_end(self) -> bytes:
        """Return the last part and the end record. Frames must wait for the follower's first real ack."""
        last = self._encoder().end()
        self._step(Step.SNAPSHOT_END)
        self._snapshot = None
        return last

    def _encoder(self) -> SnapshotEncoder:
        if self._snapshot is None:
            raise ProtocolViolation("no snapshot has been begun")
        return self._snapshot


class FollowerProtocol(_Protocol[FollowerEvent]):
    """The follower's side. Checks that each frame extends exactly what came before it.

    Args:
        hello: what `send_hello` will say; its tip is where frames must continue.
        own: the end of the follower's own log even when the hello asks for a snapshot (R9), None when it has none.
    """

    def __init__(self, hello: Hello, *, own: Position | None) -> None:
        super().__init__()
        self.term = 0
        self.tip = hello.tip
        self._hello = hello
        self._own = own
        self._compared = False
        self._history = TermHistory()
        self._cluster = bytes.fromhex(hello.cluster)
        self._frames = FrameAssembler()
        self._snapshots = SnapshotAssembler()
        self._held: list[bytes] = []  # records of a frame that may still turn out small
        self._held_bytes = 0
        self._streamed = False
        self._ready: deque[FollowerEvent] = deque()

    # sending

    def send_hello(self) -> bytes:
        self._step(Step.HELLO)
        return encode_record(Kind.HELLO, self._hello.to_body())

    def send_ack(self, ack: Ack) -> bytes:
        """Return an ACK. While a snapshot is taken only `Ack.seeding()` may be sent."""
        if not ack.is_seeding and self.phase is Phase.INSTALLING:
            raise ProtocolViolation("an ack must wait until the snapshot is installed")
        self._step(Step.SEEDING_ACK if ack.is_seeding else Step.ACK)
        return encode_record(Kind.ACK, ack.to_body())

    def send_pages(self, data: bytes) -> bytes:
        """Return a record with the next bytes of this node's page checksum record, at most MAX_BODY of them."""
        self._step(Step.PAGES)
        return encode_record(Kind.PAGE_CHECKSUMS, data)

    def send_installed(self, ack: Ack) -> bytes:
        """Return the first real ACK after a snapshot: the database is replaced, frames may come."""
        if self.phase is not Phase.INSTALLING:
            raise ProtocolViolation("no snapshot is being installed")
        self._step(Step.ACK)
        return encode_record(Kind.ACK, ack.to_body())

    # receiving

    def _next_event(self) -> FollowerEvent | None:
        return self._ready.popleft() if self._ready else super()._next_event()

    def _handle(self, record: Record) -> FollowerEvent | None:
        kind = record.kind
        if kind in _FRAME_KINDS:
            self._step(Step.FRAME)
            return self._on_frame(record)
        if kind is Kind.HEARTBEAT:
            self._step(Step.HEARTBEAT)
            return Heartbeat.parse(record.body)
        if kind in _SNAPSHOT_STEPS:
            self._step(_SNAPSHOT_STEPS[kind])
            return self._on_snapshot(record)
        if kind is Kind.WELCOME:
            return self._on_welcome(Welcome.parse(record.body))
        if kind is Kind.REFUSAL:
            self._step(Step.REFUSAL)
            return Refusal.parse(record.body)
        if kind is Kind.GOODBYE:
            self._step(Step.GOODBYE)
            return Goodbye.parse(record.body)
        raise ProtocolViolation(f"a leader sent a {record}; the connection ends, no data lost")

    def _on_welcome(self, welcome: Welcome) -> Welcome:
        if welcome.term < self._hello.promised:
            raise Fenced(
                f"{welcome.name} leads in term {welcome.term}, but this node has promised term "
                f"{self._hello.promised}; nothing of it is accepted"
            )
        if welcome.source is StreamSource.LOG:
            if self.tip is None or welcome.position != self.tip.position:
                raise ProtocolViolation(f"{welcome}, but the hello said {self._hello}")
        else:
            if welcome.source is StreamSource.PAGES and not self._hello.comparable:
                raise ProtocolViolation(f"{welcome}, but this node's pages cannot be compared")
            self._compared = welcome.source is StreamSource.PAGES
            self.tip = None
        self._step(_WELCOMES[welcome.source])
        self.term = welcome.term
        self._history = TermHistory(welcome.history)
        return welcome

    def _on_frame(self, record: Record) -> FollowerEvent | None:
        event = self._frames.feed(record)
        if isinstance(event, FrameStarted):
            self._check_extends(event.header)
            self._held, self._held_bytes, self._streamed = [record.to_bytes()], record.size_bytes, False
            return None
        if isinstance(event, FrameComplete):
            self.tip = event.header.tip
            end = record.to_bytes()
            if self._streamed:
                return FrameEnded(event.header, end)
            self._held.append(end)
            data = b"".join(self._held)
            self._held = []
            return FrameReceived(event.header, data)
        if self._streamed:
            return FramePartReceived(record.to_bytes())
        self._held.append(record.to_bytes())
        self._held_bytes += record.size_bytes
        return self._begin_stream() if self._held_bytes > WHOLE_FRAME_BYTES else None

    def _begin_stream(self) -> FrameBegan:
        header = self._frames.header
        assert header is not None
        self._streamed = True
        self._ready.extend(FramePartReceived(part) for part in self._held[1:])
        self._held = []
        return FrameBegan(header)

    def _check_extends(self, header: FrameHeader) -> None:
        if header.cluster != self._cluster:
            raise ProtocolViolation(f"{header} is of cluster {header.cluster.hex()}, not of {self._cluster.hex()}")
        if header.term > self.term:
            raise ProtocolViolation(f"{header} came in a stream of term {self.term}")
        tip = self.tip
        assert tip is not None  # set by the welcome or by the snapshot, else the phase forbids frames
        if header.previous != tip.position or header.previous_checksum != tip.checksum:
            raise HistoryMismatch(
                f"the leader sent {header} after checksum {header.previous_checksum:016x}, but this node is at {tip}. "
                "The frame was not taken; a snapshot will be asked for, and the data kept until it is verified"
            )

    def _on_snapshot(self, record: Record) -> FollowerEvent:
        event = self._snapshots.feed(record)
        if isinstance(event, SnapshotStarted):
            self._check_snapshot(event.header)
            return SnapshotBegan(event.header)
        if isinstance(event, SnapshotComplete):
            self.tip = event.header.tip
            return SnapshotEnded(event.header)
        return SnapshotPartReceived(event.data)

    def _check_snapshot(self, header: SnapshotHeader) -> None:
        if header.cluster != self._cluster:
            raise ProtocolViolation(f"{header} is of cluster {header.cluster.hex()}, not of {self._cluster.hex()}")
        if header.position.term > self.term:
            raise ProtocolViolation(f"{header} came in a stream of term {self.term}")
        if header.sparse and not self._compared:
            raise ProtocolViolation(f"{header} came, but nothing was said of what this node has")
        if self._hello.voter and self._own is not None and is_below(header.position, self._own, self._history):
            raise HistoryMismatch(
                f"the leader offers a {header}, but this voter holds {self._own} and takes nothing below it (R9). "
                "Its data is untouched; an operator must decide which history is right"
            )


def is_below(snapshot: Position, own: Position, history: TermHistory) -> bool:
    """True iff taking a snapshot at `snapshot` would take back what a voter at `own` may have acknowledged (R9).

    What lies past the point where a known later term began was never acknowledged by the cluster's rule, as that term
    could not have begun there otherwise (failover.md 3.4): it is kept as an orphan and given up (R12). Everything else
    has to be in the snapshot.
    """
    if history.lost(own):
        return snapshot.term <= own.term
    return snapshot.term < own.term or snapshot.txid < own.txid
