"""Renewing the lease, in a thread with an event loop and a store connection of its own.

The node's loop may be busy for long (a large reply, a slow disk under a log read), and its threads compete for the
GIL; neither may cost a healthy leader its lease. This thread does next to nothing and sleeps in between, so the kernel
and the interpreter run it as soon as it wakes (docs/chaos.md: no false failover beside 16 busy processes).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from walship.coordination.lease import Lease
from walship.coordination.record import LeaderRecord, Seen, read_leader, renew
from walship.coordination.store import Store, open_store
from walship.errors import CompareFailed, CorruptState, StoreUnavailable, UsageError

__all__ = ["Renewal"]

_log = logging.getLogger("walship.renewal")
_RETRY_SECONDS = 0.05
_JOIN_SECONDS = 5.0

T = TypeVar("T")


class Renewal:
    """Renews `seen` until `stop`, or until the record is no longer ours: then `on_lost` is called on the node's loop.

    A store that is away is asked again and again; the lease runs out meanwhile by itself (failover.md 3.8). Anything
    unforeseen goes to `on_failure`, on that loop too: a leader must not lead on with nobody who renews its lease.
    `unknown_since`: of the renewals that this one continues, whose last attempts may have landed or may still.
    """

    def __init__(
        self,
        cluster_url: str,
        seen: Seen[LeaderRecord],
        lease: Lease,
        clock: Callable[[], float],
        on_lost: Callable[[Seen[LeaderRecord] | None], None],
        on_failure: Callable[[BaseException], None],
        *,
        unknown_since: float | None = None,
    ) -> None:
        self.seen = seen
        self._url = cluster_url
        self._lease = lease
        self._clock = clock
        self._on_lost = on_lost
        self._on_failure = on_failure
        self._failing = False  # the last attempt did not succeed
        self.unknown_since: float | None = unknown_since  # when the oldest attempt began whose answer never came
        self._owner = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="walship-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it. Blocks until no attempt is under way any more; `seen` is final then. Idempotent."""
        self._stopping.set()
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop.set)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - handed to the node, which ends with it
            self._tell(self._on_failure, error)

    def _tell(self, function: Callable[[T], None], value: T) -> None:
        with contextlib.suppress(RuntimeError):  # the node's loop has ended
            self._owner.call_soon_threadsafe(function, value)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        store = open_store(self._url)
        try:
            while not self._stopping.is_set():
                at = self._lease.renew_at
                if at is None:
                    return
                now = self._clock()
                pause = _RETRY_SECONDS if self._failing else 0.0 if self._lease.must_renew else at - now
                await self._sleep(pause)
                if self._stopping.is_set():
                    return
                if not await self._renew(store):
                    return
        finally:
            await store.close()

    async def _sleep(self, seconds: float) -> None:
        assert self._stop is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._stop.wait()

    async def _renew(self, store: Store) -> bool:
        """One attempt; False when the record is somebody else's."""
        began = self._clock()
        self._failing = True
        try:
            async with asyncio.timeout(self._lease.seconds / 4):
                self.seen = await renew(store, self.seen)
        except CompareFailed:
            return await self._look(store)
        except (StoreUnavailable, TimeoutError) as error:
            if self.unknown_since is None:
                _log.warning("cannot renew the lease term=%d: %s", self.seen.record.term, error or "no answer in time")
                self.unknown_since = began
            return True
        self.unknown_since, self._failing = None, False
        self._lease.extend(began)
        return True

    async def _look(self, store: Store) -> bool:
        """The version was not the expected one: an attempt of ours landed whose answer was lost, or we were deposed."""
        try:
            async with asyncio.timeout(self._lease.seconds / 4):
                there = await read_leader(store)
        except (StoreUnavailable, TimeoutError):
            return True
        except (CorruptState, UsageError) as error:  # not ours, but no proof of another leader either
            _log.error("cannot renew the lease term=%d: %s", self.seen.record.term, error)
            return True
        if there is not None and there.record.serves_as(self.seen.record):
            # Only this process writes its term. When that attempt began is known to this thread, or it was before this
            # thread began (a handoff paused the renewals): then the next one has to succeed.
            self.seen = there
            if self.unknown_since is not None:
                self._lease.extend(self.unknown_since)
                self.unknown_since = None
            return True
        self._tell(self._on_lost, there)
        return False
