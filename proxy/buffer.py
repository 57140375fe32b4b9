"""Where writes wait while there is no leader, and how they are let go when one is there (failover.md 3.9, I19).

`Buffer` is the pure core: tickets in, tickets out, the time is given. A ticket is taken once and is waiting or out; who
comes back from a leader that refused waits again in the old place and until the old moment. So none outlives its
window, none is let go twice at once, and the order is that of coming.

When a leader is there, not all run to it at once: one goes first, twice as many with each that is done or with each
50 ms, up to 256. `Hold` is the shell: it wakes the requests that wait.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass

from walship.errors import Unavailable
from walship.metrics import ProxyMetrics

__all__ = ["Buffer", "Hold", "HoldLimits", "Ticket"]

MOST_OUT = 256
"""So many held writes may be at a leader at once. New writes wait behind held ones, so what is out must outrun what
comes: 32 let the queue grow at 500 writes a second once a write took 64 ms."""

RAMP_SECONDS = 0.05
"""The number that may be out doubles so often also when none is done: one long write must not hold up all others."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """`window_seconds` is for each request, the others are for all together."""

    window_seconds: float = 10.0
    requests: int = 1000
    size_bytes: int = 16 << 20


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the buffer. `until` is where its window ends."""

    number: int
    size_bytes: int
    since: float
    until: float
    out: bool = False
    left: bool = False

    def __lt__(self, other: Ticket) -> bool:
        return self.number < other.number


class Buffer:
    """The pure core. Times are monotonic seconds and never go back."""

    def __init__(self, limits: HoldLimits, *, most_out: int = MOST_OUT) -> None:
        self.limits, self.most_out = limits, most_out
        self.size_bytes = 0
        self._waiting: list[Ticket] = []  # a heap by number; those that left are skipped
        self._inside = 0
        self._out = 0
        self._numbers = 0
        self._opened: float | None = None
        self._done = 1  # how many may be out, by what was done since the leader came

    def __len__(self) -> int:
        """How many tickets are in the buffer, waiting or out."""
        return self._inside

    @property
    def waiting(self) -> int:
        return self._inside - self._out

    @property
    def out(self) -> int:
        return self._out

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    def enter(self, now: float, size_bytes: int, *, sent: bool = False) -> Ticket:
        """Take a place. `sent`: the request was at a leader already, so it has its place whatever the limits say: what
        became of it must be asked.

        Raises Unavailable when the buffer is full.
        """
        limits = self.limits
        if not sent and (self._inside >= limits.requests or self.size_bytes + size_bytes > limits.size_bytes):
            raise Unavailable(
                f"there is no leader at this moment and {self._inside} writes ({self.size_bytes} bytes) wait for one "
                "already. Nothing was changed by this request; send it again in a second"
            )
        self._numbers += 1
        ticket = Ticket(self._numbers, size_bytes, now, now + limits.window_seconds)
        heapq.heappush(self._waiting, ticket)
        self._inside += 1
        self.size_bytes += size_bytes
        return ticket

    def back(self, ticket: Ticket) -> None:
        """The leader did not do it: wait again, in the old place; the next leader is tried by one."""
        assert ticket.out, "only who is out comes back"
        ticket.out = False
        self._out -= 1
        self._done = 1
        if self._opened is not None:
            self._opened = None  # until it is said again that there is a leader
        heapq.heappush(self._waiting, ticket)

    def leave(self, ticket: Ticket, *, done: bool) -> None:
        """Give the place up, whatever became of the request. Idempotent."""
        if ticket.left:
            return
        ticket.left = True
        self._inside -= 1
        self.size_bytes -= ticket.size_bytes
        if ticket.out:
            ticket.out = False
            self._out -= 1
            if done:
                self._done = min(self._done * 2, self.most_out)

    def open(self, now: float) -> None:
        """There is a leader."""
        if self._opened is None:
            self._opened = now

    def shut(self) -> None:
        """There is none. Who is out is not called back."""
        self._opened, self._done = None, 1

    def allowed(self, now: float) -> int:
        """How many may be out now."""
        if self._opened is None:
            return 0
        steps = int((now - self._opened) / RAMP_SECONDS)
        return min(self.most_out, max(self._done, 1 << min(steps, 16)))

    def release(self, now: float) -> list[Ticket]:
        """Those that may go now, in order; they are out afterwards."""
        room = self.allowed(now) - self._out
        released: list[Ticket] = []
        while room > len(released) and self._waiting:
            ticket = heapq.heappop(self._waiting)
            if not ticket.left and not ticket.out and ticket.until > now:
                ticket.out = True
                released.append(ticket)
            # One past its window is no longer queued: whoever waits on it notices by the clock and leaves.
        self._out += len(released)
        return released


class Hold:
    """Requests that wait on a `Buffer`. Call `look` when there is news of a leader; `leads` says whether one is there.

    Args: `clock`, the loop's.
    """

    def __init__(
        self, limits: HoldLimits, *, leads: Callable[[], bool], clock: Callable[[], float], metrics: ProxyMetrics
    ) -> None:
        self.buffer = Buffer(limits)
        self._leads, self._clock, self._metrics = leads, clock, metrics
        self.on_empty: Callable[[], None] = lambda: None  # called when the last one has left
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Does anybody wait? Then a new write goes behind them."""
        return self.buffer.waiting > 0

    def enter(self, size_bytes: int, *, sent: bool = False) -> Ticket:
        """Take a place; give it back by `leave`. Raises Unavailable when the buffer is full."""
        try:
            return self.buffer.enter(self._clock(), size_bytes, sent=sent)
        except Unavailable:
            self._metrics.held_evicted.labels("full").inc()
            raise

    async def turn(self, ticket: Ticket) -> bool:
        """Wait until a leader is there and it is this one's turn; whoever was out is back in the queue before.

        False when the window has ended.
        """
        if ticket.out:
            self.buffer.back(ticket)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[ticket] = turn
        self.look()
        try:
            async with asyncio.timeout_at(ticket.until):
                await turn
        except TimeoutError:
            if not ticket.out:
                self._metrics.held_evicted.labels("window").inc()
                return False
        finally:
            self._turns.pop(ticket, None)
        return True

    def leave(self, ticket: Ticket, *, done: bool) -> None:
        """The request is over."""
        if not ticket.left:
            self._metrics.hold_seconds.observe(self._clock() - ticket.since)
        self.buffer.leave(ticket, done=done)
        self.look()
        if not len(self.buffer):
            self.on_empty()

    def look(self) -> None:
        """Let go whom the moment allows."""
        buffer = self.buffer
        if not buffer.waiting:
            return
        now = self._clock()
        if self._leads():
            buffer.open(now)
        else:
            buffer.shut()
            return
        for ticket in buffer.release(now):
            turn = self._turns.get(ticket)
            if turn is not None and not turn.done():
                turn.set_result(None)
        if buffer.waiting and buffer.allowed(now) < buffer.most_out and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RAMP_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.look()
