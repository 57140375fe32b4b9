"""A call that carries a commit token, or is bound to a term (R19)."""

from __future__ import annotations

from collections.abc import Sequence

from walship.engine.attempts import Attempt
from walship.engine.writer import Writer
from walship.errors import Fenced, NotDone, NotLeader, OutcomeUnknown, Unavailable
from walship.formats.position import Position
from walship.service.executor import Executor
from walship.service.plan import Item, look
from walship.service.request import Call, Host

__all__ = ["attempt_of", "fill", "last_to_commit", "raise_after", "writer_of"]


def writer_of(host: Host, term: int) -> Writer:
    """The writer to run a call that is bound to `term` (0: to none); a writer lives for one term.

    Raises NotLeader or Fenced. Ask again after every wait.
    """
    writer = host.writer
    if writer is None:
        raise NotLeader(*host.leader)
    if term not in (0, writer.attempts.term):
        raise Fenced(
            f"this request was sent to the leader of term {term}, and this node leads term {writer.attempts.term}. "
            "It was not run and changed nothing."
        )
    return writer


def attempt_of(call: Call) -> Attempt | None:
    return None if call.token is None else Attempt(call.token)


def fill(attempt: Attempt | None, executor: Executor) -> None:
    """What a client whose answer is lost may still be told of the last statement."""
    if attempt is not None:
        attempt.changes, attempt.last_insert_rowid, attempt.had_rows = executor.last


def raise_after(committed: Position | None, error: BaseException) -> None:
    """Never answer `not done` behind a commit: raise OutcomeUnknown in the place of what a proxy sends again after."""
    if committed is not None and isinstance(error, NotDone | Fenced | Unavailable):
        raise OutcomeUnknown(
            f"an earlier part of this request was committed and acknowledged at {committed}, and a later part "
            f"was not done: {error}"
        ) from error


def last_to_commit(items: Sequence[Item]) -> int:
    """The number of the last of `items` that may commit anything, or -1."""
    for number in range(len(items) - 1, -1, -1):
        needs = look(items[number : number + 1], closing=False)
        if needs.writes or needs.words or needs.own_connection:
            return number
    return -1
