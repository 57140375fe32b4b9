"""Getting one write done, exactly once, whatever becomes of leaders meanwhile (R19, failover.md 3.9; I18, I19).

| after                                  | then                                                                       |
|----------------------------------------|----------------------------------------------------------------------------|
| no leader                              | held until there is one (proxy/buffer.py)                                  |
| refused before it ran, never sent      | held, and sent to the next leader                                          |
| the answer was lost: link, time, node  | held, then the next leader is asked what became of it:                     |
| .. done                                | the answer is made from the token, or `CommittedResultLost`                |
| .. not done                            | sent again, as a new attempt under a new token                             |
| .. running                             | asked again                                                                |
| .. unknown, or the window is over      | `OutcomeUnknown`                                                           |
| any other refusal                      | the client gets it                                                         |

Each attempt is bound to the term of the leader that it is sent to and has a token of its own (docs/model.md, m5). No
leader below the highest term heard of is asked or sent to: `Backends.leader` gives none.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

from proxy.backends import Backend, Backends
from proxy.buffer import Hold, Ticket
from proxy.link import LinkConnection, LinkLost
from proxy.outcome import outcome_unknown
from proxy.plan import Plan
from proxy.sending import Attempt, Form, Refused, Sent, request_of
from proxy.streams import ClientStream
from walship.errors import Behind, NotDone, Overloaded, ProtocolViolation, Unavailable, WalshipError
from walship.formats.link import (
    NO_POSITION,
    Outcome,
    OutcomeBody,
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
from walship.hrana.baton import CLOSED, STREAM_EXPIRED
from walship.metrics import ProxyMetrics

__all__ = ["RUN_SECONDS", "Build", "Writes"]

RUN_SECONDS = 300.0
"""Longest a request may run on a node that is alive. A dead or silent node is noticed in seconds (backends.py)."""

RETRY_SECONDS = 0.05
"""How long to wait for news after a leader has refused, before it is asked again."""

ASK_SECONDS = 0.5
"""How long a leader may wait for a running write to end before it answers `running`."""

ANSWER_SECONDS = 1.0
"""How long its answer may take besides."""

# Refusals after which another attempt is right: nothing ran, and things may be different elsewhere or a moment later.
_ELSEWHERE = frozenset(
    {Reason.BEHIND, Reason.NOT_LEADER, Reason.DRAINING, Reason.FENCED, Reason.NOT_DONE, Reason.UNAVAILABLE}
)

A = TypeVar("A")
Build = Callable[[LinkConnection, Plan, OutcomeBody, Position], A]


class Writes:
    """The writes of one proxy. `incarnation` names this process in commit tokens."""

    def __init__(
        self,
        backends: Backends,
        hold: Hold,
        metrics: ProxyMetrics,
        *,
        wait_ms: int,
        run_seconds: float = RUN_SECONDS,
        incarnation: int | None = None,
    ) -> None:
        self.backends, self.hold, self.metrics = backends, hold, metrics
        self.wait_ms, self.run_seconds = wait_ms, run_seconds
        self._incarnation = incarnation or secrets.randbits(64) or 1
        self._seqs = itertools.count(1)

    async def run(
        self, plan: Plan, stream: ClientStream, form: Form[A], build: Build[A], *, floor: Position
    ) -> Sent[A]:
        """Run what only a leader may run, on a stream that is bound to no node."""
        return await _Write(self, plan, stream, form, build, floor).run()

    async def settle(self, plan: Plan, stream: ClientStream, form: Form[A], build: Build[A], lost: Attempt) -> Sent[A]:
        """The answer to an attempt over a pinned stream whose reply was lost.

        Raises NotDone when it was not done: its stream is gone, so it cannot be sent again.
        """
        return await _Write(self, plan, stream, form, build, NO_POSITION, lost=lost, once=True).run()

    def attempt(self, leader: Backend) -> Attempt:
        """A new attempt at this leader."""
        term, applied = leader.term, leader.applied
        known = applied.txid if applied.term == term else 0
        return Attempt(leader.name, term, known, (self._incarnation, next(self._seqs)))

    def learn(self, refusal: Refusal) -> None:
        """A refusal may name a leader of a newer term."""
        if refusal.leader is not None:
            self.backends.learn_term(refusal.leader.term)


class _Write(Generic[A]):
    """One write, from its first attempt to its answer."""

    def __init__(
        self,
        owner: Writes,
        plan: Plan,
        stream: ClientStream,
        form: Form[A],
        build: Build[A],
        floor: Position,
        *,
        lost: Attempt | None = None,
        once: bool = False,
    ) -> None:
        self._owner, self._plan, self._stream, self._form, self._build = owner, plan, stream, form, build
        self._floor = floor
        self._lost = lost  # the attempt whose outcome is to be asked for
        self._once = once
        self._ticket: Ticket | None = None
        self._pause = False  # the leader refused just now: wait for news before the next turn
        self._last: WalshipError | None = None

    async def run(self) -> Sent[A]:
        done = False
        try:
            sent = await self._run()
            done = True
            return sent
        finally:
            if self._ticket is not None:
                self._owner.hold.leave(self._ticket, done=done)

    async def _run(self) -> Sent[A]:
        leader = await self._next_leader()
        while True:
            connection = leader.connection
            if connection is None:
                sent = None
            elif self._lost is not None:
                sent = await self._ask(leader, connection, self._lost)
                if sent is None and self._lost is None:
                    continue  # it was not done: the same leader may run it now
            else:
                sent = await self._attempt(leader, connection)
            if sent is not None:
                return sent
            leader = await self._next_leader()

    async def _next_leader(self) -> Backend:
        """The leader to go to when it is this one's turn. Raises what the client is told when its window is over."""
        owner = self._owner
        backends, hold = owner.backends, owner.hold
        if self._ticket is None:
            leader = backends.leader
            if leader is not None and self._lost is None and self._last is None and not hold.busy:
                return leader
            self._ticket = hold.enter(len(self._plan.body), sent=self._lost is not None)
        while True:
            if self._pause:
                self._pause = False
                await backends.changed(RETRY_SECONDS)
            if not await hold.turn(self._ticket):
                self._give_up()
            leader = backends.leader
            if leader is not None and leader.connection is not None:
                return leader
            self._pause = True

    # --- sending ------------------------------------------------------------------------------------------------

    async def _attempt(self, leader: Backend, connection: LinkConnection) -> Sent[A] | None:
        """One attempt; None when another one is right, or its outcome must be asked for."""
        owner, plan = self._owner, self._plan
        attempt = owner.attempt(leader)
        keep = plan.keep or self._stream.kept is not None
        request = request_of(
            connection,
            plan,
            self._form,
            flags=RequestFlags.KEEP if keep else RequestFlags.NONE,
            stream=self._kept(leader),
            floor=self._floor,
            min_term=owner.backends.highest_term,
            wait_ms=owner.wait_ms,
            attempt=attempt,
        )
        generation = leader.generation
        try:
            async with asyncio.timeout(owner.run_seconds):
                answer = await self._form.send(connection, request)
        except LinkLost as lost:
            if lost.sent:
                self._ask_later(attempt, str(lost))
            else:
                self._again(lost)
            return None
        except TimeoutError:
            self._ask_later(attempt, f"node {leader.name} ran it for {owner.run_seconds:g} s")
            return None
        except Refused as refused:
            self._refused(attempt, refused.refusal, request)
            return None
        return Sent(leader, generation, answer)

    def _kept(self, leader: Backend) -> int:
        """The leader's record of this stream, 0 when there is none over the present connection."""
        kept = self._stream.kept
        if kept is None or (kept.node, kept.connection) != (leader.name, leader.generation):
            return 0
        return kept.stream

    def _refused(self, attempt: Attempt, refusal: Refusal, request: Request) -> None:
        if request.stream and (refusal.code == STREAM_EXPIRED or refusal.message == CLOSED):
            self._stream.kept = None  # the leader forgot its record of the stream before it ran anything
            return
        self._owner.learn(refusal)
        error = error_of(refusal)
        if refusal.reason is Reason.OUTCOME_UNKNOWN:
            self._ask_later(attempt, str(error))
        elif refusal.reason is Reason.NOT_READ_ONLY:
            raise may_not_write() if self._plan.read_only else error
        elif refusal.reason in _ELSEWHERE:
            self._again(error)
        else:
            raise error

    def _again(self, error: WalshipError) -> None:
        self._last = error
        self._pause = True
        self._owner.metrics.retries.labels(error.code).inc()

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask_later(self, attempt: Attempt, why: str) -> None:
        self._lost = Attempt(attempt.node, attempt.term, attempt.txid, attempt.token, why)

    async def _ask(self, leader: Backend, connection: LinkConnection, lost: Attempt) -> Sent[A] | None:
        """Ask what became of `lost`; None when that is not known yet, or (`self._lost` is None then) it was not done.

        Raises OutcomeUnknown when nobody can tell any more, CommittedResultLost.
        """
        try:
            reply = await self._asked(leader, connection, lost)
        except (LinkLost, Overloaded, TimeoutError):
            self._pause = True
            return None
        except Refused as refused:
            self._owner.learn(refused.refusal)
            if refused.refusal.reason not in _ELSEWHERE | {Reason.OVERLOADED}:
                raise outcome_unknown(lost, refused.refusal.message) from None
            self._pause = True
            return None
        body = OutcomeBody.parse(reply.body)
        self._owner.metrics.outcomes.labels(body.outcome.value).inc()
        if body.outcome is Outcome.DONE:
            answer = self._build(connection, self._plan, body, reply.position)
            return Sent(leader, leader.generation, answer)
        if body.outcome is Outcome.UNKNOWN:
            raise outcome_unknown(lost, f"{leader.name}, which leads now, cannot tell what became of it")
        if body.outcome is Outcome.NOT_DONE:
            self._lost = None
            self._last = NotDone(f"{lost.why}. Nothing was changed by this request; send it again")
            if self._once:
                raise self._last
            return None
        self._pause = True
        return None

    async def _asked(self, leader: Backend, connection: LinkConnection, lost: Attempt) -> Reply:
        request = Request(
            connection.next_id(),
            Verb.OUTCOME,
            b"",
            floor=Position(lost.term, lost.txid),
            min_term=max(self._owner.backends.highest_term, lost.term),
            wait_ms=int(ASK_SECONDS * 1000),
            ack=-1 if self._plan.settings.ack is None else self._plan.settings.ack,
            incarnation=lost.token[0],
            seq=lost.token[1],
        )
        async with asyncio.timeout(ASK_SECONDS + ANSWER_SECONDS):
            answer = await connection.request(request)
        if isinstance(answer, Refusal):
            raise Refused(answer)
        if not isinstance(answer, Reply):
            raise ProtocolViolation(f"node {leader.name} answered a question for an outcome with something else")
        return answer

    # --- the end ------------------------------------------------------------------------------------------------

    def _give_up(self) -> NoReturn:
        """Raise what the client is told when its window is over."""
        if self._lost is not None:
            raise outcome_unknown(self._lost, "no leader could tell in time what became of it")
        seconds = f"{self._owner.hold.buffer.limits.window_seconds:g} s"
        last = self._last
        if isinstance(last, Behind):
            raise Behind(f"no node reached the position {self._floor} within {seconds}: {last}") from last
        if isinstance(last, NotDone):
            raise last
        why = "" if last is None else f" ({last})"
        raise Unavailable(
            f"no leader could be reached within {seconds}{why}. Nothing was changed by this request; send it again"
        )
