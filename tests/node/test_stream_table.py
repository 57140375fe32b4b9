"""The table of client streams: a baton works once, and only what held nothing is revived."""

from __future__ import annotations

import itertools

import pytest

from walship.errors import Overloaded, ProtocolViolation, StatementFailed
from walship.hrana.baton import ALREADY_USED, Baton, sign
from walship.node.streams import StreamTable

KEY = b"key"


def table(max_streams: int = 10) -> StreamTable:
    return StreamTable(KEY, itertools.count(1000).__next__, max_streams=max_streams)


def test_a_baton_leads_back_to_its_stream() -> None:
    streams = table()
    stream = streams.begin(None)
    baton = streams.finish(stream, 7, in_transaction=True)
    assert baton is not None
    again = streams.begin(baton)
    assert (again.service_stream, again.in_transaction) == (7, True)
    assert streams.finish(again, 0, in_transaction=False) is None
    assert len(streams) == 0


def test_a_baton_that_is_being_used_or_was_used_is_refused() -> None:
    streams = table()
    baton = streams.finish(streams.begin(None), 7, in_transaction=False)
    stream = streams.begin(baton)
    for _ in range(2):
        with pytest.raises(ProtocolViolation, match=ALREADY_USED):
            streams.begin(baton)
        streams.finish(stream, 7, in_transaction=False)


def test_after_nothing_happened_the_same_baton_works() -> None:
    streams = table()
    baton = streams.finish(streams.begin(None), 7, in_transaction=False)
    streams.undo(streams.begin(baton))
    assert streams.begin(baton).service_stream == 7


def test_a_new_stream_that_was_refused_leaves_nothing_behind() -> None:
    streams = table()
    streams.undo(streams.begin(None))
    assert len(streams) == 0


@pytest.mark.parametrize("changed", [False, True])
def test_an_unknown_stream_is_revived_only_when_it_held_nothing(changed: bool) -> None:
    """hrana.md 1.4, R21."""
    assert table().begin(sign(KEY, Baton(5, 5))).service_stream == 0
    streams = table()
    stream = streams.begin(None)
    stream.changed = changed
    baton = streams.finish(stream, 7, in_transaction=not changed)
    with pytest.raises(StatementFailed) as caught:
        table().begin(baton)
    assert caught.value.statement_code == "STREAM_EXPIRED"


def test_a_loss_is_told_once_and_then_the_baton_is_good() -> None:
    """PyPI libsql sends its last baton for ever (hrana.md 1.4): refused each time, it would never get out."""
    baton = table().finish(table().begin(None), 7, in_transaction=True)
    streams = table()
    with pytest.raises(StatementFailed):
        streams.begin(baton)
    assert streams.begin(baton).service_stream == 0
    held = streams.finish(streams.begin(None), 7, in_transaction=True)
    streams.drop(streams.begin(held))  # as its request failed: that was the telling
    assert streams.begin(held).service_stream == 0


def test_a_stream_whose_transaction_ended_can_be_revived_again() -> None:
    streams = table()
    begun = streams.finish(streams.begin(None), 7, in_transaction=True)
    ended = streams.finish(streams.begin(begun), 7, in_transaction=False)
    assert table().begin(ended).service_stream == 0


def test_a_full_table_gives_up_what_is_idle_longest_and_holds_nothing() -> None:
    streams = table(max_streams=3)
    held = streams.finish(streams.begin(None), 1, in_transaction=True)
    oldest = streams.finish(streams.begin(None), 2, in_transaction=False)
    newest = streams.finish(streams.begin(None), 3, in_transaction=False)
    streams.begin(None)
    assert len(streams) == 3
    assert streams.begin(held).service_stream == 1
    assert streams.begin(newest).service_stream == 3
    with pytest.raises(Overloaded):
        streams.begin(oldest)  # it would be revived, but all others are in use
