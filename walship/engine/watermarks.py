"""Watermarks: how far this node has come, in one place, for everyone who must wait for it or report it.

Six positions, each of which only grows (design.md 3):

    leader      captured   read from the -wal into a frame
                durable    on disk here, in the -wal and in the log
                acked      covered by the acknowledgment rule
    follower    logged     durable in the log here
                publishing about to be visible to readers: set before the wal-index header is written
                applied    visible to readers: set after it (R17)

A read that begins between two marks sees at least `applied` and at most `publishing`; that is why there are two.

Marks are set from any thread (writer, applier, log) by plain assignment and read from any thread. Waiting and
callbacks belong to one event loop: a setter wakes it at most once per tick, and not at all while nobody waits.
That works without a lock because each side writes first and looks second: the setter stores the mark, then asks
whether somebody waits; a waiter enlists, then looks at the mark.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from walship.formats.position import Position, TermHistory

__all__ = ["Watermarks"]

_ZERO = Position(0, 0)


class _Mark:
    """One watermark: an attribute of `Watermarks` that refuses to fall."""

    __slots__ = ("name", "slot")

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.slot = "_" + name

    def __get__(self, marks: Watermarks, owner: type) -> Position:
        position: Position = getattr(marks, self.slot)
        return position

    def __set__(self, marks: Watermarks, position: Position) -> None:
        current: Position = getattr(marks, self.slot)
        if position == current:
            return
        # One node's own marks follow its own history, where (term, txid) order is the order of events.
        if position.order() < current.order():
            raise AssertionError(f"watermark {self.name} would fall from {current} to {position}")
        setattr(marks, self.slot, position)
        marks._wake()


@dataclass(eq=False, slots=True)
class _Waiter:
    """Somebody on the loop who waits until `slot` covers `want`."""

    slot: str
    want: Position
    done: asyncio.Future[bool]


class Watermarks:
    """The positions of one database on one node. All start at `start`.

    Does not guarantee any order between different marks, except that `applied` never passes `publishing`.
    """

    __slots__ = (
        "_acked",
        "_applied",
        "_callbacks",
        "_captured",
        "_durable",
        "_logged",
        "_loop",
        "_publishing",
        "_scheduled",
        "_waiters",
        "history",
    )

    captured = _Mark()
    durable = _Mark()
    acked = _Mark()
    logged = _Mark()
    publishing = _Mark()

    def __init__(self, start: Position = _ZERO, history: TermHistory | None = None) -> None:
        self._captured = self._durable = self._acked = start
        self._logged = self._publishing = self._applied = start
        self.history = history if history is not None else TermHistory()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._waiters: set[_Waiter] = set()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def applied(self) -> Position:
        return self._applied

    @applied.setter
    def applied(self, position: Position) -> None:
        current, bound = self._applied, self._publishing
        if position == current:
            return
        if position.order() < current.order():
            raise AssertionError(f"watermark applied would fall from {current} to {position}")
        if position.order() > bound.order():
            raise AssertionError(f"watermark applied would reach {position}, beyond publishing at {bound} (R17)")
        self._applied = position
        self._wake()

    def add_term(self, term: int, start_txid: int, prev_term: int | None = None) -> None:
        """Learn that `term` began after `start_txid` of `prev_term`; waiters are judged again."""
        self.history.add(term, start_txid, prev_term)
        self._wake()

    async def wait_applied(self, floor: Position, timeout_seconds: float) -> bool:
        """Wait until `applied` covers `floor`. True then; False after `timeout_seconds`, or once `floor` is lost.

        A floor is lost when it lies past the end of its term (R18); no waiting would help. The caller tells the two
        apart with `history.lost(floor)`.
        """
        return await self._wait("_applied", floor, timeout_seconds)

    async def wait_acked(self, position: Position, timeout_seconds: float) -> bool:
        """Wait until `acked` covers `position`. True then; False after `timeout_seconds`, or once it is lost."""
        return await self._wait("_acked", position, timeout_seconds)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called on the running loop after marks changed, at most once per tick of the loop.

        Returns the function that ends it. The callback must not raise and must not block.
        """
        self._bind()
        self._callbacks = [*self._callbacks, callback]

        def end() -> None:
            self._callbacks = [other for other in self._callbacks if other is not callback]

        return end

    async def _wait(self, slot: str, want: Position, timeout_seconds: float) -> bool:
        verdict = self._verdict(slot, want)
        if verdict is not None:
            return verdict
        loop = self._bind()
        waiter = _Waiter(slot, want, loop.create_future())
        self._waiters.add(waiter)
        try:
            verdict = self._verdict(slot, want)  # it may have grown between the first look and enlisting
            if verdict is not None:
                return verdict
            async with asyncio.timeout(max(timeout_seconds, 0)):
                return await waiter.done
        except TimeoutError:
            return self._verdict(slot, want) is True
        finally:
            self._waiters.discard(waiter)

    def _verdict(self, slot: str, want: Position) -> bool | None:
        """True: covered. False: it never will be. None: not yet."""
        have: Position = getattr(self, slot)
        if self.history.covers(have, want):
            return True
        return False if self.history.lost(want) else None

    def _bind(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and (self._waiters or self._callbacks) and not self._loop.is_closed():
                raise RuntimeError("watermarks are waited for on another event loop already")
            self._loop, self._scheduled = loop, False
        return loop

    def _wake(self) -> None:
        loop = self._loop
        if loop is None or self._scheduled or not (self._waiters or self._callbacks):
            return
        self._scheduled = True
        try:
            loop.call_soon_threadsafe(self._tick)
        except RuntimeError:
            if not loop.is_closed():
                raise
            # A closed loop has nobody left to wake; a thread that sets its last mark during shutdown may go on.

    def _tick(self) -> None:
        self._scheduled = False  # before the marks are looked at: what is set from here on schedules the next tick
        for waiter in tuple(self._waiters):
            verdict = self._verdict(waiter.slot, waiter.want)
            if verdict is not None and not waiter.done.done():
                waiter.done.set_result(verdict)
        for callback in self._callbacks:
            callback()
