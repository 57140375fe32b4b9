"""Getting one request done: choose a node, send, and on a refusal or a broken link choose again (R17, R22).

| after                    | a read                    | anything else                                   |
|--------------------------|---------------------------|-------------------------------------------------|
| refused before it ran    | another node, leader last | proxy/writes.py: held for a leader              |
| the link broke           | another node              | the same; what was sent is asked after          |
| NOT_READ_ONLY            | to the leader, as a write | -                                               |
| any other refusal        | the client gets it        | the client gets it                              |

A pinned stream has one place to go; when that is gone its state is, and the client is told. What its last request
committed is asked after like any other write.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Generic, NoReturn, TypeVar

from proxy.backends import Backend, Backends
from proxy.consistency import Floors
from proxy.freshness import Freshness
from proxy.link import Cursor, LinkConnection, LinkLost
from proxy.outcome import done_cursor, done_pipeline, outcome_unknown
from proxy.plan import Plan
from proxy.router import Need, Verdicts, decide
from proxy.sending import Attempt, Form, Refused, Sent, request_of, send_cursor, send_pipeline
from proxy.streams import ClientStream, Pin
from proxy.writes import RUN_SECONDS, Build, Writes
from walship.errors import (
    Behind,
    NotDone,
    NotReadOnly,
    Overloaded,
    TransactionTimeout,
    Unavailable,
    WalshipError,
)
from walship.formats.link import (
    NO_POSITION,
    Reason,
    Refusal,
    Reply,
    Request,
    RequestFlags,
    Role,
    Verb,
    error_of,
)
from walship.formats.position import Position
from walship.hrana.auth import may_not_write
from walship.hrana.baton import stream_expired
from walship.hrana.types import Level
from walship.metrics import ProxyMetrics

__all__ = ["Answer", "CursorAnswer", "Dispatcher"]

CLOSE_SECONDS = 1.0
"""How long to wait for a node to close one of its streams."""

PINNED_WAIT_MS = 5000
"""How long the one node that can run a pinned stream's request may take to reach the floor; mostly it is there."""

RETRY_SECONDS = 0.05
"""How long to wait for news when every node has refused, before all are asked again."""

LOOK_SECONDS = 0.25
"""How often to look again without news: room on a link, and a node heard of again, are not announced."""

# Refusals of a read after which another attempt is right: things may be different elsewhere or a moment later.
_ELSEWHERE = frozenset(
    {
        Reason.BEHIND,
        Reason.NOT_LEADER,
        Reason.DRAINING,
        Reason.FENCED,
        Reason.NOT_DONE,
        Reason.NOT_READ_ONLY,
        Reason.UNAVAILABLE,
        Reason.OVERLOADED,
        Reason.STORAGE,
    }
)


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


class Dispatcher:
    """Sends requests. Holds no request's state; `floors` and `verdicts` are what it learns."""

    def __init__(
        self,
        backends: Backends,
        floors: Floors,
        freshness: Freshness,
        writes: Writes,
        *,
        rng: random.Random,
        wait_seconds: float,
        deadline_seconds: float,
        metrics: ProxyMetrics,
        verdicts: Verdicts | None = None,
        run_seconds: float = RUN_SECONDS,
    ) -> None:
        self.backends, self.floors, self.freshness, self.writes = backends, floors, freshness, writes
        self.verdicts = verdicts or Verdicts()
        self.metrics, self.rng = metrics, rng
        self.wait_ms = max(int(wait_seconds * 1000), 1)
        self.deadline_seconds, self.run_seconds = deadline_seconds, run_seconds

    async def pipeline(self, plan: Plan, stream: ClientStream, version: int) -> Answer:
        """Run a pipeline. Raises errors of our tree for what ends the whole request."""
        sent = await self._run(plan, stream, Form(Verb.PIPELINE, version, send_pipeline), done_pipeline)
        reply = sent.answer
        self.settle(plan, sent.backend, reply.position)
        return Answer(sent.backend, sent.connection, reply)

    async def cursor(self, plan: Plan, stream: ClientStream, verb: Verb = Verb.CURSOR) -> CursorAnswer:
        """Begin a cursor, or a dump. Its end must be given to `settle` too."""
        sent = await self._run(plan, stream, Form(verb, 3, send_cursor), done_cursor)
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

    async def _run(self, plan: Plan, stream: ClientStream, form: Form[A], build: Build[A]) -> Sent[A]:
        if stream.pin is not None:
            return await self._on_pin(plan, stream, stream.pin, form, build)
        until = asyncio.get_running_loop().time() + self.deadline_seconds
        settings = plan.settings
        reading = plan.need is Need.READ and not self.verdicts.is_write(plan.texts, until - self.deadline_seconds)
        floor = NO_POSITION
        if reading or settings.floor is not None or settings.level is Level.LINEARIZABLE:
            floor = await self.freshness.floor(settings, until)
        if reading:
            sent = await _Read(self, plan, form, floor, until).run()
            if sent is not None:
                return sent
        return await self.writes.run(plan, stream, form, build, floor=floor)

    async def _on_pin(self, plan: Plan, stream: ClientStream, pin: Pin, form: Form[A], build: Build[A]) -> Sent[A]:
        backend = self.backends.get(pin.node)
        connection = None if backend is None else backend.connection
        if backend is None or connection is None or backend.generation != pin.connection:
            raise stream_expired()
        if stream.autocommit:
            until = asyncio.get_running_loop().time() + self.deadline_seconds
            floor = await self.freshness.floor(plan.settings, until)
        else:  # the transaction was as fresh as asked for when it began; its snapshot stays what it is
            floor = self.floors.needed(plan.settings)
        # Of several statements one may end the transaction by a rollback, and the next commit by itself.
        may_commit = (stream.autocommit or plan.commits or plan.results is None) and backend.role is Role.LEADER
        attempt = self.writes.attempt(backend) if may_commit else None
        request = request_of(
            connection,
            plan,
            form,
            flags=RequestFlags.KEEP if plan.keep else RequestFlags.NONE,
            stream=pin.stream,
            floor=floor,
            wait_ms=PINNED_WAIT_MS,
            attempt=attempt,
        )
        try:
            answer = await self.timed(form.send(connection, request))
        except LinkLost as lost:
            if not lost.sent or attempt is None:
                raise _rolled_back(lost) from lost
            return await self._committed(plan, stream, form, build, replace(attempt, why=str(lost)))
        except TimeoutError as error:
            if attempt is None:
                raise Unavailable(f"node {backend.name} ran this request for too long. Begin again") from error
            raise outcome_unknown(attempt) from error
        except Refused as refused:
            if plan.read_only and refused.refusal.reason is Reason.NOT_READ_ONLY:
                raise may_not_write() from None
            if attempt is not None and refused.refusal.reason is Reason.OUTCOME_UNKNOWN:
                return await self._committed(plan, stream, form, build, replace(attempt, why=refused.refusal.message))
            raise error_of(refused.refusal) from None
        return Sent(backend, pin.connection, answer)

    async def _committed(
        self, plan: Plan, stream: ClientStream, form: Form[A], build: Build[A], lost: Attempt
    ) -> Sent[A]:
        """What a pinned stream's lost request came to, as its node is gone."""
        if stream.has_state:  # its settings are gone whatever it committed, and that must be told (R21)
            plan = replace(plan, results=None)
        try:
            return await self.writes.settle(plan, stream, form, build, lost)
        except NotDone as error:
            raise _rolled_back(error) from error

    async def timed(self, answer: Awaitable[A]) -> A:
        async with asyncio.timeout(self.run_seconds):
            return await answer


