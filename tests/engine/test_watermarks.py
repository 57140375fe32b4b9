"""Watermarks: they only grow, and whoever waits for one is woken from any thread, or told that it is no use."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from walship.engine.watermarks import Watermarks
from walship.formats.position import Position, TermHistory

MARKS = ("captured", "durable", "acked", "logged", "publishing", "applied")


def at(txid: int, term: int = 1) -> Position:
    return Position(term, txid)


def apply(marks: Watermarks, position: Position) -> None:
    marks.publishing = position
    marks.applied = position


def test_all_marks_begin_at_the_start() -> None:
    marks = Watermarks(at(7))
    assert {getattr(marks, name) for name in MARKS} == {at(7)}


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_never_falls(name: str) -> None:
    marks = Watermarks(at(7, term=2))
    for lower in (at(6, term=2), at(100, term=1)):
        with pytest.raises(AssertionError, match=f"watermark {name} would fall"):
            setattr(marks, name, lower)
    setattr(marks, name, at(7, term=2))
    assert getattr(marks, name) == at(7, term=2)


def test_applied_never_passes_publishing() -> None:
    """R17: publishing is set before the wal-index header is written, applied after it."""
    marks = Watermarks(at(7))
    with pytest.raises(AssertionError, match="beyond publishing"):
        marks.applied = at(8)
    apply(marks, at(8))
    assert marks.applied == at(8)


async def test_a_floor_already_covered_is_not_waited_for() -> None:
    assert await Watermarks(at(7)).wait_applied(at(7), 0)


async def test_a_waiter_is_woken_by_another_thread() -> None:
    marks = Watermarks(at(7))
    waiting = asyncio.ensure_future(marks.wait_applied(at(9), 10))
    await asyncio.sleep(0)

    def advance() -> None:
        apply(marks, at(8))
        apply(marks, at(9))

    await asyncio.to_thread(advance)
    assert await waiting is True


async def test_waiting_for_acked_is_not_ended_by_applied() -> None:
    marks = Watermarks(at(7))
    waiting = asyncio.ensure_future(marks.wait_acked(at(8), 10))
    await asyncio.sleep(0)
    apply(marks, at(8))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    marks.acked = at(8)
    assert await waiting is True


async def test_a_wait_ends_at_its_deadline() -> None:
    assert await Watermarks(at(7)).wait_applied(at(8), 0.01) is False


async def test_a_floor_of_an_older_term_is_covered_once_the_terms_start_is_known() -> None:
    """design.md 2: never plain lexicographic order."""
    marks = Watermarks(at(20, term=3))
    waiting = asyncio.ensure_future(marks.wait_applied(at(15, term=2), 10))
    await asyncio.sleep(0)
    assert not waiting.done()
    marks.add_term(3, 18)
    assert await waiting is True


async def test_a_lost_floor_ends_the_wait_at_once() -> None:
    """R18: beyond the end of its term no surviving history contains it."""
    marks = Watermarks(at(20, term=1), TermHistory())
    waiting = asyncio.ensure_future(marks.wait_applied(at(25, term=1), 60))
    await asyncio.sleep(0)
    marks.add_term(2, 22)
    assert await waiting is False
    assert marks.history.lost(at(25, term=1))


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    marks = Watermarks(at(7))
    waiting = asyncio.ensure_future(marks.wait_applied(at(8), 60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not marks._waiters


async def test_changes_are_reported_once_a_tick_and_on_the_loop() -> None:
    marks = Watermarks(at(0))
    reports: list[tuple[int, Position]] = []
    end = marks.on_change(lambda: reports.append((threading.get_ident(), marks.logged)))
    for txid in range(1, 1000):
        marks.logged = at(txid)
    assert reports == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert reports == [(threading.get_ident(), at(999))]
    end()
    marks.logged = at(1000)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(reports) == 1


async def test_no_wake_up_is_ever_lost() -> None:
    """Store first, look second, on both sides: a race that stays unseen for a while would hang this test."""
    marks = Watermarks(at(0))
    total = 3000
    go = threading.Semaphore(0)

    def advance() -> None:
        for txid in range(1, total + 1):
            go.acquire()
            apply(marks, at(txid))

    thread = threading.Thread(target=advance)
    thread.start()
    try:
        for txid in range(1, total + 1):
            go.release()
            assert await marks.wait_applied(at(txid), 10)
    finally:
        for _ in range(total):
            go.release()
        thread.join()


async def test_a_mark_set_between_a_waiters_look_and_its_enlisting_wakes_it() -> None:
    class Racing(TermHistory):
        """Lets the mark grow just after it was first looked at, as another thread might."""

        def covers(self, have: Position, want: Position) -> bool:
            verdict = super().covers(have, want)
            if marks.applied != want:
                apply(marks, want)
            return verdict

    marks = Watermarks(at(0), Racing())
    async with asyncio.timeout(5):
        assert await marks.wait_applied(at(1), 60) is True


def test_a_thread_that_outlives_the_loop_may_still_set_marks() -> None:
    marks = Watermarks(at(0))

    async def listen() -> None:
        marks.on_change(lambda: None)

    asyncio.run(listen())
    marks.captured = at(1)
    assert marks.captured == at(1)


def test_setting_marks_is_cheap_while_nobody_waits() -> None:
    """applied is set for every frame; the bound is loose, it only tells microseconds from milliseconds."""
    marks = Watermarks(at(0))
    positions = [at(txid) for txid in range(1, 10_001)]
    before = time.perf_counter()
    for position in positions:
        apply(marks, position)
    assert time.perf_counter() - before < 1.0
