"""Client streams and their batons (hrana.md 1.4)."""

from __future__ import annotations

import random

import pytest

from proxy.streams import ClientStream, Pin, StreamLimits, Streams
from walship.errors import Overloaded, ProtocolViolation, StatementFailed

KEY = b"0" * 32
PIN = Pin("n1", 1, 5)


def streams(**limits: float) -> Streams:
    return Streams(KEY, random.Random(3), StreamLimits(**limits))  # type: ignore[arg-type]


def opened(table: Streams, now: float = 0.0) -> tuple[ClientStream, str]:
    stream = table.open()
    table.register(stream)
    return stream, table.keep(stream, now)


def pin(table: Streams, stream: ClientStream, *, autocommit: bool = False) -> None:
    table.hold(stream, PIN, autocommit=autocommit, made_state=autocommit, read=False)


def test_a_baton_is_good_once() -> None:
    table = streams()
    stream, baton = opened(table)
    assert table.resume(baton, 1.0) is stream
    with pytest.raises(ProtocolViolation, match="already been used"):
        table.resume(baton, 1.0)  # while the first request runs
    second = table.keep(stream, 1.0)
    with pytest.raises(ProtocolViolation, match="already been used"):
        table.resume(baton, 1.0)
    assert table.resume(second, 1.0) is stream


def test_a_request_that_was_not_done_leaves_its_baton_good() -> None:
    table = streams()
    stream, baton = opened(table)
    table.resume(baton, 1.0)
    table.release(stream, 1.0)
    assert table.resume(baton, 2.0) is stream


def test_a_closed_stream_is_closed() -> None:
    table = streams()
    stream, baton = opened(table)
    table.close(table.resume(baton, 1.0))
    with pytest.raises(ProtocolViolation, match="was closed"):
        table.resume(baton, 1.0)
    assert len(table) == 0
    assert not stream.known


def test_a_strangers_baton_is_invalid() -> None:
    _, baton = opened(Streams(b"1" * 32, random.Random(3)))
    with pytest.raises(ProtocolViolation, match="invalid baton"):
        streams().resume(baton, 0.0)


def test_an_idle_stream_without_state_is_revived() -> None:
    table = streams(idle_seconds=10)
    stream, baton = opened(table)
    assert table.sweep(11.0) == []
    assert len(table) == 0
    revived = table.resume(baton, 12.0)
    assert (revived.id, revived.pin) == (stream.id, None)
    with pytest.raises(ProtocolViolation, match="already been used"):
        table.resume(baton, 12.0)


def test_an_open_transaction_expires_and_its_node_stream_is_closed() -> None:
    table = streams()
    stream, _ = opened(table)
    pin(table, stream)
    baton = table.keep(stream, 0.0)
    assert table.sweep(9.0) == []
    assert table.sweep(10.5) == [PIN]
    with pytest.raises(StatementFailed, match="expired") as caught:
        table.resume(baton, 11.0)
    assert caught.value.statement_code == "STREAM_EXPIRED"


def test_a_lost_transaction_is_told_once_and_then_the_baton_is_good() -> None:
    """PyPI libsql sends its last baton for ever (hrana.md 1.4): refused each time, it would never get out."""
    table = streams()
    stream, _ = opened(table)
    pin(table, stream)
    baton = table.keep(stream, 0.0)
    with pytest.raises(StatementFailed, match="expired"):
        table.resume(baton, 10.5)  # before the sweep has seen it
    assert table.resume(baton, 10.6).autocommit
    assert table.sweep(10.7) == [PIN]


def test_a_loss_told_with_the_failed_request_is_not_told_again() -> None:
    table = streams()
    stream, _ = opened(table)
    pin(table, stream)
    baton = table.keep(stream, 0.0)
    table.close(table.resume(baton, 1.0), lost=True, told=True)
    assert table.resume(baton, 2.0).autocommit


def test_connection_state_may_idle_longer_than_a_transaction() -> None:
    table = streams()
    stream, _ = opened(table)
    pin(table, stream, autocommit=True)
    table.keep(stream, 0.0)
    assert table.sweep(11.0) == []
    assert table.sweep(301.0) == [PIN]


def test_another_process_cannot_revive_an_open_transaction() -> None:
    table = streams()
    stream, _ = opened(table)
    pin(table, stream)
    baton = table.keep(stream, 0.0)
    with pytest.raises(StatementFailed, match="expired"):
        streams().resume(baton, 0.0)


def test_another_process_cannot_revive_settings_of_a_connection() -> None:
    """R21: reported lost, not silently reset."""
    table = streams()
    stream, _ = opened(table)
    promised = table.promise(stream, may_hold=True)
    pin(table, stream, autocommit=True)
    baton = table.keep(stream, 0.0)
    assert baton == promised
    with pytest.raises(StatementFailed, match="expired"):
        streams().resume(baton, 0.0)


def test_a_lost_link_takes_the_state_it_held() -> None:
    table = streams()
    stream, _ = opened(table)
    pin(table, stream)
    baton = table.keep(stream, 0.0)
    other, other_baton = opened(table)
    table.drop_connection("n1", 1)
    with pytest.raises(StatementFailed, match="expired"):
        table.resume(baton, 0.1)
    assert table.resume(other_baton, 0.1) is other


def test_the_promised_baton_is_the_one_given_at_the_end() -> None:
    table = streams()
    stream, _ = opened(table)
    promised = table.promise(stream, may_hold=False)
    assert table.keep(stream, 0.0) == promised


def test_a_record_of_counters_pins_nothing() -> None:
    table = streams()
    stream, _ = opened(table)
    table.hold(stream, PIN, autocommit=True, made_state=False, read=False)
    assert (stream.pin, stream.kept) == (None, PIN)
    table.hold(stream, None, autocommit=True, made_state=False, read=True)
    assert stream.kept == PIN
    table.keep(stream, 0.0)
    assert table.sweep(61.0) == [PIN]
    assert stream.kept is None


def test_the_number_of_streams_is_bounded() -> None:
    table = streams(streams=2)
    first, first_baton = opened(table)
    busy = table.open()
    table.register(busy)
    opened(table)  # takes the place of the idle one, which its baton revives
    assert table.resume(first_baton, 0.0).id == first.id
    with pytest.raises(Overloaded, match="hold transactions or requests"):
        table.register(table.open())
