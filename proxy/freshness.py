"""How fresh a request must be, found out before it is sent (R18).

| level          | floor                                                                                            |
|----------------|--------------------------------------------------------------------------------------------------|
| `any`          | the client's token, if any                                                                       |
| `session`      | what this proxy acknowledged and showed; with other live proxies: what the leader says now       |
| `linearizable` | what the leader says now, and proves by a heartbeat round to its voters                          |

Questions to the leader are shared: all requests that come while one is on its way get the answer to the next one,
since an answer to a question asked before a read began proves nothing to that read. So under load a thousand reads
cost two small messages.

When no leader answers, `session` goes on: each acknowledged write is on n + 1 of the voters, so the newest position
among |V| - n of them covers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn, Protocol

from proxy.backends import Backend, Backends
from proxy.consistency import Floors, Settings
from walship.errors import Fenced, NotDone, StatementFailed, Unavailable, WalshipError
from walship.formats.link import ReadLevel, Refusal, Request, Verb, error_of
from walship.formats.position import Position
from walship.hrana.types import Level
from walship.metrics import ProxyMetrics

__all__ = ["Freshness", "Neighbours", "Shared"]

PROOF_SECONDS = 1.0
"""How long a leader may take to prove that it leads; then it is asked again, or another one is."""

ASK_SECONDS = 1.0
"""How long an answer may take besides: a node that is silent for longer counts as away."""

PAUSE_SECONDS = 0.05
"""How often to ask again when nobody could answer, besides whenever there is news of a node."""

_AWAY = (NotDone, Unavailable, Fenced)
"""What a node answers that cannot tell now: another one may, or the same a moment later."""


class Neighbours(Protocol):
    """What is known of other proxies (`walship.coordination.presence`)."""

    @property
    def alone(self) -> bool: ...
    @property
    def doubt(self) -> int:
        """Grows whenever another proxy was there, or may have been, since one knew to be alone."""


class Shared:
    """One question at a time, asked for whoever waits when it is asked. `run` must be running."""

    def __init__(self, question: Callable[[], Awaitable[Position]]) -> None:
        self._question = question
        self._waiting: list[asyncio.Future[Position]] = []
        self._wanted = asyncio.Event()
        self.asked = 0

    async def answer(self) -> Position:
        """The answer to a question asked after this call. Raises what it ended in."""
        waiter: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._wanted.set()
        return await waiter

    async def run(self) -> NoReturn:
        """Ask whenever somebody wants to know; ends only by cancellation."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            waiting, self._waiting = self._waiting, []
            if all(waiter.done() for waiter in waiting):
                continue
            self.asked += 1
            try:
                position = await self._question()
            except WalshipError as error:
                _settle(waiting, error)
            except BaseException:
                _settle(waiting, Unavailable("this proxy is shutting down; nothing was run"))
                raise
            else:
                _settle(waiting, position)


