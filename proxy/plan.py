"""What one request asks for: the facts routing needs, and the body to forward (R22, hrana.md 3.3). Pure.

The unit is one whole pipeline or cursor: any statement that is no read candidate sends all of it to the leader, since
conditions and results refer across statements. Nothing here decides that something *is* a read; that is SQLite's word.

The client's body goes on untouched, except in two cases, in which it is written anew: a stored text is used that only
the proxy still knows (unpinned streams live on no node), and a `PRAGMA walship_...`, which the proxy answers: the
statement becomes a SELECT of the answer, so that describe, cursors, conditions and column names all work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from proxy.consistency import Settings, parse_ack, parse_level, parse_token
from proxy.router import Need
from proxy.streams import StreamLimits
from walship.errors import ProtocolViolation, StatementFailed
from walship.hrana.types import (
    Batch,
    BatchRequest,
    CloseRequest,
    CloseSqlRequest,
    CursorBody,
    DescribeRequest,
    ExecuteRequest,
    GetAutocommitRequest,
    PipelineBody,
    SequenceRequest,
    Stmt,
    StoreSqlRequest,
    StreamRequest,
)
from walship.sql.classify import Kind, Verdict, classify, split
from walship.sql.pragmas import Action, PragmaCall

__all__ = ["Known", "Plan", "plan_cursor", "plan_pipeline"]

_READS = frozenset({Kind.READ_CANDIDATE, Kind.EMPTY, Kind.PRAGMA})
_OPENS = frozenset({Kind.BEGIN_DEFERRED, Kind.BEGIN_IMMEDIATE, Kind.BEGIN_READONLY, Kind.SAVEPOINT})
_ENDS = frozenset({Kind.COMMIT, Kind.RELEASE})
_ENDS_ANY = frozenset({Kind.COMMIT, Kind.ROLLBACK})


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, understood.

    Attributes:
        need: who may run it.
        texts: the read candidates in it, for the verdict cache.
        closes: the stream ends with this request.
        opens: it may leave a transaction open.
        commits: it may end one by COMMIT.
        makes_state: it says something that only one connection can keep.
        stored: the stream's stored texts afterwards.
        settings: the stream's settings afterwards, and for this request.
        keep: ask the leader to remember the stream, although it has no state.
        read_only: the client's token only reads; wherever it runs, nothing of it may write.
        results: the kinds of its requests if one of them is one statement and the others run nothing, so that its
            answer can be made from what a commit token knows; else None.
    """

    need: Need
    body: bytes
    texts: tuple[str, ...]
    closes: bool
    opens: bool
    commits: bool
    makes_state: bool
    stored: Mapping[int, str]
    settings: Settings
    keep: bool = False
    read_only: bool = False
    results: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What the proxy answers `PRAGMA walship_...` from. The calls are made only when asked for."""

    position: Callable[[], str]
    status: Callable[[], str]
    default_ack: int | None
    most_acks: int | None = None  # how many followers can acknowledge at all; None: not known


def plan_pipeline(
    pipeline: PipelineBody,
    body: bytes,
    *,
    stored: Mapping[int, str],
    settings: Settings,
    known: Known,
    limits: StreamLimits,
) -> Plan:
    """Plan a decoded pipeline whose bytes were `body`. Raises StatementFailed for what makes all of it impossible."""
    walk = _Walk(stored, settings, known, limits)
    requests = [walk.request(request) for request in pipeline.requests]
    if walk.changed:
        body = msgspec.json.encode(PipelineBody(requests))
    return walk.plan(body, _results_of(pipeline))


def plan_cursor(
    cursor: CursorBody,
    body: bytes,
    *,
    stored: Mapping[int, str],
    settings: Settings,
    known: Known,
    limits: StreamLimits,
) -> Plan:
    """Plan a decoded cursor body, as `plan_pipeline` does."""
    walk = _Walk(stored, settings, known, limits)
    batch = walk.batch(cursor.batch)
    if walk.changed:
        body = msgspec.json.encode(CursorBody(batch))
    return walk.plan(body, ("cursor",) if _is_one_statement(cursor.batch) else None)


_RUN_NOTHING = (CloseRequest, StoreSqlRequest, CloseSqlRequest, GetAutocommitRequest)


def _results_of(pipeline: PipelineBody) -> tuple[str, ...] | None:
    running = [request for request in pipeline.requests if not isinstance(request, _RUN_NOTHING)]
    if len(running) != 1:
        return None
    only = running[0]
    if not isinstance(only, ExecuteRequest) and not (isinstance(only, BatchRequest) and _is_one_statement(only.batch)):
        return None
    return tuple(str(request.__struct_config__.tag) for request in pipeline.requests)


def _is_one_statement(batch: Batch) -> bool:
    return len(batch.steps) == 1 and batch.steps[0].condition is None


class _Walk:
    """One pass over the requests in order. Each method returns its argument, or what has to stand in its place."""

    def __init__(self, stored: Mapping[int, str], settings: Settings, known: Known, limits: StreamLimits) -> None:
        self.settings = settings
        self.changed = False
        self._stored = stored
        self._own: dict[int, str] | None = None  # a copy of `stored`, made at the first change
        self._sent: set[int] = set()  # ids that the node itself knows at this point of the pipeline
        self._known, self._limits = known, limits
        self._need = Need.READ
        self._texts: list[str] = []
        self._read_only = False  # the request has said BEGIN READONLY
        self._closes = self._opens = self._commits = self._makes_state = False

    def plan(self, body: bytes, results: tuple[str, ...] | None) -> Plan:
        texts = tuple(self._texts) if self._need is Need.READ else ()
        stored = self._stored if self._own is None else self._own
        return Plan(
            self._need,
            body,
            texts,
            self._closes,
            self._opens,
            self._commits,
            self._makes_state,
            stored,
            self.settings,
            results=results,
        )

    def request(self, request: StreamRequest) -> StreamRequest:
        if isinstance(request, ExecuteRequest):
            stmt = self.stmt(request.stmt)
            return request if stmt is request.stmt else ExecuteRequest(stmt)
        if isinstance(request, BatchRequest):
            batch = self.batch(request.batch)
            return request if batch is request.batch else BatchRequest(batch)
        if isinstance(request, SequenceRequest):
            sql = self._text(request.sql, request.sql_id)
            new = sql if sql is None else self._sequence(sql)
            return (
                request if new is None or not self._differs(request.sql, request.sql_id, new) else SequenceRequest(new)
            )
        if isinstance(request, DescribeRequest):
            sql = self._text(request.sql, request.sql_id)
            new = sql if sql is None else self._described(sql)
            return (
                request if new is None or not self._differs(request.sql, request.sql_id, new) else DescribeRequest(new)
            )
        if isinstance(request, StoreSqlRequest):
            self._store(request)
        elif isinstance(request, CloseSqlRequest):
            self._mine().pop(request.sql_id, None)
            self._sent.discard(request.sql_id)
        elif isinstance(request, CloseRequest):
            self._closes = True
        return request

    def batch(self, batch: Batch) -> Batch:
        stmts = [self.stmt(step.stmt) for step in batch.steps]
        if all(stmt is step.stmt for stmt, step in zip(stmts, batch.steps, strict=True)):
            return batch
        return Batch([msgspec.structs.replace(step, stmt=stmt) for stmt, step in zip(stmts, batch.steps, strict=True)])

    def stmt(self, stmt: Stmt) -> Stmt:
        sql = self._text(stmt.sql, stmt.sql_id)
        if sql is None:
            return stmt
        new = self._judged(sql)
        return (
            msgspec.structs.replace(stmt, sql=new, sql_id=None) if self._differs(stmt.sql, stmt.sql_id, new) else stmt
        )

    # --- stored texts -------------------------------------------------------------------------------------------

    def _text(self, sql: str | None, sql_id: int | None) -> str | None:
        """The text meant, or None for an id nobody knows: the node will say so, in the right place."""
        if sql is not None or sql_id is None:
            return sql
        return (self._stored if self._own is None else self._own).get(sql_id)

    def _differs(self, sql: str | None, sql_id: int | None, new: str) -> bool:
        """Must `new` be written into the body? Not when it is the text as sent, or what the node has by that id."""
        if sql == new or (sql_id in self._sent and self._text(None, sql_id) == new):
            return False
        self.changed = True
        return True

    def _store(self, request: StoreSqlRequest) -> None:
        stored = self._mine()
        if len(request.sql.encode("utf-8", "replace")) > self._limits.stored_text_bytes:
            stored.pop(request.sql_id, None)  # the node refuses it, and every later use of it
            self._sent.discard(request.sql_id)
            return
        stored[request.sql_id] = request.sql
        self._sent.add(request.sql_id)
        if len(stored) > self._limits.stored_texts:
            raise StatementFailed(
                f"A stream may store at most {self._limits.stored_texts} SQL texts; close some first. Nothing was run",
                "SQL_STORE_TOO_MANY",
            )

    def _mine(self) -> dict[int, str]:
        if self._own is None:
            self._own = dict(self._stored)
        return self._own

    # --- statements ---------------------------------------------------------------------------------------------

    def _judged(self, sql: str) -> str:
        """Take one statement text into account; returns the text to send."""
        verdict = classify(sql)
        if verdict.kind is Kind.READ_CANDIDATE:
            self._texts.append(sql)
            return sql
        if verdict.kind is Kind.MANY:
            return self._sequence(sql)
        return self._special(sql, verdict)

    def _special(self, sql: str, verdict: Verdict) -> str:
        kind = verdict.kind
        if verdict.pragma is not None and verdict.ruling is not None and verdict.ruling.action is Action.WALSHIP:
            return self._setting(verdict.pragma, apply=True)
        if kind is Kind.BEGIN_READONLY:
            self._read_only = True  # a follower runs it, and refuses what would write
        elif kind not in _READS and not (self._read_only and kind in _ENDS_ANY):
            self._need = Need.LEADER
        if kind in _OPENS:
            self._opens = True
        elif kind in _ENDS:
            self._commits = True
        elif kind is Kind.CONNECTION_STATE and not verdict.session_functions:
            self._makes_state = True
        return sql

    def _sequence(self, sql: str) -> str:
        pieces = split(sql)
        new = [self._judged(piece) for piece in pieces]
        return sql if new == pieces else ";\n".join(new)

    def _described(self, sql: str) -> str:
        """Describing runs nothing, so it counts as a read whatever the statement is."""
        verdict = classify(sql)
        if verdict.ruling is not None and verdict.pragma is not None and verdict.ruling.action is Action.WALSHIP:
            return self._setting(verdict.pragma, apply=False)
        return sql

    def _setting(self, pragma: PragmaCall, *, apply: bool) -> str:
        """Answer one of walship's own PRAGMAs, setting what it sets. Raises StatementFailed ARGS_INVALID."""
        try:
            value = self._answer(pragma.name.removeprefix("walship_"), pragma.argument, apply=apply)
        except ProtocolViolation as error:
            raise StatementFailed(str(error), "ARGS_INVALID") from error
        return f'SELECT {_literal(value)} AS "{pragma.name}"'

    def _answer(self, name: str, argument: str | None, *, apply: bool) -> str | int | None:
        settings = self.settings
        if name == "consistency":
            if argument is not None:
                settings = replace(settings, level=parse_level(argument))
            value: str | int | None = settings.level.value
        elif name == "ack":
            if argument is not None:
                settings = replace(settings, ack=parse_ack(argument, self._known.most_acks))
            value = self._known.default_ack if settings.ack is None else settings.ack
        elif name == "wait_for" and argument is not None:
            settings = replace(settings, floor=parse_token(argument))
            value = argument
        elif name == "position" and argument is None:
            value = self._known.position()
        elif name == "status" and argument is None:
            value = self._known.status()
        else:
            raise ProtocolViolation(
                f"PRAGMA walship_{name} is not known in this form; there are walship_consistency [= LEVEL], "
                "walship_ack [= N], walship_wait_for = 'TOKEN', walship_position and walship_status"
            )
        if apply:
            self.settings = settings
        return value


def _literal(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
