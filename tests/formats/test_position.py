"""Which position contains which, across terms that ended early or were skipped (design.md 2)."""

from __future__ import annotations

import pytest

from walship.formats.position import Position, TermHistory


def at(term: int, txid: int) -> Position:
    return Position(term, txid)


def skipping() -> TermHistory:
    """Term 2 reached 2.24; term 3 began at 2.20, committed up to 3.23 and nobody took it; term 4 began at 2.24."""
    history = TermHistory([(2, 0)])
    history.add(3, 20, 2)
    history.add(4, 24, 2)
    return history


@pytest.mark.parametrize("want", [at(3, 21), at(3, 23)])
def test_no_commit_of_a_skipped_term_is_covered_by_a_larger_txid_of_the_term_before(want: Position) -> None:
    """Found by the simulation: at 4.30 there is another transaction 21 than at 3.21."""
    assert not skipping().covers(at(4, 30), want)
    assert skipping().lost(want)
    assert skipping().covers(at(3, 23), want)


@pytest.mark.parametrize("want", [at(2, 24), at(2, 20), at(3, 20), at(4, 24)])
def test_what_lies_on_the_way_is_covered(want: Position) -> None:
    assert skipping().covers(at(4, 30), want)
    assert not skipping().lost(want)


def test_a_term_that_was_skipped_itself_skips_nothing() -> None:
    """Term 4 skipped 3, then 5 continued 3: history is 2, 3, 5."""
    history = skipping()
    history.add(5, 23, 3)
    assert history.covers(at(5, 30), at(3, 23))
    assert not history.lost(at(3, 22))
    assert history.lost(at(2, 24))
    assert history.lost(at(4, 25))


def test_without_the_term_before_nothing_is_held_to_be_skipped() -> None:
    history = TermHistory([(2, 0), (3, 20), (4, 24)])
    assert history.covers(at(4, 30), at(3, 20))
    assert not history.lost(at(3, 21))
