"""The guard on real connections: what it refuses never takes a step, what clients need goes through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from walship.errors import NotReadOnly, StatementFailed
from walship.sql.guard import install


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(tmp_path / "db"))
    connection.execute("pragma journal_mode=wal").fetchall()
    connection.execute("create table t(a integer primary key, b); insert into t values(1, 2)")
    yield connection
    connection.close()


@pytest.fixture
def owned(connection: apsw.Connection) -> apsw.Connection:
    install(connection, follower=False)
    return connection


REFUSED = [
    "attach 'other' as o",
    "attach ':memory:' as o",
    "detach main",
    "vacuum into 'copy'",
    "select load_extension('x')",
    "select fts3_tokenizer('simple')",
    "pragma writable_schema = on",
    "pragma journal_mode = delete",
    "pragma journal_mode = wal",
    "pragma locking_mode = exclusive",
    "pragma page_size = 512",
    "pragma synchronous = off",
    "pragma wal_checkpoint",
    "pragma wal_checkpoint(truncate)",
    "pragma wal_autocheckpoint = 1",
    "pragma schema_version = 9",
    "pragma temp_store_directory = '/tmp'",
    "pragma mmap_size = 1000000",
    "select * from pragma_wal_checkpoint",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_what_could_break_capture_or_leave_the_file_is_refused(
    owned: apsw.Connection, sql: str, tmp_path: Path
) -> None:
    """R22; hrana.md 1.5: BLOCKED with its reason."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((StatementFailed, apsw.SQLError)) as caught:
        owned.execute(sql).fetchall()
    if isinstance(caught.value, StatementFailed):
        assert caught.value.statement_code == "BLOCKED"
        assert str(caught.value).startswith("Operation was blocked: ")
    else:
        assert "no such table" in str(caught.value) or "no such function" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


ALLOWED = [
    "select * from t",
    "insert into t values(2, 3) returning a",
    "create table u(x)",
    "create virtual table f using fts5(x)",
    "create index i on t(b)",
    "alter table t add column c",
    "vacuum",
    "analyze",
    "reindex",
    "pragma table_info(t)",
    "select * from pragma_table_info('t')",
    "pragma integrity_check",
    "pragma user_version = 3",
    "pragma foreign_keys = on",
    "pragma case_sensitive_like = 1",
    "pragma journal_mode",
    "pragma optimize",
    "begin; savepoint a; release a; commit",
    "explain select 1",
]


@pytest.mark.parametrize("sql", ALLOWED)
def test_what_clients_do_every_day_goes_through(owned: apsw.Connection, sql: str) -> None:
    owned.execute(sql).fetchall()


@pytest.mark.parametrize("sql", ["pragma foreign_keys = on", "pragma case_sensitive_like = 1", "pragma query_only = 1"])
def test_a_shared_connection_is_not_changed_by_one_client(connection: apsw.Connection, sql: str) -> None:
    """SQLite calls these read-only; on a connection shared by many they belong to the stream's own, on the leader."""
    install(connection, follower=True)
    with pytest.raises(NotReadOnly):
        connection.execute(sql)


def test_a_refused_statement_does_not_poison_the_connection(owned: apsw.Connection) -> None:
    for _ in range(3):
        with pytest.raises(StatementFailed):
            owned.execute("pragma wal_checkpoint")
        assert owned.execute("select count(*) from t").fetchall() == [(1,)]


def test_shadow_tables_and_raw_pages_cannot_be_written(owned: apsw.Connection) -> None:
    owned.execute("create virtual table f using fts5(x)")
    with pytest.raises(apsw.Error):
        owned.execute("delete from f_data")
    with pytest.raises((apsw.Error, StatementFailed)):
        owned.execute("update sqlite_dbpage set data = zeroblob(4096) where pgno = 1")
