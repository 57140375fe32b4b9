"""What a request asks for, and when its body must be written anew (R22)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from proxy.consistency import Settings
from proxy.plan import Known, Plan, plan_cursor, plan_pipeline
from proxy.router import Need
from proxy.streams import StreamLimits
from walship.errors import StatementFailed
from walship.formats.position import Position
from walship.hrana.json import decode_cursor, decode_pipeline
from walship.hrana.types import Level

KNOWN = Known(position=lambda: "1.7", status=lambda: '{"it\'s": 1}', default_ack=1)


def plan(*requests: dict[str, Any], stored: dict[int, str] | None = None, settings: Settings | None = None) -> Plan:
    body = msgspec.json.encode({"baton": "ignored", "requests": requests})
    return plan_pipeline(
        decode_pipeline(body, version=3),
        body,
        stored=stored or {},
        settings=settings or Settings(),
        known=KNOWN,
        limits=StreamLimits(),
    )


def execute(sql: str) -> dict[str, Any]:
    return {"type": "execute", "stmt": {"sql": sql}}


def batch(*texts: str) -> dict[str, Any]:
    return {"type": "batch", "batch": {"steps": [{"stmt": {"sql": sql}} for sql in texts]}}


def sent(plan: Plan) -> list[Any]:
    return msgspec.json.decode(plan.body)["requests"]  # type: ignore[no-any-return]


CLOSE = {"type": "close"}


@pytest.mark.parametrize(
    "sql",
    ["SELECT 1", "  -- note\n select 1;", "VALUES (1)", "EXPLAIN DELETE FROM t", "PRAGMA table_info(t)", ""],
)
def test_reads_may_go_anywhere(sql: str) -> None:
    assert plan(execute(sql), CLOSE).need is Need.READ


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "WITH x AS (SELECT 1) DELETE FROM t",
        "BEGIN",
        "COMMIT",
        "SAVEPOINT s",
        "CREATE TEMP TABLE x(a)",
        "PRAGMA foreign_keys = ON",
        "SELECT last_insert_rowid()",
        "SELECT 1; DELETE FROM t",
        "gibberish",
        "ATTACH 'x' AS y",
    ],
)
def test_what_is_no_read_candidate_goes_to_the_leader(sql: str) -> None:
    assert plan(execute(sql)).need is Need.LEADER


def test_one_write_takes_the_whole_request_to_the_leader() -> None:
    assert plan(execute("SELECT 1"), batch("SELECT 2", "DELETE FROM t"), CLOSE).need is Need.LEADER


def test_describing_a_write_is_a_read() -> None:
    assert plan({"type": "describe", "sql": "DELETE FROM t"}, {"type": "get_autocommit"}).need is Need.READ


def test_a_sequence_is_judged_by_its_pieces() -> None:
    assert plan({"type": "sequence", "sql": "SELECT 1; SELECT 2;"}).texts == ("SELECT 1", "SELECT 2")
    assert plan({"type": "sequence", "sql": "SELECT 1; DROP TABLE t"}).need is Need.LEADER


def test_a_read_only_transaction_may_go_to_a_follower() -> None:
    """R21: READONLY goes to a follower; the shape is @libsql/client's (hrana.md 2.4)."""
    read = plan(batch("BEGIN TRANSACTION READONLY", "SELECT 1", "COMMIT", "ROLLBACK"), CLOSE)
    assert (read.need, read.opens) == (Need.READ, True)
    assert plan(batch("BEGIN TRANSACTION READONLY", "DELETE FROM t", "COMMIT")).need is Need.LEADER
    assert plan(batch("BEGIN READONLY", "COMMIT", "BEGIN", "COMMIT")).need is Need.LEADER


def test_the_body_is_untouched_when_nothing_stands_in_for_anything() -> None:
    body = b'{ "requests" : [{"type":"execute","stmt":{"sql":"SELECT 1","unknown":[]}}] }'
    made = plan_pipeline(
        decode_pipeline(body, version=2), body, stored={}, settings=Settings(), known=KNOWN, limits=StreamLimits()
    )
    assert made.body is body


def test_texts_stored_in_the_same_request_are_the_nodes_business() -> None:
    requests = [{"type": "store_sql", "sql_id": 1, "sql": "DELETE FROM t"}, {"type": "execute", "stmt": {"sql_id": 1}}]
    made = plan(*requests)
    assert made.need is Need.LEADER
    assert sent(made) == requests
    assert made.stored == {1: "DELETE FROM t"}


