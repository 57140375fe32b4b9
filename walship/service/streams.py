"""The streams of one node: finding, keeping, running calls on them apart from their callers, and ending them.

A stream's calls run one after the other. A call runs in a task of ours: a caller who is cancelled (its client went
away) leaves it running, and the stream is closed when it is done, since nobody got its answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

from walship.errors import Overloaded, ProtocolViolation, WalshipError
from walship.hrana.baton import CLOSED, stream_expired
from walship.service.connections import Connections
from walship.service.limits import Limits
from walship.service.request import Host
from walship.service.session import Session, State

__all__ = ["Streams"]

_log = logging.getLogger("walship.service")

T = TypeVar("T")


class Streams:
    """All streams, bounded in number and in age. Tasks it starts belong to `tasks`, the service's own group."""

    def __init__(
        self,
        host: Host,
        connections: Connections,
        limits: Limits,
        clock: Callable[[], float],
        tasks: asyncio.TaskGroup,
        on_close: Callable[[], None],
    ) -> None:
        self._host = host
        self._connections = connections
        self._limits = limits
        self._clock = clock
        self._tasks = tasks
        self._on_close = on_close
        self._sessions: dict[int, Session] = {}
        self._expired: dict[int, float] = {}
        self._ids = itertools.count(secrets.randbits(48) << 14 | 1)  # so that ids of an earlier process mean nothing

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def __contains__(self, stream: int) -> bool:
        return stream in self._sessions

    def __getitem__(self, stream: int) -> Session:
        return self._sessions[stream]

    @property
    def transactions(self) -> int:
        return sum(session.state is not State.AUTOCOMMIT for session in self)

    @property
    def room(self) -> bool:
        """May there be one more?"""
        return len(self._sessions) < self._limits.streams

    def find(self, stream: int) -> Session:
        """The stream of that id. Raises ProtocolViolation, or StatementFailed STREAM_EXPIRED when it lost state."""
        session = self._sessions.get(stream)
        if session is not None:
            return session
        if stream in self._expired:
            raise stream_expired()
        raise ProtocolViolation(CLOSED)

    def new(self) -> Session:
        """A new stream. Raises Overloaded when there are too many."""
        if not self.room:
            raise Overloaded(
                f"{len(self._sessions)} streams are open on this node, as many as it allows. "
                "Nothing was changed. Close streams, or try again."
            )
        session = Session(next(self._ids), self._host, self._connections, self._clock(), self.spawn)
        self._sessions[session.id] = session
        return session

    @asynccontextmanager
    async def alone(self, session: Session) -> AsyncIterator[None]:
        """Hold the stream: its calls run one after the other. The wait is bounded; Overloaded then."""
        seconds = self._limits.stream_wait_seconds
        try:
            async with asyncio.timeout(seconds):
                await session.lock.acquire()
        except TimeoutError:
            raise Overloaded(
                f"an earlier request of this stream still runs after {seconds:g} s. This one was not begun."
            ) from None
        try:
            if session.closed:
                raise ProtocolViolation(CLOSED)
            yield
        finally:
            session.lock.release()

    async def apart(self, session: Session, work: Coroutine[None, None, T]) -> T:
        """Run `work` on the stream to its end, whatever happens to the caller."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                answer = await work
            except BaseException as error:  # noqa: BLE001  not swallowed: it is raised where the client waits
                if not future.done():
                    future.set_exception(error)
                return
            if future.done():
                await self._close_quietly(session)
            else:
                future.set_result(answer)

        self._tasks.create_task(run(), name=f"walship-stream-{session.id}")
        try:
            return await future
        except asyncio.CancelledError:
            # The caller's lock goes with it, so nobody may find the stream any more.
            session.closed = True
            self._sessions.pop(session.id, None)
            raise

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` on its own; what it fails with is logged, since nobody waits for it."""
        self._tasks.create_task(_logged(work))

    async def close(self, session: Session) -> None:
        """Close a stream, rolling back what is open. Raises what giving back its turn raises."""
        self._sessions.pop(session.id, None)
        try:
            await session.close()
        finally:
            self._on_close()

    async def close_all(self) -> None:
        """Close every stream; statements that still run are interrupted."""
        for session in list(self):
            async with session.lock:
                await self._close_quietly(session)

    async def expire_writers(self) -> None:
        """End every stream that owns a connection for writing: this node leads no more. Their clients are told so."""
        for session in [session for session in self if session.lane is not None and session.lane.writer]:
            async with session.lock:
                if session.lane is not None and session.lane.writer and not session.closed:
                    await self._expire(session)

    async def sweep(self) -> None:
        """Close what was idle for too long."""
        now, limits = self._clock(), self._limits
        for session in list(self):
            if session.lock.locked() or now - session.used_at < self._idle_seconds(session):
                continue
            if session.has_state:
                await self._expire(session)
            else:
                await self._close_quietly(session)
        while self._expired:
            oldest = next(iter(self._expired))
            if self._expired[oldest] > now and len(self._expired) <= limits.streams:
                break
            del self._expired[oldest]

    async def reclaim(self) -> bool:
        """Expire the stream that idles longest with connection state only, so that its connection is free again."""
        able = [
            session
            for session in self
            if session.pinned
            and session.state is State.AUTOCOMMIT
            and not session.lock.locked()
            and self._clock() - session.used_at >= self._limits.transaction_idle_seconds
        ]
        if not able:
            return False
        await self._expire(min(able, key=lambda session: session.used_at))
        return True

    def _idle_seconds(self, session: Session) -> float:
        limits = self._limits
        if session.expired or session.state is not State.AUTOCOMMIT:
            return limits.transaction_idle_seconds
        return limits.state_idle_seconds if session.pinned else limits.stream_idle_seconds

    async def _expire(self, session: Session) -> None:
        self._expired[session.id] = self._clock() + self._limits.expired_seconds
        await self._close_quietly(session)

    async def _close_quietly(self, session: Session) -> None:
        await _logged(self.close(session))


async def _logged(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except WalshipError as error:
        _log.warning("end stream error=%s", error)
