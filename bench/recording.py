"""A recorded life of a database: the same transactions as SQL for SQLite, and as pages for our apply.

The pages are what a real leader would ship: read back from the -wal that SQLite wrote while it ran the SQL.
"""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from walship.engine.apply import Batch
from walship.formats.wal import WAL_HEADER_SIZE, WalHeader, read_frames

__all__ = ["Recording", "Transaction", "digest", "growth", "merged", "seed_database", "updates"]

PAGE_SIZE = 4096
ROW_BYTES = 3000  # more than half a page: one row a page, so that n rows updated are n pages written
_TABLE = "CREATE TABLE t(id INTEGER PRIMARY KEY, value BLOB)"
_INSERT = "INSERT INTO t(value, id) VALUES (?, ?)"
_UPDATE = "UPDATE t SET value = ? WHERE id = ?"

Transaction = list[tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class Recording:
    """sql: transactions, each (value, id) pairs for `run_sql`. batches: the same as pages, one a transaction."""

    base: Path
    statement: str
    sql: list[Transaction]
    batches: list[Batch]

    def run_sql(self, connection: apsw.Connection, transaction: Transaction) -> None:
        if len(transaction) == 1:
            connection.execute(self.statement, transaction[0])
            return
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(self.statement, transaction)
        connection.execute("COMMIT")


def seed_database(path: Path, rows: int) -> None:
    """A WAL database of one row a page, closed (its -wal is empty)."""
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA page_size={PAGE_SIZE}; PRAGMA journal_mode=WAL; {_TABLE}").fetchall()
    with connection:
        connection.executemany(_INSERT, _rows(1, rows + 1))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def updates(base: Path, scratch: Path, *, rows: int, transactions: int, rows_each: int) -> Recording:
    """Random single-row updates, `rows_each` a transaction: as many pages."""
    pick = random.Random(rows_each)
    sql = [
        [(pick.randbytes(ROW_BYTES), id) for id in sorted(pick.sample(range(1, rows + 1), rows_each))]
        for _ in range(transactions)
    ]
    return _record(base, scratch, _UPDATE, sql)


def growth(base: Path, scratch: Path, *, rows: int, added: int) -> Recording:
    """One transaction that adds `added` rows, about as many pages."""
    return _record(base, scratch, _INSERT, [list(_rows(rows + 1, rows + added + 1))])


def _record(base: Path, scratch: Path, statement: str, sql: list[Transaction]) -> Recording:
    """Run the SQL on a copy of `base`, and read the commits back from its -wal."""
    recording = Recording(base, statement, sql, [])
    path = Path(shutil.copy(base, scratch))
    connection = apsw.Connection(str(path))
    connection.wal_autocheckpoint(0)
    connection.execute("PRAGMA synchronous=OFF")
    for transaction in sql:
        recording.run_sql(connection, transaction)
    data = path.with_name(path.name + "-wal").read_bytes()
    connection.close()
    path.unlink()
    begin = WalHeader.parse(data[:WAL_HEADER_SIZE])
    frames = read_frames(
        memoryview(data)[WAL_HEADER_SIZE:], page_size=PAGE_SIZE, salts=begin.salts, seed=begin.checksum
    )
    pages: dict[int, bytes] = {}
    for header, page in frames:
        pages[header.pgno] = bytes(page)
        if header.commit:
            recording.batches.append(_batch(pages, header.commit))
            pages = {}
    return recording


def _rows(first: int, end: int) -> Iterator[tuple[bytes, int]]:
    """New rows: 64 different contents, over and over."""
    pick = random.Random(7)
    blobs = [pick.randbytes(ROW_BYTES) for _ in range(64)]
    return ((blobs[id % 64], id) for id in range(first, end))


def merged(batches: list[Batch], count: int) -> list[Batch]:
    """Every `count` transactions as one commit, as a follower that has some queued does it."""
    result = []
    for start in range(0, len(batches), count):
        pages: dict[int, bytes] = {}
        for batch in batches[start : start + count]:
            pages.update((pgno, bytes(page)) for pgno, page in zip(batch.pgnos, batch.pages(), strict=True))
        result.append(_batch(pages, batches[min(start + count, len(batches)) - 1].commit))
    return result


def _batch(pages: dict[int, bytes], commit: int) -> Batch:
    ordered = sorted(pages.items())
    return Batch([pgno for pgno, _ in ordered], lambda: (page for _, page in ordered), commit)


def digest(connection: apsw.Connection) -> int:
    """A number that tells two contents of `t` apart, by a full read."""
    return zlib.crc32(b"".join(b"%d %b" % row for row in connection.execute("SELECT id, value FROM t ORDER BY id")))
