"""The values of the Hrana protocol, as msgspec structs: one decode of a request body gives these (hrana.md 1.2, 1.3).

Requests are tagged unions on `type`. Values travel as written on the wire: an integer is a string there, a blob is
base64 text; `walship.hrana.json` turns them into SQLite values and back.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

import msgspec

from walship.errors import AuthFailed, StatementFailed, WalshipError

__all__ = [
    "And",
    "Batch",
    "BatchRequest",
    "BatchStep",
    "BlobValue",
    "Cond",
    "CloseRequest",
    "CloseSqlRequest",
    "CursorBody",
    "DescribeRequest",
    "DumpBody",
    "ErrorBody",
    "ExecuteRequest",
    "FloatValue",
    "GetAutocommitRequest",
    "IntegerValue",
    "IsAutocommit",
    "IsError",
    "IsOk",
    "Level",
    "NamedArg",
    "Not",
    "NullValue",
    "Or",
    "PipelineBody",
    "SequenceRequest",
    "Stmt",
    "StoreSqlRequest",
    "StreamRequest",
    "TextValue",
    "Value",
]


class Level(StrEnum):
    """How fresh a read must be (R18)."""

    ANY = "any"
    SESSION = "session"
    LINEARIZABLE = "linearizable"


class NullValue(msgspec.Struct, tag="null", tag_field="type", frozen=True, gc=False):
    pass


class IntegerValue(msgspec.Struct, tag="integer", tag_field="type", frozen=True, gc=False):
    value: str


class FloatValue(msgspec.Struct, tag="float", tag_field="type", frozen=True, gc=False):
    value: float


class TextValue(msgspec.Struct, tag="text", tag_field="type", frozen=True, gc=False):
    value: str


class BlobValue(msgspec.Struct, tag="blob", tag_field="type", frozen=True, gc=False):
    base64: str = ""


Value = NullValue | IntegerValue | FloatValue | TextValue | BlobValue


class NamedArg(msgspec.Struct, frozen=True, gc=False):
    name: str
    value: Value


class Stmt(msgspec.Struct, frozen=True, gc=False):
    sql: str | None = None
    sql_id: int | None = None
    args: list[Value] | None = None
    named_args: list[NamedArg] | None = None
    want_rows: bool | None = None


class IsOk(msgspec.Struct, tag="ok", tag_field="type", frozen=True):
    step: int


class IsError(msgspec.Struct, tag="error", tag_field="type", frozen=True):
    step: int


class Not(msgspec.Struct, tag="not", tag_field="type", frozen=True):
    cond: Cond


class And(msgspec.Struct, tag="and", tag_field="type", frozen=True):
    conds: list[Cond]


class Or(msgspec.Struct, tag="or", tag_field="type", frozen=True):
    conds: list[Cond]


class IsAutocommit(msgspec.Struct, tag="is_autocommit", tag_field="type", frozen=True):
    pass


Cond = IsOk | IsError | Not | And | Or | IsAutocommit


class BatchStep(msgspec.Struct, frozen=True):
    stmt: Stmt
    condition: Cond | None = None


class Batch(msgspec.Struct, frozen=True):
    steps: list[BatchStep]


class CloseRequest(msgspec.Struct, tag="close", tag_field="type", frozen=True):
    pass


class ExecuteRequest(msgspec.Struct, tag="execute", tag_field="type", frozen=True):
    stmt: Stmt


class BatchRequest(msgspec.Struct, tag="batch", tag_field="type", frozen=True):
    batch: Batch


class SequenceRequest(msgspec.Struct, tag="sequence", tag_field="type", frozen=True):
    sql: str | None = None
    sql_id: int | None = None


class DescribeRequest(msgspec.Struct, tag="describe", tag_field="type", frozen=True):
    sql: str | None = None
    sql_id: int | None = None


class StoreSqlRequest(msgspec.Struct, tag="store_sql", tag_field="type", frozen=True):
    sql_id: int
    sql: str


class CloseSqlRequest(msgspec.Struct, tag="close_sql", tag_field="type", frozen=True):
    sql_id: int


class GetAutocommitRequest(msgspec.Struct, tag="get_autocommit", tag_field="type", frozen=True):
    pass


StreamRequest = (
    CloseRequest
    | ExecuteRequest
    | BatchRequest
    | SequenceRequest
    | DescribeRequest
    | StoreSqlRequest
    | CloseSqlRequest
    | GetAutocommitRequest
)


class PipelineBody(msgspec.Struct, frozen=True):
    """Body of POST /v2/pipeline and /v3/pipeline."""

    requests: list[StreamRequest]
    baton: str | None = None


class CursorBody(msgspec.Struct, frozen=True):
    """Body of POST /v3/cursor."""

    batch: Batch
    baton: str | None = None


class DumpBody(msgspec.Struct, frozen=True):
    """What a dump is asked for with, between proxy and node; clients say it in the query of GET /dump."""

    preserve_row_ids: bool = False


class ErrorBody(msgspec.Struct, frozen=True):
    """A Hrana error: `code` is always present, since Rust clients require it (hrana.md 1.3)."""

    message: str
    code: str

    @classmethod
    def of(cls, error: WalshipError) -> Self:
        """How an error of the tree looks inside a message."""
        if isinstance(error, StatementFailed):
            return cls(str(error), error.statement_code)
        if isinstance(error, AuthFailed):
            return cls(str(error), error.auth_code)
        return cls(str(error), error.code)
