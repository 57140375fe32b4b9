"""The floor a read asks for: never below what was shown, and honest about new terms (R18)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.consistency import Floors, Settings, parse_ack, parse_level, parse_token
from walship.errors import ProtocolViolation, WriteLost
from walship.formats.link import NO_POSITION, Role, Status
from walship.formats.position import Position
from walship.hrana.types import Level


def status(role: Role, term: int, txid: int, history: tuple[tuple[int, int], ...] = ((1, 0),)) -> Status:
    position = Position(term, txid)
    return Status("n", "00" * 16, role, term, position, position, position, history=history)


def floors_at(term: int, txid: int) -> Floors:
    floors = Floors()
    floors.learn(status(Role.LEADER, term, txid))
    return floors


def test_a_starting_proxy_is_ready_when_it_has_heard_a_leader() -> None:
    floors = Floors()
    floors.learn(status(Role.FOLLOWER, 1, 90))
    assert not floors.ready
    floors.learn(status(Role.LEADER, 1, 100))
    assert floors.ready
    assert floors.needed(Settings()) == Position(1, 100)


def test_without_a_leader_the_newest_durable_position_of_enough_voters_is_the_floor() -> None:
    floors = Floors()
    floors.start_without_leader([Position(1, 90), Position(1, 95)])
    assert floors.ready
    assert floors.needed(Settings()) == Position(1, 95)


@given(st.lists(st.integers(0, 1000)))
def test_within_a_term_the_floor_is_the_highest_position_shown(txids: list[int]) -> None:
    floors = floors_at(1, 10)
    for txid in txids:
        floors.raise_to(Position(1, txid))
    assert floors.position == Position(1, max([10, *txids]))


def test_a_leaders_status_does_not_raise_the_floor_of_a_running_proxy() -> None:
    """Only what was shown to a client does: else every read would wait for commits nobody here has seen."""
    floors = floors_at(1, 10)
    floors.learn(status(Role.LEADER, 1, 500))
    assert floors.position == Position(1, 10)


def test_on_a_new_term_the_floor_becomes_its_start() -> None:
    floors = floors_at(1, 120)
    floors.learn(status(Role.LEADER, 2, 100, ((1, 0), (2, 100))))
    assert floors.position == Position(2, 100)
    assert floors.history.covers(Position(2, 100), floors.position)


def test_a_reply_of_a_new_term_counts_before_its_history_is_known() -> None:
    floors = floors_at(1, 120)
    floors.raise_to(Position(2, 121))
    floors.raise_to(Position(1, 119))
    assert floors.position == Position(2, 121)


def test_only_a_token_beyond_the_end_of_its_term_is_lost() -> None:
    floors = floors_at(1, 120)
    floors.learn(status(Role.LEADER, 2, 100, ((1, 0), (2, 100))))
    assert floors.needed(Settings(floor=Position(1, 100))) == Position(2, 100)
    with pytest.raises(WriteLost, match=r"1\.101"):
        floors.needed(Settings(floor=Position(1, 101)))


def test_level_any_needs_nothing_but_an_explicit_token() -> None:
    floors = floors_at(1, 120)
    assert floors.needed(Settings(level=Level.ANY)) == NO_POSITION
    assert floors.needed(Settings(level=Level.ANY, floor=Position(1, 7))) == Position(1, 7)


def test_the_later_of_token_and_floor_is_needed() -> None:
    floors = floors_at(1, 120)
    assert floors.needed(Settings(floor=Position(1, 130))) == Position(1, 130)
    assert floors.needed(Settings(floor=Position(1, 110))) == Position(1, 120)


def test_request_headers_override_the_streams_settings() -> None:
    settings = Settings(level=Level.LINEARIZABLE, ack=2)
    assert settings.overridden(consistency=None, min_position=None) is settings
    assert settings.overridden(consistency="Any", min_position="3.9") == Settings(Level.ANY, 2, Position(3, 9))


def test_global_is_another_name_for_session() -> None:
    assert parse_level("global") is Level.SESSION


@given(st.text())
def test_other_words_give_our_error(text: str) -> None:
    for parse in (parse_level, parse_ack, parse_token):
        try:
            parse(text)
        except ProtocolViolation:
            continue
