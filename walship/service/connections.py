"""Connections that belong to one client for a while, and the threads that run their statements.

Interactive streams and streamed cursors cannot share a connection. A `Lane` is one connection with its executor; it
runs one thing at a time, on any thread of a small pool, and goes back to a shelf of clean ones afterwards. Bounded:
beyond `Limits.connections` lanes a client is told `Overloaded` before anything has happened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import apsw

from walship.errors import Overloaded
from walship.service.executor import Counters, Executor
from walship.service.limits import Limits, limit_values
from walship.sql import guard

if TYPE_CHECKING:
    from walship.engine.database import Database

__all__ = ["Connections", "Lane"]

T = TypeVar("T")

_STRIDE = 10_000  # VM instructions between two looks at the clock: no cost to speak of (perf.md 3)


@dataclass(eq=False, slots=True)
class Lane:
    """One connection and its executor. `writer`: opened for writing, on a leader.

    revoked: the write turn was called in: nothing may be committed any more. commits: how many commits wrote. Together
    they tell exactly whether a transaction that was called in came to its end first.
    """

    connection: apsw.Connection
    executor: Executor
    writer: bool
    deadline: float = 0.0
    running: Future[object] | None = None
    revoked: bool = False
    commits: int = 0
    frame: int = 0  # of the -wal, where the last commit ends; 0: none since it was set to 0

    def committed(self, _connection: apsw.Connection, name: str, frames: int) -> int:
        """SQLite's WAL hook."""
        if name == "main":
            self.frame = frames
        return apsw.SQLITE_OK

    def forbid_commit(self) -> bool:
        """SQLite's commit hook: True turns the commit into a rollback."""
        if not self.revoked:
            self.commits += 1
        return self.revoked


class Connections:
    """Hands out lanes and runs functions on them, off the event loop."""

    def __init__(self, database: Database, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._limits = limits
        self._clock = clock
        self._closing = False
        self._threads = ThreadPoolExecutor(limits.stream_threads, thread_name_prefix="walship-stream")
        self._idle: dict[bool, list[Lane]] = {True: [], False: []}
        self.in_use = 0

    async def run(self, lane: Lane, function: Callable[[], T]) -> T:
        """Run `function` for `lane` in the pool. A caller that is cancelled leaves it running: what writes is never
        cancelled, and `give_back` waits for it. What only reads is interrupted after `read_seconds`."""
        before = lane.running

        def call() -> T:
            if before is not None:
                wait((before,))
            lane.deadline = self._clock() + self._limits.read_seconds
            return function()

        future = self._threads.submit(call)
        lane.running = future  # type: ignore[assignment]
        return await asyncio.wrap_future(future)

    async def take(self, *, writer: bool) -> Lane:
        """A clean lane. Raises Overloaded when too many are in use."""
        if self.in_use >= self._limits.connections:
            raise Overloaded(
                f"{self.in_use} streams already own a connection to this node, as many as it allows. "
                "Nothing was changed. End a transaction, or try again."
            )
        self.in_use += 1
        shelf = self._idle[writer]
        if shelf:
            return shelf.pop()
        try:
            return await asyncio.wrap_future(self._threads.submit(self._open, writer))
        except BaseException:
            self.in_use -= 1
            raise

    def give_back(self, lane: Lane, *, clean: bool, first: Callable[[], None] | None = None) -> None:
        """Return a lane. Not clean (PRAGMA, TEMP objects, doubts): it is closed. An open transaction rolls back.

        Does not wait; the tidying happens in the pool, behind whatever still runs on the lane. `first` is called
        there before anything else: to close a generator that is stopped between two rows.
        """
        self.in_use -= 1
        shelf = self._idle[lane.writer]
        keep = clean and len(shelf) < self._limits.idle_connections
        self._threads.submit(_tidy, lane, shelf if keep else None, first)

    def drop_writers(self) -> None:
        """Close the idle lanes for writing: they are of a leadership that is over."""
        shelf = self._idle[True]
        while shelf:
            self._threads.submit(shelf.pop().connection.close, True)

    def interrupt_all(self) -> None:
        """Interrupt what runs, now and from now on: the node stops, and what is not committed is not done."""
        self._closing = True

    @property
    def closing(self) -> bool:
        return self._closing

    def _shall_stop(self, lane: Lane) -> bool:
        return self._closing or (not lane.executor.may_write and self._clock() > lane.deadline)

    def close(self) -> None:
        """Close the shelved lanes and end the threads; lanes still in use must have been given back."""
        self._threads.shutdown(wait=True)
        for shelf in self._idle.values():
            for lane in shelf:
                lane.connection.close(True)
            shelf.clear()

    def _open(self, writer: bool) -> Lane:
        connection = self._database.connect_writer() if writer else self._database.connect_reader()
        try:
            guard.install(connection, follower=not writer, shared=False)
            limit_values(connection, self._limits.value_bytes)
            lane = Lane(connection, Executor(connection, self._limits), writer)
            connection.set_progress_handler(lambda: self._shall_stop(lane), _STRIDE)
            connection.set_commit_hook(lane.forbid_commit)
            if writer:
                connection.set_wal_hook(lane.committed)
            return lane
        except BaseException:
            connection.close(True)
            raise


def _tidy(lane: Lane, shelf: list[Lane] | None, first: Callable[[], None] | None) -> None:
    if lane.running is not None:
        wait((lane.running,))
        lane.running = None
    try:
        if first is not None:
            first()
        if shelf is not None:
            if not lane.connection.get_autocommit():
                lane.connection.execute("ROLLBACK")
            lane.executor.may_write = lane.revoked = False
            lane.executor.start(Counters())
            lane.executor.settings = {}
            shelf.append(lane)
            return
    except apsw.Error:
        pass  # closing it rolls back too
    lane.connection.close(True)
