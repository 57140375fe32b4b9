"""Getting one request done: choose a node, send, and on a refusal or a broken link choose again (R17, R22).

What may be repeated is decided here and nowhere else:

| after                                 | a read                        | anything else                           |
|---------------------------------------|-------------------------------|-----------------------------------------|
| refused before it ran (NotDone)       | another node, leader last     | waits for a leader, until the deadline  |
| link broke, request never sent        | another node                  | waits for a leader, until the deadline  |
| link broke after sending              | another node                  | `OutcomeUnknown`                        |
| NOT_READ_ONLY                         | to the leader, as a write     | -                                       |
| any other refusal                     | the client gets it            | the client gets it                      |

A pinned stream has one place to go; when that is gone its state is, and the client is told.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from proxy.backends import Backend, Backends
from proxy.consistency import Floors
from proxy.freshness import Freshness
from proxy.link import Cursor, LinkConnection, LinkLost
from proxy.plan import Plan
from proxy.router import Need, Verdicts, decide
from proxy.streams import ClientStream, Pin
from walship.errors import (
    Behind,
    NotDone,
    NotReadOnly,
    OutcomeUnknown,
    Overloaded,
    TransactionTimeout,
    Unavailable,
    WalshipError,
)
from walship.formats.link import (
    NO_POSITION,
    ReadLevel,
    Reason,
    Refusal,
    Reply,
    Request,
    RequestFlags,
    Verb,
    error_of,
)
from walship.formats.position import Position
from walship.hrana.auth import may_not_write
from walship.hrana.baton import CLOSED, STREAM_EXPIRED, stream_expired
from walship.hrana.types import Level
from walship.metrics import ProxyMetrics

__all__ = ["Answer", "CursorAnswer", "Dispatcher"]

RUN_SECONDS = 300.0
"""Longest a request may run on a node that is alive. A dead or silent node is noticed in seconds (backends.py)."""

CLOSE_SECONDS = 1.0
"""How long to wait for a node to close one of its streams."""

PINNED_WAIT_MS = 5000
"""How long the one node that can run a pinned stream's request may take to reach the floor; mostly it is there."""

RETRY_SECONDS = 0.05
"""How long to wait for news when every node has refused, before all are asked again."""

LOOK_SECONDS = 0.25
"""How often to look again without news: room on a link, and a node heard of again, are not announced."""

# What is linearizable was proven when its floor was asked for; any node that covers the floor may serve it.
_LEVELS = {Level.ANY: ReadLevel.ANY, Level.SESSION: ReadLevel.SESSION, Level.LINEARIZABLE: ReadLevel.SESSION}

# Refusals after which another attempt is right: nothing ran, and things may be different elsewhere or a moment later.
_ELSEWHERE = frozenset(
    {
        Reason.BEHIND,
        Reason.NOT_LEADER,
        Reason.DRAINING,
        Reason.FENCED,
        Reason.NOT_DONE,
        Reason.NOT_READ_ONLY,
        Reason.UNAVAILABLE,
    }
)
_READ_ELSEWHERE = _ELSEWHERE | {Reason.OVERLOADED, Reason.STORAGE}


@dataclass(frozen=True, slots=True)
class Answer:
    """A pipeline's reply, and who gave it over which connection."""

    backend: Backend
    connection: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class CursorAnswer:
    """A cursor that has begun: its first bytes are here, so it will not be repeated elsewhere."""

    backend: Backend
    connection: int
    first: bytes
    cursor: Cursor


A = TypeVar("A")


