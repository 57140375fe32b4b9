"""Classification agrees with SQLite where SQLite can be asked, and with perf.md 5 where it decides."""

from __future__ import annotations

import apsw
import apsw.ext
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.sql.classify import Kind, classify, counts_changes, is_insert, split
from walship.sql.pragmas import Action

READ, WRITE = Kind.READ_CANDIDATE, Kind.WRITE

VERDICTS = [
    # perf.md 5, the table of verified verdicts
    ("WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x", WRITE),
    ("INSERT INTO t VALUES (1) RETURNING a", WRITE),
    ("REPLACE INTO t VALUES (1)", WRITE),
    ("EXPLAIN INSERT INTO t VALUES (1)", READ),
    ("EXPLAIN QUERY PLAN DELETE FROM t", READ),
    ("BEGIN", Kind.BEGIN_DEFERRED),
    ("BEGIN IMMEDIATE", Kind.BEGIN_IMMEDIATE),
    ("BEGIN EXCLUSIVE", Kind.BEGIN_IMMEDIATE),
    ("COMMIT", Kind.COMMIT),
    ("END", Kind.COMMIT),
    ("ROLLBACK", Kind.ROLLBACK),
    ("SAVEPOINT a", Kind.SAVEPOINT),
    ("RELEASE a", Kind.RELEASE),
    ("ATTACH 'x' AS y", Kind.REFUSED),
    ("DETACH y", Kind.REFUSED),
    ("PRAGMA user_version", READ),
    ("PRAGMA user_version = 5", WRITE),
    ("PRAGMA journal_mode", Kind.PRAGMA),
    ("PRAGMA wal_checkpoint", Kind.REFUSED),
    ("PRAGMA optimize", WRITE),
    ("PRAGMA query_only=1", Kind.CONNECTION_STATE),
    ("PRAGMA foreign_keys=on", Kind.CONNECTION_STATE),
    ("PRAGMA cache_size=10", Kind.PRAGMA),
    ("VACUUM", WRITE),
    ("VACUUM main", WRITE),
    ("VACUUM INTO 'x'", Kind.REFUSED),
    ("vacuum main into 'x'", Kind.REFUSED),
    ("ANALYZE", WRITE),
    ("REINDEX", WRITE),
    ("SELECT last_insert_rowid(), changes()", Kind.CONNECTION_STATE),
    ("SELECT random()", READ),
    ("SELECT 1; INSERT INTO t VALUES (1)", Kind.MANY),
    ("", Kind.EMPTY),
    ("-- nothing\n /* here */ ", Kind.EMPTY),
    (";;", Kind.EMPTY),
    (";; select 1", READ),
    ("BEGIN CONCURRENT", WRITE),
    ("CREATE TEMP TABLE a(b)", Kind.CONNECTION_STATE),
    ("INSERT INTO temp.a VALUES (1)", Kind.CONNECTION_STATE),
    # hrana.md 3.1 and the corners of the grammar
    ("BEGIN TRANSACTION READONLY", Kind.BEGIN_READONLY),
    ("begin readonly", Kind.BEGIN_READONLY),
    ("BEGIN DEFERRED TRANSACTION", Kind.BEGIN_DEFERRED),
    ("BEGIN IMMEDIATE TRANSACTION 'x'", Kind.BEGIN_IMMEDIATE),
    ("BEGIN IMMEDIATE nonsense", WRITE),
    ("ROLLBACK TO a", Kind.ROLLBACK_TO),
    ("ROLLBACK TRANSACTION TO SAVEPOINT a", Kind.ROLLBACK_TO),
    ("release savepoint a;", Kind.RELEASE),
    ("/* c */ SELECT 1 -- end", READ),
    ("\ufeffSELECT 1", READ),
    ("VALUES (1)", READ),
    ("WITH replace AS (SELECT 1) SELECT * FROM replace", READ),
    ("WITH a(replace) AS (SELECT 1), b AS MATERIALIZED (SELECT (2)) SELECT 1", READ),
    ("WITH a AS (SELECT 1) VALUES (2)", READ),
    ("WITH RECURSIVE a AS (SELECT 1) DELETE FROM t", WRITE),
    ('SELECT "changes" /* c */ ()', Kind.CONNECTION_STATE),
    ("SELECT changes FROM audit", READ),
    ("SELECT 'changes()'", READ),
    ("UPDATE t SET a = changes()", Kind.CONNECTION_STATE),
    ("SELECT * FROM sqlite_temp_master", Kind.CONNECTION_STATE),
    ("SELECT * FROM [temp].a", Kind.CONNECTION_STATE),
    ("SELECT temp FROM weather", READ),
    ("CREATE TABLE a(b)", WRITE),
    ("CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; SELECT CASE WHEN 1 THEN 2 END; END", WRITE),
    ("CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; END; SELECT 2", Kind.MANY),
    ('PRAGMA main.table_info("t")', READ),
    ("PRAGMA temp.table_info('t')", Kind.CONNECTION_STATE),
    ("PRAGMA integrity_check", READ),
    ("PRAGMA unheard_of", Kind.REFUSED),
    ("PRAGMA read_uncommitted", Kind.PRAGMA),
    ("PRAGMA walship_consistency = 'linearizable'", Kind.PRAGMA),
    ("PRAGMA writable_schema = on", Kind.REFUSED),
    ("SELECT $a(;) + 1", READ),
    ("SELECT 'unterminated", READ),
    ("SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9, CHANGES ()", Kind.CONNECTION_STATE),
    ('SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9, "last_insert_rowid" /* c */ ()', Kind.CONNECTION_STATE),
    ("SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9 FROM a, b, [temp].c", Kind.CONNECTION_STATE),
    ("SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9 FROM sqlite_temp_master", Kind.CONNECTION_STATE),
    ("SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9, changes, temp, 'temp.a changes()' FROM audit -- changes()", READ),
    ("nonsense", WRITE),
    ("'text'", WRITE),
]


