"""Hrana over HTTP, version 1: one statement or one batch a request, no streams (hrana.md 1.1, 1.5). Pure.

`POST /v1/execute {"stmt"}` and `POST /v1/batch {"batch"}` answer `{"result"}`. Each is run as a pipeline of the later
versions that closes its stream; a statement that fails is the failure of the whole request, with a status.

`django-libsql-backend` speaks a dialect of this version, and a client wins over the specification: it sends floats as
`{"type": "real"}` and blobs as `{"type": "blob", "value": base64}`, looks for blobs under `value` in replies (padded),
and knows a violated constraint only by status 400.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from walship.errors import ProtocolViolation
from walship.hrana.http import JSON_TYPE, Failure, Verb
from walship.hrana.json import check_request, decode_body
from walship.hrana.types import (
    Batch,
    BatchRequest,
    BatchStep,
    BlobValue,
    CloseRequest,
    Cond,
    ErrorBody,
    ExecuteRequest,
    FloatValue,
    IntegerValue,
    NamedArg,
    NullValue,
    PipelineBody,
    Stmt,
    TextValue,
    Value,
)

__all__ = ["VERSION", "answer", "decode"]

VERSION: Final = 1

_CLIENT_ERROR, _SERVER_ERROR, _NOT_IMPLEMENTED, _UNAVAILABLE = 400, 500, 501, 503
_STATUSES: Final = {
    "ARGS_BOTH_POSITIONAL_AND_NAMED": _NOT_IMPLEMENTED,
    "SQLITE_CONSTRAINT": _CLIENT_ERROR,
    "TRANSACTION_TIMEOUT": _UNAVAILABLE,
    "TRANSACTION_BUSY": _UNAVAILABLE,
}
"""Statuses by code; besides them, what SQLite says is 500 and the rest is the client's mistake."""


class _RealValue(msgspec.Struct, tag="real", tag_field="type"):
    value: float

    def plain(self) -> Value:
        return FloatValue(self.value)


class _AnyBlobValue(msgspec.Struct, tag="blob", tag_field="type"):
    base64: str | None = None
    value: str = ""

    def plain(self) -> Value:
        return BlobValue(self.value if self.base64 is None else self.base64)


_AnyValue = NullValue | IntegerValue | FloatValue | TextValue | _RealValue | _AnyBlobValue


def _plain(value: _AnyValue) -> Value:
    return value.plain() if isinstance(value, _RealValue | _AnyBlobValue) else value


class _NamedArg(msgspec.Struct):
    name: str
    value: _AnyValue


class _Stmt(msgspec.Struct):
    sql: str | None = None
    sql_id: int | None = None
    args: list[_AnyValue] | None = None
    named_args: list[_NamedArg] | None = None
    want_rows: bool | None = None

    def plain(self) -> Stmt:
        return Stmt(
            self.sql,
            self.sql_id,
            None if self.args is None else [_plain(value) for value in self.args],
            None if self.named_args is None else [NamedArg(each.name, _plain(each.value)) for each in self.named_args],
            self.want_rows,
        )


class _BatchStep(msgspec.Struct):
    stmt: _Stmt
    condition: Cond | None = None


class _Batch(msgspec.Struct):
    steps: list[_BatchStep]


class _ExecuteBody(msgspec.Struct):
    stmt: _Stmt


class _BatchBody(msgspec.Struct):
    batch: _Batch


class _Response(msgspec.Struct):
    result: msgspec.Raw


class _StreamResult(msgspec.Struct):
    type: str
    response: _Response | None = None
    error: ErrorBody | None = None


_EXECUTE = msgspec.json.Decoder(_ExecuteBody)
_BATCH = msgspec.json.Decoder(_BatchBody)
_RESULT = msgspec.json.Decoder(_StreamResult)
# Inside a JSON string every quote has a backslash before it: only a value of a result can look like this.
_BLOB = re.compile(rb'\{"type":"blob","base64":"([^"]*)"\}')


def decode(verb: Verb, body: bytes) -> PipelineBody:
    """The pipeline that a request stands for; `verb` is EXECUTE or BATCH. Raises ProtocolViolation."""
    request: ExecuteRequest | BatchRequest
    if verb is Verb.EXECUTE:
        request = ExecuteRequest(decode_body(_EXECUTE, body).stmt.plain())
    else:
        steps = decode_body(_BATCH, body).batch.steps
        request = BatchRequest(Batch([BatchStep(step.stmt.plain(), step.condition) for step in steps]))
    check_request(request, VERSION)
    return PipelineBody([request, CloseRequest()])


def answer(result: bytes | msgspec.Raw) -> bytes | Failure:
    """The body to answer with, from the first StreamResult of the pipeline's reply, or the failure."""
    found = _RESULT.decode(result)
    if found.response is not None:
        return b'{"result":%b}' % _BLOB.sub(_blob_of_two_names, bytes(found.response.result))
    error = found.error or ErrorBody("the node answered neither a result nor an error", ProtocolViolation.code)
    default = _SERVER_ERROR if error.code.startswith("SQLITE_") else _CLIENT_ERROR
    text = {"message": error.message, "code": error.code, "error": error.message}
    return Failure(_STATUSES.get(error.code, default), JSON_TYPE, msgspec.json.encode(text))


def _blob_of_two_names(found: re.Match[bytes]) -> bytes:
    text = found[1]
    return b'{"type":"blob","base64":"%b","value":"%b"}' % (text, text + b"=" * (-len(text) % 4))
