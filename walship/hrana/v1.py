"""Hrana over HTTP, version 1: one statement or one batch a request, no streams (hrana.md 1.1, 1.5). Pure.

`POST /v1/execute {"stmt"}` and `POST /v1/batch {"batch"}` answer `{"result"}`. Each is run as a pipeline of the later
versions that closes its stream; a statement that fails is the failure of the whole request, with a status.
"""

from __future__ import annotations

from typing import Final

import msgspec

from walship.errors import ProtocolViolation
from walship.hrana.http import JSON_TYPE, Failure, Verb
from walship.hrana.json import check_request, decode_body
from walship.hrana.types import Batch, BatchRequest, CloseRequest, ErrorBody, ExecuteRequest, PipelineBody, Stmt

__all__ = ["VERSION", "answer", "decode"]

VERSION: Final = 1

_CLIENT_ERROR, _SERVER_ERROR, _NOT_IMPLEMENTED, _UNAVAILABLE = 400, 500, 501, 503
_STATUSES: Final = {
    "ARGS_BOTH_POSITIONAL_AND_NAMED": _NOT_IMPLEMENTED,
    "TRANSACTION_TIMEOUT": _UNAVAILABLE,
    "TRANSACTION_BUSY": _UNAVAILABLE,
}
"""Statuses by code; besides them, what SQLite says is 500 and the rest is the client's mistake."""


class _ExecuteBody(msgspec.Struct):
    stmt: Stmt


class _BatchBody(msgspec.Struct):
    batch: Batch


class _Response(msgspec.Struct):
    result: msgspec.Raw


class _StreamResult(msgspec.Struct):
    type: str
    response: _Response | None = None
    error: ErrorBody | None = None


_EXECUTE = msgspec.json.Decoder(_ExecuteBody)
_BATCH = msgspec.json.Decoder(_BatchBody)
_RESULT = msgspec.json.Decoder(_StreamResult)


def decode(verb: Verb, body: bytes) -> PipelineBody:
    """The pipeline that a request stands for; `verb` is EXECUTE or BATCH. Raises ProtocolViolation."""
    request = (
        ExecuteRequest(decode_body(_EXECUTE, body).stmt)
        if verb is Verb.EXECUTE
        else BatchRequest(decode_body(_BATCH, body).batch)
    )
    check_request(request, VERSION)
    return PipelineBody([request, CloseRequest()])


def answer(result: bytes | msgspec.Raw) -> bytes | Failure:
    """The body to answer with, from the first StreamResult of the pipeline's reply, or the failure."""
    found = _RESULT.decode(result)
    if found.response is not None:
        return b'{"result":%b}' % bytes(found.response.result)
    error = found.error or ErrorBody("the node answered neither a result nor an error", ProtocolViolation.code)
    default = _SERVER_ERROR if error.code.startswith("SQLITE_") else _CLIENT_ERROR
    text = {"message": error.message, "code": error.code, "error": error.message}
    return Failure(_STATUSES.get(error.code, default), JSON_TYPE, msgspec.json.encode(text))
