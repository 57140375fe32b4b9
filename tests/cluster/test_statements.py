"""Statements as users write them, through the proxy of a real cluster (perf.md 5, hrana.md 3, R21, R22).

Each row says what a client gets and who served it. The three database files are compared at the end, so that whatever
ran here was replicated too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.client import Client, Failed
from tests.cluster.harness import Cluster, same_files

LEADER, FOLLOWER = "n1", ("n2", "n3")
SERIES = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {}) SELECT n FROM c"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("statements"))
    try:
        cluster.start()
        with cluster.client() as client:
            client.sequence(
                "CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT UNIQUE)",
                "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
                "CREATE TABLE child (id INTEGER PRIMARY KEY, p INTEGER REFERENCES parent)",
                "CREATE VIEW seen AS SELECT id, v FROM t",
                "CREATE TRIGGER through INSTEAD OF INSERT ON seen BEGIN INSERT INTO t(v) VALUES (new.v); END",
                "CREATE VIRTUAL TABLE words USING fts5(text)",
                "INSERT INTO parent VALUES (1)",
            )
        yield cluster
        cluster.wait_level()
        same_files(cluster.stop())
    finally:
        cluster.end()


@dataclass(frozen=True)
class Answer:
    """One statement's result as it came."""

    rows: list[list[Any]]
    affected: int
    rowid: str | None
    served_by: str

    @property
    def value(self) -> Any:
        return self.rows[0][0]


