"""The JSON codec: strict about requests, exact about values, never another error than ours."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from typing import Any

import apsw
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from walship.errors import ProtocolViolation, StatementFailed
from walship.hrana import json as codec
from walship.hrana.types import (
    And,
    Batch,
    BatchRequest,
    BatchStep,
    BlobValue,
    ErrorBody,
    FloatValue,
    IntegerValue,
    IsAutocommit,
    IsError,
    IsOk,
    NamedArg,
    Not,
    NullValue,
    Or,
    Stmt,
    TextValue,
    Value,
)

I64 = st.integers(-(1 << 63), (1 << 63) - 1)
SQL_VALUES = st.none() | I64 | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.binary()


def reference(value: Any) -> dict[str, Any]:
    """A Hrana value object, the plain way."""
    if value is None:
        return {"type": "null"}
    if isinstance(value, int):
        return {"type": "integer", "value": str(value)}
    if isinstance(value, float):
        return {"type": "float", "value": value}
    if isinstance(value, str):
        return {"type": "text", "value": value}
    return {"type": "blob", "base64": base64.b64encode(value).decode().rstrip("=")}


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    width = draw(st.integers(1, 5))
    return draw(st.lists(st.tuples(*[SQL_VALUES] * width), max_size=6))


# --- rows -------------------------------------------------------------------------------------------------------


@given(tables())
@example([(-0.0, 1e300, 5e-324), (1, None, "x")])
@example([(1,), (2,), (None,), ("3",)])
def test_rows_are_what_the_plain_encoding_says(rows: list[tuple[Any, ...]]) -> None:
    assert json.loads(codec.encode_rows(rows)) == [[reference(value) for value in row] for row in rows]


@given(tables())
def test_row_entries_are_one_json_object_a_line(rows: list[tuple[Any, ...]]) -> None:
    lines = codec.row_entries(rows).split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == [
        {"type": "row", "row": [reference(value) for value in row]} for row in rows
    ]


def test_no_character_of_a_cursor_entry_ends_a_line_for_any_client() -> None:
    """`turso-serverless` cuts the reply with str.splitlines(), which knows more line ends than JSON escapes."""
    text = "a\x85b\u2028c\u2029d\n\x1c"
    error = ErrorBody(text, "SQLITE_UNKNOWN")
    entries = [
        codec.row_entries([(text, 1), (2, text)]),
        codec.step_begin(0, codec.encode_columns([(text, text)])),
        codec.step_error(0, error),
        codec.cursor_error(error),
    ]
    rows, begin, step_error, cursor_error = [
        [json.loads(line) for line in entry.decode().splitlines()] for entry in entries
    ]
    assert [row["row"][index]["value"] for index, row in enumerate(rows)] == [text, text]
    assert begin[0]["cols"] == [{"name": text, "decltype": text}]
    assert [step_error[0]["error"]["message"], cursor_error[0]["error"]["message"]] == [text, text]


@given(tables())
def test_every_value_survives_the_way_to_a_client_and_back(rows: list[tuple[Any, ...]]) -> None:
    decoder = codec._PIPELINE  # the real request decoder
    for row in rows:
        body = b'{"requests":[{"type":"execute","stmt":{"sql":"x","args":%b}}]}' % codec.encode_row(row)
        (request,) = decoder.decode(body).requests
        back = tuple(map(codec.sql_value, request.stmt.args))
        assert back == row
        assert [math.copysign(1, value) for value in back if isinstance(value, float)] == [
            math.copysign(1, value) for value in row if isinstance(value, float)
        ]


def test_wide_rows_are_encoded_without_generated_code() -> None:
    row = tuple(range(2000))
    before = codec._encoder.cache_info().currsize
    assert len(json.loads(codec.encode_rows([row, row]))[1]) == 2000
    assert codec._encoder.cache_info().currsize == before


def test_rows_from_sqlite_with_changing_types_are_verified_value_by_value() -> None:
    """SQLite is dynamically typed: the first row's types promise nothing (perf.md 2)."""
    rows = apsw.Connection(":memory:").execute("values (1, 'a'), ('one', 2.5), (null, x'00')").fetchall()
    assert json.loads(codec.encode_rows(rows)) == [[reference(value) for value in row] for row in rows]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_number_that_is_not_json_fails_the_statement(value: float, rows: int) -> None:
    with pytest.raises(StatementFailed, match="JSON cannot carry") as caught:
        codec.encode_rows([(1.0,)] * (rows - 1) + [(value,)])
    assert caught.value.statement_code == codec.RESULT_NOT_JSON


