"""A database as SQL text, in the order and the words of the sqlite3 shell's `.dump`, so that the shell can read it.

One pass over the connection's open read transaction, in chunks: memory does not grow with the database. Values come
back bit for bit: text that a script cannot carry (control characters, NUL, what is not valid Unicode) is written as a
cast of its bytes. Numbers have as many digits as tell them apart; a reader's SQLite before 3.43 may still round the
last one otherwise. Left out are sqlite_stat4 and its like: ANALYZE makes them anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator
from typing import Any, Final

import apsw

from walship.errors import Unavailable

__all__ = ["dump"]

# The shell drops the CR of a CR LF at the end of a line, also inside a string.
_UNSAFE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_CODECS: Final = {"UTF-8": "utf-8", "UTF-16le": "utf-16-le", "UTF-16be": "utf-16-be"}
_ROWID_NAMES: Final = ("rowid", "_rowid_", "oid")
_DEFENSIVE: Final = "/* WARNING: Script requires that SQLITE_DBCONFIG_DEFENSIVE be disabled */"
_TABLES: Final = (
    "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' "
    "ESCAPE '\\' ORDER BY rowid"
)
_REST: Final = (
    "SELECT sql FROM sqlite_schema WHERE type IN ('view', 'trigger', 'index') AND sql IS NOT NULL "
    "ORDER BY type DESC, rowid"
)
_SEQUENCES: Final = (
    "SELECT name, seq FROM sqlite_sequence WHERE name IN (SELECT name FROM sqlite_schema WHERE type = 'table')"
)
_BEFORE_IN: Final = "SELECT 1 FROM sqlite_schema WHERE name = ?"


def dump(connection: apsw.Connection, *, row_ids: bool, chunk_bytes: int) -> Generator[bytes, None, None]:
    """The script, about `chunk_bytes` at a time, from the snapshot the connection is in.

    Args:
        row_ids: write the rowid of each row, where a table has one that can be named.

    Raises Unavailable when it is interrupted or a page cannot be read.
    """
    pending: list[bytes] = []
    size = 0
    try:
        for line in _Dump(connection, row_ids=row_ids).lines():
            data = line.encode() + b"\n"
            pending.append(data)
            size += len(data)
            if size >= chunk_bytes:
                yield b"".join(pending)
                pending.clear()
                size = 0
    except apsw.Error as error:
        raise Unavailable(f"the dump could not go on: {error}. Nothing was changed; ask for it again") from error
    if pending:
        yield b"".join(pending)


class _Dump:
    def __init__(self, connection: apsw.Connection, *, row_ids: bool) -> None:
        self._connection, self._row_ids = connection, row_ids
        self._encoding = str(connection.pragma("encoding"))
        self._codec = _CODECS[self._encoding]

    def lines(self) -> Iterator[str]:
        tables: list[tuple[str, str]] = list(self._connection.execute(_TABLES))
        virtual = any(_is_virtual(sql) for _, sql in tables)
        if virtual:
            yield _DEFENSIVE
        if self._codec != "utf-8":
            yield f"PRAGMA encoding='{self._encoding}';"
        yield "PRAGMA foreign_keys=OFF;"
        yield "BEGIN TRANSACTION;"
        for name in ("user_version", "application_id"):
            if value := self._connection.pragma(name):
                yield f"PRAGMA {name}={value};"
        if virtual:
            yield "PRAGMA writable_schema=ON;"
        for name, sql in tables:
            if _is_virtual(sql):
                row = f"'table',{self._literal(name)},{self._literal(name)},0,{self._literal(sql)}"
                yield f"INSERT INTO sqlite_schema(type,name,tbl_name,rootpage,sql)VALUES({row});"
            else:
                yield _statement(sql)
                yield from self._rows(name)
        yield from self._statistics()
        yield from self._sequences()
        for (sql,) in self._connection.execute(_REST):
            yield _statement(sql)
        if virtual:
            yield "PRAGMA writable_schema=OFF;"
        yield "COMMIT;"

    def _rows(self, table: str) -> Iterator[str]:
        described = list(self._connection.execute("SELECT name, hidden FROM pragma_table_xinfo(?)", (table,)))
        columns = [name for name, hidden in described if hidden == 0]
        into = _name(table)
        if len(columns) < len(described):  # generated columns are not written
            into += f"({','.join(map(_name, columns))})"
        if self._row_ids and (row_id := self._row_id(table, [name for name, _ in described])):
            columns = [row_id, *columns]
            into = f"{_name(table)}({','.join(map(_name, columns))})"
        yield from self._values(f"INSERT INTO {into} VALUES(", table, columns)

    def _row_id(self, table: str, columns: list[str]) -> str | None:
        """A name of the table's rowid that no column has taken."""
        without = self._connection.execute("SELECT wr FROM pragma_table_list(?) WHERE schema = 'main'", (table,)).get
        taken = {name.lower() for name in columns}
        return None if without else next((name for name in _ROWID_NAMES if name not in taken), None)

    def _values(self, head: str, table: str, columns: list[str]) -> Iterator[str]:
        # Text is fetched as its bytes, beside the fact that it is text: it need not be valid.
        parts = []
        for column in map(_name, columns):
            is_text = f"typeof({column})='text'"
            parts += [f"iif({is_text},CAST({column} AS BLOB),{column})", is_text]
        literal = self._literal
        for row in self._connection.execute(f"SELECT {','.join(parts)} FROM {_name(table)}"):
            values = [
                self._text(value) if is_text else literal(value)
                for value, is_text in zip(row[::2], row[1::2], strict=True)
            ]
            yield f"{head}{','.join(values)});"

    def _statistics(self) -> Iterator[str]:
        if self._connection.execute(_BEFORE_IN, ("sqlite_stat1",)).get:
            yield "ANALYZE sqlite_schema;"
            yield from self._values("INSERT INTO sqlite_stat1 VALUES(", "sqlite_stat1", ["tbl", "idx", "stat"])

    def _sequences(self) -> Iterator[str]:
        if not self._connection.execute(_BEFORE_IN, ("sqlite_sequence",)).get:
            return
        for number, (name, seq) in enumerate(self._connection.execute(_SEQUENCES)):
            if number == 0:
                yield "DELETE FROM sqlite_sequence;"
            yield f"INSERT INTO sqlite_sequence VALUES({self._literal(name)},{self._literal(seq)});"

    def _text(self, data: bytes) -> str:
        try:
            text = data.decode(self._codec)
        except UnicodeDecodeError:
            text = None
        if text is None or _UNSAFE.search(text):
            return f"CAST(X'{data.hex()}' AS TEXT)"
        return _quoted(text)

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._text(value.encode(self._codec, "surrogatepass"))
        if isinstance(value, bytes):
            return f"X'{value.hex()}'"
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else "9.0e+999" if value > 0 else "-9.0e+999"
        return "NULL" if value is None else str(value)


def _is_virtual(sql: str) -> bool:
    return sql[:20].upper() == "CREATE VIRTUAL TABLE"


def _statement(sql: str) -> str:
    """A statement of the schema with its end. What the shell quotes by ' are tables of virtual ones: they may exist."""
    if sql.startswith("CREATE TABLE '"):
        sql = "CREATE TABLE IF NOT EXISTS '" + sql[14:]
    last_line = sql.rpartition("\n")[2]
    return sql + ("\n;" if "--" in last_line else ";")


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
