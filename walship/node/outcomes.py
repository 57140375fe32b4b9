"""Answering OUTCOME: what became of an attempt to write whose answer was lost (R19)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from walship.engine.attempts import Attempts
from walship.engine.tokens import Name
from walship.errors import Draining, Fenced, NotLeader, Unavailable
from walship.formats.link_words import Outcome, OutcomeBody
from walship.formats.position import Position
from walship.service.request import Host

__all__ = ["Outcomes"]

_LOOK_SECONDS = 0.05


class Outcomes:
    """What a serving leader says of attempts.

    counted: called with each answer, for the metric.
    """

    def __init__(
        self,
        host: Host,
        counted: Callable[[Outcome], None] = lambda _outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._counted = counted
        self._clock = clock

    async def of(
        self, name: Name, sent_after: Position, wait_seconds: float, ack: int | None = None
    ) -> tuple[OutcomeBody, Position]:
        """The outcome, and the commit's position when it is DONE. While it is RUNNING, waits for `wait_seconds`.

        See `Attempts.outcome` for `sent_after` and `ack`. Raises NotLeader, Fenced, Draining or Unavailable when this
        node cannot know: ask the leader, again.
        """
        until = self._clock() + wait_seconds
        while True:
            left = until - self._clock()
            try:
                attempts = self._serving(sent_after)
            except Unavailable:
                if left <= 0:
                    raise
                await self._wait(left, None)
                continue
            outcome, found = attempts.outcome(name, sent_after, ack)
            if outcome is not Outcome.RUNNING or left <= 0:
                break
            await self._wait(left, attempts)
        self._counted(outcome)
        if found is None:
            return OutcomeBody(outcome), Position(0, 0)
        token = found.token
        body = OutcomeBody(outcome, token.txid, token.changes, token.last_insert_rowid, token.had_rows)
        return body, found.position

    def _serving(self, sent_after: Position) -> Attempts:
        """The attempts of the term that this node serves: its start is acknowledged, its lease lives (m5 SERVING)."""
        writer = self._host.writer
        if writer is None:
            raise NotLeader(*self._host.leader)
        attempts = writer.attempts
        if attempts.term < sent_after.term:
            raise Fenced(
                f"this node leads term {attempts.term}, the attempt was sent in term {sent_after.term}. Ask its leader."
            )
        if not writer.serving:
            raise Draining("this node no longer leads for certain; ask the leader that follows")
        if self._host.watermarks.acked.term != attempts.term:
            raise Unavailable(f"the start of term {attempts.term} is not acknowledged yet; ask again")
        return attempts

    async def _wait(self, left_seconds: float, attempts: Attempts | None) -> None:
        seconds = min(left_seconds, _LOOK_SECONDS)
        if attempts is None:
            await asyncio.sleep(seconds)
            return
        attempts.changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await attempts.changed.wait()
        except TimeoutError:
            return