@pytest.mark.parametrize(("sql", "kind"), VERDICTS)
def test_a_text_gets_its_verdict(sql: str, kind: Kind) -> None:
    """R22, perf.md 5."""
    assert classify(sql).kind is kind


@pytest.mark.parametrize(
    ("sql", "insert", "counts"),
    [
        ("INSERT INTO t VALUES (1)", True, True),
        ("REPLACE INTO t VALUES (1)", True, True),
        ("WITH a AS (SELECT 1) INSERT INTO t SELECT 1", True, True),
        ("UPDATE t SET a = 1", False, True),
        ("DELETE FROM t", False, True),
        ("WITH a AS (SELECT 1) DELETE FROM t", False, True),
        ("SELECT 1", False, False),
        ("EXPLAIN INSERT INTO t VALUES (1)", False, False),
        ("CREATE TABLE x AS SELECT 1", False, False),
        ("WITH insert_into AS (SELECT 1) SELECT 1", False, False),
    ],
)
def test_counters_follow_the_statement_kind(sql: str, insert: bool, counts: bool) -> None:
    """hrana.md 1.3: SQLite does not reset its counters, so the kind decides what is reported."""
    assert (is_insert(sql), counts_changes(sql)) == (insert, counts)


def test_a_setting_walship_decides_is_answered_with_the_value_in_force() -> None:
    ruling = classify("PRAGMA journal_mode = WAL").ruling
    assert ruling is not None
    assert (ruling.action, ruling.column, ruling.value) == (Action.ANSWER, "journal_mode", "wal")


def test_another_journal_mode_is_refused() -> None:
    """R22: whoever asks for it relies on getting it."""
    verdict = classify("PRAGMA journal_mode = DELETE")
    assert (verdict.kind, verdict.reason) == (
        Kind.REFUSED,
        "PRAGMA journal_mode: the -wal is what is shipped to the followers",
    )


@pytest.mark.parametrize("sql", ["PRAGMA main.page_size", "pragma PAGE_SIZE = 512", "PRAGMA page_size(512)"])
def test_a_kept_setting_is_answered_by_its_query_form(sql: str) -> None:
    ruling = classify(sql).ruling
    assert ruling is not None
    assert ruling.action is (Action.READ if "512" not in sql else Action.ANSWER)
    if ruling.action is Action.ANSWER:
        assert ruling.query == "PRAGMA page_size"


# --- agreement with SQLite --------------------------------------------------------------------------------------

STATEMENTS = [
    "select 1",
    "select ';'",
    'select ";" from (select 1 as ";")',
    "select [a;b] from (select 1 as [a;b])",
    "select `;` from (select 2 as `;`)",
    "select 'it''s;' /* ; */ -- ;\n, 2",
    "select $v(;) || :a || @b || ?1",
    "select 1 - -1, 4 /2, x'3b', 1.5e3, 0x3b",
    "insert into t values (1) returning a",
    "create trigger r after insert on t begin select 1; update t set a = case when 1 then 2 end; end",
    "explain query plan create temp trigger r2 after insert on t begin delete from t; end",
    "create table if not exists u(a, b)",
    "with a as (select ';') select * from a",
    "pragma user_version",
    "begin",
    "select '💥;' as é",
    # longer than the head that is looked at token by token
    "select 1, 2, 3, 4, 5, 6, 7, 8, 9, ';', \"a;\", [a;], `a;`, $v(;), 'it''s;' /* ; */ -- ;\n, 2 - -1 "
    "from (select 1 as [a;])",
    "insert into t values (1), (2), (3), (4), (5), (';'), (x'3b') /* ; */, (8.5e3), (- 9), (4 / 2), (?1), (:a)",
    "create trigger long after insert on t when new.a > 1 or new.a < 1 or new.a = 1 or new.a is null "
    "begin update t set a = case when 1 then 2 end where a = 1; delete from t where a = ';' and a = 2; end",
]
BLANKS = ["", " ", "\n", "\t", "-- c;\n", "/* ; */", "/*'*/", "/**/", "/*/ ; */"]


