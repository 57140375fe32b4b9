"""What a client's request asks of its node, read off before anything runs: freshness, and what it may leave behind.

Only words are looked at, so a mistake costs a detour or an unneeded error, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from walship.errors import CorruptRecord, UsageError
from walship.formats.position import Position
from walship.hrana.types import (
    Batch,
    BatchRequest,
    ExecuteRequest,
    Level,
    SequenceRequest,
    StreamRequest,
)
from walship.sql.classify import Kind, Verdict, classify, split

__all__ = ["changes_connection", "freshness", "may_open"]

_OPENING_KINDS: Final = frozenset({Kind.BEGIN_DEFERRED, Kind.BEGIN_IMMEDIATE, Kind.BEGIN_READONLY, Kind.SAVEPOINT})


def freshness(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Level, Position | None]:
    """The level and floor a client asks for. Raises UsageError for what is neither."""
    level: Level | None = None
    floor: Position | None = None
    for name, value in headers:
        if name == b"walship-consistency":
            level = _level(value.decode("latin-1").strip().lower())
        elif name == b"walship-min-position":
            try:
                floor = Position.parse_text(value.decode("latin-1").strip())
            except CorruptRecord as error:
                raise UsageError(f"header walship-min-position: {error}") from error
    return level or Level.ANY, floor


def _level(text: str) -> Level:
    if text == "global":
        return Level.SESSION
    try:
        return Level(text)
    except ValueError as error:
        allowed = ", ".join(Level)
        raise UsageError(f"header walship-consistency: {text[:40]!r} is not a level; allowed: {allowed}") from error


def changes_connection(requests: Sequence[StreamRequest]) -> bool:
    """May these requests leave settings or TEMP objects behind on their connection?"""
    return any(_leaves_state(verdict) for request in requests for verdict in _verdicts(request))


def _leaves_state(verdict: Verdict) -> bool:
    return verdict.kind is Kind.CONNECTION_STATE and not verdict.session_functions


def may_open(batch: Batch) -> bool:
    """May a transaction be open after this batch? Texts stored on the stream are taken for yes."""
    return any(step.stmt.sql is None for step in batch.steps) or any(
        verdict.kind in _OPENING_KINDS for verdict in _verdicts(BatchRequest(batch))
    )


def _verdicts(request: StreamRequest) -> Iterator[Verdict]:
    """The verdict on each statement of a request; describe runs nothing, stored texts are not known here."""
    if isinstance(request, ExecuteRequest):
        texts: list[str | None] = [request.stmt.sql]
    elif isinstance(request, BatchRequest):
        texts = [step.stmt.sql for step in request.batch.steps]
    elif isinstance(request, SequenceRequest):
        texts = [request.sql]
    else:
        return
    for text in texts:
        verdict = classify(text or "")
        if verdict.kind is Kind.MANY:
            yield from map(classify, split(text or ""))
        else:
            yield verdict