def test_text_with_a_lone_surrogate_fails_the_statement() -> None:
    with pytest.raises(StatementFailed, match="not valid Unicode"):
        codec.encode_rows([("\ud800",)])


def test_base64_is_sent_without_padding_and_without_escapes() -> None:
    """hrana.md 1.3, pitfall 2: Rust borrows the string, so no escape may be inside."""
    assert codec.encode_row((b"\xff\xff\xff\xff",)) == b'[{"type":"blob","base64":"/////w"}]'


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["9223372036854775808", "-9223372036854775809", "1e3", "", " 1", "1_0", "٣", "9" * 5000]
)
def test_an_integer_beyond_64_bits_or_no_integer_is_refused(text: str) -> None:
    with pytest.raises(StatementFailed) as caught:
        codec.sql_value(IntegerValue(text))
    assert caught.value.statement_code == "ARGS_INVALID"


@pytest.mark.parametrize("text", ["AP8", "AP8="])
def test_base64_is_accepted_with_and_without_padding(text: str) -> None:
    assert codec.sql_value(BlobValue(text)) == b"\x00\xff"


@pytest.mark.parametrize("text", ["A", "AP8!", "AP 8", "é", "A=P8"])
def test_bad_base64_is_refused(text: str) -> None:
    with pytest.raises(StatementFailed) as caught:
        codec.sql_value(BlobValue(text))
    assert caught.value.statement_code == "ARGS_INVALID"


def _named(**values: int) -> list[NamedArg]:
    return [NamedArg(name, IntegerValue(str(value))) for name, value in values.items()]


@pytest.mark.parametrize("prefix", [":", "@", "$", ""])
def test_named_arguments_match_with_and_without_their_prefix(prefix: str) -> None:
    stmt = Stmt(sql="", named_args=[NamedArg(prefix + "v", IntegerValue("7"))])
    parameter = (prefix or ":") + "v"
    assert codec.bind_arguments(stmt, [parameter]) == (7,)


