"""The write turn: how an interactive transaction waits for its place among the writes, and how it loses it (R21)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from walship.engine.attempts import Attempt
from walship.formats.position import Position

__all__ = ["Done", "Turn"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """What a job returned and the position that covers it: the end of its group, also when it wrote nothing."""

    value: T
    position: Position


class Turn:
    """The write turn of one interactive transaction. Release it after COMMIT or ROLLBACK, always.

    expired: the turn was taken away; the holder must roll back and release. `on_expire`, when set, is called on the
    loop at that moment.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, call_soon: Callable[..., None]) -> None:
        self._loop = loop
        self._call_soon = call_soon
        self._released = False
        self._stirred = threading.Event()
        self._busy = 0
        self._last_used = time.monotonic()
        self.granted: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[Done[Any]] = loop.create_future()
        self.so_far: asyncio.Future[Done[Any]] | None = None  # who waits for what was committed until now
        self.expired = False
        self.on_expire: Callable[[], None] | None = None
        self.ack: int | None = None
        self.attempt: Attempt | None = None  # whose request runs now; set before it can commit

    def begin_statement(self) -> None:
        """A statement of the transaction runs: the turn is not idle. Pair with `end_statement`."""
        self._busy += 1

    def end_statement(self) -> None:
        self._busy -= 1
        self._last_used = time.monotonic()

    async def release(self, *, ack: int | None = None) -> Position:
        """Give the turn back. Returns the position that covers what was committed, once it is acknowledged.

        `ack` overrides the cluster's number of acknowledgments, as in `Writer.submit`.
        Raises OutcomeUnknown when the acknowledgments did not come in time.
        """
        self.ack = ack
        self._release()
        done = await asyncio.shield(self.finished)
        return done.position

    async def acknowledge(self, *, ack: int | None = None) -> Position:
        """As `release`, for what was committed so far, and keep the turn: another transaction holds SQLite's lock."""
        self.ack = ack
        self.so_far = self._loop.create_future()
        self._stirred.set()
        done = await asyncio.shield(self.so_far)
        return done.position

    def withdraw(self) -> None:
        """Nobody will use it, granted or not."""
        self._release()

    def _release(self) -> None:
        self._released = True
        self._stirred.set()

    def hold(
        self,
        *,
        idle_seconds: float,
        total_seconds: float,
        look_seconds: float,
        waiting: Callable[[], bool],
        look: Callable[[], None],
        acknowledge: Callable[[asyncio.Future[Done[Any]]], None],
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        """Writer thread: wait until released, and call the turn in when it is over its limits (R21).

        It may be idle for `idle_seconds` while others are `waiting`, and last `total_seconds`. Meanwhile `look` finds
        commits of other programs, which readers may have seen already; `acknowledge` is called for `so_far`. `ending`:
        the turn has to end now.
        """
        answering: asyncio.Future[Done[Any]] | None = None
        start = time.monotonic()
        while True:
            self._stirred.wait(look_seconds)
            self._stirred.clear()
            if self._released:
                return
            if self.so_far is not answering:
                answering = self.so_far
                if answering is not None:
                    acknowledge(answering)
            look()
            now = time.monotonic()
            idle = self._busy == 0 and now - self._last_used > idle_seconds and waiting()
            if (idle or ending() or now - start > total_seconds) and not self.expired:
                self.expired = True
                self._call_soon(self._tell)

    def call_in(self) -> None:
        """On the loop: take the turn away now, because this node stops leading."""
        if not self.expired:
            self.expired = True
            self._tell()

    def _tell(self) -> None:
        if self.on_expire is not None:
            self.on_expire()
