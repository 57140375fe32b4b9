"""The answer to a write whose reply was lost, made from what the log knows of it (R19). Pure.

A commit token brings back two numbers, `changes` and `last_insert_rowid`, and no rows. So a request of one statement
that gives no rows is answered as if nothing had happened; for anything else the client is told that it is done.
"""

from __future__ import annotations

from proxy.link import Cursor, LinkConnection
from proxy.plan import Plan
from proxy.sending import Attempt, Started
from walship.errors import CommittedResultLost, OutcomeUnknown
from walship.formats.link import CursorEnd, CursorHead, OutcomeBody, Reply
from walship.formats.position import Position
from walship.hrana import json

__all__ = ["done_cursor", "done_pipeline", "outcome_unknown", "result_lost"]


def done_pipeline(connection: LinkConnection, plan: Plan, outcome: OutcomeBody, position: Position) -> Reply:
    """The reply of a pipeline. Raises CommittedResultLost when more would be needed than is known."""
    if plan.results is None or outcome.had_rows or _holds_state(plan):
        raise result_lost(position)
    result = json.encode_stmt_result(
        json.encode_columns(()),
        json.encode_rows(()),
        affected_row_count=outcome.changes,
        last_insert_rowid=outcome.last_insert_rowid,
    )
    results = [_result(kind, result) for kind in plan.results]
    return Reply(connection.next_id(), json.pipeline_reply(None, results), position)


def _result(kind: str, result: bytes) -> bytes:
    if kind == "execute":
        return json.ok(kind, result)
    if kind == "batch":
        return json.ok(kind, json.encode_batch_result([result], [None]))
    if kind == "get_autocommit":
        return json.ok(kind, is_autocommit=True)
    return json.ok(kind)


def done_cursor(connection: LinkConnection, plan: Plan, outcome: OutcomeBody, position: Position) -> Started:
    """The same for a cursor, whole and at its end. Raises CommittedResultLost."""
    if plan.results is None or outcome.had_rows or _holds_state(plan):
        raise result_lost(position)
    cursor = Cursor(connection, connection.next_id())
    cursor.feed(CursorHead(cursor.id, position))
    cursor.feed(CursorEnd(cursor.id, position))
    lines = json.cursor_head(None) + json.step_begin(0, json.encode_columns(()))
    return Started(lines + json.step_end(outcome.changes, outcome.last_insert_rowid), cursor)


def _holds_state(plan: Plan) -> bool:
    """What it left open or set on its connection is gone with that, whatever it committed."""
    return plan.makes_state or (plan.opens and not plan.commits)


def result_lost(position: Position) -> CommittedResultLost:
    return CommittedResultLost(
        f"this request is committed at position {position}, and its result went with the leader that ran it. "
        "Do not send it again; read what you need from it"
    )


def outcome_unknown(attempt: Attempt, why: str = "") -> OutcomeUnknown:
    lost = attempt.why or "no answer came in time"
    return OutcomeUnknown(
        f"{lost}, after the request was sent to {attempt.node} in term {attempt.term}"
        f"{': ' + why if why else ''}. It may or may not be done: look before sending it again"
    )
