"""Hrana over WebSocket with JSON, versions 1 to 3, as messages and values (hrana.md 1.6). Pure: no socket, no task.

One `Connection` is what the server knows of one client: whether it said hello, which streams and cursors it named, and
the SQL texts it stored. A message in gives actions out, in order: bytes to send, a token to check, a job for a stream,
or the end of the connection. Whoever runs the jobs answers them with the functions of `websocket_messages`.

What a connection may be told, and when::

    state      event     next
    NEW        HELLO     GREETED     the token is being checked
    GREETED    ACCEPTED  OPEN        hello_ok
    GREETED    REJECTED  CLOSED      hello_error, then 1000
    OPEN       REQUEST   OPEN
    OPEN       HELLO     GREETED     a new token, from version 2 on
    any        BROKEN    CLOSED      1003 binary, 1007 not JSON of the right shape, 1008 any other broken rule

Ids are the client's (32 bits, signed). A text is put in the place of its id when the request comes in, so that closing
the text afterwards changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Final

import msgspec

from walship.errors import ProtocolViolation, WalshipError
from walship.hrana import json
from walship.hrana import websocket_messages as messages
from walship.hrana.types import (
    Batch,
    BatchRequest,
    DescribeRequest,
    ErrorBody,
    ExecuteRequest,
    GetAutocommitRequest,
    SequenceRequest,
    Stmt,
    StreamRequest,
)

__all__ = [
    "FOLLOWS",
    "SUBPROTOCOLS",
    "Action",
    "Authenticate",
    "CloseCode",
    "Connection",
    "EndCursor",
    "EndStream",
    "Event",
    "FetchCursor",
    "HangUp",
    "Job",
    "Limits",
    "Run",
    "Send",
    "StartCursor",
    "State",
    "negotiate",
]

SUBPROTOCOLS: Final[dict[str, int]] = {"hrana3": 3, "hrana2": 2, "hrana1": 1}
"""The versions spoken, the best first."""


class CloseCode(IntEnum):
    """Why the server ends a connection (RFC 6455 7.4.1; 1012 is IANA's)."""

    NORMAL = 1000
    UNSUPPORTED = 1003
    INVALID = 1007
    POLICY = 1008
    INTERNAL = 1011
    RESTART = 1012


class State(Enum):
    NEW = auto()
    GREETED = auto()
    OPEN = auto()
    CLOSED = auto()


class Event(Enum):
    HELLO = auto()
    ACCEPTED = auto()
    REJECTED = auto()
    REQUEST = auto()
    BROKEN = auto()


FOLLOWS: Final[dict[tuple[State, Event], State]] = {
    (State.NEW, Event.HELLO): State.GREETED,
    (State.GREETED, Event.ACCEPTED): State.OPEN,
    (State.GREETED, Event.REJECTED): State.CLOSED,
    (State.OPEN, Event.REQUEST): State.OPEN,
    (State.OPEN, Event.HELLO): State.GREETED,
    **{(state, Event.BROKEN): State.CLOSED for state in State},
}
"""What is not in here is a broken rule."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one connection. sqld: 150 texts; npm @libsql/client keeps 100, each below 5,000 characters."""

    streams: int = 1024
    refused_streams: int = 4096
    stored_texts: int = 150
    stored_bytes: int = 1 << 20


def negotiate(offered: Sequence[str]) -> tuple[int, str | None]:
    """The version to speak, and the subprotocol to answer with, as the client wrote it; None when it offered nothing.

    Raises ProtocolViolation when none of those offered is spoken here.
    """
    if not offered:
        return 1, None
    by_name = {name.strip().lower(): name.strip() for name in reversed(offered)}
    for name, version in SUBPROTOCOLS.items():
        if name in by_name:
            return version, by_name[name]
    raise ProtocolViolation(f"Only these WebSocket subprotocols are supported: {', '.join(SUBPROTOCOLS)}")


# --- actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send this as one text message."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Authenticate:
    """Check this token and say `accepted` or `rejected`, before any other message is given to the connection."""

    jwt: str | None


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection; nothing follows."""

    code: CloseCode
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """Run a request on a stream and answer with `response`. Texts are in place; the request is never about a text."""

    request_id: int
    stream_id: int
    request: StreamRequest


@dataclass(frozen=True, slots=True)
class StartCursor:
    """Run a batch on a stream, its entries to be fetched. When it fails as a whole, fetching says CURSOR_NOT_OPEN."""

    request_id: int
    stream_id: int
    cursor_id: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class FetchCursor:
    """Answer with `fetched`: the next entries, at most `max_count`."""

    request_id: int
    stream_id: int
    cursor_id: int
    max_count: int


@dataclass(frozen=True, slots=True)
class EndCursor:
    """Give up what was not fetched, then answer `close_cursor`."""

    request_id: int
    stream_id: int
    cursor_id: int


@dataclass(frozen=True, slots=True)
class EndStream:
    """Close the stream behind its other jobs, rolling back what is open, then answer `close_stream`."""

    request_id: int
    stream_id: int


Job = Run | StartCursor | FetchCursor | EndCursor | EndStream
"""Work for one stream. Jobs of one stream run in order, those of different streams side by side.

A stream begins with its first job: opening one was answered already, it costs nothing.
"""

Action = Send | Authenticate | HangUp | Job


class Connection:
    """One client's side of the protocol, as the server sees it. `version` is what `negotiate` gave."""

    def __init__(self, version: int, limits: Limits = Limits()) -> None:
        self.version, self._limits = version, limits
        self.state = State.NEW
        self._streams: dict[int, int | None] = {}  # by id: its cursor
        self._refused: set[int] = set()  # ids of streams that failed to open and were not closed yet
        self._cursors: dict[int, int] = {}  # by id: its stream
        self._texts: dict[int, str] = {}
        self._text_bytes = 0

    def receive_text(self, data: str | bytes) -> list[Action]:
        """One text message; what is to be done because of it, in order."""
        if self.state is State.CLOSED:
            return []  # it crossed our close
        try:
            message = messages.MESSAGE.decode(data)
        except msgspec.ValidationError as error:
            # An unknown `type` is a rule broken; any other wrong shape is as if it were not JSON at all.
            unknown = str(error).startswith("Invalid value") and str(error).endswith(".type`")
            code = CloseCode.POLICY if unknown else CloseCode.INVALID
            return self._hang_up(code, f"The message is not what the protocol asks for: {error}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._hang_up(CloseCode.INVALID, f"The message is not JSON: {error}")
        except RecursionError:
            return self._hang_up(CloseCode.INVALID, "The message is nested too deeply")
        try:
            return self._hello(message) if isinstance(message, messages.Hello) else self._request(message)
        except ProtocolViolation as error:
            return self._hang_up(CloseCode.POLICY, str(error))

    def receive_binary(self) -> list[Action]:
        """One binary message: no version spoken here has them."""
        if self.state is State.CLOSED:
            return []
        return self._hang_up(CloseCode.UNSUPPORTED, "Binary messages are not supported in this subprotocol")

    def accepted(self) -> list[Action]:
        """The token of the last hello is good."""
        self._move(Event.ACCEPTED)
        return [Send(b'{"type":"hello_ok"}')]

    def rejected(self, error: WalshipError) -> list[Action]:
        """The token of the last hello is not good."""
        self._move(Event.REJECTED)
        said = Send(b'{"type":"hello_error","error":%b}' % json.error_object(ErrorBody.of(error)))
        return [said, HangUp(CloseCode.NORMAL, "The token was not accepted")]

    # --- messages -----------------------------------------------------------------------------------------------

    def _hello(self, message: messages.Hello) -> list[Action]:
        if self.state is not State.NEW and self.version < 2:
            raise ProtocolViolation("A repeated hello is only supported in protocol version 2 and higher")
        self._move(Event.HELLO)
        return [Authenticate(message.jwt)]

    def _request(self, message: messages.Request) -> list[Action]:
        self._move(Event.REQUEST)
        id, request = message.request_id, message.request
        since = messages.SINCE.get(type(request), 1)
        if self.version < since:
            name = request.__struct_config__.tag
            raise ProtocolViolation(f"The {name} request is only supported in protocol version {since} and higher")
        if isinstance(request, messages.OpenStream):
            return self._open_stream(id, request.stream_id)
        if isinstance(request, messages.CloseStream):
            return self._close_stream(id, request.stream_id)
        if isinstance(request, messages.StoreSql):
            return self._store(id, request)
        if isinstance(request, messages.CloseSql):
            self._text_bytes -= len(self._texts.pop(request.sql_id, ""))
            return [Send(messages.response_ok(id, "close_sql"))]
        if isinstance(request, messages.OpenCursor):
            return self._open_cursor(id, request)
        if isinstance(request, messages.CloseCursor):
            stream_id = self._stream_of(request.cursor_id)
            del self._cursors[request.cursor_id]
            self._streams[stream_id] = None
            return [EndCursor(id, stream_id, request.cursor_id)]
        if isinstance(request, messages.FetchCursor):
            stream_id = self._stream_of(request.cursor_id)
            return [FetchCursor(id, stream_id, request.cursor_id, request.max_count)]
        return self._on_stream(id, request)

    def _open_stream(self, id: int, stream_id: int) -> list[Action]:
        if stream_id in self._streams or stream_id in self._refused:
            raise ProtocolViolation(f"Stream {stream_id} already exists")
        if len(self._streams) < self._limits.streams:
            self._streams[stream_id] = None
            return [Send(messages.response_ok(id, "open_stream"))]
        if len(self._refused) >= self._limits.refused_streams:
            raise ProtocolViolation("Too many streams were opened although there was no room for them")
        self._refused.add(stream_id)
        message = f"{len(self._streams)} streams are open on this connection, as many as it may have; close some"
        return [Send(messages.response_error(id, ErrorBody(message, "STREAM_TOO_MANY")))]

    def _close_stream(self, id: int, stream_id: int) -> list[Action]:
        if stream_id in self._refused:
            self._refused.discard(stream_id)
            return [Send(messages.response_ok(id, "close_stream"))]
        if stream_id not in self._streams:
            raise _no_stream(stream_id)
        cursor_id = self._streams.pop(stream_id)
        if cursor_id is not None:
            del self._cursors[cursor_id]
        return [EndStream(id, stream_id)]

    def _store(self, id: int, request: messages.StoreSql) -> list[Action]:
        limits = self._limits
        if request.sql_id in self._texts:
            raise ProtocolViolation(f"SQL text {request.sql_id} already exists")
        if len(self._texts) >= limits.stored_texts:
            message = f"The server already stores {len(self._texts)} SQL texts, it cannot store more"
            return [Send(messages.response_error(id, ErrorBody(message, "SQL_STORE_TOO_MANY")))]
        if self._text_bytes + len(request.sql) > limits.stored_bytes:
            message = f"A connection may store {limits.stored_bytes} characters of SQL; close texts, or send them whole"
            return [Send(messages.response_error(id, ErrorBody(message, "SQL_STORE_TOO_LARGE")))]
        self._texts[request.sql_id] = request.sql
        self._text_bytes += len(request.sql)
        return [Send(messages.response_ok(id, "store_sql"))]

    def _open_cursor(self, id: int, request: messages.OpenCursor) -> list[Action]:
        stream_id, cursor_id = request.stream_id, request.cursor_id
        if cursor_id in self._cursors:
            raise ProtocolViolation(f"Cursor {cursor_id} already exists")
        if stream_id in self._refused:
            # The stream's id is used up, the cursor's is not: there is no stream it could be closed on.
            return [Send(messages.response_error(id, _stream_not_open(stream_id)))]
        if stream_id not in self._streams:
            raise _no_stream(stream_id)
        if self._streams[stream_id] is not None:
            raise ProtocolViolation(f"Stream {stream_id} already has an open cursor")
        json.check_request(BatchRequest(request.batch), self.version)
        batch = self._batch(request.batch)
        self._streams[stream_id] = cursor_id
        self._cursors[cursor_id] = stream_id
        return [StartCursor(id, stream_id, cursor_id, batch)]

    def _on_stream(self, id: int, request: messages.OnStream) -> list[Action]:
        stream_id = request.stream_id
        if stream_id not in self._streams and stream_id not in self._refused:
            raise _no_stream(stream_id)
        job = self._stream_request(request)
        json.check_request(job, self.version)
        if stream_id in self._refused:
            return [Send(messages.response_error(id, _stream_not_open(stream_id)))]
        return [Run(id, stream_id, self._with_texts(job))]

    def _stream_request(self, request: messages.OnStream) -> StreamRequest:
        if isinstance(request, messages.Execute):
            return ExecuteRequest(request.stmt)
        if isinstance(request, messages.RunBatch):
            return BatchRequest(request.batch)
        if isinstance(request, messages.RunSequence):
            return SequenceRequest(request.sql, request.sql_id)
        if isinstance(request, messages.Describe):
            return DescribeRequest(request.sql, request.sql_id)
        return GetAutocommitRequest()

    # --- texts --------------------------------------------------------------------------------------------------

    def _with_texts(self, request: StreamRequest) -> StreamRequest:
        if isinstance(request, ExecuteRequest):
            return ExecuteRequest(self._stmt(request.stmt))
        if isinstance(request, BatchRequest):
            return BatchRequest(self._batch(request.batch))
        if isinstance(request, SequenceRequest):
            return SequenceRequest(self._text(request.sql, request.sql_id))
        if isinstance(request, DescribeRequest):
            return DescribeRequest(self._text(request.sql, request.sql_id))
        return request

    def _batch(self, batch: Batch) -> Batch:
        if all(step.stmt.sql_id is None for step in batch.steps):
            return batch
        return Batch([msgspec.structs.replace(step, stmt=self._stmt(step.stmt)) for step in batch.steps])

    def _stmt(self, stmt: Stmt) -> Stmt:
        if stmt.sql_id is None:
            return stmt
        return msgspec.structs.replace(stmt, sql=self._text(stmt.sql, stmt.sql_id), sql_id=None)

    def _text(self, sql: str | None, sql_id: int | None) -> str | None:
        if sql_id is None:
            return sql
        text = self._texts.get(sql_id)
        if text is None:
            raise ProtocolViolation(f"SQL text {sql_id} not found")
        return text

    # --- small --------------------------------------------------------------------------------------------------

    def _stream_of(self, cursor_id: int) -> int:
        stream_id = self._cursors.get(cursor_id)
        if stream_id is None:
            raise ProtocolViolation(f"Cursor {cursor_id} not found")
        return stream_id

    def _move(self, event: Event) -> None:
        follows = FOLLOWS.get((self.state, event))
        if follows is None:
            raise ProtocolViolation("Received a request before hello" if event is Event.REQUEST else "Unexpected hello")
        self.state = follows

    def _hang_up(self, code: CloseCode, reason: str) -> list[Action]:
        self._move(Event.BROKEN)
        return [HangUp(code, _short(reason))]


def _no_stream(stream_id: int) -> ProtocolViolation:
    return ProtocolViolation(f"Stream {stream_id} not found")


def _stream_not_open(stream_id: int) -> ErrorBody:
    return ErrorBody(f"Stream {stream_id} has failed to open", "STREAM_NOT_OPEN")


def _short(reason: str) -> str:
    """A close frame has room for 123 bytes (RFC 6455 5.5)."""
    return reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
