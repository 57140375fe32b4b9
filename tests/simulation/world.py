"""The simulated world: real time, a queue of events, a network, the coordination store. One random source, no I/O.

The network delays, loses, reorders; what was sent may arrive seconds later, also into a later term. Partitions are
one-way pairs. A store call is carried out when it arrives, whether or not somebody still waits for the answer.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from walship.coordination.store import Change, Versioned
from walship.errors import CompareFailed, Fenced, StoreUnavailable

STORE = "store"


class Violation(AssertionError):
    """An invariant of failover.md 3.13 was broken."""


class World:
    """Time in seconds. `at` runs a function later; `send` does so over the network from one name to another."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.cut: dict[tuple[str, str], float] = {}  # one-way pair -> until
        self.slow: dict[str, float] = {}  # name -> until: what it sends or receives may take long
        self.loss = 0.0
        self.verbose = verbose
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()

    def at(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._number), function, args))

    def run(self, until: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, function, args = heapq.heappop(queue)
            function(*args)
        self.now = until

    def send(self, source: str, target: str, function: Callable[..., None], *args: Any) -> None:
        if self.cut.get((source, target), 0.0) > self.now or (self.loss and self.random.random() < self.loss):
            return
        delay = 0.0002 + self.random.random() * 0.002
        if self.slow.get(source, 0.0) > self.now or self.slow.get(target, 0.0) > self.now:
            delay += self.random.random() ** 2 * 1.5
        self.at(delay, function, *args)

    def partition(self, source: str, target: str, seconds: float) -> None:
        self.cut[source, target] = self.now + seconds

    def say(self, text: str) -> None:
        if self.verbose:
            print(f"{self.now:8.4f} {text}")  # noqa: T201

    def heal(self) -> None:
        self.cut.clear()
        self.slow.clear()
        self.loss = 0.0


class SimStore:
    """`coordination.store.Store` in memory; `down_until` is an outage, `flaky` loses a call between its changes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.down_until = 0.0
        self.flaky = 0.0
        self.records: dict[str, Versioned] = {}
        self.on_change: list[Callable[[str, Versioned], None]] = []
        self._version = 0

    async def get(self, key: str) -> Versioned | None:
        self._answer()
        return self.records.get(key)

    async def put_if(self, key: str, value: bytes, *, version: int | None) -> int:
        self._answer()
        there = self.records.get(key)
        if (there.version if there else None) != version:
            raise CompareFailed(key)
        self._version += 1
        state = self.records[key] = Versioned(value, self._version)
        for function in self.on_change:
            function(key, state)
        return self._version

    async def delete(self, key: str, *, version: int) -> None:
        raise NotImplementedError

    async def list(self, prefix: str) -> dict[str, Versioned]:
        return {key: state for key, state in self.records.items() if key.startswith(prefix)}

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        raise NotImplementedError
        yield

    async def close(self) -> None: ...

    def _answer(self) -> None:
        if self.world.now < self.down_until or (self.flaky and self.world.random.random() < self.flaky):
            raise StoreUnavailable("the simulated store is away")


def finish(call: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits; an error of the store as a value."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    except (CompareFailed, Fenced, StoreUnavailable) as error:
        return error
    raise AssertionError("a simulated call waited")
