"""Statements through the service: results and errors as hrana.md 1.3 and 1.5 say."""

from __future__ import annotations

import msgspec
import pytest

from tests.service.bench import CLOSE, Bench, batch, code_of, execute, following, results, rows_of, steps_of, stmt
from walship.errors import NotLeader, NotReadOnly, ProtocolViolation
from walship.hrana.types import (
    And,
    Batch,
    BatchStep,
    CloseSqlRequest,
    DescribeRequest,
    ExecuteRequest,
    GetAutocommitRequest,
    IsAutocommit,
    IsError,
    IsOk,
    NamedArg,
    Not,
    SequenceRequest,
    Stmt,
    StoreSqlRequest,
    TextValue,
)
from walship.service.request import Call

TABLE = "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE)"


async def test_insert_reports_count_and_rowid_as_hrana_wants_them(bench: Bench) -> None:
    """hrana.md 1.3: affected_row_count is a number, last_insert_rowid a string, and only an INSERT has one."""
    await bench.run(TABLE)
    inserted = (await bench.run("INSERT INTO t (name) VALUES (?), (?)", "a", "b"))["response"]["result"]
    assert (inserted["affected_row_count"], inserted["last_insert_rowid"]) == (2, "2")
    updated = (await bench.run("UPDATE t SET name = name || 'x'"))["response"]["result"]
    assert (updated["affected_row_count"], updated["last_insert_rowid"]) == (2, None)
    selected = (await bench.run("SELECT * FROM t"))["response"]["result"]
    assert (selected["affected_row_count"], selected["last_insert_rowid"]) == (0, None)
    with_insert = await bench.run("WITH x(n) AS (VALUES ('w')) INSERT INTO t (name) SELECT n FROM x RETURNING name")
    assert rows_of(with_insert) == [["w"]]
    assert with_insert["response"]["result"]["last_insert_rowid"] == "3"


async def test_ddl_after_dml_counts_nothing(bench: Bench) -> None:
    """SQLite does not reset changes(); the statement's kind decides (hrana.md 1.3)."""
    await bench.run(TABLE)
    reply = await bench.call(execute("INSERT INTO t (name) VALUES ('a')"), execute("CREATE TABLE u (a)"), CLOSE)
    assert results(reply)[1]["response"]["result"]["affected_row_count"] == 0


async def test_declared_types_are_given(bench: Bench) -> None:
    await bench.run(TABLE)
    result = (await bench.run("SELECT id, name, 1 AS one FROM t"))["response"]["result"]
    assert result["cols"] == [
        {"name": "id", "decltype": "INTEGER"},
        {"name": "name", "decltype": "TEXT"},
        {"name": "one", "decltype": None},
    ]


async def test_unwanted_rows_are_left_out_and_columns_stay(bench: Bench) -> None:
    await bench.run(TABLE)
    reply = await bench.call(
        ExecuteRequest(Stmt(sql="INSERT INTO t (name) VALUES ('a'), ('b') RETURNING id", want_rows=False)), CLOSE
    )
    result = results(reply)[0]["response"]["result"]
    assert (result["rows"], len(result["cols"]), result["affected_row_count"]) == ([], 1, 2)
    assert await bench.rows("SELECT count(*) FROM t") == [[2]]