class Stream:
    """One Hrana stream of a client; each call is a request of its own."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._baton: str | None = None

    def ask(self, *requests: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        headers, text = self._client.post("/v3/pipeline", {"baton": self._baton, "requests": requests})
        reply = json.loads(text)
        self._baton = reply["baton"]
        return reply["results"], headers["walship-served-by"]

    def run(self, sql: str) -> Answer:
        (result,), served_by = self.ask({"type": "execute", "stmt": {"sql": sql}})
        return answer(result, served_by)

    def batch(self, *steps: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        (result,), _ = self.ask({"type": "batch", "batch": {"steps": steps}})
        assert result["type"] == "ok", result
        whole = result["response"]["result"]
        return whole["step_results"], whole["step_errors"]

    def script(self, sql: str) -> None:
        (result,), _ = self.ask({"type": "sequence", "sql": sql})
        if result["type"] == "error":
            raise Failed(result["error"]["code"], result["error"]["message"])

    @property
    def autocommit(self) -> bool:
        (result,), _ = self.ask({"type": "get_autocommit"})
        told: bool = result["response"]["is_autocommit"]
        return told


def answer(result: dict[str, Any], served_by: str) -> Answer:
    if result["type"] == "error":
        raise Failed(result["error"]["code"], result["error"]["message"])
    found = result["response"]["result"]
    rows = [[value.get("value") for value in row] for row in found["rows"]]
    return Answer(rows, found["affected_row_count"], found["last_insert_rowid"], served_by)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.client() as client:
        client.execute("DELETE FROM t")
        yield client


@pytest.fixture
def stream(client: Client) -> Stream:
    return Stream(client)


@pytest.fixture
def other(cluster: Cluster) -> Iterator[Stream]:
    with cluster.client() as client:
        yield Stream(client)


def code_of(work: Any) -> str:
    with pytest.raises(Failed) as caught:
        work()
    return caught.value.code


# --- one statement: who runs it, and what it answers ----------------------------------------------------------------

READS = [
    "SELECT id, v FROM t",
    "VALUES (1), (2)",
    "WITH x AS (SELECT 1 AS a) SELECT a FROM x",
    "SELECT random(), datetime('now')",
    "EXPLAIN INSERT INTO t(v) VALUES ('never')",
    "EXPLAIN QUERY PLAN DELETE FROM t",
    "PRAGMA user_version",
    'PRAGMA main.table_info("t")',
    "SELECT name FROM pragma_table_info('t')",
    "PRAGMA integrity_check",
    "PRAGMA foreign_key_check",
    "SELECT count(*) FROM sqlite_master",
    ";; SELECT 1",
    "SELECT 1; -- and nothing else",
]


@pytest.mark.parametrize("sql", READS)
def test_a_read_runs_on_a_follower(stream: Stream, sql: str) -> None:
    assert stream.run(sql).served_by in FOLLOWER
    assert stream.run("SELECT count(*) FROM t WHERE v = 'never'").value == "0"


WRITES = [
    ("INSERT INTO t(v) VALUES ('w1')", 1),
    ("REPLACE INTO t(v) VALUES ('w1')", 1),
    ("INSERT INTO t(v) VALUES ('w2') RETURNING id, v", 1),
    ("WITH x AS (SELECT 'w3' AS a) INSERT INTO t(v) SELECT a FROM x", 1),
    ("WITH replace AS (SELECT 'w2' AS a) UPDATE t SET v = v WHERE v IN (SELECT a FROM replace)", 1),
    ("DELETE FROM t WHERE v GLOB 'w*' RETURNING v", 3),
    ("INSERT INTO seen(v) VALUES ('by trigger')", 0),
    ("INSERT INTO words(text) VALUES ('some words')", 1),
    ("INSERT INTO words(words) VALUES ('optimize')", 1),
    ("PRAGMA user_version = 5", 0),
    ("ANALYZE", 0),
    ("REINDEX t", 0),
    ("VACUUM", 0),
    ("PRAGMA optimize", 0),
]


def test_a_write_runs_on_the_leader_and_counts_its_rows(stream: Stream) -> None:
    for sql, affected in WRITES:
        found = stream.run(sql)
        assert (found.served_by, found.affected) == (LEADER, affected), sql
    assert stream.run("PRAGMA user_version").value == "5"
    assert stream.run("SELECT v FROM t").rows == [["by trigger"]]


def test_returning_gives_rows_and_rowid(stream: Stream) -> None:
    found = stream.run("INSERT INTO t(id, v) VALUES (40, 'r'), (41, 's') RETURNING id, upper(v)")
    assert found == Answer([["40", "R"], ["41", "S"]], 2, "41", LEADER)


REFUSED = [
    ("ATTACH 'x.db' AS x", "BLOCKED"),
    ("ATTACH '' AS x", "BLOCKED"),
    ("DETACH x", "BLOCKED"),
    ("VACUUM INTO 'copy.db'", "BLOCKED"),
    ("SELECT load_extension('x')", "BLOCKED"),
    ("SELECT fts3_tokenizer('simple')", "BLOCKED"),
    ("PRAGMA writable_schema = ON", "BLOCKED"),
    ("PRAGMA schema_version = 7", "BLOCKED"),
    ("PRAGMA wal_checkpoint(TRUNCATE)", "BLOCKED"),
    ("PRAGMA temp_store_directory = '/tmp'", "BLOCKED"),
    ("PRAGMA no_such_pragma", "BLOCKED"),
    ("PRAGMA journal_mode = DELETE", "BLOCKED"),
    ("PRAGMA page_size = 512", "BLOCKED"),
    ("UPDATE sqlite_dbpage SET data = zeroblob(4096)", "SQLITE_UNKNOWN"),
    ("BEGIN CONCURRENT", "SQL_PARSE_ERROR"),
    ("SELEC 1", "SQL_PARSE_ERROR"),
    ("SELECT nowhere FROM t", "SQL_INPUT_ERROR"),
    ("SELECT 1; INSERT INTO t(v) VALUES ('never')", "SQL_MANY_STATEMENTS"),
    ("", "SQL_NO_STATEMENT"),
    ("-- only a comment", "SQL_NO_STATEMENT"),
    ("COMMIT", "SQLITE_UNKNOWN"),
    ("ROLLBACK", "SQLITE_UNKNOWN"),
    ("RELEASE nowhere", "SQLITE_UNKNOWN"),
    ("INSERT INTO child VALUES (1)", "SQLITE_UNKNOWN"),
    ("INSERT INTO parent VALUES (1)", "SQLITE_CONSTRAINT"),
    ("UPDATE sqlite_master SET sql = ''", "SQLITE_UNKNOWN"),
]


@pytest.mark.parametrize(("sql", "code"), REFUSED)
def test_a_refusal_has_a_code_and_changes_nothing(stream: Stream, sql: str, code: str) -> None:
    assert code_of(lambda: stream.run(sql)) == code
    assert stream.autocommit
    assert stream.run("SELECT count(*) FROM t").value == "0"


NO_OPS = [
    ("PRAGMA journal_mode = WAL", "wal"),
    ("PRAGMA journal_mode", "wal"),
    ("PRAGMA synchronous = FULL", "1"),
    ("PRAGMA busy_timeout = 5000", "0"),
    ("PRAGMA mmap_size = 268435456", "0"),
    ("PRAGMA page_size = 4096", "4096"),
    ("PRAGMA read_uncommitted", "0"),
    ("PRAGMA locking_mode = EXCLUSIVE", "normal"),
    ("PRAGMA wal_autocheckpoint = 1", "0"),
]


@pytest.mark.parametrize(("sql", "value"), NO_OPS)
def test_a_setting_that_walship_decides_answers_what_is_in_force(stream: Stream, sql: str, value: str) -> None:
    """hrana.md 3.2: refusing them breaks every program that sets them at its start."""
    assert stream.run(sql).value == value


@pytest.mark.parametrize("name", ["cache_size", "temp_store"])
def test_tuning_is_accepted_and_changes_nothing(stream: Stream, name: str) -> None:
    before = stream.run(f"PRAGMA {name}").value
    assert stream.run(f"PRAGMA {name} = 2").value == before
    assert stream.run(f"PRAGMA {name}").value == before


# --- what SQLite keeps per connection -------------------------------------------------------------------------------


def test_counters_are_the_streams_own_across_requests(stream: Stream, other: Stream) -> None:
    """R21: right on whatever node the question runs."""
    stream.run("INSERT INTO t(id, v) VALUES (7, 'a'), (8, 'b')")
    other.run("INSERT INTO t(id, v) VALUES (90, 'theirs')")
    counted = "SELECT changes(), last_insert_rowid(), total_changes()"
    assert stream.run(counted).rows == [["2", "8", "2"]]
    assert other.run(counted).rows == [["1", "90", "1"]]
    assert stream.run("DELETE FROM t").affected == 3
    assert stream.run(counted).rows == [["3", "8", "5"]]


def test_temp_tables_stay_on_their_stream(stream: Stream, other: Stream) -> None:
    stream.run("CREATE TEMP TABLE mine (a)")
    stream.run("INSERT INTO mine VALUES (1), (2)")
    stream.run("INSERT INTO t(v) SELECT 'from temp ' || a FROM temp.mine")
    assert stream.run("SELECT count(*) FROM mine").value == "2"
    assert code_of(lambda: other.run("SELECT * FROM mine")) == "SQLITE_UNKNOWN"
    assert other.run("DELETE FROM t").affected == 2


def test_foreign_keys_are_set_per_stream_and_connections_are_clean_when_reused(stream: Stream, other: Stream) -> None:
    stream.run("PRAGMA foreign_keys = ON")
    assert code_of(lambda: stream.run("INSERT INTO child VALUES (1, 404)")) == "SQLITE_CONSTRAINT"
    assert stream.run("PRAGMA foreign_keys").value == "1"
    stream.ask({"type": "close"})
    assert other.run("PRAGMA foreign_keys").value == "0"
    other.run("BEGIN IMMEDIATE")  # takes a connection from the shelf
    other.run("INSERT INTO child VALUES (1, 404)")
    other.run("ROLLBACK")


def test_a_migration_with_foreign_keys_off_around_it(stream: Stream) -> None:
    """hrana.md 2.4: what `migrate` of @libsql/client and drizzle sends, in one batch."""
    texts = [
        "PRAGMA foreign_keys=off",
        "BEGIN DEFERRED",
        "CREATE TABLE moved (id INTEGER PRIMARY KEY, p INTEGER REFERENCES parent)",
        "INSERT INTO moved SELECT * FROM child",
        "DROP TABLE child",
        "ALTER TABLE moved RENAME TO child",
        "COMMIT",
    ]
    steps = [
        {"stmt": {"sql": text}, "condition": {"type": "ok", "step": i - 1} if i else None}
        for i, text in enumerate(texts)
    ]
    undo = {"stmt": {"sql": "ROLLBACK"}, "condition": {"type": "not", "cond": {"type": "ok", "step": 6}}}
    results, errors = stream.batch(*steps, undo, {"stmt": {"sql": "PRAGMA foreign_keys=on"}})
    assert errors == [None] * 9
    assert results[7] is None
    assert stream.autocommit
    assert stream.run("SELECT sql FROM sqlite_master WHERE name = 'child'").value.startswith("CREATE TABLE")


# --- transactions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["BEGIN TRANSACTION READONLY", "BEGIN READONLY"])
def test_a_readonly_transaction_is_on_a_follower_and_really_read_only(
    stream: Stream, other: Stream, begin: str
) -> None:
    """hrana.md 3.1: in stock SQLite READONLY would be a transaction's name."""
    assert stream.run(begin).served_by in FOLLOWER
    before = stream.run("SELECT count(*) FROM t")
    assert before.served_by in FOLLOWER
    other.run("INSERT INTO t(v) VALUES ('meanwhile')")
    assert stream.run("SELECT count(*) FROM t").value == before.value, "one snapshot"
    assert code_of(lambda: stream.run("INSERT INTO t(v) VALUES ('no')")) == "SQLITE_READONLY"
    assert not stream.autocommit
    stream.run("COMMIT")
    assert stream.run("SELECT v FROM t").rows == [["meanwhile"]]


