"""The dump: what it writes, the sqlite3 shell reads back, value by value and row id by row id (hrana.md 1.1)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from walship.errors import Unavailable
from walship.service.dump import dump
from walship.sql import guard

SHELL = shutil.which("sqlite3")

SCHEMA = """
CREATE TABLE plain(a, b TEXT, "c ""q" BLOB);
CREATE TABLE keyed(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE) -- a remark
;
CREATE TABLE flat(k TEXT PRIMARY KEY, v) WITHOUT ROWID;
CREATE TABLE made(a, twice AS (a * 2) STORED, b, half AS (b / 2));
CREATE TABLE taken(rowid TEXT, _rowid_ TEXT);
CREATE INDEX by_b ON plain(b) WHERE b IS NOT NULL;
CREATE VIEW names AS SELECT name FROM keyed;
CREATE TRIGGER audit AFTER INSERT ON keyed BEGIN UPDATE plain SET a = a + 1; DELETE FROM plain WHERE a > 1e300; END;
CREATE TRIGGER through INSTEAD OF INSERT ON names BEGIN INSERT INTO keyed(name) VALUES (new.name); END;
CREATE VIRTUAL TABLE ft USING fts5(body);
PRAGMA user_version = 42;
"""

VALUES = [
    None,
    0,
    -(1 << 63),
    (1 << 63) - 1,
    0.1,
    -0.0,
    1e16,
    5e-324,
    1.7976931348623157e308,
    float("inf"),
    float("-inf"),
    "",
    "it's\n.quit\n;\nGO\n/\n",
    "\r\n\x00\t\x7f",
    "žluťoučký 🐎",
    b"",
    b"\x00\xff'",
]


def script(connection: apsw.Connection, *, row_ids: bool = False, chunk_bytes: int = 1000) -> bytes:
    connection.execute("BEGIN")
    try:
        return b"".join(dump(connection, row_ids=row_ids, chunk_bytes=chunk_bytes))
    finally:
        connection.execute("ROLLBACK")


def reloaded(directory: Path, text: bytes) -> apsw.Connection:
    """The script as the shell, or where there is none apsw's own, reads it into a new file."""
    path = directory / "copy.db"
    path.unlink(missing_ok=True)
    assert SHELL is not None
    done = subprocess.run([SHELL, "-bail", str(path)], input=text, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return apsw.Connection(str(path))


def content(connection: apsw.Connection, table: str, columns: str = "*") -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = list(connection.execute(f"SELECT {columns} FROM {table}"))
    return [tuple((type(value), value) for value in row) for row in rows]


@pytest.fixture
def source() -> Iterator[apsw.Connection]:
    connection = apsw.Connection(":memory:")
    connection.execute(SCHEMA)
    connection.executemany("INSERT INTO plain VALUES (?, ?, ?)", [(value, value, value) for value in VALUES])
    connection.execute("INSERT INTO plain(rowid, a) VALUES (9000000000, CAST(X'c328' AS TEXT))")
    connection.execute("INSERT INTO keyed(id, name) VALUES (7, 'x'), (90, 'y'); DELETE FROM keyed WHERE id = 90")
    connection.execute("INSERT INTO flat VALUES ('b', 1), ('a', 2); INSERT INTO made(a, b) VALUES (1, 4), ('z', 5)")
    connection.execute("INSERT INTO taken VALUES ('r', 's'); INSERT INTO ft VALUES ('the quick fox'), ('a dog')")
    connection.execute("ANALYZE")
    yield connection
    connection.close()


needs_shell = pytest.mark.skipif(SHELL is None, reason="no sqlite3 shell here")


@needs_shell
@pytest.mark.parametrize("row_ids", [False, True])
def test_the_shell_reads_it_back(source: apsw.Connection, tmp_path: Path, row_ids: bool) -> None:
    text = script(source, row_ids=row_ids)
    copy = reloaded(tmp_path, text)
    for table in ("keyed", "flat", "made", "taken", "sqlite_sequence"):
        assert content(copy, table) == content(source, table), table
    columns = 'typeof(a), CAST(a AS BLOB), b, "c ""q"' + (", rowid" if row_ids else "")
    assert content(copy, "plain", columns) == content(source, "plain", columns)
    assert copy.execute("SELECT rowid FROM ft WHERE ft MATCH 'dog'").get == 2
    assert copy.pragma("user_version") == 42
    assert copy.pragma("integrity_check") == "ok"
    objects = "SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite_stat4' ORDER BY name"
    assert list(copy.execute(objects)) == list(source.execute(objects))
    assert set(copy.execute("SELECT * FROM sqlite_stat1")) == set(source.execute("SELECT * FROM sqlite_stat1"))
    copy.close()


@needs_shell
def test_another_encoding_comes_back(tmp_path: Path) -> None:
    source = apsw.Connection(":memory:")
    source.execute("PRAGMA encoding = 'UTF-16le'; CREATE TABLE t(a); INSERT INTO t VALUES ('ž\r\n'), ('🐎''')")
    copy = reloaded(tmp_path, script(source))
    assert copy.pragma("encoding") == "UTF-16le"
    assert content(copy, "t") == content(source, "t")
    copy.close()
    source.close()


def test_an_empty_database_is_an_empty_script() -> None:
    connection = apsw.Connection(":memory:")
    assert script(connection) == b"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\nCOMMIT;\n"
    connection.close()


def test_it_comes_in_chunks_and_runs_under_the_guard(source: apsw.Connection) -> None:
    """A node's reading connections let no PRAGMA through that they do not know."""
    guard.install(source, follower=True)
    whole = script(source)
    source.execute("BEGIN")
    chunks = list(dump(source, row_ids=False, chunk_bytes=200))
    assert len(chunks) > 5
    assert b"".join(chunks) == whole
    source.execute("ROLLBACK")


def test_an_interruption_is_told(source: apsw.Connection) -> None:
    chunks = dump(source, row_ids=False, chunk_bytes=10)
    next(chunks)
    source.set_progress_handler(lambda: True, 1)
    with pytest.raises(Unavailable, match="ask for it again"):
        list(chunks)


@needs_shell
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.integers(-(1 << 63), (1 << 63) - 1),
            st.integers(-(10**6), 10**6).map(lambda n: n / 64),  # longer decimals older shells read less exactly
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
            st.binary(max_size=30),
        ),
        max_size=40,
    )
)
def test_any_values_come_back_bit_for_bit(tmp_path: Path, values: list[object]) -> None:
    source = apsw.Connection(":memory:")
    source.execute("CREATE TABLE t(a)")
    source.executemany("INSERT INTO t VALUES (?)", [(value,) for value in values])
    copy = reloaded(tmp_path, script(source))
    columns = "a, typeof(a), CAST(a AS BLOB)"
    assert content(copy, "t", columns) == content(source, "t", columns)
    copy.close()
    source.close()
