"""The messages of Hrana over WebSocket (hrana.md 1.6): what a client says, as structs; the answers, as bytes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from walship.hrana import json
from walship.hrana.types import Batch, ErrorBody, Stmt

__all__ = [
    "AnyRequest",
    "CloseCursor",
    "CloseSql",
    "CloseStream",
    "Describe",
    "Execute",
    "FetchCursor",
    "GetAutocommit",
    "Hello",
    "MESSAGE",
    "OnStream",
    "OpenCursor",
    "OpenStream",
    "Request",
    "RunBatch",
    "RunSequence",
    "SINCE",
    "StoreSql",
    "fetched",
    "response",
    "response_error",
    "response_ok",
]

_I32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
_U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class OpenStream(msgspec.Struct, tag="open_stream", tag_field="type", frozen=True):
    stream_id: _I32


class CloseStream(msgspec.Struct, tag="close_stream", tag_field="type", frozen=True):
    stream_id: _I32


class Execute(msgspec.Struct, tag="execute", tag_field="type", frozen=True):
    stream_id: _I32
    stmt: Stmt


class RunBatch(msgspec.Struct, tag="batch", tag_field="type", frozen=True):
    stream_id: _I32
    batch: Batch


class RunSequence(msgspec.Struct, tag="sequence", tag_field="type", frozen=True):
    stream_id: _I32
    sql: str | None = None
    sql_id: _I32 | None = None


class Describe(msgspec.Struct, tag="describe", tag_field="type", frozen=True):
    stream_id: _I32
    sql: str | None = None
    sql_id: _I32 | None = None


class GetAutocommit(msgspec.Struct, tag="get_autocommit", tag_field="type", frozen=True):
    stream_id: _I32


class StoreSql(msgspec.Struct, tag="store_sql", tag_field="type", frozen=True):
    sql_id: _I32
    sql: str


class CloseSql(msgspec.Struct, tag="close_sql", tag_field="type", frozen=True):
    sql_id: _I32


class OpenCursor(msgspec.Struct, tag="open_cursor", tag_field="type", frozen=True):
    stream_id: _I32
    cursor_id: _I32
    batch: Batch


class CloseCursor(msgspec.Struct, tag="close_cursor", tag_field="type", frozen=True):
    cursor_id: _I32


class FetchCursor(msgspec.Struct, tag="fetch_cursor", tag_field="type", frozen=True):
    cursor_id: _I32
    max_count: _U32


OnStream = Execute | RunBatch | RunSequence | Describe | GetAutocommit
AnyRequest = OpenStream | CloseStream | OnStream | StoreSql | CloseSql | OpenCursor | CloseCursor | FetchCursor


class Hello(msgspec.Struct, tag="hello", tag_field="type", frozen=True):
    jwt: str | None = None


class Request(msgspec.Struct, tag="request", tag_field="type", frozen=True):
    request_id: _I32
    request: AnyRequest


MESSAGE = msgspec.json.Decoder(Hello | Request)

SINCE: Final[dict[type, int]] = {
    RunSequence: 2,
    Describe: 2,
    StoreSql: 2,
    CloseSql: 2,
    GetAutocommit: 3,
    OpenCursor: 3,
    CloseCursor: 3,
    FetchCursor: 3,
}
"""The version a request came with, where that is not the first."""


class _StreamResult(msgspec.Struct):
    type: str
    response: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


_RESULT = msgspec.json.Decoder(_StreamResult)


def response(request_id: int, result: bytes | msgspec.Raw) -> bytes:
    """The answer to a request, from its StreamResult as a pipeline has it. The result itself is not looked into."""
    found = _RESULT.decode(result)
    if found.type == "ok":
        return b'{"type":"response_ok","request_id":%d,"response":%b}' % (request_id, bytes(found.response))
    return b'{"type":"response_error","request_id":%d,"error":%b}' % (request_id, bytes(found.error))


def response_ok(request_id: int, kind: str) -> bytes:
    """The answer to a request that has nothing to say but that it was done."""
    return b'{"type":"response_ok","request_id":%d,"response":{"type":"%b"}}' % (request_id, kind.encode("ascii"))


def response_error(request_id: int, error: ErrorBody) -> bytes:
    """The answer to a request that failed."""
    return b'{"type":"response_error","request_id":%d,"error":%b}' % (request_id, json.error_object(error))


def fetched(request_id: int, entries: Sequence[bytes], *, done: bool) -> bytes:
    """The answer to fetch_cursor: entries as lines of a cursor have them. `done`: there are no more."""
    return b'{"type":"response_ok","request_id":%d,"response":{"type":"fetch_cursor","entries":[%b],"done":%b}}' % (
        request_id,
        b",".join(entries),
        b"true" if done else b"false",
    )