class _Refused(Exception):
    """A node refused one attempt; never leaves this module."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class _Started:
    first: bytes
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class _Sent(Generic[A]):
    """An answer, and whose."""

    backend: Backend
    connection: int
    answer: A


class Dispatcher:
    """Sends requests. Holds no request's state; `floors` and `verdicts` are what it learns."""

    def __init__(
        self,
        backends: Backends,
        floors: Floors,
        freshness: Freshness,
        *,
        rng: random.Random,
        wait_seconds: float,
        deadline_seconds: float,
        metrics: ProxyMetrics,
        verdicts: Verdicts | None = None,
        run_seconds: float = RUN_SECONDS,
    ) -> None:
        self.backends, self.floors, self.freshness = backends, floors, freshness
        self.verdicts = verdicts or Verdicts()
        self.metrics = metrics
        self._rng = rng
        self._wait_ms = max(int(wait_seconds * 1000), 1)
        self._deadline_seconds, self._run_seconds = deadline_seconds, run_seconds

    async def pipeline(self, plan: Plan, stream: ClientStream, version: int) -> Answer:
        """Run a pipeline. Raises errors of our tree for what ends the whole request."""
        sent = await self._run(plan, stream, Verb.PIPELINE, version, _send_pipeline)
        reply = sent.answer
        self.settle(plan, sent.backend, reply.position)
        return Answer(sent.backend, sent.connection, reply)

    async def cursor(self, plan: Plan, stream: ClientStream, verb: Verb = Verb.CURSOR) -> CursorAnswer:
        """Begin a cursor, or a dump. Its end must be given to `settle` too."""
        sent = await self._run(plan, stream, verb, 3, _send_cursor)
        cursor = sent.answer.cursor
        self.settle(plan, sent.backend, cursor.position)  # its first rows may be seen long before its end
        return CursorAnswer(sent.backend, sent.connection, sent.answer.first, cursor)

    def settle(self, plan: Plan, backend: Backend, position: Position) -> None:
        """Learn from an answer before the client sees it: the next read must not show less (R18)."""
        if plan.need is Need.LEADER or plan.settings.level is not Level.ANY:
            self.floors.raise_to(position)
        backend.saw(position)

    async def close_pin(self, pin: Pin) -> None:
        """Tell a node that one of its streams ended. Does its best: the node's own timer does the rest."""
        backend = self.backends.get(pin.node)
        if backend is None or backend.connection is None or backend.generation != pin.connection:
            return
        connection = backend.connection
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await connection.request(Request(connection.next_id(), Verb.CLOSE_STREAM, b"", stream=pin.stream))
        except (LinkLost, Overloaded, TimeoutError):
            return

    # --- choosing and trying --------------------------------------------------------------------------------------

    async def _run(
        self,
        plan: Plan,
        stream: ClientStream,
        verb: Verb,
        version: int,
        send: Callable[[LinkConnection, Request], Awaitable[A]],
    ) -> _Sent[A]:
        if stream.pin is not None:
            return await self._on_pin(plan, stream, stream.pin, verb, version, send)
        return await _Attempts(self, plan, stream, verb, version, send).run()

    async def _on_pin(
        self,
        plan: Plan,
        stream: ClientStream,
        pin: Pin,
        verb: Verb,
        version: int,
        send: Callable[[LinkConnection, Request], Awaitable[A]],
    ) -> _Sent[A]:
        backend = self.backends.get(pin.node)
        connection = None if backend is None else backend.connection
        if backend is None or connection is None or backend.generation != pin.connection:
            raise stream_expired()
        if stream.autocommit:
            until = asyncio.get_running_loop().time() + self._deadline_seconds
            floor = await self.freshness.floor(plan.settings, until)
        else:  # the transaction was as fresh as asked for when it began; its snapshot stays what it is
            floor = self.floors.needed(plan.settings)
        request = self.request(
            connection,
            plan,
            verb,
            version,
            flags=RequestFlags.KEEP if plan.keep else RequestFlags.NONE,
            stream=pin.stream,
            floor=floor,
            wait_ms=PINNED_WAIT_MS,
        )
        try:
            answer = await self.timed(send(connection, request))
        except LinkLost as lost:
            if lost.sent and (stream.autocommit or plan.commits):
                raise _outcome_unknown(backend.name, lost) from lost
            raise TransactionTimeout(
                f"{lost}; the open transaction was on that node and is rolled back. Begin it again"
            ) from lost
        except TimeoutError as error:
            raise _outcome_unknown(backend.name, error) from error
        except _Refused as refused:
            if plan.read_only and refused.refusal.reason is Reason.NOT_READ_ONLY:
                raise may_not_write() from None
            raise error_of(refused.refusal) from None
        return _Sent(backend, pin.connection, answer)

    def request(
        self,
        connection: LinkConnection,
        plan: Plan,
        verb: Verb,
        version: int,
        *,
        flags: RequestFlags = RequestFlags.NONE,
        stream: int = 0,
        floor: Position = NO_POSITION,
        min_term: int = 0,
        wait_ms: int = 0,
    ) -> Request:
        settings = plan.settings
        if plan.read_only:
            flags |= RequestFlags.READ_ONLY
        return Request(
            connection.next_id(),
            verb,
            plan.body,
            version,
            flags,
            _LEVELS[settings.level],
            stream,
            floor,
            min_term,
            wait_ms,
            -1 if settings.ack is None else settings.ack,
        )

    async def timed(self, answer: Awaitable[A]) -> A:
        async with asyncio.timeout(self._run_seconds):
            return await answer

    @property
    def wait_ms(self) -> int:
        return self._wait_ms

    @property
    def rng(self) -> random.Random:
        return self._rng

    @property
    def deadline_seconds(self) -> float:
        return self._deadline_seconds