def test_texts_stored_earlier_are_written_out() -> None:
    named = [{"name": "x", "value": {"type": "null"}}]
    made = plan({"type": "execute", "stmt": {"sql_id": 1, "named_args": named}}, stored={1: "SELECT :x"})
    [request] = sent(made)
    assert (request["stmt"]["sql"], request["stmt"]["sql_id"]) == ("SELECT :x", None)
    assert request["stmt"]["named_args"] == named
    for kind in ("describe", "sequence"):
        assert sent(plan({"type": kind, "sql_id": 1}, stored={1: "SELECT 1"}))[0]["sql"] == "SELECT 1"


def test_a_closed_text_is_unknown_and_left_to_the_node() -> None:
    made = plan({"type": "close_sql", "sql_id": 1}, {"type": "execute", "stmt": {"sql_id": 1}}, stored={1: "SELECT 1"})
    assert sent(made)[1]["stmt"] == {"sql_id": 1}
    assert made.stored == {}


def test_stored_texts_are_bounded() -> None:
    with pytest.raises(StatementFailed) as caught:
        plan(*[{"type": "store_sql", "sql_id": n, "sql": "SELECT 1"} for n in range(51)])
    assert caught.value.statement_code == "SQL_STORE_TOO_MANY"


def test_a_walship_pragma_becomes_a_select_of_its_answer() -> None:
    made = plan(batch("PRAGMA walship_consistency = 'any'", "PRAGMA walship_ack", "PRAGMA walship_status"))
    assert made.settings.level is Level.ANY
    assert made.need is Need.READ
    assert [step["stmt"]["sql"] for step in sent(made)[0]["batch"]["steps"]] == [
        "SELECT 'any' AS \"walship_consistency\"",
        'SELECT 1 AS "walship_ack"',
        "SELECT '{\"it''s\": 1}' AS \"walship_status\"",
    ]


def test_wait_for_becomes_the_floor() -> None:
    assert plan(execute("PRAGMA walship_wait_for = '3.120'")).settings.floor == Position(3, 120)
    assert plan(execute("PRAGMA walship_ack = 2")).settings.ack == 2


def test_describing_a_pragma_sets_nothing() -> None:
    made = plan({"type": "describe", "sql": "PRAGMA walship_consistency = 'any'"})
    assert made.settings.level is Level.SESSION
    assert sent(made)[0]["sql"] == "SELECT 'any' AS \"walship_consistency\""


@pytest.mark.parametrize(
    "sql", ["PRAGMA walship_consistency = 'soon'", "PRAGMA walship_ack = -1", "PRAGMA walship_wait_for = 'x'"]
)
def test_a_bad_setting_is_a_bad_argument(sql: str) -> None:
    with pytest.raises(StatementFailed) as caught:
        plan(execute(sql))
    assert caught.value.statement_code == "ARGS_INVALID"


def test_a_pragma_of_walship_inside_a_script() -> None:
    made = plan({"type": "sequence", "sql": "PRAGMA walship_consistency='any'; SELECT 1"})
    assert sent(made)[0]["sql"] == "SELECT 'any' AS \"walship_consistency\";\nSELECT 1"


def test_temp_objects_and_settings_make_state_and_counters_do_not() -> None:
    assert plan(execute("CREATE TEMP TABLE x(a)")).makes_state
    assert plan(execute("PRAGMA foreign_keys = ON")).makes_state
    assert not plan(execute("SELECT changes()")).makes_state


def test_a_cursor_is_planned_as_a_batch() -> None:
    body = (
        b'{"batch":{"steps":[{"stmt":{"sql_id":1}},{"stmt":{"sql":"SELECT 1"},"condition":{"type":"is_autocommit"}}]}}'
    )
    made = plan_cursor(
        decode_cursor(body),
        body,
        stored={1: "DELETE FROM t"},
        settings=Settings(),
        known=KNOWN,
        limits=StreamLimits(),
    )
    assert made.need is Need.LEADER
    steps = msgspec.json.decode(made.body)["batch"]["steps"]
    assert steps[0]["stmt"]["sql"] == "DELETE FROM t"
    assert steps[1]["condition"] == {"type": "is_autocommit"}