class _Read(Generic[A]):
    """The attempts of one read that is bound to no node, until one succeeds or the deadline has passed."""

    def __init__(self, owner: Dispatcher, plan: Plan, form: Form[A], floor: Position, until: float) -> None:
        self._owner, self._plan, self._form, self._floor, self._until = owner, plan, form, floor, until
        self._loop = asyncio.get_running_loop()
        self._tried: set[str] = set()
        self._may_wait = True
        self._writes = False
        self._floor_lost = False
        self._last: WalshipError | None = None

    async def run(self) -> Sent[A] | None:
        """The answer, or None when SQLite says that it is no read: then only a leader may run it."""
        owner = self._owner
        while not self._writes:
            if self._floor_lost:
                self._floor = await owner.freshness.floor(self._plan.settings, self._until)
                self._floor_lost = False
            decision = decide(
                Need.READ,
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
        return None

    async def _wait_for_news(self) -> None:
        left = self._until - self._loop.time()
        if left <= 0:
            self._give_up()
        await self._owner.backends.changed(min(left, RETRY_SECONDS if self._tried else LOOK_SECONDS))
        self._tried.clear()
        self._may_wait = True

    async def _attempt(
        self, backend: Backend, connection: LinkConnection, *, wait_ms: int, covered: bool
    ) -> Sent[A] | None:
        """One attempt; None when another one is right."""
        request = request_of(
            connection, self._plan, self._form, flags=RequestFlags.READ_ONLY, floor=self._floor, wait_ms=wait_ms
        )
        started, generation = self._loop.time(), backend.generation
        try:
            answer = await self._owner.timed(self._form.send(connection, request))
        except (LinkLost, Overloaded) as error:
            self._again(backend, error)
            return None
        except TimeoutError as error:
            raise Unavailable(f"node {backend.name} ran this read for too long; nothing was changed") from error
        except Refused as refused:
            self._refused(backend, refused.refusal)
            return None
        if covered:
            now = self._loop.time()
            backend.latency.observe(now - started, now)
        backend.reads += 1
        return Sent(backend, generation, answer)

    def _refused(self, backend: Backend, refusal: Refusal) -> None:
        if refusal.reason is Reason.WRITE_LOST and self._floor != self._plan.settings.floor:
            # The floor is this proxy's own, and that node knows of a newer term than it: what lay beyond the start of
            # that term was acknowledged to nobody. Only a token may name such a write and be told so (R18).
            self._floor_lost = True
            self._again(backend, error_of(refusal))
            return
        if refusal.reason not in _ELSEWHERE:
            raise error_of(refusal) from None
        if refusal.reason is Reason.NOT_READ_ONLY:
            if self._plan.texts:
                self._owner.verdicts.note_write(self._plan.texts, self._loop.time())
            self._writes = True
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
        if isinstance(self._last, NotDone):
            raise self._last
        why = "" if self._last is None else f" ({self._last})"
        raise Unavailable(f"no node could serve this read within {seconds}{why}. Nothing was changed")


def _rolled_back(cause: Exception) -> TransactionTimeout:
    return TransactionTimeout(f"{cause}; the open transaction was on that node and is rolled back. Begin it again")