@pytest.mark.parametrize(
    ("sql", "code", "start"),
    [
        ("SELECT nope FROM t", "SQL_INPUT_ERROR", "SQL input error: no such column: nope (at offset 7)"),
        ("SELEC 1", "SQL_PARSE_ERROR", 'SQL string could not be parsed: near "SELEC": syntax error'),
        ("SELECT * FROM nope", "SQLITE_UNKNOWN", "SQLite error: no such table: nope"),
        ("INSERT INTO t (id, name) VALUES (1, 'dup')", "SQLITE_CONSTRAINT", "SQLite error: UNIQUE constraint failed"),
        ("INSERT INTO t (id) VALUES ('x')", "SQLITE_MISMATCH", "SQLite error: datatype mismatch"),
        ("", "SQL_NO_STATEMENT", ""),
        ("-- nothing", "SQL_NO_STATEMENT", ""),
        ("SELECT 1; SELECT 2", "SQL_MANY_STATEMENTS", ""),
        ("INSERT INTO t (name) VALUES ('m'); SELECT 2", "SQL_MANY_STATEMENTS", ""),
        ("ATTACH 'x' AS y", "BLOCKED", "Operation was blocked: "),
        ("VACUUM INTO 'x'", "BLOCKED", "Operation was blocked: "),
        ("SELECT load_extension('x')", "BLOCKED", "Operation was blocked: "),
        ("PRAGMA wal_checkpoint", "BLOCKED", "Operation was blocked: "),
        ("SELECT ?", "ARGS_INVALID", "Arguments do not match SQL parameters: value for parameter 1 not found"),
        ("COMMIT", "SQLITE_UNKNOWN", "SQLite error: cannot commit - no transaction is active"),
        ("ROLLBACK", "SQLITE_UNKNOWN", "SQLite error: cannot rollback - no transaction is active"),
    ],
)
async def test_errors_carry_the_codes_of_sqld(bench: Bench, sql: str, code: str, start: str) -> None:
    await bench.run(TABLE)
    await bench.run("INSERT INTO t VALUES (1, 'a')")
    result = await bench.run(sql)
    assert code_of(result) == code
    assert result["error"]["message"].startswith(start)
    assert await bench.rows("SELECT count(*) FROM t") == [[1]]


async def test_too_many_arguments_are_refused(bench: Bench) -> None:
    assert code_of(await bench.run("SELECT 1", 5)) == "ARGS_INVALID"


@pytest.mark.parametrize("sql", ["SELECT 1;", "SELECT 1 ; -- done", ";; SELECT 1", "/* x */ SELECT 1 ;;"])
async def test_trailing_semicolons_and_comments_are_one_statement(bench: Bench, sql: str) -> None:
    """hrana.md 6, pitfall 6."""
    assert await bench.rows(sql) == [[1]]


async def test_named_arguments_are_found_with_and_without_prefix(bench: Bench) -> None:
    args = [NamedArg("a", TextValue("x")), NamedArg("@b", TextValue("y"))]
    reply = await bench.call(ExecuteRequest(Stmt(sql="SELECT :a, @b", named_args=args)), CLOSE)
    assert rows_of(results(reply)[0]) == [["x", "y"]]


async def test_one_failing_request_does_not_stop_the_others(bench: Bench) -> None:
    """hrana.md 1.2: all requests run, exactly one result each."""
    reply = await bench.call(execute("SELECT nope"), execute("SELECT 2"), CLOSE)
    assert [result["type"] for result in results(reply)] == ["error", "ok", "ok"]


async def test_batch_conditions_and_skipped_steps_are_exact(bench: Bench) -> None:
    """hrana.md 1.3: a skipped step is null in both lists, and neither ok nor an error."""
    await bench.run(TABLE)
    request = batch(
        "INSERT INTO t (name) VALUES ('a')",
        ("INSERT INTO t (name) VALUES ('a')", IsOk(0)),
        ("SELECT 'skipped'", IsOk(1)),
        ("SELECT 'recovered'", And([IsError(1), Not(IsError(2)), Not(IsOk(2))])),
        ("SELECT 'auto'", IsAutocommit()),
    )
    result = results(await bench.call(request, CLOSE))[0]["response"]["result"]
    assert [r is not None for r in result["step_results"]] == [True, False, False, True, True]
    assert [e and e["code"] for e in result["step_errors"]] == [None, "SQLITE_CONSTRAINT", None, None, None]


async def test_sequence_runs_all_and_stops_at_the_first_error(bench: Bench) -> None:
    sql = "CREATE TABLE t (a); INSERT INTO t VALUES (1); INSERT INTO nope VALUES (1); INSERT INTO t VALUES (2)"
    result = results(await bench.call(SequenceRequest(sql=sql), CLOSE))[0]
    assert code_of(result) == "SQLITE_UNKNOWN"
    assert await bench.rows("SELECT a FROM t") == [[1]]


async def test_sequence_of_only_comments_is_fine(bench: Bench) -> None:
    assert results(await bench.call(SequenceRequest(sql="-- nothing\n;"), CLOSE))[0]["type"] == "ok"


