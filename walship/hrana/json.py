"""Hrana over JSON: request bodies in, reply bytes out (hrana.md 1.2 to 1.4). Pure; no SQLite, no HTTP.

Requests are decoded once, typed, by msgspec. Replies are put together from finished pieces of bytes: columns are
encoded once per statement text by the caller's cache, rows by an encoder generated for their types (perf.md 2),
so that a large result costs little more than fetching it.

What JSON cannot carry fails the statement that produced it, code RESULT_NOT_JSON: non-finite floats (SQLite
stores +-Infinity; `Infinity` is not JSON) and text that is not valid Unicode (lone surrogates). Text that is not
valid UTF-8 in the database never gets here: apsw raises UnicodeDecodeError when it is fetched, and the executor
answers with the same code. Nothing is replaced or dropped silently; `CAST(x AS BLOB)` reads such a value.
"""

from __future__ import annotations

import binascii
import json.encoder
import re
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from math import isfinite
from typing import Any, Final, TypeVar

import msgspec

from walship.errors import ProtocolViolation, StatementFailed
from walship.hrana.types import (
    And,
    Batch,
    BatchRequest,
    BlobValue,
    Cond,
    CursorBody,
    DescribeRequest,
    ErrorBody,
    ExecuteRequest,
    FloatValue,
    GetAutocommitRequest,
    IntegerValue,
    IsError,
    IsOk,
    Not,
    Or,
    PipelineBody,
    SequenceRequest,
    Stmt,
    StoreSqlRequest,
    StreamRequest,
    TextValue,
    Value,
)

__all__ = [
    "MAX_CONDITION_DEPTH",
    "RESULT_NOT_JSON",
    "Outcome",
    "bind_arguments",
    "check_batch",
    "check_request",
    "cursor_error",
    "cursor_head",
    "decode_body",
    "decode_cursor",
    "decode_pipeline",
    "encode_batch_result",
    "encode_columns",
    "encode_describe",
    "encode_row",
    "encode_rows",
    "encode_stmt_result",
    "error_object",
    "evaluate",
    "failed",
    "ok",
    "pipeline_reply",
    "row_entries",
    "row_entry",
    "sql_value",
    "step_begin",
    "step_end",
    "step_error",
]

MAX_CONDITION_DEPTH: Final = 64
RESULT_NOT_JSON: Final = "RESULT_NOT_JSON"

SqlValue = int | float | str | bytes | None
Row = tuple[Any, ...]
_T = TypeVar("_T")

_PIPELINE = msgspec.json.Decoder(PipelineBody)
_CURSOR = msgspec.json.Decoder(CursorBody)
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_I32 = range(-(1 << 31), 1 << 31)


class Outcome(Enum):
    """What became of a step of a batch. A skipped step is neither ok nor an error."""

    OK = "ok"
    ERROR = "error"
    SKIPPED = "skipped"


# --- requests ---------------------------------------------------------------------------------------------------


def decode_pipeline(body: bytes, *, version: int) -> PipelineBody:
    """Read and check the body of POST /v2/pipeline or /v3/pipeline.

    Everything that makes the whole request wrong is found here, before anything runs. Raises ProtocolViolation.
    """
    pipeline = decode_body(_PIPELINE, body)
    for request in pipeline.requests:
        check_request(request, version)
    return pipeline


def decode_cursor(body: bytes) -> CursorBody:
    """Read and check the body of POST /v3/cursor. Raises ProtocolViolation."""
    cursor = decode_body(_CURSOR, body)
    _check_batch(cursor.batch, version=3)
    return cursor


def check_batch(batch: Batch) -> None:
    """Raise ProtocolViolation when a step is malformed or its condition looks at itself or ahead.

    The decoders have done this already; for batches that come another way.
    """
    _check_batch(batch, version=3)


