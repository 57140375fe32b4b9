"""The checkers: each kind of bad history is caught, by its name, and histories of correct runs pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.checkers.append import Append, Read, Transaction, judge_append
from tests.chaos.checkers.bank import judge_bank
from tests.chaos.checkers.register import RegisterOperation, judge_by_search, judge_positions
from tests.chaos.checkers.sets import Outcome, judge_set
from tests.cluster.linearizable import Operation, violation

OK, NOT_DONE, UNKNOWN = Outcome.OK, Outcome.NOT_DONE, Outcome.UNKNOWN
INF = math.inf


# -- set ------------------------------------------------------------------------------------------------------------

ADDS = [(1, OK), (2, OK), (3, NOT_DONE), (4, UNKNOWN), (5, UNKNOWN)]


@pytest.mark.parametrize(
    ("final", "orphans", "complaint"),
    [
        ([1], [], "lost: [2]"),
        ([1, 2, 2], [], "done twice: [2]"),
        ([1, 2, 4, 4], [], "done twice: [4]"),
        ([1, 2, 3], [], "refused as not done, and done: [3]"),
        ([1, 2, 9], [], "added by nobody: [9]"),
        ([1, 2], [2], "done twice: [2]"),
        ([1, 2], [9], "added by nobody: [9]"),
    ],
)
def test_a_bad_set_is_caught(final: list[int], orphans: list[int], complaint: str) -> None:
    [said] = judge_set(ADDS, final, orphans).complaints()
    assert complaint in said


@settings(deadline=None)
@given(st.lists(st.sampled_from(Outcome)), st.data())
def test_a_set_as_promised_passes(outcomes: list[Outcome], data: st.DataObject) -> None:
    adds = list(enumerate(outcomes))
    unknown = [value for value, outcome in adds if outcome is UNKNOWN]
    happened = {value for value in unknown if data.draw(st.booleans())}
    orphaned = {value for value, outcome in adds if outcome is OK and data.draw(st.booleans())}
    final = [value for value, outcome in adds if outcome is OK and value not in orphaned] + sorted(happened)
    verdict = judge_set(adds, data.draw(st.permutations(final)), orphaned)
    assert verdict.complaints() == []
    assert verdict.recovered == happened


def test_a_value_added_twice_by_the_test_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="twice"):
        judge_set([(1, OK), (1, OK)], [1])


# -- bank -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "complaint"),
    [
        ({0: 60, 1: 50}, "torn: the sum is 110"),
        ({0: 40, 1: 50}, "torn: the sum is 90"),
        ({0: 100}, "shows accounts"),
        ({0: 120, 1: -20}, "overdraft"),
    ],
)
def test_a_bad_bank_is_caught(read: dict[int, int], complaint: str) -> None:
    [said] = judge_bank([{0: 50, 1: 50}, read], frozenset({0, 1}), 100)
    assert complaint in said


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 30))))
def test_a_bank_of_whole_transfers_passes(transfers: list[tuple[int, int, int]]) -> None:
    balances = dict.fromkeys(range(5), 20)
    reads = [dict(balances)]
    for one, other, amount in transfers:
        if balances[one] >= amount:
            balances[one] -= amount
            balances[other] += amount
        reads.append(dict(balances))
    assert judge_bank(reads, frozenset(range(5)), 100) == []


# -- list-append ----------------------------------------------------------------------------------------------------


def txn(session: int, begin: float, end: float, *steps: Append | Read, outcome: Outcome = OK) -> Transaction:
    return Transaction(session, begin, end, outcome, steps)


def r(key: int, *values: int) -> Read:
    return Read(key, values)


a = Append
X, Y = 1, 2

BAD_APPENDS = {
    # name of the fault: (the complaint it must get, the history)
    "a refused write is read": (
        "G1a", [txn(1, 0, 1, a(X, 1), outcome=NOT_DONE), txn(2, 2, 3, r(X, 1))],
    ),
    "a part of a transaction is read": (
        "G1b", [txn(1, 0, 3, a(X, 1), a(X, 2)), txn(2, 1, 2, r(X, 1)), txn(2, 4, 5, r(X, 1, 2))],
    ),
    "a value from nowhere": ("from nowhere", [txn(1, 0, 1, r(X, 7))]),
    "done twice": ("duplicate", [txn(1, 0, 1, a(X, 1)), txn(2, 2, 3, r(X, 1, 1))]),
    "reordered for two readers": (
        "incompatible order",
        [txn(1, 0, 9, a(X, 1)), txn(2, 0, 9, a(X, 2)), txn(3, 0, 9, r(X, 1, 2)), txn(4, 0, 9, r(X, 2, 1))],
    ),
    "an old value vanishes": (
        "incompatible order",
        [txn(1, 0, 9, a(X, 1)), txn(2, 0, 9, a(X, 2)), txn(3, 0, 9, r(X, 1)), txn(4, 0, 9, r(X, 2))],
    ),
    "its own append is missed": ("internal", [txn(1, 0, 1, a(X, 1), r(X))]),
    "two reads of one transaction differ": (
        "internal", [txn(1, 0, 9, a(X, 1)), txn(2, 0, 9, r(X), r(X, 1))],
    ),
    "writes interleave (dirty write)": (
        "G0",
        [txn(1, 0, 9, a(X, 1), a(Y, 1)), txn(2, 0, 9, a(X, 2), a(Y, 2)), txn(3, 0, 9, r(X, 1, 2), r(Y, 2, 1))],
    ),
    "each reads what the other wrote": (
        "G1c", [txn(1, 0, 9, a(X, 1), r(Y, 2)), txn(2, 0, 9, a(Y, 2), r(X, 1)), txn(3, 0, 9, r(X, 1), r(Y, 2))],
    ),
    "a torn read of a transaction (read skew)": (
        "G-single:", [txn(1, 0, 9, a(X, 1), a(Y, 1)), txn(2, 0, 9, r(X, 1), r(Y)), txn(3, 0, 9, r(X, 1), r(Y, 1))],
    ),
    "a lost update": (
        "G-single:",
        [txn(1, 0, 9, r(X), a(X, 1)), txn(2, 0, 9, r(X), a(X, 2)), txn(3, 0, 9, r(X, 1, 2))],
    ),
    "an acknowledged append that no later read shows": (
        "G-single-realtime", [txn(1, 0, 1, a(X, 1)), txn(2, 2, 3, r(X))],
    ),
    "an acknowledged append that vanished from a longer list": (
        "G-single-realtime", [txn(1, 0, 1, a(X, 1)), txn(2, 2, 3, a(X, 2)), txn(3, 4, 5, r(X, 2))],
    ),
    "write skew": (
        "G2:",
        [txn(1, 0, 9, r(X), a(Y, 1)), txn(2, 0, 9, r(Y), a(X, 1)), txn(3, 0, 9, r(X, 1), r(Y, 1))],
    ),
    "a long fork": (
        "G2:",
        [
            txn(1, 0, 9, a(X, 1)), txn(2, 0, 9, a(Y, 1)), txn(3, 0, 9, r(X, 1), r(Y)), txn(4, 0, 9, r(X), r(Y, 1)),
            txn(5, 0, 9, r(X, 1), r(Y, 1)),
        ],
    ),
    "a client does not see its own write": (
        "G-single-session", [txn(1, 0, 1, a(X, 1)), txn(1, 1, 2, r(X)), txn(2, 0, 9, r(X, 1))],
    ),
    "a client goes back in time": (
        "G-single-session", [txn(1, 0, 9, a(X, 1)), txn(2, 0, 1, r(X, 1)), txn(2, 2, 3, r(X))],
    ),
    "another client misses what was acknowledged before": (
        "G-single-realtime", [txn(1, 0, 1, a(X, 1)), txn(2, 2, 3, r(X)), txn(3, 4, 5, r(X, 1))],
    ),
    "the same, with somebody else's write ending in between": (
        "G-single-realtime",
        [txn(1, 0, 1, a(X, 1)), txn(4, 0, 1.5, a(Y, 1)), txn(2, 2, 3, r(X)), txn(3, 4, 5, r(X, 1))],
    ),
    "a later write comes first in history": (
        "G0-realtime", [txn(1, 0, 1, a(X, 1)), txn(2, 2, 3, a(X, 2)), txn(3, 4, 5, r(X, 2, 1))],
    ),
    "a read of the future": (
        "G1c-realtime", [txn(1, 0, 1, r(X, 1)), txn(2, 2, 3, a(X, 1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("complaint", "history"), BAD_APPENDS.values(), ids=BAD_APPENDS.keys())
def test_a_bad_history_of_lists_is_caught(complaint: str, history: list[Transaction]) -> None:
    said = judge_append(history)
    assert said
    assert all(each.startswith(complaint) for each in said), said


def test_real_time_is_asked_for_only_where_it_is_promised() -> None:
    _, history = BAD_APPENDS["another client misses what was acknowledged before"]
    assert judge_append(history, real_time=False) == []


@st.composite
def good_lists(draw: st.DrawFn) -> list[Transaction]:
    """Transactions that ran one after the other at some instant between begin and end; some were never answered."""
    lists: dict[int, tuple[int, ...]] = {X: (), Y: ()}
    free = dict.fromkeys(range(4), -1.0)  # a session begins the next one after the last one ended
    history = []
    for instant in range(draw(st.integers(1, 25))):
        session = draw(st.sampled_from([each for each, until in free.items() if until < instant] or [len(free)]))
        begin = draw(st.floats(max(free.get(session, -1.0), instant - 5.0), instant))
        outcome = draw(st.sampled_from([OK, OK, OK, UNKNOWN, NOT_DONE]))
        end = draw(st.floats(instant, instant + 5.0))
        steps: list[Append | Read] = []
        after = dict(lists)
        for number in range(draw(st.integers(1, 3))):
            key = draw(st.sampled_from([X, Y]))
            if draw(st.booleans()):
                after[key] = (*after[key], instant * 10 + number)
                steps.append(Append(key, after[key][-1]))
            else:
                steps.append(Read(key, after[key]))
        happened = outcome is OK or (outcome is UNKNOWN and draw(st.booleans()))
        if happened:
            lists = after
        free[session] = end
        history.append(Transaction(session, begin, INF if outcome is UNKNOWN else end, outcome, tuple(steps)))
    return draw(st.permutations(history))


@settings(deadline=None)
@given(good_lists())
def test_lists_of_a_sequential_run_pass(history: list[Transaction]) -> None:
    assert judge_append(history) == []


# -- register -------------------------------------------------------------------------------------------------------


def w(value: int, begin: float, end: float, at: int | None = None) -> RegisterOperation:
    return RegisterOperation(True, value, begin, end, None if at is None else (1, at))


def rd(value: int, begin: float, end: float, at: int) -> RegisterOperation:
    return RegisterOperation(False, value, begin, end, (1, at))


BAD_REGISTERS = {
    "a stale read": [w(1, 0, 1, 1), rd(0, 2, 3, 0)],
    "back again": [w(1, 0, 9, 1), rd(1, 1, 2, 1), rd(0, 3, 4, 0)],
    "an old value returns": [w(1, 0, 1, 1), w(2, 2, 3, 2), rd(2, 4, 5, 2), rd(1, 6, 7, 1)],
    "out of nowhere": [rd(7, 0, 1, 1)],
    "from the future": [rd(1, 0, 1, 1), w(1, 2, 3, 1)],
    "unknown, seen, then not": [w(1, 0, INF), rd(1, 1, 2, 1), rd(0, 3, 4, 1)],
    "a lost write": [w(1, 0, 1, 1), w(2, 2, 3, 2), rd(1, 4, 5, 2)],
    "writes in the wrong order": [w(1, 0, 1, 2), w(2, 2, 3, 1), rd(1, 4, 5, 2)],
    "readers disagree": [w(1, 0, 9, 1), w(2, 0, 9, 2), rd(1, 1, 2, 1), rd(2, 3, 4, 2), rd(1, 5, 6, 2)],
}


@pytest.mark.parametrize("history", BAD_REGISTERS.values(), ids=BAD_REGISTERS.keys())
def test_a_bad_register_is_caught_by_search_and_by_zones(history: list[RegisterOperation]) -> None:
    assert not judge_by_search(history, 0)
    assert violation(_plain(history), 0)


@pytest.mark.parametrize(
    "history",
    [
        [w(1, 0, 1, 2), w(2, 2, 3, 1)],
        [w(1, 0, 1, 2), rd(1, 2, 3, 1)],
        [rd(0, 0, 1, 2), rd(0, 2, 3, 1)],
        [w(1, 0, 1, 5), replace(rd(1, 2, 3, 0), position=(2, 4))],
        [replace(w(1, 0, 1, 0), position=(2, 4)), rd(1, 2, 3, 9)],
    ],
    ids=["of a later write", "a stale read's", "back in time", "a term that begins too low", "back to an old term"],
)
def test_a_position_that_does_not_cover_what_was_answered_before_is_caught(history: list[RegisterOperation]) -> None:
    assert len(judge_positions(history)) == 1


@st.composite
def good_registers(draw: st.DrawFn) -> list[RegisterOperation]:
    value, position, history = 0, 0, []
    for instant in range(draw(st.integers(1, 25))):
        begin, end = draw(st.floats(instant - 4.0, instant)), draw(st.floats(instant, instant + 4.0))
        if draw(st.booleans()):
            unanswered = draw(st.booleans())
            if not unanswered or draw(st.booleans()):
                position += draw(st.integers(1, 3))
                value = instant + 1
            history.append(w(instant + 1, begin, INF if unanswered else end, None if unanswered else position))
        else:
            position += draw(st.integers(0, 1))
            history.append(rd(value, begin, end, position))
    return draw(st.permutations(history))


@settings(deadline=None)
@given(good_registers())
def test_a_register_of_a_sequential_run_passes(history: list[RegisterOperation]) -> None:
    assert judge_positions(history) == []
    assert judge_by_search(history, 0)
    assert violation(_plain(history), 0) is None


@settings(deadline=None)
@given(good_registers(), st.data())
def test_search_and_zones_agree_on_a_spoilt_history(history: list[RegisterOperation], data: st.DataObject) -> None:
    """One read is given another value."""
    reads = [number for number, each in enumerate(history) if not each.writes]
    if reads:
        spoilt = data.draw(st.sampled_from(reads))
        value = data.draw(st.sampled_from([each.value for each in history]))
        history[spoilt] = replace(history[spoilt], value=value)
    assert judge_by_search(history, 0) == (violation(_plain(history), 0) is None)


def test_two_thousand_operations_are_searched_in_time() -> None:
    history = []
    for number in range(1, 1001):
        history += [w(number, number - 0.9, number + 2.0, number), rd(number, number - 0.5, number + 2.2, number)]
    assert judge_by_search(history, 0)
    with pytest.raises(ValueError, match="at most"):
        judge_by_search([*history, w(9999, 0, 1)], 0)


def _plain(history: list[RegisterOperation]) -> list[Operation]:
    return [Operation(each.writes, each.value, each.begin, each.end) for each in history]
