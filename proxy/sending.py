"""One attempt: a plan made into a link request, sent to one node, and what it ended in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from proxy.backends import Backend
from proxy.link import Cursor, LinkConnection
from proxy.plan import Plan
from walship.formats.link import NO_POSITION, ReadLevel, Refusal, Reply, Request, RequestFlags, Verb
from walship.formats.position import Position
from walship.hrana.types import Level

__all__ = ["Attempt", "Form", "Refused", "Sent", "Started", "request_of", "send_cursor", "send_pipeline"]

# What is linearizable was proven when its floor was asked for; any node that covers the floor may serve it.
_LEVELS = {Level.ANY: ReadLevel.ANY, Level.SESSION: ReadLevel.SESSION, Level.LINEARIZABLE: ReadLevel.SESSION}

A = TypeVar("A")


class Refused(Exception):
    """A node refused one attempt; never leaves the dispatcher."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Started:
    """A cursor that has begun: its first bytes are here, so it will not be repeated elsewhere."""

    first: bytes
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class Sent(Generic[A]):
    """An answer, and whose, over which connection."""

    backend: Backend
    connection: int
    answer: A


@dataclass(frozen=True, slots=True)
class Attempt:
    """A write as it was sent once: the term it is bound to, its commit token, and the newest TXID of that leader known
    before (0: none). `why` says how its answer was lost."""

    node: str
    term: int
    txid: int
    token: tuple[int, int]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Form(Generic[A]):
    """How a kind of request is sent, and how its answer is made when only the outcome is known (proxy/outcome.py)."""

    verb: Verb
    version: int
    send: Callable[[LinkConnection, Request], Awaitable[A]]


def request_of(
    connection: LinkConnection,
    plan: Plan,
    form: Form[A],
    *,
    flags: RequestFlags = RequestFlags.NONE,
    stream: int = 0,
    floor: Position = NO_POSITION,
    wait_ms: int = 0,
    min_term: int = 0,
    attempt: Attempt | None = None,
) -> Request:
    """The request for one attempt over `connection`; `attempt` for what may write."""
    settings = plan.settings
    if plan.read_only:
        flags |= RequestFlags.READ_ONLY
    incarnation, seq = (0, 0) if attempt is None else attempt.token
    return Request(
        connection.next_id(),
        form.verb,
        plan.body,
        form.version,
        flags,
        _LEVELS[settings.level],
        stream,
        floor,
        min_term,
        wait_ms,
        -1 if settings.ack is None else settings.ack,
        0 if attempt is None else attempt.term,
        incarnation,
        seq,
    )


async def send_pipeline(connection: LinkConnection, request: Request) -> Reply:
    """Raises Refused, LinkLost, Overloaded."""
    answer = await connection.request(request)
    if isinstance(answer, Refusal):
        raise Refused(answer)
    return answer


async def send_cursor(connection: LinkConnection, request: Request) -> Started:
    """Raises as `send_pipeline`, until the first bytes are here."""
    cursor = connection.cursor(request)
    try:
        first = await cursor.chunk()
    except BaseException:
        cursor.abandon()
        raise
    if first is None and isinstance(cursor.end, Refusal):
        raise Refused(cursor.end)
    return Started(first or b"", cursor)