def decode_body(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """Decode a request body. Raises ProtocolViolation for anything that is not what `decoder` wants."""
    try:
        return decoder.decode(body)
    except RecursionError as error:
        raise ProtocolViolation("The request body is nested too deeply") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolViolation(f"The request body is not what the protocol asks for: {error}") from error


def check_request(request: StreamRequest, version: int) -> None:
    """Raise ProtocolViolation when a request breaks a rule that its shape does not show, or is newer than `version`.

    The decoders have done this already; for requests that come another way.
    """
    if isinstance(request, ExecuteRequest):
        _check_text(request.stmt.sql, request.stmt.sql_id)
    elif isinstance(request, BatchRequest):
        _check_batch(request.batch, version)
    elif isinstance(request, SequenceRequest | DescribeRequest):
        _check_text(request.sql, request.sql_id)
    elif isinstance(request, StoreSqlRequest):
        if request.sql_id not in _I32:
            raise ProtocolViolation("sql_id must fit in 32 bits")
    elif isinstance(request, GetAutocommitRequest) and version < 3:
        raise ProtocolViolation("The get_autocommit request is only supported in protocol version 3 and higher")


def _check_text(sql: str | None, sql_id: int | None) -> None:
    if sql is None:
        if sql_id is None:
            raise ProtocolViolation("Either sql or sql_id must be given")
        if sql_id not in _I32:
            raise ProtocolViolation("sql_id must fit in 32 bits")
    elif sql_id is not None:
        raise ProtocolViolation("sql and sql_id must not both be given")


def _check_batch(batch: Batch, version: int) -> None:
    for index, step in enumerate(batch.steps):
        _check_text(step.stmt.sql, step.stmt.sql_id)
        if step.condition is not None:
            _check_condition(step.condition, index, version, MAX_CONDITION_DEPTH)


def _check_condition(cond: Cond, index: int, version: int, depth_left: int) -> None:
    if depth_left == 0:
        raise ProtocolViolation(f"A batch condition is nested more than {MAX_CONDITION_DEPTH} deep")
    if isinstance(cond, IsOk | IsError):
        if not 0 <= cond.step < index:
            raise ProtocolViolation("Invalid reference to step in a batch condition")
    elif isinstance(cond, Not):
        _check_condition(cond.cond, index, version, depth_left - 1)
    elif isinstance(cond, And | Or):
        for inner in cond.conds:
            _check_condition(inner, index, version, depth_left - 1)
    elif version < 3:
        raise ProtocolViolation("The is_autocommit condition is only supported in protocol version 3 and higher")


def evaluate(cond: Cond, outcomes: Sequence[Outcome], *, is_autocommit: bool) -> bool:
    """Is the condition met, given what became of the steps so far? `cond` must have passed `check_batch`."""
    if isinstance(cond, IsOk):
        return outcomes[cond.step] is Outcome.OK
    if isinstance(cond, IsError):
        return outcomes[cond.step] is Outcome.ERROR
    if isinstance(cond, Not):
        return not evaluate(cond.cond, outcomes, is_autocommit=is_autocommit)
    if isinstance(cond, And):
        return all(evaluate(inner, outcomes, is_autocommit=is_autocommit) for inner in cond.conds)
    if isinstance(cond, Or):
        return any(evaluate(inner, outcomes, is_autocommit=is_autocommit) for inner in cond.conds)
    return is_autocommit


# --- arguments --------------------------------------------------------------------------------------------------


def sql_value(value: Value) -> SqlValue:
    """The SQLite value of a Hrana value. Raises StatementFailed ARGS_INVALID.

    Integers must fit in 64 bits, signed; base64 may be padded or not.
    """
    if isinstance(value, TextValue):
        return value.value
    if isinstance(value, IntegerValue):
        return _integer(value.value)
    if isinstance(value, FloatValue):
        return value.value
    if isinstance(value, BlobValue):
        return _blob(value.base64)
    return None


def _integer(text: str) -> int:
    number = int(text) if _INTEGER.fullmatch(text) else None
    if number is None or not -(1 << 63) <= number < 1 << 63:
        raise _bad_argument(f"{text[:40]!r} is not an integer of 64 bits")
    return number


def _blob(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), strict_mode=True)
    except ValueError as error:
        raise _bad_argument(f"a blob is not base64: {error}") from error


