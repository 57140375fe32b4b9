"""Runs Hrana requests on one SQLite connection and gives finished result bytes (hrana.md 1.3, 1.5).

One `Executor` per connection, used by one thread at a time. It knows SQL and Hrana, but not where it stands: on the
loop thread inside a read batch, in the writer thread, or in a thread of a stream. Two things differ there, and both
are told from outside:

* `may_write`. SQLite decides what writes (R22): every statement is prepared first, and one that is neither read-only
  nor an EXPLAIN is not stepped unless `may_write` is set. `perform` then yields `Need.WRITE`: whoever drives it takes
  what is needed (the write turn), sets `may_write` and resumes, or gives up; nothing has happened yet.
* `virtual`. Inside a read batch the transaction is the batch's; BEGIN, COMMIT and ROLLBACK of a program that only
  reads are then answered without SQLite, with SQLite's own rules and messages.

`changes()`, `total_changes()` and `last_insert_rowid()` are answered per stream (R21): the executor keeps the values
of the stream it serves (`counters`), primes SQLite's rowid from them, and overrides the two counting functions. A
statement that names them itself gets its stream's value; a trigger that names them gets SQLite's, as anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from enum import Enum, auto

import apsw

from walship.errors import NotReadOnly, StatementFailed
from walship.hrana import json as hrana
from walship.hrana.json import Outcome
from walship.hrana.types import (
    Batch,
    BatchRequest,
    DescribeRequest,
    ErrorBody,
    ExecuteRequest,
    GetAutocommitRequest,
    SequenceRequest,
    Stmt,
    StreamRequest,
)
from walship.service.limits import Limits
from walship.service.parameters import parameters
from walship.sql.classify import EMPTY_VERDICT, Kind, Verdict, classify, split
from walship.sql.guard import blocked
from walship.sql.pragmas import Action, repeatable

__all__ = ["Counters", "Executor", "Lines", "Need", "Program", "drive", "statement_error"]


class Need(Enum):
    """What a program asks of its driver before it can go on."""

    WRITE = auto()
    """The next statement writes, or asks for the write lock, and may not yet."""


Program = Generator[Need, None, bytes]
Lines = Generator[Need | bytes, None, None]


@dataclass(slots=True)
class Counters:
    """What SQLite keeps per connection and a client expects per stream (R21)."""

    changes: int = 0
    total_changes: int = 0
    last_insert_rowid: int = 0


class _Described(Exception):
    """Ends a describe before its statement is stepped."""


_FIRST_ROWS = 8
_MOST_ROWS = 2_000
_BATCH_BYTES = 256 * 1024

_CACHED_COLUMNS = 512
_CACHED_COLUMNS_BYTES = 2_048

_PARSE_ERRORS = ("near ", "incomplete input", "unrecognized token")


class Executor:
    """Statements of one connection, one at a time.

    Attributes:
        may_write: statements that write are stepped. False: `Need.WRITE` first.
        virtual: transaction words are answered without SQLite.
        budgeted: an interruption, or a value too large for here, ends the whole run (apsw.InterruptError,
            apsw.TooBigError) instead of failing one statement.
        text: the SQL text run last, for whoever must remember it as slow.
        last: affected rows, rowid of an INSERT, and whether there are columns, of the statement that ended last.
        counters: the values of the stream being served; replaced by whoever changes streams.
        settings: the PRAGMAs it has set here that can be said again elsewhere, by name; replaced likewise.
        readonly_transaction: the open transaction was begun READONLY.
    """

    def __init__(self, connection: apsw.Connection, limits: Limits, *, may_write: bool = False) -> None:
        self.connection = connection
        self.may_write = may_write
        self.virtual = False
        self.budgeted = False
        self.last: tuple[int, int | None, bool] = (0, None, False)
        self.counters = Counters()
        self.settings: dict[str, str] = {}
        self._limits = limits
        self._cursor = connection.cursor()
        self._cursor.exec_trace = self._before_step
        self._in_virtual = False
        self.readonly_transaction = False
        self._describing = False
        self.text = ""
        self._started = False
        self._verdict = EMPTY_VERDICT
        self._description: tuple[tuple[str, str | None], ...] = ()
        self._readonly = True
        self._explain = False
        self._columns: dict[tuple[tuple[str, str | None], ...], bytes] = {}
        self._spent_bytes = 0
        connection.create_scalar_function("changes", self._changes, 0, flags=apsw.SQLITE_INNOCUOUS)
        connection.create_scalar_function("total_changes", self._total_changes, 0, flags=apsw.SQLITE_INNOCUOUS)

    @property
    def autocommit(self) -> bool:
        """True outside of any transaction of the stream being served."""
        return not self._in_virtual if self.virtual else self.connection.get_autocommit()

    def start(self, counters: Counters, *, virtual: bool = False) -> None:
        """Serve another stream, or another call of it: its counters, and a fresh response budget."""
        self.counters, self.virtual, self._in_virtual = counters, virtual, False
        self._spent_bytes = 0
        if self.connection.get_autocommit() or virtual:
            self.readonly_transaction = False

    # --- requests -----------------------------------------------------------------------------------------------

    def perform(self, request: StreamRequest) -> Program:
        """Run one request, SQL texts resolved, and return its StreamResult; errors of statements are inside.

        Yields `Need.WRITE` before a statement that writes while `may_write` is False. Raises what is not about one
        statement: apsw.InterruptError when a budget ended the run.
        """
        if isinstance(request, ExecuteRequest):
            try:
                result = yield from self._permitted(lambda: self._statement(request.stmt))
            except StatementFailed as error:
                return hrana.failed(ErrorBody.of(error))
            return hrana.ok("execute", result)
        if isinstance(request, BatchRequest):
            return hrana.ok("batch", (yield from self._batch(request.batch)))
        if isinstance(request, SequenceRequest):
            return (yield from self._sequence(request.sql or ""))
        if isinstance(request, DescribeRequest):
            try:
                return hrana.ok("describe", self._describe(request.sql or ""))
            except StatementFailed as error:
                return hrana.failed(ErrorBody.of(error))
        if isinstance(request, GetAutocommitRequest):
            return hrana.ok("get_autocommit", is_autocommit=self.autocommit)
        raise AssertionError(f"{type(request).__name__} is the service's to answer")

    def _permitted(self, run: Callable[[], bytes]) -> Program:
        """`run`, asking for the right to write when it turns out to need it; it has done nothing until then."""
        try:
            return run()
        except NotReadOnly as error:
            self._refuse_if_permitted(error)
            yield Need.WRITE
            return run()

    def _refuse_if_permitted(self, error: NotReadOnly) -> None:
        """With the right to write, only the guard still says no: the statement changes a shared connection. Earlier
        ones of the same request may be done, so that is an error of this statement, not of the whole."""
        if self.may_write:
            raise blocked(str(error)) from error

    def _batch(self, batch: Batch) -> Program:
        outcomes: list[Outcome] = []
        results: list[bytes | None] = []
        errors: list[ErrorBody | None] = []
        for step in batch.steps:
            result, error = None, None
            if step.condition is not None and not hrana.evaluate(
                step.condition, outcomes, is_autocommit=self.autocommit
            ):
                outcomes.append(Outcome.SKIPPED)
            else:
                try:
                    result = yield from self._permitted(lambda stmt=step.stmt: self._statement(stmt))  # type: ignore[misc]
                    outcomes.append(Outcome.OK)
                except StatementFailed as failure:
                    error = ErrorBody.of(failure)
                    outcomes.append(Outcome.ERROR)
            results.append(result)
            errors.append(error)
        return hrana.encode_batch_result(results, errors)

    def _sequence(self, sql: str) -> Program:
        for text in split(sql):
            try:
                yield from self._permitted(lambda text=text: self._statement(Stmt(sql=text, want_rows=False)))  # type: ignore[misc]
            except StatementFailed as error:
                return hrana.failed(ErrorBody.of(error))
        return hrana.ok("sequence")

    def lines(self, batch: Batch) -> Lines:
        """Run a batch and yield its cursor entries as chunks of whole lines, about `chunk_bytes` each."""
        outcomes: list[Outcome] = []
        pending = bytearray()
        for number, step in enumerate(batch.steps):
            if step.condition is not None and not hrana.evaluate(
                step.condition, outcomes, is_autocommit=self.autocommit
            ):
                outcomes.append(Outcome.SKIPPED)
                continue
            try:
                try:
                    self._open(step.stmt)
                except NotReadOnly as error:
                    self._refuse_if_permitted(error)
                    yield Need.WRITE
                    self._open(step.stmt)
                pending += hrana.step_begin(number, self._encoded_columns())
                try:
                    for rows in self._rows(step.stmt):
                        pending += hrana.row_entries(rows)
                        if len(pending) >= self._limits.chunk_bytes:
                            yield bytes(pending)
                            pending.clear()
                except (Exception, GeneratorExit):
                    self._abandon()
                    raise
                affected, rowid = self._close()
                pending += hrana.step_end(affected, rowid)
                outcomes.append(Outcome.OK)
            except StatementFailed as error:
                pending += hrana.step_error(number, ErrorBody.of(error))
                outcomes.append(Outcome.ERROR)
        if pending:
            yield bytes(pending)

    # --- one statement ------------------------------------------------------------------------------------------

    def _statement(self, stmt: Stmt) -> bytes:
        """Run one statement to its end and return its StmtResult.

        Raises StatementFailed; NotReadOnly before anything was stepped; apsw.InterruptError.
        """
        started = time.perf_counter()
        self._open(stmt)
        columns = self._encoded_columns()
        pieces: list[bytes] = []
        size = len(columns)
        count = 0
        try:
            for rows in self._rows(stmt):
                piece = hrana.encode_rows(rows)
                size += len(piece)
                self._check_size(size)
                pieces.append(piece)
                count += len(rows)
        except Exception:
            self._abandon()
            raise
        self._spent_bytes += size
        affected, rowid = self._close()
        encoded = pieces[0] if len(pieces) == 1 else b"[%b]" % b",".join([piece[1:-1] for piece in pieces])
        return hrana.encode_stmt_result(
            columns,
            encoded,
            affected_row_count=affected,
            last_insert_rowid=rowid,
            rows_read=count,
            rows_written=affected,
            query_duration_ms=(time.perf_counter() - started) * 1000,
        )

    def _check_size(self, size_bytes: int) -> None:
        limit = self._limits.response_bytes
        if size_bytes > limit or self._spent_bytes + size_bytes > 3 * limit:
            raise StatementFailed(
                f"The response is too large: one statement may return {limit} bytes, one request three times that. "
                "Ask for fewer rows at a time, or use a cursor",
                "RESPONSE_TOO_LARGE",
            )

    def _open(self, stmt: Stmt) -> None:
        """Prepare, bind, and step up to the first row."""
        sql = stmt.sql or ""
        verdict = self._verdict = classify(sql)
        if verdict.kind in _SPECIAL:
            if verdict.kind in _TRANSACTION_WORDS:
                if self._transaction_word(verdict.kind):
                    return
                sql = _begin_text(verdict, sql)
            elif verdict.kind is Kind.PRAGMA:
                self._check_unchanged(verdict)
                sql = _pragma_answer(verdict)
            else:
                raise _not_run(verdict)
        names = parameters(sql)
        bindings: tuple[object, ...] = ()
        if names or stmt.args or stmt.named_args:
            bindings = hrana.bind_arguments(stmt, names, explain=verdict.verb == "EXPLAIN")
        if verdict.session_functions or verdict.is_insert:  # an INSERT may add no row, and answers what was before it
            self.connection.set_last_insert_rowid(self.counters.last_insert_rowid)
        self._run(sql, bindings)
        if verdict.kind is Kind.CONNECTION_STATE and verdict.pragma is not None and repeatable(verdict.pragma):
            self._remember_setting(verdict.pragma.name, sql)
        if self.readonly_transaction and self.connection.get_autocommit():
            self.readonly_transaction = False

    def _remember_setting(self, name: str, sql: str) -> None:
        # Inside a transaction SQLite ignores this one, so it must not come into force later.
        if name != "foreign_keys" or self.connection.get_autocommit():
            self.settings[name] = sql

    def _run(self, sql: str, bindings: tuple[object, ...]) -> None:
        self.text, self._started = sql, False
        try:
            self._cursor.execute(sql, bindings)
        except (apsw.Error, UnicodeError, OverflowError, ValueError) as error:
            raise self._translated(error) from error
        if not self._started:
            raise _not_run(EMPTY_VERDICT)

    def _before_step(self, cursor: apsw.Cursor, sql: str, bindings: object) -> bool:
        """SQLite's own verdict on a prepared statement, before it does anything."""
        if not cursor.has_vdbe:
            return True  # a semicolon, blanks or a comment around the one statement
        if self._started:
            raise _not_run(Verdict(Kind.MANY))  # a belt: classify has counted already, before anything ran
        self._started = True
        self._description = cursor.get_description()
        self._readonly = cursor.is_readonly
        self._explain = cursor.is_explain > 0
        if self._describing:
            raise _Described
        if not self._readonly and not self._explain:
            if self.readonly_transaction:
                raise StatementFailed("SQLite error: attempt to write a readonly database", "SQLITE_READONLY")
            if not self.may_write:
                raise NotReadOnly(
                    "the statement writes, and it was sent where only reads run. Nothing was changed. "
                    "Send it to the leader, or connect to the proxy."
                )
        return True

    def _rows(self, stmt: Stmt) -> Iterator[list[tuple[object, ...]]]:
        """The rows in lists of moderate size; none when they are not wanted, but the statement still runs."""
        if not self._description:
            return
        try:
            if stmt.want_rows is False:
                deque(self._cursor, maxlen=0)
                return
            wanted = _FIRST_ROWS
            while True:
                rows = list(itertools.islice(self._cursor, wanted))
                if rows:
                    yield rows
                if len(rows) < wanted:
                    return
                # By weight, so that neither wide rows fill the memory nor narrow ones cost a loop each.
                weight = sum(map(_weight, rows)) // len(rows) + 1
                wanted = max(1, min(_MOST_ROWS, wanted * 4, _BATCH_BYTES // weight))
        except (apsw.Error, UnicodeError) as error:
            raise self._translated(error) from error

    def _close(self) -> tuple[int, int | None]:
        """After the last row: affected_row_count and last_insert_rowid, and the stream's counters (hrana.md 1.3)."""
        self.last = (0, None, bool(self._description))
        if self._readonly or self._explain:
            return 0, None
        connection, counters = self.connection, self.counters
        affected, rowid = 0, None
        if self._verdict.counts_changes:
            affected = counters.changes = connection.changes()
            counters.total_changes += affected
        if self._verdict.is_insert:
            rowid = counters.last_insert_rowid = connection.last_insert_rowid()
        self.last = (affected, rowid, bool(self._description))
        return affected, rowid

    def _abandon(self) -> None:
        """End a statement between two rows, since its result cannot be delivered, or nobody wants it.

        It must not stay open: it would keep its snapshot for whatever runs on this connection next. In autocommit
        the writes of such a statement are undone: interrupted, it is rolled back; only reset, it would be committed.
        Inside a transaction an interrupt would roll all of it back, so there its writes stay, as those of any
        statement whose rows the client did not like.
        """
        if not self._readonly and self.connection.get_autocommit():
            self.connection.interrupt()
            with contextlib.suppress(apsw.InterruptError):
                deque(self._cursor, maxlen=0)
        self._cursor.close(True)
        self._cursor = self.connection.cursor()
        self._cursor.exec_trace = self._before_step

    def _describe(self, sql: str) -> bytes:
        verdict = classify(sql)
        if verdict.kind in (Kind.MANY, Kind.EMPTY, Kind.REFUSED):
            raise _not_run(verdict)
        if verdict.kind is Kind.PRAGMA:
            sql = _pragma_answer(verdict)  # what it stands for; PyPI libsql describes everything before it runs it
        elif verdict.ruling is not None and verdict.ruling.action is Action.STREAM:
            return _describe_setting(sql)
        names = parameters(sql)
        self._describing = True
        try:
            self._run(_begin_text(verdict, sql), (None,) * len(names))
        except _Described:
            pass
        finally:
            self._describing = False
        return hrana.encode_describe(
            names, self._description, is_explain=self._explain, is_readonly=self._readonly or self._explain
        )

    def _check_unchanged(self, verdict: Verdict) -> None:
        """Refuse to seem to set what cannot be changed. Raises StatementFailed BLOCKED."""
        ruling, pragma = verdict.ruling, verdict.pragma
        if ruling is None or pragma is None or ruling.query is None or not ruling.reason or pragma.argument is None:
            return
        if str(self.connection.execute(ruling.query).get) != pragma.argument:
            raise blocked(ruling.reason)

    # --- transactions -------------------------------------------------------------------------------------------

    def _transaction_word(self, kind: Kind) -> bool:
        """Prepare for a transaction word. True when it is answered here already, without SQLite."""
        if kind is Kind.BEGIN_IMMEDIATE and not self.may_write:
            raise NotReadOnly(
                "BEGIN IMMEDIATE asks for the write lock, and it was sent where only reads run. Nothing was changed. "
                "Send it to the leader, or connect to the proxy."
            )
        if self.virtual:
            begins = kind in (Kind.BEGIN_DEFERRED, Kind.BEGIN_READONLY)
            if begins and self._in_virtual:
                raise StatementFailed("SQLite error: cannot start a transaction within a transaction", "SQLITE_UNKNOWN")
            if not begins and not self._in_virtual:
                word = "commit" if kind is Kind.COMMIT else "rollback"
                raise StatementFailed(f"SQLite error: cannot {word} - no transaction is active", "SQLITE_UNKNOWN")
            self._in_virtual = begins
            self.readonly_transaction = kind is Kind.BEGIN_READONLY
            self._description, self._readonly, self._explain = (), True, False
            return True
        if kind is Kind.BEGIN_READONLY and self.connection.get_autocommit():
            self.readonly_transaction = True
        return False

    # --- small parts --------------------------------------------------------------------------------------------

    def _encoded_columns(self) -> bytes:
        description = self._description
        known = self._columns.get(description)
        if known is None:
            known = hrana.encode_columns(description)
            # A column may be named by a whole expression: what is long is not kept.
            if len(known) <= _CACHED_COLUMNS_BYTES:
                if len(self._columns) >= _CACHED_COLUMNS:
                    self._columns.clear()
                self._columns[description] = known
        return known

    def _changes(self, *_: object) -> int:
        return self.counters.changes if self._verdict.session_functions else self.connection.changes()

    def _total_changes(self, *_: object) -> int:
        return self.counters.total_changes if self._verdict.session_functions else self.connection.total_changes()

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, apsw.InterruptError | apsw.TooBigError) and self.budgeted:
            return error
        return statement_error(error, prepared=self._started)


_TRANSACTION_WORDS = frozenset(
    (Kind.BEGIN_DEFERRED, Kind.BEGIN_IMMEDIATE, Kind.BEGIN_READONLY, Kind.COMMIT, Kind.ROLLBACK)
)
_SPECIAL = _TRANSACTION_WORDS | {Kind.PRAGMA, Kind.MANY, Kind.EMPTY, Kind.REFUSED}


def _not_run(verdict: Verdict) -> StatementFailed:
    """Why a text is not given to SQLite at all."""
    if verdict.kind is Kind.MANY:
        return StatementFailed("SQL string contains more than one statement", "SQL_MANY_STATEMENTS")
    if verdict.kind is Kind.EMPTY:
        return StatementFailed("SQL string does not contain any statement", "SQL_NO_STATEMENT")
    return blocked(verdict.reason)


def _begin_text(verdict: Verdict, sql: str) -> str:
    """BEGIN READONLY is libSQL's: SQLite takes the word only where a transaction's name may stand."""
    return "BEGIN" if verdict.kind is Kind.BEGIN_READONLY else sql


def _pragma_answer(verdict: Verdict) -> str:
    """The text that gives a PRAGMA's value in force without setting it (sql/pragmas.py)."""
    ruling = verdict.ruling
    if ruling is None or ruling.action is Action.WALSHIP:
        raise blocked("PRAGMA walship_* is answered by the proxy; connect there")
    if ruling.query is not None:
        return ruling.query
    value = ruling.value if isinstance(ruling.value, int) else f"'{ruling.value}'"
    return f"SELECT {value} AS {ruling.column}"


def _describe_setting(sql: str) -> bytes:
    """Describe a PRAGMA of a connection on one of its own: SQLite sets such a setting already when it prepares it."""
    with contextlib.closing(apsw.Connection(":memory:")) as apart:
        cursor = apart.cursor()
        found: list[tuple[tuple[tuple[str, str | None], ...], bool]] = []

        def look(prepared: apsw.Cursor, _sql: str, _bindings: object) -> bool:
            found.append((prepared.get_description(), prepared.is_readonly))
            return True  # it may run, here

        cursor.exec_trace = look
        try:
            cursor.execute(sql)
        except apsw.Error as error:
            raise statement_error(error, prepared=bool(found)) from error
        description, readonly = found[0]
        return hrana.encode_describe((), description, is_explain=False, is_readonly=readonly)


def drive(program: Program) -> bytes:
    """Run a program that has all it needs. Raises NotReadOnly when it asks for more."""
    try:
        next(program)
    except StopIteration as end:
        result: bytes = end.value
        return result
    program.close()
    raise NotReadOnly(
        "a statement of this request writes, and it was sent where only reads run. Nothing was changed. "
        "Send it to the leader, or connect to the proxy."
    )


def statement_error(error: Exception, *, prepared: bool) -> StatementFailed:
    """What a client is told about an exception of apsw's, with the codes of hrana.md 1.5."""
    if isinstance(error, apsw.BindingsError):
        return StatementFailed(f"Arguments do not match SQL parameters: {error}", "ARGS_INVALID")
    if isinstance(error, apsw.Error):
        offset = getattr(error, "error_offset", -1)
        if not prepared and str(error).startswith(_PARSE_ERRORS):
            where = f" (at offset {offset})" if offset >= 0 else ""
            return StatementFailed(f"SQL string could not be parsed: {error}{where}", "SQL_PARSE_ERROR")
        if not prepared and offset >= 0:
            return StatementFailed(f"SQL input error: {error} (at offset {offset})", "SQL_INPUT_ERROR")
        if isinstance(error, apsw.InterruptError):
            return StatementFailed(
                "SQLite error: interrupted: the statement ran for longer than this server allows, or the server stops. "
                "Nothing of it was kept",
                _code_name(error),
            )
        return StatementFailed(f"SQLite error: {error}", _code_name(error))
    if isinstance(error, UnicodeDecodeError):
        return StatementFailed(
            "The result holds text that is not valid UTF-8, which JSON cannot carry; read it with CAST(... AS BLOB)",
            hrana.RESULT_NOT_JSON,
        )
    return StatementFailed(f"SQL or its arguments cannot be given to SQLite: {error}", "ARGS_INVALID")


def _code_name(error: apsw.Error) -> str:
    """The name of the primary result code; plain SQLITE_ERROR is SQLITE_UNKNOWN in Hrana."""
    result = getattr(error, "result", apsw.SQLITE_ERROR) & 0xFF
    if result == apsw.SQLITE_ERROR:
        return "SQLITE_UNKNOWN"
    return str(apsw.mapping_result_codes.get(result, "SQLITE_UNKNOWN"))


def _weight(row: tuple[object, ...]) -> int:
    return sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
