"""The buffer of held writes: I19 by a state machine, and its shell."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.buffer import MOST_OUT, RAMP_SECONDS, Buffer, Hold, HoldLimits, Ticket
from walship.errors import Unavailable
from walship.metrics import ProxyMetrics

LIMITS = HoldLimits(window_seconds=1.0, requests=12, size_bytes=1000)


class Held(RuleBasedStateMachine):
    """Any order of coming, going, refusals, leaders and time."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer(LIMITS, most_out=4)
        self.now = 0.0
        self.inside: list[Ticket] = []
        self.out: list[Ticket] = []
        self.entered = self.gone = 0

    @rule(size_bytes=st.integers(0, 300), sent=st.booleans())
    def enter(self, size_bytes: int, sent: bool) -> None:
        held_bytes = sum(ticket.size_bytes for ticket in self.inside)
        full = len(self.inside) >= LIMITS.requests or held_bytes + size_bytes > LIMITS.size_bytes
        if full and not sent:
            with pytest.raises(Unavailable, match="Nothing was changed"):
                self.buffer.enter(self.now, size_bytes)
            return
        self.inside.append(self.buffer.enter(self.now, size_bytes, sent=sent))
        self.entered += 1

    @rule(seconds=st.floats(0.001, 0.6))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def leader(self) -> None:
        self.buffer.open(self.now)

    @rule()
    def no_leader(self) -> None:
        self.buffer.shut()

    @rule()
    def release(self) -> None:
        waiting = [ticket for ticket in self.inside if not ticket.out and ticket.until > self.now]
        released = self.buffer.release(self.now)
        assert released == sorted(waiting)[: len(released)], "in the order of coming, none past its window, none twice"
        assert released or not waiting or len(self.out) >= self.buffer.allowed(self.now), "who may go goes"
        self.out += released

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.out))
        self.out.remove(ticket)
        until = ticket.until
        self.buffer.back(ticket)
        assert ticket.until == until
        assert not ticket.out

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), done=st.booleans())
    def leave(self, data: st.DataObject, done: bool) -> None:
        ticket = data.draw(st.sampled_from(self.inside))
        self.inside.remove(ticket)
        if ticket in self.out:
            self.out.remove(ticket)
        self.buffer.leave(ticket, done=done)
        self.buffer.leave(ticket, done=done)  # once more changes nothing
        self.gone += 1

    @invariant()
    def slots_are_conserved(self) -> None:
        buffer = self.buffer
        assert len(buffer) == len(self.inside) == self.entered - self.gone == buffer.waiting + buffer.out
        assert buffer.out == len(self.out) <= buffer.most_out
        assert buffer.size_bytes == sum(ticket.size_bytes for ticket in self.inside)


TestHeld = Held.TestCase
TestHeld.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_the_ramp_begins_at_one_and_doubles_with_each_that_is_done() -> None:
    buffer = Buffer(HoldLimits())
    for _ in range(1000):
        buffer.enter(0.0, 1)
    assert buffer.release(0.0) == [], "nobody goes without a leader"
    buffer.open(1.0)
    out = list(buffer.release(1.0))
    seen: list[int] = []
    while len(seen) < 9:
        seen.append(len(out))
        buffer.leave(out.pop(0), done=True)
        out += buffer.release(1.0)
    assert seen == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert len(out) == MOST_OUT


def test_a_long_one_does_not_hold_up_the_others() -> None:
    buffer = Buffer(HoldLimits())
    for _ in range(10):
        buffer.enter(0.0, 1)
    buffer.open(0.0)
    assert len(buffer.release(0.0)) == 1
    assert len(buffer.release(RAMP_SECONDS * 2)) == 3
    assert len(buffer.release(RAMP_SECONDS * 4)) == 6


class Leads:
    def __init__(self) -> None:
        self.now = False

    def __call__(self) -> bool:
        return self.now


def hold_of(leads: Leads, **limits: float) -> Hold:
    clock = asyncio.get_running_loop().time
    return Hold(HoldLimits(**limits), leads=leads, clock=clock, metrics=ProxyMetrics())  # type: ignore[arg-type]


async def test_held_requests_go_in_order_when_a_leader_comes() -> None:
    leads = Leads()
    hold = hold_of(leads)
    order: list[int] = []

    async def write(number: int) -> None:
        ticket = hold.enter(10)
        assert await hold.turn(ticket)
        order.append(number)
        await asyncio.sleep(0)
        hold.leave(ticket, done=True)

    async with asyncio.TaskGroup() as tasks:
        for number in range(50):
            tasks.create_task(write(number))
        await asyncio.sleep(0)
        hold.look()
        assert not order
        assert hold.busy
        leads.now = True
        hold.look()
    assert order == list(range(50))
    assert len(hold.buffer) == 0
    assert not hold.busy


async def test_a_window_ends_also_after_many_refusals() -> None:
    leads = Leads()
    leads.now = True
    hold = hold_of(leads, window_seconds=0.05)
    ticket = hold.enter(10)
    turns = 0
    while await hold.turn(ticket):
        turns += 1
        await asyncio.sleep(0.001)  # at a leader, which refuses
    assert turns > 1
    hold.leave(ticket, done=False)
    assert len(hold.buffer) == 0


async def test_a_cancelled_request_gives_its_place_to_the_next() -> None:
    leads = Leads()
    hold = hold_of(leads)
    first, second = hold.enter(1), hold.enter(1)
    waits = asyncio.create_task(hold.turn(first))
    goes = asyncio.create_task(hold.turn(second))
    await asyncio.sleep(0)
    waits.cancel()
    hold.leave(first, done=False)
    leads.now = True
    hold.look()
    assert await goes