def _bad_argument(message: str) -> StatementFailed:
    return StatementFailed(f"Arguments do not match SQL parameters: {message}", "ARGS_INVALID")


def bind_arguments(stmt: Stmt, parameters: Sequence[str | None], *, explain: bool = False) -> tuple[SqlValue, ...]:
    """One value per SQL parameter, in order of their numbers, ready for apsw.

    Args:
        parameters: names as in DescribeResult: with prefix, None for `?`; index i is parameter i + 1.
        explain: under EXPLAIN missing values are allowed and become NULL.

    A positional argument fills the parameter of its number, whatever its name. A named one is found by the full
    name or by the name without prefix; names the statement does not have are ignored unless there are too many.
    Raises StatementFailed ARGS_INVALID or ARGS_BOTH_POSITIONAL_AND_NAMED.
    """
    positional, named = stmt.args or (), stmt.named_args or ()
    if positional and named:
        raise StatementFailed(
            "Specifying both positional and named arguments is not supported", "ARGS_BOTH_POSITIONAL_AND_NAMED"
        )
    found, expected = len(positional) + len(named), len(parameters)
    if found > expected:
        raise _bad_argument(f"too many parameters, expected {expected} found {found}")
    if found == expected and not named:
        return tuple(map(sql_value, positional))
    by_name = {argument.name: argument.value for argument in named}
    bound: list[SqlValue] = []
    for index, name in enumerate(parameters):
        value: Value | None
        if index < len(positional):
            value = positional[index]
        elif name is None:
            value = None
        else:
            value = by_name.get(name) or by_name.get(name[1:])
        if value is None and not explain:
            raise _bad_argument(f"value for parameter {name or index + 1} not found")
        bound.append(None if value is None else sql_value(value))
    return tuple(bound)


# --- values and rows --------------------------------------------------------------------------------------------

_quote: Callable[[str], str] = json.encoder.encode_basestring


def _quoted(text: str | None) -> str:
    """A JSON string (or null) that can always be encoded: lone surrogates become question marks. For messages."""
    return "null" if text is None else _quote(text.encode("utf-8", "replace").decode("utf-8"))


def _float(value: float) -> str:
    if not isfinite(value):
        raise StatementFailed(
            f"The result holds the number {value}, which JSON cannot carry; read it with CAST(... AS TEXT)",
            RESULT_NOT_JSON,
        )
    return repr(value)


def _base64(value: bytes) -> str:
    return binascii.b2a_base64(value, newline=False).rstrip(b"=").decode("ascii")


# For each type SQLite can give: the JSON object around the value, and the function that writes the value.
_FORMS: Final[dict[type, str]] = {
    int: '{{"type":"integer","value":"{%s}"}}',
    float: '{{"type":"float","value":{number(%s)}}}',
    str: '{{"type":"text","value":{quote(%s)}}}',
    bytes: '{{"type":"blob","base64":"{base64(%s)}"}}',
    type(None): '{{"type":"null"}}',
}
_MIXED_FORM: Final = "{value[type(%s)](%s)}"
_VALUES: Final[dict[type, Callable[[Any], str]]] = {
    int: lambda value: f'{{"type":"integer","value":"{value}"}}',
    float: lambda value: f'{{"type":"float","value":{_float(value)}}}',
    str: lambda value: f'{{"type":"text","value":{_quote(value)}}}',
    bytes: lambda value: f'{{"type":"blob","base64":"{_base64(value)}"}}',
    type(None): lambda _: '{"type":"null"}',
}
_NAMES: Final[dict[str, object]] = {"number": _float, "quote": _quote, "base64": _base64, "value": _VALUES}
# Compiling an encoder costs about 0.1 ms a dozen columns: wide results take the general path instead.
_MAX_GENERATED_COLUMNS: Final = 64
_MAX_ENCODERS: Final = 1024


