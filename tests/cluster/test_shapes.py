"""Databases of every shape are adopted in place and replicated byte for byte: page sizes, VACUUM, FTS5, DROP, ALTER."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from tests.cluster.client import Client
from tests.cluster.harness import Cluster, Up, content_of, same_files

STORY = (
    "CREATE TABLE made (id INTEGER PRIMARY KEY, kind TEXT, body TEXT)",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400) "
    "INSERT INTO made (kind, body) SELECT 'k' || (i % 7), hex(randomblob(150)) FROM n",
    "CREATE INDEX made_kind ON made (kind, id)",
    "CREATE VIRTUAL TABLE found USING fts5(title, body)",
    "INSERT INTO found SELECT kind, body || ' walrus' FROM made WHERE id % 3 = 0",
    "DELETE FROM made WHERE id % 2 = 0",
    "ALTER TABLE made ADD COLUMN note TEXT DEFAULT 'none'",
    "ALTER TABLE made RENAME COLUMN body TO content",
    "UPDATE made SET note = hex(zeroblob(300)) WHERE id % 5 = 0",
    "DROP TABLE old",
    "PRAGMA incremental_vacuum",
    "VACUUM",
    "ALTER TABLE made DROP COLUMN note",
    "INSERT INTO found (found) VALUES ('optimize')",
    "INSERT INTO kept (text) VALUES ('after the vacuum')",
)


@pytest.mark.parametrize(
    ("page_size", "auto_vacuum"), [(512, "FULL"), (4096, "INCREMENTAL"), (65536, "NONE")], ids=lambda value: str(value)
)
def test_an_adopted_database_stays_equal_through_every_change_of_shape(
    start_up: Callable[..., Up], tmp_path: Path, page_size: int, auto_vacuum: str
) -> None:
    """Guarantees, "Files": what SQLite does to its pages is replicated as it is, whatever it was."""
    database = ordinary(tmp_path / "app.db", page_size, auto_vacuum)
    up = start_up(str(database))
    with up.client() as client:
        tell_story(client)
    up.wait_level()
    files = up.databases()
    assert up.process.stop() == 0

    assert database in files, "adopted in place"
    same_files(files)
    check_story(files[1], page_size)


def test_a_node_adopts_a_database_of_large_pages(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    database = ordinary(tmp_path / "app.db", 65536, "FULL")
    cluster = start_cluster(nodes=2, database=database)
    with cluster.client() as client:
        tell_story(client)
    cluster.wait_level()
    files = cluster.stop()

    assert database in files
    same_files(files)
    check_story(files[1], 65536)


def ordinary(path: Path, page_size: int, auto_vacuum: str) -> Path:
    """A SQLite file in rollback-journal mode, as applications have them."""
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute(f"PRAGMA page_size = {page_size}; PRAGMA auto_vacuum = {auto_vacuum}")
        db.execute("CREATE TABLE kept (id INTEGER PRIMARY KEY, text); CREATE TABLE old (blob)")
        db.execute("BEGIN")
        db.executemany("INSERT INTO kept (text) VALUES (?)", ((f"row {number}",) for number in range(500)))
        db.execute("INSERT INTO old SELECT randomblob(5000) FROM kept LIMIT 50")
        db.execute("COMMIT")
    return path


def tell_story(client: Client) -> None:
    for sql in STORY:
        client.execute(sql)
    assert client.execute("SELECT count(*) FROM found WHERE found MATCH 'walrus'").value == 133


def check_story(path: Path, page_size: int) -> None:
    assert content_of(path, "PRAGMA page_size") == [(page_size,)]
    assert content_of(path, "SELECT count(*) FROM kept") == [(501,)]
    assert content_of(path, "SELECT count(*), max(id) FROM made") == [(200, 399)]
    assert content_of(path, "SELECT count(*) FROM found WHERE found MATCH 'walrus'") == [(133,)]