async def test_describe_runs_nothing_and_names_parameters_with_their_prefix(bench: Bench) -> None:
    await bench.run(TABLE)
    requests = [
        DescribeRequest(sql="SELECT id AS x FROM t WHERE name = :n AND id > ?3 AND id < ?"),
        DescribeRequest(sql="INSERT INTO t (name) VALUES ('z')"),
        DescribeRequest(sql="EXPLAIN DELETE FROM t"),
    ]
    first, second, third = [r["response"]["result"] for r in results(await bench.call(*requests))]
    assert [p["name"] for p in first["params"]] == [":n", None, "?3", None]
    assert (first["is_readonly"], second["is_readonly"], third["is_explain"]) == (True, False, True)
    assert first["cols"] == [{"name": "x", "decltype": "INTEGER"}]
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]


async def test_stored_texts_live_on_their_stream_and_are_bounded(bench: Bench) -> None:
    """hrana.md 1.5: 50 texts of 5,000 bytes."""
    reply, answers = await bench.on(0, StoreSqlRequest(1, "SELECT 41"), ExecuteRequest(Stmt(sql_id=1)))
    assert rows_of(answers[1]) == [[41]]
    reply, answers = await bench.on(reply.stream, ExecuteRequest(Stmt(sql_id=1)), StoreSqlRequest(2, "x" * 5001))
    assert (rows_of(answers[0]), code_of(answers[1])) == ([[41]], "SQL_STORE_TOO_LARGE")
    _, answers = await bench.on(reply.stream, *[StoreSqlRequest(n, "SELECT 1") for n in range(100, 150)])
    assert code_of(answers[-1]) == "SQL_STORE_TOO_MANY"
    with pytest.raises(ProtocolViolation, match="not stored"):
        await bench.on(reply.stream, CloseSqlRequest(1), ExecuteRequest(Stmt(sql_id=1)))


async def test_requests_behind_a_close_are_a_protocol_error(bench: Bench) -> None:
    with pytest.raises(ProtocolViolation):
        await bench.call(CLOSE, execute("SELECT 1"))


async def test_large_results_arrive_whole(bench: Bench) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) SELECT i, 'row ' || i FROM n"
    rows = await bench.rows(sql)
    assert rows == [[i, f"row {i}"] for i in range(1, 10_001)]


async def test_response_too_large_is_an_error_and_its_writes_are_undone(bench: Bench) -> None:
    """A write whose RETURNING rows cannot be delivered is undone in autocommit, so that an error means not done."""
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30) "
    await bench.run("CREATE TABLE big (a)")
    result = await bench.run(many + "INSERT INTO big SELECT hex(zeroblob(500000)) FROM n RETURNING a")
    assert code_of(result) == "RESPONSE_TOO_LARGE"
    assert await bench.rows("SELECT count(*) FROM big") == [[0]]
    assert code_of(await bench.run(many + "SELECT hex(zeroblob(500000)) FROM n")) == "RESPONSE_TOO_LARGE"


async def test_settings_that_walship_decides_are_accepted_and_tell_the_value_in_force(bench: Bench) -> None:
    """hrana.md 3.2: programs set these at start."""
    assert await bench.rows("PRAGMA journal_mode = WAL") == [["wal"]]
    assert await bench.rows("PRAGMA synchronous = OFF") == [[1]]
    assert await bench.rows("PRAGMA journal_mode") == [["wal"]]
    assert await bench.rows("PRAGMA page_size = 4096") == [[4096]]


@pytest.mark.parametrize("sql", ["PRAGMA journal_mode = DELETE", "PRAGMA page_size = 512"])
async def test_what_cannot_be_changed_is_refused_when_another_value_is_asked_for(bench: Bench, sql: str) -> None:
    """R22."""
    assert code_of(await bench.run(sql)) == "BLOCKED"
    assert await bench.rows("PRAGMA page_size") == [[4096]]


@pytest.mark.parametrize(
    ("sql", "column"), [("PRAGMA journal_mode = WAL", "journal_mode"), ("PRAGMA busy_timeout = 5000", "timeout")]
)
async def test_a_setting_that_walship_decides_is_described_as_what_answers_it(
    bench: Bench, sql: str, column: str
) -> None:
    """PyPI libsql describes every statement before it runs it (hrana.md 2.1)."""
    answers = results(await bench.call(DescribeRequest(sql=sql), DescribeRequest(sql="BEGIN READONLY")))
    assert [answer["type"] for answer in answers] == ["ok", "ok"]
    result = answers[0]["response"]["result"]
    assert ([col["name"] for col in result["cols"]], result["is_readonly"]) == ([column], True)


