"""Streams as clients see them over HTTP: batons in, batons out (hrana.md 1.4, R21).

A stream is a small record: an id, a sequence, stored SQL texts, settings. It has a connection somewhere only while it
is *pinned*: an open transaction, or connection state, on one node under that node's own stream id. A stream that wrote
is also *kept* by the leader, as a record of what changes() and last_insert_rowid() are to answer; its reads stay free
to go anywhere. So an idle client costs nothing, and expiry hurts only who left a transaction open: after
`transaction_idle_seconds` the node's stream is closed, and the client is told STREAM_EXPIRED. A baton that says
"autocommit" is good for as long as its key, also after this process forgot the record or was restarted: the stream is
then revived without its stored SQL, and at its own consistency level. So is a stream whose loss the client has been
told, once: PyPI libsql sends its last baton for ever, whatever the answers, and would never get out otherwise.

Time is an argument (monotonic seconds); random numbers come from the `random` given.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from proxy.consistency import Settings
from walship.errors import Overloaded, ProtocolViolation
from walship.hrana.baton import ALREADY_USED, CLOSED, Baton, open_baton, sign, stream_expired

__all__ = ["ClientStream", "Pin", "StreamLimits", "Streams"]

_U64 = (1 << 64) - 1


class _End(Enum):
    """How a stream ended, remembered for whoever comes with a baton of it."""

    CLOSED = auto()
    LOST = auto()
    """With its transaction or its connection's state; the client does not know yet."""
    TOLD = auto()
    """Lost, and the client has had the error: its next request begins anew."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds, with what others use: sqld expires after 10 s; a record here is about 1 KB."""

    transaction_idle_seconds: float = 10.0
    state_idle_seconds: float = 300.0
    idle_seconds: float = 3600.0
    kept_idle_seconds: float = 60.0
    kept: int = 1024  # a node remembers 4096 streams; beyond this, new ones just have no last_insert_rowid() to ask for
    streams: int = 65_536
    stored_texts: int = 50
    stored_text_bytes: int = 5000

    @classmethod
    def of(cls, stream_idle_seconds: float) -> StreamLimits:
        """The bounds for one setting: an open transaction idles so long, connection state and records in proportion."""
        default, of_one = cls(), stream_idle_seconds / cls().transaction_idle_seconds
        return cls(
            transaction_idle_seconds=stream_idle_seconds,
            state_idle_seconds=default.state_idle_seconds * of_one,
            idle_seconds=default.idle_seconds * of_one,
            kept_idle_seconds=default.kept_idle_seconds * of_one,
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """Where a stream's connection lives: the node, the connection generation of its link, and the node's stream id."""

    node: str
    connection: int
    stream: int


@dataclass(slots=True)
class ClientStream:
    """One client-visible stream. Requests on it are serial: while `busy`, its old baton is "already used"."""

    id: int
    sequence: int
    settings: Settings = field(default_factory=Settings)
    stored: Mapping[int, str] = field(default_factory=dict)
    pin: Pin | None = None
    kept: Pin | None = None  # the leader's record of this stream: what changes() and last_insert_rowid() answer
    has_state: bool = False  # said something that only one connection can keep: TEMP objects, PRAGMA settings
    autocommit: bool = True
    busy: bool = True
    known: bool = False  # a baton was given out, so the record is kept
    last_used: float = 0.0


class Streams:
    """All streams of one proxy. `sweep` must be called now and then: it says which node streams to close."""

    def __init__(
        self,
        key: bytes,
        rng: random.Random,
        limits: StreamLimits | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.limits = limits or StreamLimits()
        self.settings = settings or Settings()  # what a stream begins with
        self._key, self._rng = key, rng
        self._streams: OrderedDict[int, ClientStream] = OrderedDict()  # least recently used first
        self._kept: set[int] = set()
        self._ended: OrderedDict[int, _End] = OrderedDict()  # those that ended lately
        self._lost: list[Pin] = []  # node streams to close, for the next sweep to say

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def pinned(self) -> int:
        """How many streams hold a connection on some node."""
        return sum(stream.pin is not None for stream in self._streams.values())

    @property
    def may_keep(self) -> bool:
        """May one more stream ask the leader to remember it?"""
        return len(self._kept) < self.limits.kept

    def hold(self, stream: ClientStream, held: Pin | None, *, autocommit: bool, made_state: bool, read: bool) -> None:
        """Take what a reply says of a registered stream: `held` is the node's stream, None when the node keeps none.

        A node stream that is more than a record of counters pins the client's; a read elsewhere changes nothing.
        """
        stream.autocommit = autocommit
        stream.has_state = held is not None and (stream.has_state or made_state)
        if stream.has_state or not autocommit:
            stream.pin, stream.kept = held, None
        else:
            stream.pin = None
            stream.kept = held or (stream.kept if read else None)
        if stream.kept is None:
            self._kept.discard(stream.id)
        else:
            self._kept.add(stream.id)

    def drop_kept(self, stream: ClientStream) -> Pin | None:
        """Go on without the leader's record; returns the node stream to close."""
        pin, stream.kept = stream.kept, None
        self._kept.discard(stream.id)
        return pin

    def open(self) -> ClientStream:
        """A stream for a request without a baton. Nothing is kept of it until `register`."""
        return ClientStream(self._rng.getrandbits(64), self._rng.getrandbits(63), self.settings)

    def register(self, stream: ClientStream) -> None:
        """Keep the stream, busy: its client will get a baton. To be called before its request runs.

        Raises Overloaded when every record is in use.
        """
        if not stream.known:
            self._make_room()
            stream.known = True
            self._streams[stream.id] = stream

    def resume(self, text: str, now: float) -> ClientStream:
        """The stream of a baton, busy from now on; hand it back by `keep` or `close`.

        Raises ProtocolViolation with sqld's messages, StatementFailed STREAM_EXPIRED, once, when its state is gone.
        """
        baton = open_baton(self._key, text)
        stream = self._streams.get(baton.stream)
        if stream is None:
            return self._revive(baton)
        if stream.busy or stream.sequence != baton.sequence:
            raise ProtocolViolation(ALREADY_USED)
        if stream.pin is not None and now - stream.last_used > self._idle_seconds(stream):
            # The node's own timer has fired or is about to; the sweep closes what is left.
            self._lost.append(stream.pin)
            self.close(stream, told=True)
            raise stream_expired()
        stream.busy = True
        return stream

    def take(self, stream: ClientStream, now: float) -> None:
        """As `resume`, for a stream that its client names by its connection: busy from now on, and registered.

        Raises StatementFailed STREAM_EXPIRED, once, when its state is gone; Overloaded.
        """
        if self._streams.get(stream.id) is not stream:
            stream.known = False
            if self._ended.pop(stream.id, None) is _End.LOST:
                raise stream_expired()
            self.register(stream)
        elif stream.pin is not None and now - stream.last_used > self._idle_seconds(stream):
            self._lost.append(stream.pin)
            self.close(stream, told=True)
            raise stream_expired()
        stream.busy = True

    def keep(self, stream: ClientStream, now: float) -> str:
        """Hand a registered stream back after a request; returns its next baton."""
        stream.sequence = (stream.sequence + 1) & _U64
        stream.busy, stream.last_used = False, now
        self._streams.move_to_end(stream.id)
        # PRAGMA settings and TEMP objects count too: a stream that had them must not be revived unnoticed (R21).
        in_transaction = stream.has_state or not stream.autocommit
        return self._sign(stream, stream.sequence, in_transaction=in_transaction)

    def promise(self, stream: ClientStream, *, may_hold: bool) -> str:
        """The baton `keep` is going to return, before the request has ended: a cursor's head line comes first.

        What the stream's state will be is not known yet; `may_hold`: the request may open a transaction or make
        state. A cautious guess, which matters only to whoever has lost the record.
        """
        in_transaction = may_hold or stream.has_state or not stream.autocommit
        return self._sign(stream, (stream.sequence + 1) & _U64, in_transaction=in_transaction)

    def _sign(self, stream: ClientStream, sequence: int, *, in_transaction: bool) -> str:
        return sign(self._key, Baton(stream.id, sequence, in_transaction, stream.settings.packed(self.settings)))

    def forget(self, stream: ClientStream) -> None:
        """Drop a stream whose client never got a baton."""
        self._streams.pop(stream.id, None)
        stream.known = False

    def release(self, stream: ClientStream, now: float) -> None:
        """Hand a stream back after a request that was not done: the baton the client has stays good."""
        stream.busy, stream.last_used = False, now

    def close(self, stream: ClientStream, *, lost: bool = False, told: bool = False) -> None:
        """The stream has ended; a later request with a baton of it is told so. Idempotent.

        `lost`: with its state, which the client hears at its next request. `told`: it hears of it now.
        """
        if stream.known:
            self._streams.pop(stream.id, None)
            self._remember(stream.id, _End.TOLD if told else _End.LOST if lost else _End.CLOSED)
        self._kept.discard(stream.id)
        stream.pin, stream.kept, stream.autocommit, stream.known = None, None, True, False

    def sweep(self, now: float) -> list[Pin]:
        """End what sat idle too long; returns the node streams to close."""
        pins, self._lost = self._lost, []
        for stream in list(self._streams.values()):
            idle = now - stream.last_used
            if stream.busy:
                continue
            if stream.kept is not None and idle > self.limits.kept_idle_seconds:
                pins.append(stream.kept)
                self.drop_kept(stream)
            if idle <= self._idle_seconds(stream):
                continue
            if stream.pin is not None:
                pins.append(stream.pin)
                self.close(stream, lost=True)
            else:
                del self._streams[stream.id]  # forgotten, not closed: its baton revives it
        return pins

    def drop_connection(self, node: str, connection: int) -> None:
        """A link is gone, and with it what the node's streams of that link held: the clients are told at their next
        request (R21: reported lost, not silently reset)."""
        for stream in list(self._streams.values()):
            pin = stream.pin
            if pin is not None and pin.node == node and pin.connection == connection and not stream.busy:
                self.close(stream, lost=True)
            elif stream.kept is not None and stream.kept.connection == connection and stream.kept.node == node:
                self.drop_kept(stream)

    def pins(self) -> list[Pin]:
        """Every node stream held now, for draining."""
        streams = self._streams.values()
        return [pin for stream in streams for pin in (stream.pin, stream.kept) if pin is not None]

    def _revive(self, baton: Baton) -> ClientStream:
        end = self._ended.get(baton.stream)
        if end is _End.CLOSED:
            raise ProtocolViolation(CLOSED)
        if end is _End.LOST or (end is None and baton.in_transaction):
            self._remember(baton.stream, _End.TOLD)
            raise stream_expired()
        self._ended.pop(baton.stream, None)
        stream = ClientStream(baton.stream, baton.sequence, Settings.unpacked(baton.settings, self.settings))
        self.register(stream)
        return stream

    def _idle_seconds(self, stream: ClientStream) -> float:
        if stream.pin is None:
            return self.limits.idle_seconds
        return self.limits.state_idle_seconds if stream.autocommit else self.limits.transaction_idle_seconds

    def _make_room(self) -> None:
        if len(self._streams) < self.limits.streams:
            return
        for stream in self._streams.values():
            if not stream.busy and stream.pin is None:
                del self._streams[stream.id]
                return
        raise Overloaded(
            f"all {self.limits.streams} streams of this proxy hold transactions or requests; nothing was kept. "
            "Close transactions sooner, or add a proxy"
        )

    def _remember(self, id: int, end: _End) -> None:
        self._ended[id] = end
        if len(self._ended) > self.limits.streams:
            self._ended.popitem(last=False)