@pytest.mark.parametrize(
    ("stmt", "parameters", "message"),
    [
        (Stmt(args=[NullValue()] * 3), [None, None], "too many parameters, expected 2 found 3"),
        (Stmt(args=[NullValue()]), [None, None], "value for parameter 2 not found"),
        (Stmt(), [":a"], "value for parameter :a not found"),
        (Stmt(named_args=_named(b=1)), [":a"], "value for parameter :a not found"),
        (Stmt(named_args=_named(b=1, a=2)), [":a"], "too many parameters, expected 1 found 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(stmt: Stmt, parameters: list[str | None], message: str) -> None:
    """hrana.md 1.3."""
    with pytest.raises(StatementFailed, match=message) as caught:
        codec.bind_arguments(stmt, parameters)
    assert caught.value.statement_code == "ARGS_INVALID"


def test_both_kinds_of_arguments_are_refused() -> None:
    with pytest.raises(StatementFailed) as caught:
        codec.bind_arguments(Stmt(args=[NullValue()], named_args=_named(a=1)), [None, ":a"])
    assert caught.value.statement_code == "ARGS_BOTH_POSITIONAL_AND_NAMED"


def test_under_explain_missing_arguments_are_null() -> None:
    assert codec.bind_arguments(Stmt(), [":a", None], explain=True) == (None, None)


@pytest.mark.parametrize(
    ("sql", "parameters", "args"),
    [
        ("select ?, ?", [None, None], [IntegerValue("1"), TextValue("b")]),
        ("select ?3, ?1", [None, None, "?3"], [IntegerValue("1"), IntegerValue("2"), FloatValue(0.5)]),
        ("select :a, @b, $c, :a", [":a", "@b", "$c"], [IntegerValue("1"), NullValue(), BlobValue("AA")]),
    ],
)
def test_bound_arguments_are_what_apsw_binds(sql: str, parameters: list[str | None], args: list[Value]) -> None:
    row = apsw.Connection(":memory:").execute(sql, codec.bind_arguments(Stmt(args=args), parameters)).fetchone()
    values = [codec.sql_value(arg) for arg in args]
    expected = {"select ?, ?": values, "select ?3, ?1": [0.5, 1]}.get(sql, [*values, values[0]])
    assert list(row) == expected


# --- requests ---------------------------------------------------------------------------------------------------


def _batch_body(condition: str) -> bytes:
    step = '{"stmt":{"sql":"select 1"}%s}'
    steps = ",".join([step % "", step % f',"condition":{condition}'])
    return f'{{"requests":[{{"type":"batch","batch":{{"steps":[{steps}]}}}}]}}'.encode()


def test_a_pipeline_is_decoded_with_unknown_fields_ignored() -> None:
    body = (
        b'{"baton":"b","x":{},"requests":[{"type":"execute","stmt":{"sql":"s","args":[{"type":"integer","value":"1"}],'
        b'"want_rows":false,"replication_index":"9"}},{"type":"close","y":1}]}'
    )
    pipeline = codec.decode_pipeline(body, version=2)
    assert pipeline.baton == "b"
    assert [type(request).__name__ for request in pipeline.requests] == ["ExecuteRequest", "CloseRequest"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"requests":[{"type":"walk"}]}',
        b'{"requests":[{"type":"execute"}]}',
        b'{"requests":[{"type":"execute","stmt":{}}]}',
        b'{"requests":[{"type":"execute","stmt":{"sql":"a","sql_id":1}}]}',
        b'{"requests":[{"type":"describe"}]}',
        b'{"requests":[{"type":"sequence","sql_id":2147483648}]}',
        b'{"requests":[{"type":"store_sql","sql_id":9999999999999999999999,"sql":""}]}',
        b'{"requests":[{"type":"execute","stmt":{"sql":"\xff"}}]}',
        b'{"requests":[{"type":"execute","stmt":{"sql":"\\ud800"}}]}',
        b'{"requests":[{"type":"execute","stmt":{"sql":"a","args":[{"type":"float","value":1e999}]}}]}',
        b'{"requests":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_malformed_body_is_a_protocol_violation(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        codec.decode_pipeline(body, version=3)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0nul\\requstypxcab', max_size=200).map(str.encode))
def test_arbitrary_bytes_never_raise_anything_else(body: bytes) -> None:
    for decode in (lambda: codec.decode_pipeline(body, version=3), lambda: codec.decode_cursor(body)):
        with contextlib.suppress(ProtocolViolation):
            decode()


@pytest.mark.parametrize("step", [-1, 1, 2])
def test_a_condition_looks_only_back(step: int) -> None:
    with pytest.raises(ProtocolViolation, match="Invalid reference to step in a batch condition"):
        codec.decode_pipeline(_batch_body(f'{{"type":"not","cond":{{"type":"ok","step":{step}}}}}'), version=3)


@pytest.mark.parametrize(("depth", "fits"), [(63, True), (64, False), (5000, False)])
def test_conditions_nest_to_a_bounded_depth(depth: int, fits: bool) -> None:
    body = _batch_body('{"type":"not","cond":' * depth + '{"type":"is_autocommit"}' + "}" * depth)
    if fits:
        codec.decode_pipeline(body, version=3)
        return
    with pytest.raises(ProtocolViolation):
        codec.decode_pipeline(body, version=3)


@pytest.mark.parametrize("body", [b'{"requests":[{"type":"get_autocommit"}]}', _batch_body('{"type":"is_autocommit"}')])
def test_what_came_with_version_3_is_refused_on_version_2(body: bytes) -> None:
    codec.decode_pipeline(body, version=3)
    with pytest.raises(ProtocolViolation, match="version 3"):
        codec.decode_pipeline(body, version=2)


def test_a_cursor_body_is_decoded_and_its_batch_checked() -> None:
    assert codec.decode_cursor(b'{"batch":{"steps":[]}}').baton is None
    with pytest.raises(ProtocolViolation):
        codec.decode_cursor(b'{"batch":{"steps":[{"stmt":{"sql":"a"},"condition":{"type":"ok","step":0}}]}}')


def test_a_batch_made_elsewhere_can_be_checked() -> None:
    with pytest.raises(ProtocolViolation):
        codec.check_batch(Batch([BatchStep(Stmt(sql="a"), IsOk(0))]))


OK, ERROR, SKIPPED = codec.Outcome.OK, codec.Outcome.ERROR, codec.Outcome.SKIPPED


@pytest.mark.parametrize(
    ("cond", "expected"),
    [
        (IsOk(0), True),
        (IsOk(1), False),
        (IsOk(2), False),
        (IsError(0), False),
        (IsError(1), True),
        (IsError(2), False),
        (Not(IsOk(2)), True),
        (And([]), True),
        (Or([]), False),
        (And([IsOk(0), IsError(1)]), True),
        (And([IsOk(0), IsOk(1)]), False),
        (Or([IsOk(1), IsOk(0)]), True),
        (IsAutocommit(), True),
    ],
)
def test_conditions_are_evaluated_with_skipped_as_neither(cond: Any, expected: bool) -> None:
    """hrana.md 1.3: a skipped step is neither ok nor error."""
    assert codec.evaluate(cond, [OK, ERROR, SKIPPED], is_autocommit=True) is expected


def test_is_autocommit_follows_the_connection() -> None:
    assert not codec.evaluate(IsAutocommit(), [], is_autocommit=False)


# --- replies ----------------------------------------------------------------------------------------------------


def test_a_pipeline_reply_has_exactly_the_keys_clients_need() -> None:
    """hrana.md 1.2, 1.3: Rust clients need cols, rows, affected_row_count and last_insert_rowid to be there."""
    columns = codec.encode_columns([("a", "FURRY BUNNY"), ('q"', None)])
    result = codec.encode_stmt_result(
        columns, codec.encode_rows([(1, 2)]), affected_row_count=3, last_insert_rowid=1 << 62, query_duration_ms=0.25
    )
    error = ErrorBody("no \ud800 such", "SQLITE_UNKNOWN")
    batch = codec.encode_batch_result([result, None, None], [None, error, None])
    reply = json.loads(
        codec.pipeline_reply(
            None,
            [
                codec.ok("execute", result),
                codec.ok("batch", batch),
                codec.ok("get_autocommit", is_autocommit=True),
                codec.failed(error),
                codec.ok("close"),
            ],
        )
    )
    assert reply["baton"] is None
    assert reply["base_url"] is None
    execute, batched, autocommit, failed, close = reply["results"]
    assert execute["response"]["result"] == {
        "cols": [{"name": "a", "decltype": "FURRY BUNNY"}, {"name": 'q"', "decltype": None}],
        "rows": [[{"type": "integer", "value": "1"}, {"type": "integer", "value": "2"}]],
        "affected_row_count": 3,
        "last_insert_rowid": str(1 << 62),
        "replication_index": None,
        "rows_read": 0,
        "rows_written": 0,
        "query_duration_ms": 0.25,
    }
    assert batched["response"]["result"]["step_results"][1:] == [None, None]
    assert batched["response"]["result"]["step_errors"] == [
        None,
        {"message": "no ? such", "code": "SQLITE_UNKNOWN"},
        None,
    ]
    assert autocommit["response"] == {"type": "get_autocommit", "is_autocommit": True}
    assert failed == {"type": "error", "error": {"message": "no ? such", "code": "SQLITE_UNKNOWN"}}
    assert close == {"type": "ok", "response": {"type": "close"}}


def test_replies_without_a_baton_begin_with_bytes_a_proxy_can_replace() -> None:
    assert codec.pipeline_reply(None, []).startswith(b'{"baton":null')
    assert codec.cursor_head(None).startswith(b'{"baton":null')
    assert json.loads(codec.pipeline_reply("b/+", []))["baton"] == "b/+"


def test_describe_keeps_prefixes_and_holes() -> None:
    described = json.loads(codec.encode_describe([None, ":a"], [("x", None)], is_explain=False, is_readonly=True))
    assert described == {
        "params": [{"name": None}, {"name": ":a"}],
        "cols": [{"name": "x", "decltype": None}],
        "is_explain": False,
        "is_readonly": True,
    }


def test_cursor_lines_are_json_objects_that_end_a_line() -> None:
    error = ErrorBody("m", "C")
    lines = [
        (codec.cursor_head("b"), {"baton": "b", "base_url": None}),
        (codec.step_begin(0, codec.encode_columns([])), {"type": "step_begin", "step": 0, "cols": []}),
        (codec.row_entry((None,)), {"type": "row", "row": [{"type": "null"}]}),
        (codec.step_end(1, 5), {"type": "step_end", "affected_row_count": 1, "last_insert_rowid": "5"}),
        (codec.step_end(1, 5, rust=True), {"type": "step_end", "affected_row_count": 1, "last_insert_rowid": 5}),
        (codec.step_end(0, None), {"type": "step_end", "affected_row_count": 0, "last_insert_rowid": None}),
        (codec.step_error(2, error), {"type": "step_error", "step": 2, "error": {"message": "m", "code": "C"}}),
        (codec.cursor_error(error), {"type": "error", "error": {"message": "m", "code": "C"}}),
    ]
    for line, expected in lines:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert json.loads(line) == expected


def test_a_decoded_batch_keeps_its_steps_in_order() -> None:
    (request,) = codec.decode_pipeline(_batch_body('{"type":"ok","step":0}'), version=2).requests
    assert isinstance(request, BatchRequest)
    assert request.batch.steps[1].condition == IsOk(0)
