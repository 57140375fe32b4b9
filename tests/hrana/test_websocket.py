"""The WebSocket protocol's core (hrana.md 1.6): every rule of it by a message or two, and anything at all by chance."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.errors import AuthFailed, ProtocolViolation
from walship.hrana.types import Batch, BatchRequest, BatchStep, DescribeRequest, ErrorBody, ExecuteRequest, Stmt
from walship.hrana.websocket import (
    FOLLOWS,
    Action,
    Authenticate,
    CloseCode,
    Connection,
    EndCursor,
    EndStream,
    Event,
    FetchCursor,
    HangUp,
    Limits,
    Run,
    Send,
    StartCursor,
    State,
    negotiate,
)
from walship.hrana.websocket_messages import fetched, response, response_error

EXECUTE = {"type": "execute", "stream_id": 1, "stmt": {"sql": "SELECT 1"}}
BATCH: dict[str, Any] = {"steps": [{"stmt": {"sql": "SELECT 1"}}]}


def hello(connection: Connection, jwt: str | None = None) -> list[Action]:
    return connection.receive_text(json.dumps({"type": "hello", "jwt": jwt}))


def opened(version: int = 3, *streams: int, limits: Limits = Limits()) -> Connection:
    connection = Connection(version, limits)
    assert hello(connection) == [Authenticate(None)]
    assert connection.accepted() == [Send(b'{"type":"hello_ok"}')]
    for stream in streams:
        ask(connection, type="open_stream", stream_id=stream)
    return connection


def ask(connection: Connection, request_id: int = 7, **request: Any) -> list[Action]:
    return connection.receive_text(json.dumps({"type": "request", "request_id": request_id, "request": request}))


def said(actions: list[Action]) -> dict[str, Any]:
    (action,) = actions
    assert isinstance(action, Send), action
    message: dict[str, Any] = json.loads(action.data)
    return message


def hung_up(actions: list[Action]) -> tuple[CloseCode, str]:
    (action,) = actions
    assert isinstance(action, HangUp), action
    assert len(action.reason.encode()) <= 123
    return action.code, action.reason


# --- subprotocols -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "version", "answer"),
    [
        ([], 1, None),
        (["hrana2", "hrana1"], 2, "hrana2"),
        (["hrana1", "hrana2", "hrana3"], 3, "hrana3"),
        (["hrana3-protobuf", "hrana3"], 3, "hrana3"),
        (["HRANA2"], 2, "HRANA2"),
        (["soap", "hrana1"], 1, "hrana1"),
    ],
)
def test_the_best_common_version_is_spoken(offered: list[str], version: int, answer: str | None) -> None:
    assert negotiate(offered) == (version, answer)


def test_no_common_version_is_an_error_that_lists_them() -> None:
    with pytest.raises(ProtocolViolation, match="Only these WebSocket subprotocols are supported: hrana3, hrana2, hra"):
        negotiate(["hrana3-protobuf", "chat"])


# --- hello --------------------------------------------------------------------------------------------------------


def test_a_token_is_handed_out_to_be_checked() -> None:
    connection = Connection(2)
    assert hello(connection, "abc") == [Authenticate("abc")]


def test_a_refused_token_ends_the_connection_after_saying_why() -> None:
    connection = Connection(2)
    hello(connection, "abc")
    error, end = connection.rejected(AuthFailed(401, "AUTH_JWT_EXPIRED", "the token has expired"))
    assert said([error]) == {
        "type": "hello_error",
        "error": {"message": "the token has expired", "code": "AUTH_JWT_EXPIRED"},
    }
    assert hung_up([end])[0] is CloseCode.NORMAL
    assert ask(connection, **EXECUTE) == []


def test_a_request_before_hello_closes() -> None:
    assert hung_up(ask(Connection(3), **EXECUTE)) == (CloseCode.POLICY, "Received a request before hello")


def test_hello_may_be_repeated_from_version_2_on() -> None:
    assert hello(opened(2), "new") == [Authenticate("new")]
    assert hung_up(hello(opened(1)))[0] is CloseCode.POLICY


def test_a_closed_connection_says_nothing_more() -> None:
    connection = opened()
    hung_up(connection.receive_binary())
    assert connection.receive_binary() == []
    assert connection.receive_text("{") == []


def test_the_table_knows_every_state() -> None:
    assert {state for state, _ in FOLLOWS} == set(State)
    assert all(FOLLOWS[state, Event.BROKEN] is State.CLOSED for state in State)


# --- messages that are none ---------------------------------------------------------------------------------------


def test_binary_is_unsupported() -> None:
    assert hung_up(opened().receive_binary())[0] is CloseCode.UNSUPPORTED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"type":"request","request_id":1}',
        '{"type":"request","request_id":"1","request":{"type":"close_sql","sql_id":1}}',
        '{"type":"request","request_id":2147483648,"request":{"type":"close_sql","sql_id":1}}',
        '{"type":"request","request_id":1,"request":{"type":"fetch_cursor","cursor_id":1,"max_count":-1}}',
        '{"type":"hello","jwt":' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
def test_what_is_not_json_of_the_right_shape_closes_1007(text: str) -> None:
    assert hung_up(opened().receive_text(text))[0] is CloseCode.INVALID


def test_bytes_that_are_not_utf_8_close_1007() -> None:
    assert hung_up(opened().receive_text(b'{"type":"hello","jwt":"\xff"}'))[0] is CloseCode.INVALID


def test_unknown_types_close_1008() -> None:
    assert hung_up(opened().receive_text('{"type":"goodbye"}'))[0] is CloseCode.POLICY
    assert hung_up(ask(opened(), type="drop_everything"))[0] is CloseCode.POLICY


def test_unknown_fields_are_ignored() -> None:
    assert said(ask(opened(), type="open_stream", stream_id=1, color="red"))["type"] == "response_ok"


@pytest.mark.parametrize(
    ("version", "request_"),
    [
        (1, {"type": "sequence", "stream_id": 1, "sql": ""}),
        (1, {"type": "describe", "stream_id": 1, "sql": ""}),
        (1, {"type": "store_sql", "sql_id": 1, "sql": ""}),
        (1, {"type": "close_sql", "sql_id": 1}),
        (2, {"type": "get_autocommit", "stream_id": 1}),
        (2, {"type": "open_cursor", "stream_id": 1, "cursor_id": 1, "batch": BATCH}),
        (2, {"type": "fetch_cursor", "cursor_id": 1, "max_count": 1}),
        (2, {"type": "close_cursor", "cursor_id": 1}),
        (
            2,
            {
                "type": "batch",
                "stream_id": 1,
                "batch": {"steps": [{"condition": {"type": "is_autocommit"}, "stmt": {}}]},
            },
        ),
    ],
)
def test_what_a_version_does_not_have_closes(version: int, request_: dict[str, Any]) -> None:
    assert hung_up(ask(opened(version, 1), **request_))[0] is CloseCode.POLICY


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_is_opened_used_and_closed() -> None:
    connection = opened(1)
    assert said(ask(connection, 5, type="open_stream", stream_id=-3)) == {
        "type": "response_ok",
        "request_id": 5,
        "response": {"type": "open_stream"},
    }
    assert ask(connection, 6, type="execute", stream_id=-3, stmt={"sql": "SELECT 1"}) == [
        Run(6, -3, ExecuteRequest(Stmt("SELECT 1")))
    ]
    assert ask(connection, 7, type="close_stream", stream_id=-3) == [EndStream(7, -3)]
    assert said(ask(connection, type="open_stream", stream_id=-3))["type"] == "response_ok"


@pytest.mark.parametrize("request_", [EXECUTE, {"type": "close_stream", "stream_id": 1}])
def test_a_stream_nobody_opened_closes(request_: dict[str, Any]) -> None:
    assert hung_up(ask(opened(3, 2), **request_)) == (CloseCode.POLICY, "Stream 1 not found")


def test_an_id_in_use_closes() -> None:
    assert hung_up(ask(opened(3, 1), type="open_stream", stream_id=1))[0] is CloseCode.POLICY


def test_a_batch_may_not_look_ahead() -> None:
    batch = {"steps": [{"condition": {"type": "ok", "step": 0}, "stmt": {"sql": "SELECT 1"}}]}
    code, reason = hung_up(ask(opened(1, 1), type="batch", stream_id=1, batch=batch))
    assert (code, reason) == (CloseCode.POLICY, "Invalid reference to step in a batch condition")


def test_a_statement_needs_one_text() -> None:
    assert hung_up(ask(opened(2, 1), type="execute", stream_id=1, stmt={}))[0] is CloseCode.POLICY


def test_too_many_streams_are_refused_by_an_error_and_their_ids_stay_used() -> None:
    connection = opened(3, 1, limits=Limits(streams=1, refused_streams=1))
    assert said(ask(connection, type="open_stream", stream_id=2))["error"]["code"] == "STREAM_TOO_MANY"
    assert said(ask(connection, **{**EXECUTE, "stream_id": 2}))["error"]["code"] == "STREAM_NOT_OPEN"
    cursor = {"type": "open_cursor", "stream_id": 2, "cursor_id": 1, "batch": BATCH}
    assert said(ask(connection, **cursor))["error"]["code"] == "STREAM_NOT_OPEN"
    assert said(ask(connection, type="close_stream", stream_id=2))["response"] == {"type": "close_stream"}
    ask(connection, type="open_stream", stream_id=2)
    assert hung_up(ask(connection, type="open_stream", stream_id=3))[0] is CloseCode.POLICY


# --- texts --------------------------------------------------------------------------------------------------------


def test_a_text_is_put_in_place_for_any_stream_of_the_connection() -> None:
    connection = opened(2, 1, 2)
    assert said(ask(connection, type="store_sql", sql_id=9, sql="SELECT 9"))["response"] == {"type": "store_sql"}
    assert ask(connection, type="execute", stream_id=2, stmt={"sql_id": 9, "want_rows": False}) == [
        Run(7, 2, ExecuteRequest(Stmt("SELECT 9", want_rows=False)))
    ]
    assert ask(connection, type="describe", stream_id=1, sql_id=9) == [Run(7, 1, DescribeRequest("SELECT 9"))]
    steps = [{"stmt": {"sql_id": 9}}, {"stmt": {"sql": "SELECT 1"}}]
    assert ask(connection, type="batch", stream_id=1, batch={"steps": steps}) == [
        Run(7, 1, BatchRequest(Batch([BatchStep(Stmt("SELECT 9")), BatchStep(Stmt("SELECT 1"))])))
    ]


def test_a_text_nobody_stored_closes() -> None:
    connection = opened(2, 1)
    ask(connection, type="store_sql", sql_id=9, sql="SELECT 9")
    assert said(ask(connection, type="close_sql", sql_id=9))["response"] == {"type": "close_sql"}
    assert said(ask(connection, type="close_sql", sql_id=9))["type"] == "response_ok"
    assert hung_up(ask(connection, type="sequence", stream_id=1, sql_id=9)) == (
        CloseCode.POLICY,
        "SQL text 9 not found",
    )


def test_a_text_id_in_use_closes() -> None:
    connection = opened(2)
    ask(connection, type="store_sql", sql_id=9, sql="SELECT 9")
    assert hung_up(ask(connection, type="store_sql", sql_id=9, sql="SELECT 9"))[0] is CloseCode.POLICY


def test_stored_texts_are_bounded_in_number_and_size() -> None:
    connection = opened(2, limits=Limits(stored_texts=2, stored_bytes=10))
    ask(connection, type="store_sql", sql_id=1, sql="12345678")
    assert said(ask(connection, type="store_sql", sql_id=2, sql="123"))["error"]["code"] == "SQL_STORE_TOO_LARGE"
    ask(connection, type="store_sql", sql_id=2, sql="12")
    assert said(ask(connection, type="store_sql", sql_id=3, sql=""))["error"]["code"] == "SQL_STORE_TOO_MANY"
    ask(connection, type="close_sql", sql_id=1)
    assert said(ask(connection, type="store_sql", sql_id=3, sql="12345678"))["type"] == "response_ok"


# --- cursors ------------------------------------------------------------------------------------------------------


def test_a_cursor_is_opened_fetched_and_closed() -> None:
    connection = opened(3, 1)
    cursor = {"type": "open_cursor", "stream_id": 1, "cursor_id": 4, "batch": BATCH}
    assert ask(connection, **cursor) == [StartCursor(7, 1, 4, Batch([BatchStep(Stmt("SELECT 1"))]))]
    assert ask(connection, type="fetch_cursor", cursor_id=4, max_count=10) == [FetchCursor(7, 1, 4, 10)]
    assert ask(connection, type="close_cursor", cursor_id=4) == [EndCursor(7, 1, 4)]
    assert hung_up(ask(connection, type="fetch_cursor", cursor_id=4, max_count=1))[1] == "Cursor 4 not found"


def test_a_stream_has_one_cursor_and_an_id_one_stream() -> None:
    cursor = {"type": "open_cursor", "stream_id": 1, "cursor_id": 4, "batch": BATCH}
    connection = opened(3, 1, 2)
    ask(connection, **cursor)
    assert hung_up(ask(connection, **{**cursor, "cursor_id": 5}))[1] == "Stream 1 already has an open cursor"
    connection = opened(3, 1, 2)
    ask(connection, **cursor)
    assert hung_up(ask(connection, **{**cursor, "stream_id": 2}))[1] == "Cursor 4 already exists"


def test_closing_a_stream_frees_its_cursor() -> None:
    connection = opened(3, 1)
    cursor = {"type": "open_cursor", "stream_id": 1, "cursor_id": 4, "batch": BATCH}
    ask(connection, **cursor)
    ask(connection, type="close_stream", stream_id=1)
    ask(connection, type="open_stream", stream_id=1)
    assert isinstance(ask(connection, **cursor)[0], StartCursor)


# --- answers ------------------------------------------------------------------------------------------------------


def test_answers_carry_the_result_as_it_is() -> None:
    ok = b'{"type":"ok","response":{"type":"execute","result":{"cols":[], "rows":[[1e3]]}}}'
    assert response(5, ok) == (
        b'{"type":"response_ok","request_id":5,"response":{"type":"execute","result":{"cols":[], "rows":[[1e3]]}}}'
    )
    bad = b'{"type":"error","error":{"message":"no","code":"X"}}'
    assert response(5, bad) == b'{"type":"response_error","request_id":5,"error":{"message":"no","code":"X"}}'
    assert json.loads(response_error(5, ErrorBody('"\ud800', "X")))["error"] == {"message": '"?', "code": "X"}
    entries = json.loads(fetched(5, [b'{"type":"row"}', b'{"type":"step_end"}'], done=True))["response"]
    assert entries == {"type": "fetch_cursor", "entries": [{"type": "row"}, {"type": "step_end"}], "done": True}


# --- anything at all ----------------------------------------------------------------------------------------------

ids = st.integers(0, 2)
requests = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["open_stream", "close_stream"]), "stream_id": ids}),
    st.fixed_dictionaries({"type": st.just("execute"), "stream_id": ids, "stmt": st.just({"sql": "SELECT 1"})}),
    st.fixed_dictionaries(
        {"type": st.just("execute"), "stream_id": ids, "stmt": st.builds(lambda i: {"sql_id": i}, ids)}
    ),
    st.fixed_dictionaries({"type": st.just("store_sql"), "sql_id": ids, "sql": st.text(max_size=5)}),
    st.fixed_dictionaries({"type": st.just("close_sql"), "sql_id": ids}),
    st.fixed_dictionaries(
        {"type": st.just("open_cursor"), "stream_id": ids, "cursor_id": ids, "batch": st.just(BATCH)}
    ),
    st.fixed_dictionaries({"type": st.just("fetch_cursor"), "cursor_id": ids, "max_count": ids}),
    st.fixed_dictionaries({"type": st.just("close_cursor"), "cursor_id": ids}),
)


@given(st.lists(requests, max_size=30))
def test_every_request_is_answered_once_or_ends_the_connection(asked: list[dict[str, Any]]) -> None:
    """And a job is only ever for a stream that is open, a fetch only for the cursor that was opened on it."""
    connection = opened(3, limits=Limits(streams=2, refused_streams=1, stored_texts=2, stored_bytes=8))
    streams: set[int] = set()
    cursors: dict[int, int] = {}
    for number, request in enumerate(asked):
        (action,) = ask(connection, number, **request)
        if isinstance(action, HangUp):
            assert connection.state is State.CLOSED
            return
        assert not isinstance(action, Authenticate)
        if isinstance(action, Send):
            message = json.loads(action.data)
            assert message["request_id"] == number
            if message.get("response") == {"type": "open_stream"}:
                streams.add(request["stream_id"])
            continue
        assert action.request_id == number
        assert action.stream_id in streams
        if isinstance(action, StartCursor):
            assert action.stream_id not in cursors.values()
            cursors[action.cursor_id] = action.stream_id
        elif isinstance(action, FetchCursor):
            assert cursors[action.cursor_id] == action.stream_id
        elif isinstance(action, EndCursor):
            assert cursors.pop(action.cursor_id) == action.stream_id
        elif isinstance(action, EndStream):
            streams.discard(action.stream_id)
            cursors = {cursor: stream for cursor, stream in cursors.items() if stream != action.stream_id}


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["type", "request", "request_id", "stream_id", "stmt", "sql"]), inner)
            ),
            max_leaves=12,
        ).map(json.dumps),
    )
)
def test_no_message_whatever_raises(data: str | bytes) -> None:
    for connection in (Connection(3), opened(1), opened(3, 1)):
        for action in connection.receive_text(data):
            assert isinstance(action, Send | HangUp | Authenticate | Run | EndStream)