def test_a_deferred_transaction_that_reads_holds_up_no_writer(stream: Stream, other: Stream) -> None:
    """R21: BEGIN takes nothing, a first read takes a snapshot and no turn; writing after others did is SQLITE_BUSY."""
    stream.run("BEGIN")
    assert stream.run("SELECT count(*) FROM t").value == "0"
    started = time.monotonic()
    other.run("INSERT INTO t(v) VALUES ('not held up')")
    assert time.monotonic() - started < 3
    assert stream.run("SELECT count(*) FROM t").value == "0"
    assert code_of(lambda: stream.run("INSERT INTO t(v) VALUES ('too late')")) == "SQLITE_BUSY"
    stream.run("ROLLBACK")
    stream.run("BEGIN")
    stream.run("SELECT count(*) FROM t")
    stream.run("DELETE FROM t")
    stream.run("COMMIT")
    assert other.run("SELECT count(*) FROM t").value == "0"


def test_savepoints_nest(stream: Stream) -> None:
    stream.run("BEGIN")
    stream.run("INSERT INTO t(v) VALUES ('kept')")
    stream.run("SAVEPOINT sp0")
    stream.run("INSERT INTO t(v) VALUES ('undone')")
    stream.run("SAVEPOINT sp1")
    stream.run("INSERT INTO t(v) VALUES ('released')")
    stream.run("RELEASE sp1")
    stream.run("ROLLBACK TO sp0")
    stream.run("release savepoint sp0")
    stream.run("COMMIT")
    stream.run("SAVEPOINT alone")
    stream.run("INSERT INTO t(v) VALUES ('by a savepoint alone')")
    assert not stream.autocommit
    stream.run("RELEASE alone")
    assert stream.autocommit
    assert stream.run("SELECT v FROM t ORDER BY id").rows == [["kept"], ["by a savepoint alone"]]


