"""Open-loop load through proxies, on a thread of its own: so many writes and reads a second whatever becomes of them.

Each write adds a number to table `w`, which has no unique key: what is done twice is there twice. Every operation is
recorded with its times, and what its client was told. Reads check themselves: at `session`, rows that were
acknowledged before the read began must be counted by it.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.chaos.checkers.sets import Outcome
from tests.chaos.client import Pool, execute
from tests.cluster.harness import eventually

__all__ = ["Operation", "Workload"]

DRAIN_SECONDS = 45.0  # longer than any request takes
MOST_WAITING = 3000
MOST_COMPLAINTS = 20
_RECENT = 2000
_INSERT = "INSERT INTO w (id) VALUES (?)"
_COUNT = "SELECT ifnull(max(rowid), 0) FROM w"  # rows are never deleted: the number of them, without a scan


@dataclass(slots=True)
class Operation:
    """One request. Times in seconds of time.monotonic()."""

    kind: str  # "write", or the level of a read
    number: int
    begin: float
    end: float
    outcome: Outcome
    code: str
    message: str
    position: tuple[int, int] | None


class Workload:
    """Writes at `rate` a second and reads at `reads` a second at each level, spread over the proxies in turn."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        rate: float = 200.0,
        reads: float = 20.0,
        levels: Sequence[str] = ("any", "session"),
    ) -> None:
        self.operations: list[Operation] = []
        self.answered: list[float] = []  # when acknowledged writes were answered, in order
        self.complaints: list[str] = []  # what a read saw that it must not see
        self.skipped = 0  # not sent, as too many were waiting: the load was not open any more
        self.rate = rate  # writes a second
        self._urls, self._reads, self._levels = urls, reads, levels
        self._acked = 0
        self._waiting = 0
        self._problem: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="workload")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more, and wait for all answers."""
        self._stopping.set()
        self._thread.join(DRAIN_SECONDS)
        assert not self._thread.is_alive(), "the workload did not end"
        if self._problem is not None:
            raise self._problem

    def wait_acked(self, more: int, timeout_seconds: float = 60.0) -> None:
        """Wait until so many more writes have been acknowledged."""
        goal = self._acked + more

        def reached() -> bool:
            assert self._problem is None, self._problem
            return self._acked >= goal

        eventually(reached, f"{more} more acknowledged writes", timeout_seconds=timeout_seconds)

    @property
    def acked(self) -> int:
        return self._acked

    def adds(self) -> list[tuple[int, Outcome]]:
        """For the set checker. After `stop`."""
        return [(each.number, each.outcome) for each in self.operations if each.kind == "write"]

    def recent_writes(self) -> list[Operation]:
        """The acknowledged ones among the operations that ended last."""
        return [each for each in self.operations[-_RECENT:] if each.kind == "write" and each.outcome is Outcome.OK]

    def examples(self) -> dict[str, str]:
        """One message for each kind and code of what did not go well."""
        return {f"{each.kind}: {each.code}": each.message[:300] for each in self.operations if each.code}

    def errors(self, kind: str = "") -> Counter[str]:
        """Codes of what did not go well, of one kind or of all."""
        return Counter(f"{each.kind}: {each.code}" for each in self.operations if each.code and kind in ("", each.kind))

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._problem = error
            raise

    async def _run(self) -> None:
        pools = [Pool(url) for url in self._urls]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send("write", self.rate, pools, group))
                for level in self._levels:
                    group.create_task(self._send(level, self._reads, pools, group))
        finally:
            for pool in pools:
                await pool.close()

    async def _send(self, kind: str, rate: float, pools: list[Pool], group: asyncio.TaskGroup) -> None:
        """Requests at their times; what is late is sent at once, so that a pause of this process is made up for."""
        start = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            if self._stopping.is_set():
                return
            if self._waiting >= MOST_WAITING:
                self.skipped += 1
                continue
            self._waiting += 1
            group.create_task(self._one(pools[number % len(pools)], kind, number))

    async def _one(self, pool: Pool, kind: str, number: int) -> None:
        acked_before, begin = self._acked, time.monotonic()
        if kind == "write":
            reply = await pool.ask(execute(_INSERT, number))
        else:
            reply = await pool.ask(execute(_COUNT), level=kind)
        end = time.monotonic()
        self._waiting -= 1
        self.operations.append(
            Operation(kind, number, begin, end, reply.outcome, reply.code, reply.message, reply.position)
        )
        if reply.code.startswith("SQL") and len(self.complaints) < MOST_COMPLAINTS:
            self.complaints.append(f"{kind} at {time.time():.3f} s by {reply.served_by}: {reply.code} {reply.message}")
        if reply.outcome is not Outcome.OK:
            return
        if kind == "write":
            self._acked += 1
            self.answered.append(end)
        elif kind == "session" and reply.rows[0][0] < acked_before and len(self.complaints) < MOST_COMPLAINTS:
            self.complaints.append(
                f"a session read at {begin:.3f} s saw {reply.rows[0][0]} rows, at {reply.position} of "
                f"{reply.served_by}; "
                f"{acked_before} were acknowledged before"
            )