async def test_describing_a_setting_of_a_connection_does_not_set_it(bench: Bench) -> None:
    """SQLite sets foreign_keys when it prepares `PRAGMA foreign_keys = ON`; a describe runs nothing (hrana.md 1.2)."""
    describe = DescribeRequest(sql="PRAGMA foreign_keys = ON")
    (answer,) = results(await bench.call(describe))
    assert (answer["type"], answer["response"]["result"]["cols"]) == ("ok", [])
    begun, _ = await bench.on(0, execute("BEGIN"))
    _, answers = await bench.on(begun.stream, execute("COMMIT"), describe, execute("PRAGMA foreign_keys"))
    assert rows_of(answers[2]) == [[0]]


async def test_values_that_json_cannot_carry_fail_their_statement(bench: Bench) -> None:
    assert code_of(await bench.run("SELECT 9e999")) == "RESULT_NOT_JSON"
    assert code_of(await bench.run("SELECT CAST(x'ff' AS TEXT)")) == "RESULT_NOT_JSON"


async def test_read_only_calls_refuse_to_write_before_anything_runs(bench: Bench) -> None:
    """R22."""
    await bench.run(TABLE)
    for sql in ("INSERT INTO t (name) VALUES ('a')", "WITH x AS (SELECT 1) DELETE FROM t", "PRAGMA user_version = 7"):
        with pytest.raises(NotReadOnly):
            await bench.run(sql, read_only=True)
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]
    assert await bench.rows("PRAGMA user_version") == [[0]]


async def test_explain_of_a_write_is_a_read(bench: Bench) -> None:
    """perf.md 5: explain overrides the write verdict."""
    await bench.run(TABLE)
    assert (await bench.run("EXPLAIN QUERY PLAN DELETE FROM t WHERE id = 1", read_only=True))["type"] == "ok"


async def test_autocommit_is_told(bench: Bench) -> None:
    reply, answers = await bench.on(0, execute("BEGIN"), GetAutocommitRequest())
    assert (answers[1]["response"]["is_autocommit"], reply.autocommit) == (False, False)


async def test_write_on_a_follower_names_the_leader(bench: Bench) -> None:
    """R23."""
    await bench.run(TABLE)
    async with following(bench, bench.host.watermarks.captured) as follower:
        with pytest.raises(NotLeader, match="node1"):
            await follower.run("INSERT INTO t (name) VALUES ('a')")
        with pytest.raises(NotLeader):
            await follower.on(0, execute("BEGIN"))
        with pytest.raises(NotReadOnly):
            await follower.run("WITH x AS (SELECT 1) DELETE FROM t", read_only=True)
        assert await follower.rows("SELECT count(*) FROM t") == [[0]]
        assert await follower.rows("SELECT count(*) FROM t", read_only=True) == [[0]]


async def test_cursor_lines_follow_the_protocol(bench: Bench) -> None:
    """hrana.md 1.3 and 2.2: skipped steps send nothing; a step may begin, give rows and fail."""
    await bench.run(TABLE)
    steps = steps_of(
        "INSERT INTO t (name) VALUES ('a') RETURNING id",
        ("SELECT 1", IsAutocommit()),
        ("SELECT 2", IsError(0)),
        "SELECT nope",
    )
    reply = await bench.service.cursor(Call([]), steps)
    lines = [msgspec.json.decode(line) for chunk in [c async for c in reply.lines] for line in chunk.splitlines()]
    assert [(line["type"], line.get("step")) for line in lines] == [
        ("step_begin", 0),
        ("row", None),
        ("step_end", None),
        ("step_begin", 1),
        ("row", None),
        ("step_end", None),
        ("step_error", 3),
    ]
    assert (lines[2]["affected_row_count"], lines[2]["last_insert_rowid"]) == (1, "1")
    assert reply.autocommit
    assert reply.stream == 0


async def test_cursor_steps_without_wanted_rows_still_begin_and_end(bench: Bench) -> None:
    """hrana.md 2.2: the serverless clients probe with `SELECT 1`, want_rows=false."""
    reply = await bench.service.cursor(Call([]), Batch([BatchStep(stmt("SELECT 1", want_rows=False))]))
    lines = [
        msgspec.json.decode(line)["type"] for chunk in [c async for c in reply.lines] for line in chunk.splitlines()
    ]
    assert lines == ["step_begin", "step_end"]