@lru_cache(_MAX_ENCODERS)
def _encoder(signature: tuple[type | None, ...]) -> Callable[[Sequence[Row]], list[str]]:
    """A function from rows to one JSON array text each; None in the signature stands for a column of mixed types.

    Only type names and column numbers go into the generated source, never data.
    """
    names = [f"c{index}" for index in range(len(signature))]
    forms = [
        _MIXED_FORM % (name, name) if kind is None else _FORMS[kind].replace("%s", name)
        for name, kind in zip(names, signature, strict=True)
    ]
    source = f"lambda rows: [f'[{','.join(forms)}]' for {','.join(names)}, in rows]"
    return eval(source, dict(_NAMES))  # type: ignore[no-any-return]


def _row_texts(rows: Sequence[Row]) -> list[str]:
    width = len(rows[0])
    if not width:
        return ["[]"] * len(rows)
    if width > _MAX_GENERATED_COLUMNS:
        return [f"[{','.join([_VALUES[type(value)](value) for value in row])}]" for row in rows]
    if len(rows) == 1:
        return _encoder(tuple(map(type, rows[0])))(rows)
    # SQLite is dynamically typed: every value of every column is looked at, and a column of several types gets
    # the form that decides value by value.
    signature: list[type | None] = []
    for column in zip(*rows, strict=True):
        kinds = set(map(type, column))
        signature.append(kinds.pop() if len(kinds) == 1 else None)
    return _encoder(tuple(signature))(rows)


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StatementFailed(
            "The result holds text that is not valid Unicode, which JSON cannot carry; read it with CAST(... AS BLOB)",
            RESULT_NOT_JSON,
        ) from error


def encode_rows(rows: Sequence[Row]) -> bytes:
    """`[[Value, ...], ...]` for rows as apsw gives them. Raises StatementFailed RESULT_NOT_JSON."""
    return _encoded(f"[{','.join(_row_texts(rows))}]") if rows else b"[]"


def encode_row(row: Row) -> bytes:
    """`[Value, ...]` for one row. Raises StatementFailed RESULT_NOT_JSON."""
    return _encoded(_row_texts((row,))[0])


# --- results ----------------------------------------------------------------------------------------------------


def encode_columns(columns: Sequence[tuple[str, str | None]]) -> bytes:
    """`[{"name":..,"decltype":..}, ...]` for (name, declared type or None) pairs."""
    parts = [f'{{"name":{_quoted(name)},"decltype":{_quoted(decltype)}}}' for name, decltype in columns]
    return f"[{','.join(parts)}]".encode()


def encode_stmt_result(
    columns: bytes,
    rows: bytes,
    *,
    affected_row_count: int,
    last_insert_rowid: int | None,
    rows_read: int = 0,
    rows_written: int = 0,
    query_duration_ms: float = 0.0,
) -> bytes:
    """A StmtResult; `columns` and `rows` as `encode_columns` and `encode_rows` made them."""
    rowid = b"null" if last_insert_rowid is None else b'"%d"' % last_insert_rowid
    return (
        b'{"cols":%b,"rows":%b,"affected_row_count":%d,"last_insert_rowid":%b,"replication_index":null,'
        b'"rows_read":%d,"rows_written":%d,"query_duration_ms":%.3f}'
        % (columns, rows, affected_row_count, rowid, rows_read, rows_written, query_duration_ms)
    )


def encode_batch_result(results: Sequence[bytes | None], errors: Sequence[ErrorBody | None]) -> bytes:
    """A BatchResult: per step a StmtResult or None, and an error or None; a skipped step has None in both."""
    oks = b",".join([b"null" if result is None else result for result in results])
    bad = b",".join([b"null" if error is None else error_object(error) for error in errors])
    return b'{"step_results":[%b],"step_errors":[%b],"replication_index":null}' % (oks, bad)


def encode_describe(
    parameters: Sequence[str | None],
    columns: Sequence[tuple[str, str | None]],
    *,
    is_explain: bool,
    is_readonly: bool,
) -> bytes:
    """A DescribeResult; parameter names with their prefix, None for `?` and for holes."""
    names = ",".join([f'{{"name":{_quoted(name)}}}' for name in parameters]).encode()
    return b'{"params":[%b],"cols":%b,"is_explain":%b,"is_readonly":%b}' % (
        names,
        encode_columns(columns),
        _bool(is_explain),
        _bool(is_readonly),
    )