def test_insert_or_rollback_ends_the_transaction_of_its_client_only(stream: Stream, other: Stream) -> None:
    """R20: no savepoint batches, so nobody else's work is undone."""
    stream.run("INSERT INTO t(id, v) VALUES (1, 'there')")
    stream.run("BEGIN")
    stream.run("INSERT INTO t(v) VALUES ('undone')")
    assert code_of(lambda: stream.run("INSERT OR ROLLBACK INTO t(id) VALUES (1)")) == "SQLITE_CONSTRAINT"
    assert stream.autocommit
    other.run("INSERT INTO t(v) VALUES ('theirs')")
    assert stream.run("SELECT v FROM t ORDER BY id").rows == [["there"], ["theirs"]]


def test_a_script_with_a_trigger_runs_whole_and_stops_at_its_first_error(stream: Stream) -> None:
    stream.script(
        """-- a migration file
        CREATE TABLE log (what TEXT); /* ; not an end */
        CREATE TRIGGER noted AFTER INSERT ON t BEGIN
            INSERT INTO log VALUES ('a; b' || CASE WHEN new.v = ';' THEN 1 ELSE 2 END);
            DELETE FROM log WHERE what IS NULL;
        END;
        BEGIN; INSERT INTO t(v) VALUES (';'); COMMIT;
        """
    )
    assert stream.run("SELECT what FROM log").rows == [["a; b1"]]
    stream.script("DROP TRIGGER noted; DROP TABLE log; DELETE FROM t;")
    code = code_of(
        lambda: stream.script("INSERT INTO t(v) VALUES ('first'); SELECT no; INSERT INTO t(v) VALUES ('not')")
    )
    assert code == "SQL_INPUT_ERROR"
    assert stream.run("SELECT v FROM t").rows == [["first"]]


def test_an_idle_transaction_is_ended_when_others_wait_and_says_so_once(stream: Stream, other: Stream) -> None:
    """R21: after 5 s idle if others wait; TRANSACTION_TIMEOUT, once, and the stream goes on."""
    stream.run("BEGIN IMMEDIATE")
    stream.run("INSERT INTO t(v) VALUES ('held')")
    started = time.monotonic()
    other.run("INSERT INTO t(v) VALUES ('waited')")
    assert 3 < time.monotonic() - started < 9
    assert code_of(lambda: stream.run("COMMIT")) == "TRANSACTION_TIMEOUT"
    assert stream.run("SELECT v FROM t").rows == [["waited"]]


def test_writers_wait_their_turn_and_none_is_told_busy(cluster: Cluster, client: Client) -> None:
    """The write turn is FIFO: no busy errors among transactions that say IMMEDIATE."""

    def work(number: int) -> None:
        with cluster.client() as own:
            stream = Stream(own)
            for round_ in range(5):
                stream.run("BEGIN IMMEDIATE")
                stream.run(f"INSERT INTO t(v) VALUES ('{number}/{round_}')")
                stream.run("COMMIT")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert client.execute("SELECT count(*) FROM t").value == 40


def test_a_cursor_streams_what_a_pipeline_refuses_as_too_large(client: Client, stream: Stream) -> None:
    big = SERIES.format(400_000)
    assert code_of(lambda: stream.run(big)) == "RESPONSE_TOO_LARGE"
    _, text = client.post("/v3/cursor", {"baton": None, "batch": {"steps": [{"stmt": {"sql": big}}]}})
    assert text.count('"type":"row"') == 400_000