class _Attempts(Generic[A]):
    """The attempts of one request that is bound to no node, until one succeeds or the deadline has passed."""

    def __init__(
        self,
        owner: Dispatcher,
        plan: Plan,
        stream: ClientStream,
        verb: Verb,
        version: int,
        send: Callable[[LinkConnection, Request], Awaitable[A]],
    ) -> None:
        self._owner, self._plan, self._verb, self._version, self._send = owner, plan, verb, version, send
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + owner.deadline_seconds
        self._floor = NO_POSITION
        self._tried: set[str] = set()
        self._may_wait = True
        self._last: WalshipError | None = None
        self._need = plan.need
        if plan.need is Need.READ and owner.verdicts.is_write(plan.texts, self._loop.time()):
            self._need = Need.LEADER

    async def run(self) -> _Sent[A]:
        owner = self._owner
        settings = self._plan.settings
        if self._need is Need.READ or settings.floor is not None or settings.level is Level.LINEARIZABLE:
            self._floor = await owner.freshness.floor(settings, self._until)
        while True:
            decision = decide(
                self._need,
                self._floor,
                owner.backends,
                owner.floors.history,
                owner.rng,
                wait_ms=owner.wait_ms,
                tried=self._tried,
                may_wait=self._may_wait,
            )
            backend = None if decision is None else owner.backends.get(decision.name)
            if decision is None or backend is None or backend.connection is None:
                await self._wait_for_news()
                continue
            sent = await self._attempt(backend, backend.connection, wait_ms=decision.wait_ms, covered=decision.covered)
            if not decision.covered:
                owner.metrics.waits.labels("failed" if sent is None else "reached").inc()
            if sent is not None:
                return sent

    async def _wait_for_news(self) -> None:
        left = self._until - self._loop.time()
        if left <= 0:
            self._give_up()
        await self._owner.backends.changed(min(left, RETRY_SECONDS if self._tried else LOOK_SECONDS))
        self._tried.clear()
        self._may_wait = True

    async def _attempt(
        self, backend: Backend, connection: LinkConnection, *, wait_ms: int, covered: bool
    ) -> _Sent[A] | None:
        """One attempt; None when another one is right."""
        reading = self._need is Need.READ
        request = self._owner.request(
            connection,
            self._plan,
            self._verb,
            self._version,
            flags=self._flags(),
            stream=self._kept(backend),
            floor=self._floor,
            min_term=0 if reading else self._owner.floors.term,
            wait_ms=wait_ms,
        )
        started, generation = self._loop.time(), backend.generation
        try:
            answer = await self._owner.timed(self._send(connection, request))
        except LinkLost as lost:
            if lost.sent and not reading:
                raise _outcome_unknown(backend.name, lost) from lost
            self._again(backend, lost)
            return None
        except Overloaded as error:
            if not reading:
                raise
            self._again(backend, error)
            return None
        except TimeoutError as error:
            if not reading:
                raise _outcome_unknown(backend.name, error) from error
            raise Unavailable(f"node {backend.name} ran this read for too long; nothing was changed") from error
        except _Refused as refused:
            self._refused(backend, refused.refusal, request)
            return None
        if covered:
            now = self._loop.time()
            backend.latency.observe(now - started, now)
        if reading:
            backend.reads += 1
        return _Sent(backend, generation, answer)

    def _flags(self) -> RequestFlags:
        if self._need is Need.READ:
            return RequestFlags.READ_ONLY
        return RequestFlags.KEEP if self._plan.keep or self._stream.kept is not None else RequestFlags.NONE

    def _kept(self, backend: Backend) -> int:
        """The leader's record of this stream, 0 when there is none over the present connection."""
        kept = self._stream.kept
        if self._need is Need.READ or kept is None:
            return 0
        return kept.stream if (kept.node, kept.connection) == (backend.name, backend.generation) else 0

    def _refused(self, backend: Backend, refusal: Refusal, request: Request) -> None:
        reading = self._need is Need.READ
        if request.stream and (refusal.code == STREAM_EXPIRED or refusal.message == CLOSED):
            self._stream.kept = None  # the leader forgot its record of the stream before it ran anything
            return
        if refusal.reason not in (_READ_ELSEWHERE if reading else _ELSEWHERE):
            raise error_of(refusal) from None
        if refusal.reason is Reason.NOT_READ_ONLY and not reading and self._plan.read_only:
            raise may_not_write() from None
        if refusal.reason is Reason.NOT_READ_ONLY and reading:
            if self._plan.texts:
                self._owner.verdicts.note_write(self._plan.texts, self._loop.time())
            self._need = Need.LEADER
            self._tried.clear()
            self._owner.metrics.retries.labels(NotReadOnly.code).inc()
            return
        if refusal.reason is Reason.BEHIND:
            self._may_wait = False
        self._again(backend, error_of(refusal))

    def _again(self, backend: Backend, error: WalshipError) -> None:
        self._tried.add(backend.name)
        self._last = error
        self._owner.metrics.retries.labels(error.code).inc()

    def _give_up(self) -> NoReturn:
        seconds = f"{self._owner.deadline_seconds:g} s"
        if isinstance(self._last, Behind):
            raise Behind(f"no node reached the position {self._floor} within {seconds}: {self._last}") from self._last
        if isinstance(self._last, NotDone) and not isinstance(self._last, Behind):
            raise self._last
        why = "" if self._last is None else f" ({self._last})"
        if self._need is Need.LEADER:
            raise Unavailable(
                f"no leader could be reached within {seconds}{why}. Nothing was changed by this request; send it again"
            )
        raise Unavailable(f"no node could serve this read within {seconds}{why}. Nothing was changed")


async def _send_pipeline(connection: LinkConnection, request: Request) -> Reply:
    answer = await connection.request(request)
    if isinstance(answer, Refusal):
        raise _Refused(answer)
    return answer


async def _send_cursor(connection: LinkConnection, request: Request) -> _Started:
    cursor = connection.cursor(request)
    try:
        first = await cursor.chunk()
    except BaseException:
        cursor.abandon()
        raise
    if first is None and isinstance(cursor.end, Refusal):
        raise _Refused(cursor.end)
    return _Started(first or b"", cursor)


def _outcome_unknown(node: str, cause: Exception) -> OutcomeUnknown:
    why = str(cause) or "no answer came in time"
    return OutcomeUnknown(
        f"{why}, after the request was sent to {node}. It may or may not be done: look before sending it again"
    )