def _bool(value: bool) -> bytes:
    return b"true" if value else b"false"


def error_object(error: ErrorBody) -> bytes:
    """An Error: always with its code, and always valid Unicode."""
    return f'{{"message":{_quoted(error.message)},"code":{_quoted(error.code)}}}'.encode()


def ok(kind: str, result: bytes | None = None, **fields: bool) -> bytes:
    """A StreamResult that went well: `kind` is the request's type; `fields` are extra booleans (is_autocommit)."""
    extra = b"".join([b',"%b":%b' % (name.encode(), _bool(value)) for name, value in fields.items()])
    if result is not None:
        extra += b',"result":%b' % result
    return b'{"type":"ok","response":{"type":"%b"%b}}' % (kind.encode(), extra)


def failed(error: ErrorBody) -> bytes:
    """A StreamResult that failed."""
    return b'{"type":"error","error":%b}' % error_object(error)


def pipeline_reply(baton: str | None, results: Sequence[bytes]) -> bytes:
    """The whole reply body. With no baton it begins with the bytes `{"baton":null`, which a proxy may replace."""
    return b'{"baton":%b,"base_url":null,"results":[%b]}' % (_quoted(baton).encode(), b",".join(results))


# --- cursors: one JSON object a line ----------------------------------------------------------------------------

# `turso-serverless` cuts the reply with str.splitlines(), for which these end a line too. JSON escapes the others.
_LINE_ENDS: Final = ("\x85", "\u2028", "\u2029")


def _one_line(text: str) -> str:
    """`text` with the characters escaped that some clients take for the end of a line."""
    for end in _LINE_ENDS:
        if end in text:
            text = text.replace(end, f"\\u{ord(end):04x}")
    return text


def _one_line_of(encoded: bytes) -> bytes:
    return encoded if encoded.isascii() else _one_line(encoded.decode()).encode()


def cursor_head(baton: str | None) -> bytes:
    """The first line of a cursor reply. With no baton it begins with the bytes `{"baton":null`."""
    return b'{"baton":%b,"base_url":null}\n' % _quoted(baton).encode()


def step_begin(step: int, columns: bytes) -> bytes:
    """A step starts; `columns` as `encode_columns` made them."""
    return b'{"type":"step_begin","step":%d,"cols":%b}\n' % (step, _one_line_of(columns))


def row_entry(row: Row) -> bytes:
    """One row. Raises StatementFailed RESULT_NOT_JSON."""
    return row_entries((row,))


def row_entries(rows: Sequence[Row]) -> bytes:
    """Lines for many rows of one step, as cheap as `encode_rows`. Raises StatementFailed RESULT_NOT_JSON."""
    if not rows:
        return b""
    lines = _one_line('}\n{"type":"row","row":'.join(_row_texts(rows)))
    return _encoded(f'{{"type":"row","row":{lines}}}\n')


def step_end(affected_row_count: int, last_insert_rowid: int | None, *, rust: bool = False) -> bytes:
    """A step went well. `rust`: the client parses the rowid as a number (hrana.md 1.3), others need a string."""
    rowid = b"null"
    if last_insert_rowid is not None:
        rowid = (b"%d" if rust else b'"%d"') % last_insert_rowid
    return b'{"type":"step_end","affected_row_count":%d,"last_insert_rowid":%b}\n' % (affected_row_count, rowid)


def step_error(step: int, error: ErrorBody) -> bytes:
    """A step failed, maybe after some of its rows."""
    return b'{"type":"step_error","step":%d,"error":%b}\n' % (step, _one_line_of(error_object(error)))


def cursor_error(error: ErrorBody) -> bytes:
    """The cursor as a whole failed; nothing follows."""
    return b'{"type":"error","error":%b}\n' % _one_line_of(error_object(error))