class Freshness:
    """Floors of requests. `neighbours` None: this proxy never asks for a `session` floor (`--session-scope proxy`)."""

    def __init__(
        self, backends: Backends, floors: Floors, metrics: ProxyMetrics, neighbours: Neighbours | None = None
    ) -> None:
        self._backends, self._floors, self._metrics = backends, floors, metrics
        self._neighbours = neighbours
        self._cleared = 0  # the doubt that the own floor answers
        self.index = Shared(self._read_index)
        self.session = Shared(self._session_floor)

    async def run(self) -> None:
        """Ask what has to be asked; ends only by cancellation."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.index.run(), name="read index")
            tasks.create_task(self.session.run(), name="session floor")

    async def floor(self, settings: Settings, until: float) -> Position:
        """The position that a request begun now must be served at, `NO_POSITION` for none.

        `until` is a time of the loop's clock. Raises WriteLost for a token of a lost history, StatementFailed when
        the level cannot be had, and what last kept the floor from being known when the time is up.
        """
        if settings.level is Level.ANY:
            return self._floors.needed(settings)
        self._floors.needed(settings)  # a lost token needs no asking
        while True:
            try:
                if settings.level is Level.LINEARIZABLE:
                    return self._floors.needed(settings, at_least=await _in_time(self.index.answer(), until))
                if not await self._learn_others(until):
                    return self._floors.needed(settings)
                problem: WalshipError = Unavailable(
                    "no leader has been heard of, so it is not known how fresh is fresh"
                )
            except _AWAY as error:
                problem = error
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                raise Unavailable(f"how fresh this read must be could not be found out: {problem}. Nothing was run")
            await self._backends.changed(min(left, PAUSE_SECONDS))

    async def _learn_others(self, until: float) -> bool:
        """Raise the own floor to what others may have acknowledged, if there are others. True: not possible yet."""
        neighbours = self._neighbours
        if neighbours is None or (neighbours.alone and neighbours.doubt == self._cleared):
            return not self._floors.ready
        alone, doubt = neighbours.alone, neighbours.doubt
        position = await _in_time(self.session.answer(), until)
        self._floors.raise_to(position)
        self._floors.ready = True
        if alone and neighbours.alone and neighbours.doubt == doubt:
            self._cleared = doubt  # nobody else could acknowledge anything since the question was asked
        return False

    # --- questions --------------------------------------------------------------------------------------------------

    async def _read_index(self) -> Position:
        leader = self._backends.leader
        if leader is None:
            raise Unavailable("there is no leader to prove that it leads")
        return await self._ask(leader, ReadLevel.LINEARIZABLE)

    async def _session_floor(self) -> Position:
        leader = self._backends.leader
        if leader is not None:
            position = await self._ask_if_there(leader, ReadLevel.SESSION)
            if position is not None:
                return position
        return await self._newest_of_voters()  # they know as much as is needed

    async def _newest_of_voters(self) -> Position:
        cluster = self._backends.cluster_record
        voters = [] if cluster is None else [node for node in self._backends if node.name in cluster.voters]
        needed = 1 if cluster is None else len(cluster.voters) - cluster.acks
        there = [node for node in voters if node.usable]
        answers = await asyncio.gather(*(self._ask_if_there(node, ReadLevel.ANY) for node in there))
        found = [answer for answer in answers if answer is not None]
        if len(found) < needed:
            raise Unavailable(f"there is no leader, and {len(found)} of the {needed} voters needed instead answered")
        return self._floors.latest(found)

    async def _ask_if_there(self, node: Backend, level: ReadLevel) -> Position | None:
        try:
            return await self._ask(node, level)
        except _AWAY:
            return None

    async def _ask(self, node: Backend, level: ReadLevel) -> Position:
        connection = node.connection
        if connection is None:
            raise Unavailable(f"there is no connection to node {node.name}")
        request = Request(
            connection.next_id(),
            Verb.READ_INDEX,
            b"",
            level=level,
            min_term=self._backends.highest_term,
            wait_ms=int(PROOF_SECONDS * 1000),
        )
        outcome = "failed"
        proof_seconds = PROOF_SECONDS if level is ReadLevel.LINEARIZABLE else 0.0
        try:
            async with asyncio.timeout(proof_seconds + ASK_SECONDS):
                answer = await connection.request(request)
            if isinstance(answer, Refusal):
                raise error_of(answer)
            outcome = "answered"
            return answer.position
        except TimeoutError:
            raise Unavailable(f"node {node.name} does not say how fresh a read must be") from None
        except StatementFailed:
            outcome = "refused"
            raise
        finally:
            self._metrics.floor_requests.labels(level.name.lower(), outcome).inc()


def _settle(waiting: Iterable[asyncio.Future[Position]], outcome: Position | WalshipError) -> None:
    for waiter in waiting:
        if waiter.done():
            continue
        if isinstance(outcome, Position):
            waiter.set_result(outcome)
        else:
            waiter.set_exception(outcome)


async def _in_time(answer: Awaitable[Position], until: float) -> Position:
    try:
        async with asyncio.timeout_at(until):
            return await answer
    except TimeoutError:
        raise Unavailable("no node answered in time") from None
