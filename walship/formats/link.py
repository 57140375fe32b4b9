"""The multiplexed link between a proxy and a node, as bytes and values (perf.md 4, 9.3). Pure: no socket in here.

One connection carries the requests of every client. A message is::

    length u32 | id u64 | kind u8 | body            big-endian; `length` counts what follows it (9 + body)

`id` names a request and is chosen by the proxy (never 0, never used again on that connection); 0 is for what nobody
asked for. Bodies, offsets inside the body:

    REQUEST  proxy -> node   0 verb u8 | 1 version u8 | 2 flags u16 | 4 level u8 | 5 stream u64 | 13 floor term u64 |
                             21 floor txid u64 | 29 min_term u64 | 37 wait_ms u32 | 41 ack i8 | 42 term u64 |
                             50 incarnation u64 | 58 seq u64 | 66 the JSON body
    REPLY    node -> proxy   0 status u16 | 2 flags u8 | 3 stream u64 | 11 term u64 | 19 txid u64 | 27 JSON
    HEAD     node -> proxy   0 term u64 | 8 txid u64: a position that covers a cursor's rows, before its first CHUNK
    CHUNK    node -> proxy   0 bytes of a cursor reply (whole lines), or of a dump
    END      node -> proxy   as REPLY, without JSON: how a cursor ended
    REFUSED  node -> proxy   0 reason u8 | 1 term u64 | 9 txid u64 |
                             17 JSON {code, message, leader: {name, url, term} or null}
    STATUS   node -> proxy   unsolicited, id 0; see `Status`
    GRANT    proxy -> node   0 bytes u32: so many more bytes of CHUNK bodies may be sent for this id

Every request is answered by exactly one REPLY, one REFUSED, or (CURSOR, DUMP) HEAD CHUNK* END. A pipeline's JSON starts
with `NO_BATON`, and so does the first line of a cursor, so that the proxy can put its own baton in by one slice.
A cursor may have `CURSOR_WINDOW` bytes of CHUNK bodies under way beyond what GRANTs allowed: a slow client holds up its
own cursor and nobody else's link. Answers may come in any order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

import msgspec

from walship import errors
from walship.errors import ProtocolViolation
from walship.formats.link_words import (
    Outcome,
    OutcomeBody,
    ReadLevel,
    Reason,
    ReplyFlags,
    RequestFlags,
    Role,
    StatusFlags,
    Verb,
)
from walship.formats.position import Position

__all__ = [
    "CURSOR_WINDOW",
    "MAX_MESSAGE",
    "NO_BATON",
    "NO_POSITION",
    "NO_TOKEN",
    "Chunk",
    "CursorEnd",
    "CursorHead",
    "Grant",
    "Leader",
    "LinkReader",
    "Message",
    "Outcome",
    "OutcomeBody",
    "ReadLevel",
    "Reason",
    "Refusal",
    "Reply",
    "ReplyFlags",
    "Request",
    "RequestFlags",
    "Role",
    "Status",
    "StatusFlags",
    "Verb",
    "error_of",
    "refusal_of",
]

MAX_MESSAGE = 64 << 20
"""Longest message accepted, in bytes; twice the largest whole reply a node gives (hrana.md 1.5)."""

CURSOR_WINDOW = 1 << 20
"""Bytes of CHUNK bodies a node may send for one cursor before the first GRANT."""

NO_BATON = b'{"baton":null'
NO_POSITION = Position(0, 0)
NO_TOKEN = (0, 0)

UNKNOWN_LAG = 0xFFFFFFFF
MAX_HISTORY = 16

_HEAD = struct.Struct(">IQB")
_REQUEST = struct.Struct(">BBHBQQQQIbQQQ")
_REPLY = struct.Struct(">HBQQQ")
_REFUSED = struct.Struct(">BQQ")
_GRANT = struct.Struct(">I")
_STATUS = struct.Struct(">BBQQQQQQQII16sBB")
_TERM_START = struct.Struct(">QQ")

_KIND_REQUEST, _KIND_REPLY, _KIND_CHUNK, _KIND_END, _KIND_REFUSED, _KIND_STATUS, _KIND_GRANT, _KIND_HEAD = range(1, 9)
_OVERHEAD = _HEAD.size - 4


# Looking a member up costs a tenth of making one, and these are made for each request.
_VERBS = {verb.value: verb for verb in Verb}
_LEVELS = tuple(ReadLevel)
_REQUEST_FLAGS = tuple(RequestFlags(bits) for bits in range(4))
_REPLY_FLAGS = tuple(ReplyFlags(bits) for bits in range(2))


class Request(msgspec.Struct, frozen=True, gc=False):
    """One client request on its way to a node.

    `stream` is the node's own stream id (0 = none), `floor` the position the node must have applied (`NO_POSITION`:
    none), `min_term` the newest term the proxy knows (a leader below it answers FENCED), `ack` the followers to wait
    for (-1: the cluster's default). `body` is the client's JSON, untouched.

    `term` binds the attempt to that very term (0: to none): a node that does not lead it answers FENCED or NOT_LEADER
    and runs nothing. `incarnation` and `seq` are its commit token (R19; 0 and 0: none), never used for another attempt.
    A write with a token must have a term.
    """

    id: int
    verb: Verb
    body: bytes
    version: int = 3
    flags: RequestFlags = RequestFlags.NONE
    level: ReadLevel = ReadLevel.SESSION
    stream: int = 0
    floor: Position = NO_POSITION
    min_term: int = 0
    wait_ms: int = 0
    ack: int = -1
    term: int = 0
    incarnation: int = 0
    seq: int = 0

    def to_bytes(self) -> bytes:
        head = _REQUEST.pack(
            self.verb,
            self.version,
            self.flags,
            self.level,
            self.stream,
            self.floor.term,
            self.floor.txid,
            self.min_term,
            self.wait_ms,
            self.ack,
            self.term,
            self.incarnation,
            self.seq,
        )
        return _message(self.id, _KIND_REQUEST, head, self.body)

    @classmethod
    def parse(cls, id: int, body: bytes) -> Request:
        (
            verb,
            version,
            flags,
            level,
            stream,
            floor_term,
            floor_txid,
            min_term,
            wait_ms,
            ack,
            term,
            incarnation,
            seq,
        ) = _unpack(_REQUEST, body, "request")
        return cls(
            id,
            _VERBS.get(verb) or _member(Verb, verb),
            body[_REQUEST.size :],
            version,
            _REQUEST_FLAGS[flags] if flags < 4 else RequestFlags(flags),
            _LEVELS[level] if level < 3 else _member(ReadLevel, level),
            stream,
            Position(floor_term, floor_txid),
            min_term,
            wait_ms,
            ack,
            term,
            incarnation,
            seq,
        )

    def __str__(self) -> str:
        return f"request {self.id} {self.verb.name} stream={self.stream} floor={self.floor} {len(self.body)} bytes"


class Reply(msgspec.Struct, frozen=True, gc=False):
    """The answer to a PIPELINE or CLOSE_STREAM. `stream` is the node's stream from now on, 0 when it keeps none."""

    id: int
    body: bytes
    position: Position
    stream: int = 0
    flags: ReplyFlags = ReplyFlags.AUTOCOMMIT
    status: int = 200

    def to_bytes(self) -> bytes:
        position = self.position
        head = _REPLY.pack(self.status, self.flags, self.stream, position.term, position.txid)
        return _message(self.id, _KIND_REPLY, head, self.body)

    @classmethod
    def parse(cls, id: int, body: bytes) -> Reply:
        status, flags, stream, term, txid = _unpack(_REPLY, body, "reply")
        reply_flags = _REPLY_FLAGS[flags] if flags < 2 else ReplyFlags(flags)
        return cls(id, body[_REPLY.size :], Position(term, txid), stream, reply_flags, status)

    def __str__(self) -> str:
        return f"reply {self.id} {self.status} stream={self.stream} position={self.position} {len(self.body)} bytes"


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Some whole lines of a cursor. The first line of the first one is the cursor's head, with no baton."""

    id: int
    data: bytes

    def to_bytes(self) -> bytes:
        return _message(self.id, _KIND_CHUNK, b"", self.data)

    @classmethod
    def parse(cls, id: int, body: bytes) -> Chunk:
        return cls(id, body)

    def __str__(self) -> str:
        return f"chunk {self.id} {len(self.data)} bytes"


class CursorHead(msgspec.Struct, frozen=True, gc=False):
    """The beginning of a cursor: whoever sees a row of it has seen `position`, long before the END."""

    id: int
    position: Position

    def to_bytes(self) -> bytes:
        return _message(self.id, _KIND_HEAD, _TERM_START.pack(self.position.term, self.position.txid), b"")

    @classmethod
    def parse(cls, id: int, body: bytes) -> CursorHead:
        return cls(id, Position(*_unpack(_TERM_START, body, "head", exact=True)))

    def __str__(self) -> str:
        return f"head {self.id} position={self.position}"


class CursorEnd(msgspec.Struct, frozen=True, gc=False):
    """The end of a cursor: what `Reply` says of a pipeline."""

    id: int
    position: Position
    stream: int = 0
    flags: ReplyFlags = ReplyFlags.AUTOCOMMIT
    status: int = 200

    def to_bytes(self) -> bytes:
        position = self.position
        head = _REPLY.pack(self.status, self.flags, self.stream, position.term, position.txid)
        return _message(self.id, _KIND_END, head, b"")

    @classmethod
    def parse(cls, id: int, body: bytes) -> CursorEnd:
        status, flags, stream, term, txid = _unpack(_REPLY, body, "end", exact=True)
        return cls(id, Position(term, txid), stream, ReplyFlags(flags), status)

    def __str__(self) -> str:
        return f"end {self.id} {self.status} stream={self.stream} position={self.position}"


class Leader(msgspec.Struct, frozen=True):
    """The leader as the refusing node knows it."""

    name: str
    url: str | None = None
    term: int = 0


class _RefusalText(msgspec.Struct, frozen=True):
    code: str
    message: str
    leader: Leader | None = None


class Refusal(msgspec.Struct, frozen=True):
    """A whole request refused. `position` is where the node stands, so that BEHIND says how far."""

    id: int
    reason: Reason
    code: str
    message: str
    position: Position = NO_POSITION
    leader: Leader | None = None

    def to_bytes(self) -> bytes:
        head = _REFUSED.pack(self.reason, self.position.term, self.position.txid)
        text = msgspec.json.encode(_RefusalText(self.code, self.message, self.leader))
        return _message(self.id, _KIND_REFUSED, head, text)

    @classmethod
    def parse(cls, id: int, body: bytes) -> Refusal:
        reason, term, txid = _unpack(_REFUSED, body, "refusal")
        try:
            text = _DECODE_REFUSAL(body[_REFUSED.size :])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolViolation(f"link: a refusal carries unreadable text: {error}") from error
        return cls(id, _member(Reason, reason), text.code, text.message, Position(term, txid), text.leader)

    def __str__(self) -> str:
        return f"refusal {self.id} {self.reason.name} position={self.position}: {self.message}"


_DECODE_REFUSAL = msgspec.json.Decoder(_RefusalText).decode


class Grant(msgspec.Struct, frozen=True, gc=False):
    """`size_bytes` more of CHUNK bodies may be sent for cursor `id`."""

    id: int
    size_bytes: int

    def to_bytes(self) -> bytes:
        return _message(self.id, _KIND_GRANT, _GRANT.pack(self.size_bytes), b"")

    @classmethod
    def parse(cls, id: int, body: bytes) -> Grant:
        return cls(id, *_unpack(_GRANT, body, "grant", exact=True))

    def __str__(self) -> str:
        return f"grant {self.id} {self.size_bytes} bytes"


class Status(msgspec.Struct, frozen=True):
    """What a node tells each proxy about itself, on change and at least every 100 ms. The first message of a node.

    Offsets: 0 role u8 | 1 flags u8 | 2 term u64 | 10 applied (term u64, txid u64) | 26 durable | 42 acked |
    58 in_flight u32 | 62 lag_ms u32 (0xffffffff = unknown) | 66 node id, 16 bytes | 82 name length u8 |
    83 history entries u8 | 84 name, UTF-8 | then entries of (term u64, start txid u64), ascending, the last 16.
    `durable` is the tip of the own log after fsync; `lag_ms` how far behind the leader by the own monotonic clock.
    """

    name: str
    node_id: str
    role: Role
    term: int
    applied: Position
    durable: Position
    acked: Position
    in_flight: int = 0
    lag_ms: int | None = None
    flags: StatusFlags = StatusFlags.SERVING
    history: tuple[tuple[int, int], ...] = ()

    id = 0

    def to_bytes(self) -> bytes:
        name = self.name.encode()[:255]
        history = self.history[-MAX_HISTORY:]
        head = _STATUS.pack(
            self.role,
            self.flags,
            self.term,
            self.applied.term,
            self.applied.txid,
            self.durable.term,
            self.durable.txid,
            self.acked.term,
            self.acked.txid,
            self.in_flight,
            UNKNOWN_LAG if self.lag_ms is None else min(self.lag_ms, UNKNOWN_LAG - 1),
            bytes.fromhex(self.node_id),
            len(name),
            len(history),
        )
        return _message(0, _KIND_STATUS, head, name + b"".join(_TERM_START.pack(*entry) for entry in history))

    @classmethod
    def parse(cls, id: int, body: bytes) -> Status:
        (role, flags, term, *pairs, in_flight, lag, node_id, name_size, count) = _unpack(_STATUS, body, "status")
        tail = body[_STATUS.size :]
        if id != 0 or len(tail) != name_size + count * _TERM_START.size or count > MAX_HISTORY:
            raise ProtocolViolation("link: a status message whose length or id does not fit its contents")
        try:
            name = tail[:name_size].decode()
        except UnicodeDecodeError as error:
            raise ProtocolViolation("link: a node name that is not UTF-8") from error
        return cls(
            name,
            node_id.hex(),
            _member(Role, role),
            term,
            Position(pairs[0], pairs[1]),
            Position(pairs[2], pairs[3]),
            Position(pairs[4], pairs[5]),
            in_flight,
            None if lag == UNKNOWN_LAG else lag,
            StatusFlags(flags),
            tuple((start, txid) for start, txid in _TERM_START.iter_unpack(tail[name_size:])),
        )

    def __str__(self) -> str:
        return f"status {self.name} {self.role.name} term={self.term} applied={self.applied} in_flight={self.in_flight}"


Message = Request | Reply | CursorHead | Chunk | CursorEnd | Refusal | Status | Grant

_PARSE: dict[int, Callable[[int, bytes], Message]] = {
    _KIND_REQUEST: Request.parse,
    _KIND_REPLY: Reply.parse,
    _KIND_CHUNK: Chunk.parse,
    _KIND_END: CursorEnd.parse,
    _KIND_REFUSED: Refusal.parse,
    _KIND_STATUS: Status.parse,
    _KIND_GRANT: Grant.parse,
    _KIND_HEAD: CursorHead.parse,
}


class LinkReader:
    """Cuts a byte stream into messages. After a ProtocolViolation the stream is lost: close the connection."""

    __slots__ = ("_broken", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = False

    def receive_data(self, data: bytes) -> list[Message]:
        """Take what a read gave; return the messages that are whole now, in order, maybe none.

        Raises ProtocolViolation for an impossible length, an unknown kind or a body that does not fit its kind;
        messages before the bad one are lost with it, as the connection is.
        """
        if self._broken:
            raise ProtocolViolation("link: the stream was broken before; nothing after that can be read")
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        at, size = 0, len(buffer)
        try:
            while size - at >= _HEAD.size:
                length, id, kind = _HEAD.unpack_from(buffer, at)
                if not _OVERHEAD <= length <= MAX_MESSAGE:
                    raise ProtocolViolation(f"link: a message of {length} bytes; allowed are 9 to {MAX_MESSAGE}")
                end = at + 4 + length
                if end > size:
                    break
                parse = _PARSE.get(kind)
                if parse is None:
                    raise ProtocolViolation(f"link: unknown message kind {kind}")
                messages.append(parse(id, bytes(buffer[at + _HEAD.size : end])))
                at = end
        except ProtocolViolation:
            self._broken = True
            raise
        if at:
            del buffer[:at]
        return messages

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished message held so far. At the end of a connection: not 0 means it was cut."""
        return len(self._buffer)


_REASONS: tuple[tuple[type[errors.WalshipError], Reason], ...] = (
    (errors.NotReadOnly, Reason.NOT_READ_ONLY),
    (errors.Behind, Reason.BEHIND),
    (errors.NotLeader, Reason.NOT_LEADER),
    (errors.Overloaded, Reason.OVERLOADED),
    (errors.Draining, Reason.DRAINING),
    (errors.TransactionTimeout, Reason.TRANSACTION_TIMEOUT),
    (errors.NotDone, Reason.NOT_DONE),
    (errors.Fenced, Reason.FENCED),
    (errors.Unavailable, Reason.UNAVAILABLE),
    (errors.ProtocolViolation, Reason.PROTOCOL),
    (errors.OutcomeUnknown, Reason.OUTCOME_UNKNOWN),
    (errors.StatementFailed, Reason.STATEMENT),
    (errors.WriteLost, Reason.WRITE_LOST),
    (errors.StorageFailed, Reason.STORAGE),
    (errors.CommittedResultLost, Reason.COMMITTED),
    (errors.WalshipError, Reason.FAILED),
)
_ERRORS = {reason: error for error, reason in _REASONS}


def refusal_of(id: int, error: errors.WalshipError, position: Position = NO_POSITION) -> Refusal:
    """The REFUSED message for an error a node answers a whole request with."""
    reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
    if isinstance(error, errors.StatementFailed):
        return Refusal(id, reason, error.statement_code, str(error), position)
    if isinstance(error, errors.NotLeader):
        leader = Leader(error.leader, error.url, error.term) if error.leader else None
        return Refusal(id, reason, error.code, str(error), position, leader)
    return Refusal(id, reason, error.code, str(error), position)


def error_of(refusal: Refusal) -> errors.WalshipError:
    """The error a refusal stands for, with the node's own words: the inverse of `refusal_of`."""
    kind = _ERRORS[refusal.reason]
    if kind is errors.StatementFailed:
        return errors.StatementFailed(refusal.message, refusal.code)
    if kind is errors.NotLeader:
        leader = refusal.leader or Leader("", None, 0)
        return errors.NotLeader(leader.name or None, leader.url, leader.term)
    return kind(refusal.message)


_E = TypeVar("_E", bound=IntEnum)


def _message(id: int, kind: int, head: bytes, body: bytes) -> bytes:
    length = _OVERHEAD + len(head) + len(body)
    if length > MAX_MESSAGE:
        raise ProtocolViolation(f"link: a message of {length} bytes is too long; {MAX_MESSAGE} are allowed")
    return _HEAD.pack(length, id, kind) + head + body


def _unpack(layout: struct.Struct, body: bytes, what: str, *, exact: bool = False) -> tuple[Any, ...]:
    if len(body) < layout.size or (exact and len(body) != layout.size):
        _wrong_length(what, layout.size, len(body))
    return layout.unpack_from(body)


def _wrong_length(what: str, expected: int, found: int) -> NoReturn:
    raise ProtocolViolation(f"link: a {what} of {found} bytes; its fixed part has {expected}")


def _member(kind: type[_E], number: int) -> _E:
    try:
        return kind(number)
    except ValueError as error:
        raise ProtocolViolation(f"link: {number} is not a {kind.__name__.lower()}") from error
