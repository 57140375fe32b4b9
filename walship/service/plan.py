"""What a list of requests will need, judged before anything runs (R21, R22). Pure.

`resolve` puts stored texts in the place of their ids and answers what needs no database; `look` then says where the
list can run. Only words are looked at here, so a verdict costs at most a detour: a list judged a read that turns out
to write is refused by SQLite before it does anything, and runs again where writes run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from walship.errors import ProtocolViolation
from walship.hrana import json as hrana
from walship.hrana.baton import CLOSED
from walship.hrana.types import (
    And,
    Batch,
    BatchRequest,
    BatchStep,
    CloseRequest,
    CloseSqlRequest,
    Cond,
    DescribeRequest,
    ErrorBody,
    ExecuteRequest,
    IsOk,
    Not,
    SequenceRequest,
    Stmt,
    StoreSqlRequest,
    StreamRequest,
)
from walship.service.limits import Limits
from walship.sql.classify import Kind, Verdict, classify, split
from walship.sql.pragmas import repeatable

__all__ = ["Item", "Needs", "look", "resolve"]

Item = StreamRequest | bytes
"""A request with its texts in place, or its finished answer."""

_Texted = TypeVar("_Texted", SequenceRequest, DescribeRequest)


@dataclass(frozen=True, slots=True)
class Needs:
    """Where a list of requests can run.

    writes: it has a statement that probably writes, or asks for the write lock.
    own_connection: it changes or needs state of one connection (PRAGMA, TEMP objects).
    lasting: that state cannot be made again on another connection (TEMP objects).
    begins: it opens a transaction of its own.
    words: it has transaction words at all.
    certain: whatever happens, no transaction is open when it has run.
    read_only: every transaction it begins says READONLY.
    """

    writes: bool = False
    own_connection: bool = False
    lasting: bool = False
    begins: bool = False
    words: bool = False
    certain: bool = True
    read_only: bool = False


def resolve(requests: Sequence[StreamRequest], texts: dict[int, str], limits: Limits) -> tuple[list[Item], bool]:
    """Requests with stored texts in place, in order, and whether the list closes the stream. Changes `texts`.

    Raises ProtocolViolation for an unknown text, for a request behind a close, and for too many requests.
    """
    if len(requests) > limits.requests:
        raise ProtocolViolation(f"too many requests at once: {len(requests)}, at most {limits.requests} are taken")
    items: list[Item] = []
    closed = False
    for request in requests:
        if closed:
            raise ProtocolViolation(CLOSED)
        if isinstance(request, CloseRequest):
            closed = True
            items.append(hrana.ok("close"))
        elif isinstance(request, StoreSqlRequest):
            items.append(_store(request, texts, limits))
        elif isinstance(request, CloseSqlRequest):
            texts.pop(request.sql_id, None)
            items.append(hrana.ok("close_sql"))
        else:
            items.append(_with_text(request, texts, limits))
    return items, closed


def resolve_batch(batch: Batch, texts: dict[int, str], limits: Limits) -> Batch:
    """A batch with stored texts in place. Raises ProtocolViolation."""
    if len(batch.steps) > limits.requests:
        raise ProtocolViolation(f"too many steps in a batch: {len(batch.steps)}, at most {limits.requests} are taken")
    if all(step.stmt.sql is not None for step in batch.steps):
        return batch
    return Batch([BatchStep(_stmt(step.stmt, texts), step.condition) for step in batch.steps])


def _store(request: StoreSqlRequest, texts: dict[int, str], limits: Limits) -> bytes:
    if request.sql_id in texts:
        raise ProtocolViolation(f"SQL text {request.sql_id} is already stored on this stream")
    if len(texts) >= limits.stored_texts:
        return hrana.failed(
            ErrorBody(f"Too many SQL texts stored on this stream, at most {limits.stored_texts}", "SQL_STORE_TOO_MANY")
        )
    if len(request.sql.encode("utf-8", "surrogatepass")) > limits.stored_bytes:
        return hrana.failed(
            ErrorBody(f"SQL text is too large to store, at most {limits.stored_bytes} bytes", "SQL_STORE_TOO_LARGE")
        )
    texts[request.sql_id] = request.sql
    return hrana.ok("store_sql")


def _with_text(request: StreamRequest, texts: dict[int, str], limits: Limits) -> StreamRequest:
    if isinstance(request, ExecuteRequest):
        return request if request.stmt.sql is not None else ExecuteRequest(_stmt(request.stmt, texts))
    if isinstance(request, BatchRequest):
        batch = resolve_batch(request.batch, texts, limits)
        return request if batch is request.batch else BatchRequest(batch)
    if isinstance(request, SequenceRequest):
        return _texted(request, texts)
    if isinstance(request, DescribeRequest):
        return _texted(request, texts)
    return request


def _texted(request: _Texted, texts: dict[int, str]) -> _Texted:
    return request if request.sql is not None else type(request)(sql=_text(request.sql_id, texts))


def _stmt(stmt: Stmt, texts: dict[int, str]) -> Stmt:
    return stmt if stmt.sql is not None else msgspec.structs.replace(stmt, sql=_text(stmt.sql_id, texts), sql_id=None)


def _text(sql_id: int | None, texts: dict[int, str]) -> str:
    try:
        return texts[sql_id]  # type: ignore[index]
    except KeyError:
        raise ProtocolViolation(f"SQL text {sql_id} is not stored on this stream") from None


# --- looking ----------------------------------------------------------------------------------------------------

_READS = frozenset((Kind.READ_CANDIDATE, Kind.PRAGMA, Kind.MANY, Kind.EMPTY, Kind.REFUSED))
_BEGINS = frozenset((Kind.BEGIN_DEFERRED, Kind.BEGIN_IMMEDIATE, Kind.BEGIN_READONLY, Kind.SAVEPOINT))
_ENDS = frozenset((Kind.COMMIT, Kind.ROLLBACK))
_INNER = frozenset((Kind.RELEASE, Kind.ROLLBACK_TO))


def look(items: Sequence[Item], *, closing: bool) -> Needs:
    """What `items` need. `closing`: the stream ends behind them, so that nothing they leave open can go on."""
    needs = Needs()
    begins: list[Kind] = []
    for item in items:
        if isinstance(item, bytes):
            continue
        for verdict in _verdicts(item):
            needs = _with_verdict(needs, verdict, begins)
    if not begins:
        return needs
    certain = closing or _settles(items)
    return replace(needs, begins=True, certain=certain, read_only=all(kind is Kind.BEGIN_READONLY for kind in begins))


def _verdicts(request: StreamRequest) -> Iterator[Verdict]:
    """The verdict on each statement that would run; a describe runs none."""
    if isinstance(request, ExecuteRequest):
        yield classify(request.stmt.sql or "")
    elif isinstance(request, BatchRequest):
        for step in request.batch.steps:
            yield classify(step.stmt.sql or "")
    elif isinstance(request, SequenceRequest):
        verdict = classify(request.sql or "")
        if verdict.kind is Kind.MANY:
            yield from map(classify, split(request.sql or ""))
        else:
            yield verdict


def _with_verdict(needs: Needs, verdict: Verdict, begins: list[Kind]) -> Needs:
    kind = verdict.kind
    if kind in _READS:
        return needs
    if kind in _BEGINS:
        begins.append(kind)
        return replace(needs, words=True, writes=needs.writes or kind in (Kind.BEGIN_IMMEDIATE, Kind.SAVEPOINT))
    if kind in _ENDS:
        return replace(needs, words=True)
    if kind in _INNER:
        return replace(needs, words=True, writes=True)
    if kind is Kind.CONNECTION_STATE:
        if not verdict.session_functions or verdict.verb == "CREATE":
            lasting = needs.lasting or verdict.pragma is None or not repeatable(verdict.pragma)
            return replace(needs, own_connection=True, lasting=lasting)
        # changes() and its like are answered from the stream's own values, wherever the statement runs.
        return needs if verdict.verb in ("SELECT", "VALUES") else replace(needs, writes=True)
    return replace(needs, writes=True)


def _settles(items: Sequence[Item]) -> bool:
    """True iff the only transaction is the shape all clients send: one batch with BEGIN, then COMMIT, then a
    ROLLBACK that runs whenever the COMMIT did not go well (hrana.md 2.4)."""
    with_words = [item for item in items if not isinstance(item, bytes) and any(map(_is_word, _verdicts(item)))]
    if len(with_words) != 1 or not isinstance(with_words[0], BatchRequest):
        return False
    steps = with_words[0].batch.steps
    kinds = [classify(step.stmt.sql or "").kind for step in steps]
    places = [index for index, kind in enumerate(kinds) if kind in _ENDS or kind in _BEGINS - {Kind.SAVEPOINT}]
    if len(places) != 3:
        return False
    begin, commit, rollback = places
    if kinds[begin] not in _BEGINS or kinds[commit] is not Kind.COMMIT or kinds[rollback] is not Kind.ROLLBACK:
        return False
    if any(kinds[index] is Kind.SAVEPOINT for index in (*range(begin), *range(rollback, len(steps)))):
        return False
    condition = steps[rollback].condition
    return condition is None or _runs_unless_ok(condition, commit, begin)


def _runs_unless_ok(condition: Cond, commit: int, begin: int) -> bool:
    """Is `condition` true whenever the transaction was begun and the COMMIT is not ok?"""
    if isinstance(condition, Not):
        return condition.cond == IsOk(commit)
    if isinstance(condition, And):
        return all(part == IsOk(begin) or _runs_unless_ok(part, commit, begin) for part in condition.conds)
    return False


def _is_word(verdict: Verdict) -> bool:
    return verdict.kind in _BEGINS or verdict.kind in _ENDS or verdict.kind in _INNER