def sqlite_split(connection: apsw.Connection, sql: str) -> list[str]:
    """The statements as SQLite cuts them, in the same trimmed form as ours."""
    found: list[str] = []
    rest: str | None = sql
    while rest:
        remaining = apsw.ext.query_info(connection, rest).query_remaining
        found.append(rest[: len(rest) - len(remaining or "")])
        rest = remaining
    return found


def normal(statements: list[str]) -> list[list[str]]:
    """Statements without what surrounds them: SQLite keeps semicolons and leading comments."""
    return [split(statement) for statement in statements if split(statement)]


@given(
    st.lists(
        st.tuples(st.sampled_from([*BLANKS, "\ufeff"]), st.sampled_from(STATEMENTS), st.sampled_from(BLANKS)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["", ";", ";;", "; -- end", "; /* end"]),
)
def test_statements_are_cut_where_sqlite_cuts_them(parts: list[tuple[str, str, str]], tail: str) -> None:
    connection = apsw.Connection(":memory:")
    connection.execute("create table t(a)")
    sql = ";".join("".join(part) for part in parts) + tail
    ours = split(sql)
    assert len(ours) == len(parts)
    assert ours == [statement for piece in normal(sqlite_split(connection, sql)) for statement in piece]


@given(st.text(alphabet="abct;'\"[]`-/* \n().$:?1=é", max_size=40))
def test_sqlite_finds_no_more_than_one_statement_where_we_find_one(sql: str) -> None:
    """What we call one statement, SQLite must not run as two."""
    connection = apsw.Connection(":memory:")
    if classify(sql).kind in (Kind.MANY, Kind.EMPTY):
        return
    try:
        info = apsw.ext.query_info(connection, sql)
    except apsw.Error:
        return
    assert not split(info.query_remaining or "")


@given(st.text(max_size=60))
def test_any_text_has_a_verdict(sql: str) -> None:
    verdict = classify(sql)
    assert (verdict.kind is Kind.EMPTY) == (split(sql) == [])
    assert (verdict.kind is Kind.MANY) == (len(split(sql)) > 1)


def test_what_sqlite_calls_a_transaction_statement_we_do_too() -> None:
    """A BEGIN taken for anything else would leave a transaction open on a shared connection."""
    connection = apsw.Connection(":memory:")
    words = ["", "deferred", "immediate", "exclusive", "readonly", "transaction", "transaction x", "transaction [to]"]
    for first in words:
        for second in words:
            sql = f"begin {first} {second}"
            try:
                apsw.ext.query_info(connection, sql)
            except apsw.SQLError:
                continue
            assert classify(sql).kind in (Kind.BEGIN_DEFERRED, Kind.BEGIN_IMMEDIATE, Kind.BEGIN_READONLY), sql


@pytest.mark.parametrize(
    "sql",
    [
        "a," * 250_000,
        "$" + "::" * 250_000 + "!",
        "$(" * 250_000,
        "select 1" + " $a(" * 250_000,
        "select " + "/*" * 250_000,
        "select " + "1-/" * 150_000,
        "select 1" + ",temp" * 100_000,
        "select 1, 2, 3, 4, 5, 6, 7, 8, 9 " + "[" * 500_000,
        "select 1, 2, 3, 4, 5, 6, 7, 8, 9 " + "'a" * 250_001,
    ],
    ids=lambda sql: sql[:12],
)
def test_hostile_texts_take_linear_time(sql: str) -> None:
    """It runs on event loops: anything quadratic in half a megabyte would run into the test's time limit."""
    classify(sql)


def test_long_texts_are_judged_but_not_kept() -> None:
    from walship.sql import classify as module

    before = module._cached.cache_info().currsize
    assert classify("insert into t values " + ",".join(["(1)"] * 100_000)).kind is WRITE
    assert module._cached.cache_info().currsize == before
