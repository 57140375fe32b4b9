"""The floor a read asks for: never below what was shown, and honest about new terms (R18)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.consistency import Floors, Settings, parse_ack, parse_level, parse_token
from walship.errors import ProtocolViolation, WriteLost
from walship.formats.link import NO_POSITION, Role, Status, StatusFlags
from walship.formats.position import Position, TermHistory
from walship.hrana.types import Level


def status(role: Role, term: int, txid: int, history: tuple[tuple[int, int], ...] = ((1, 0),)) -> Status:
    position = Position(term, txid)
    flags = StatusFlags.SERVING | (StatusFlags.LED if role is Role.LEADER else StatusFlags.NONE)
    return Status("n", "00" * 16, role, term, position, position, position, flags=flags, history=history)


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


def test_a_leader_whose_lease_is_over_gives_no_floor() -> None:
    """m6 LEASE: it may have been deposed, and know nothing of what another one acknowledged."""
    floors = Floors()
    floors.learn(msgspec.structs.replace(status(Role.LEADER, 1, 100), flags=StatusFlags.SERVING))
    assert not floors.ready


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


@given(
    st.builds(Settings, st.sampled_from(Level), st.none() | st.integers(0, 30)),
    st.builds(Settings, st.sampled_from(Level)),
)
def test_a_baton_carries_level_and_acks(settings: Settings, default: Settings) -> None:
    """A revived stream must not be weaker than its client asked for."""
    number = settings.packed(default)
    assert 0 <= number < 128
    assert Settings.unpacked(number, default) == settings


def test_more_acknowledgments_than_there_are_followers_are_refused() -> None:
    assert parse_ack("2", 2) == 2
    assert parse_ack("all", 2) == parse_ack(" ALL ", 2) == 2
    with pytest.raises(ProtocolViolation):
        parse_ack("all")  # of how many is not known
    with pytest.raises(ProtocolViolation, match="0 to 2"):
        parse_ack("3", 2)


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, Status | Position]]:
    """What a proxy hears of a cluster: statuses as old as it likes, and answers that show what was acknowledged.

    A leader may lose what it had not got acknowledged; the next term begins where the acknowledged part ends, or after.
    """
    term, txid, acked = 1, 0, 0
    history = [(1, 0)]
    statuses = [status(Role.LEADER, 1, 0, tuple(history))]
    heard: list[tuple[str, Status | Position]] = []
    for _ in range(draw(st.integers(1, 25))):
        what = draw(st.sampled_from(["write", "ack", "term", "status", "answer", "old answer"]))
        if what == "write":
            txid += draw(st.integers(1, 5))
        elif what == "ack":
            acked = draw(st.integers(acked, txid))
        elif what == "term":
            term, txid = term + 1, draw(st.integers(acked, txid))
            acked = txid
            history.append((term, txid))
        elif what == "status":
            heard.append(("status", draw(st.sampled_from(statuses))))
        else:
            shown = acked if what == "answer" else draw(st.integers(0, acked))
            in_term = max(start for start in history if start[1] <= shown)[0]
            heard.append(("answer", Position(in_term, shown)))
        role = draw(st.sampled_from([Role.LEADER, Role.FOLLOWER]))
        statuses.append(status(role, term, acked, tuple(history)))
    heard.append(("status", statuses[-1]))
    return heard


@given(lives())
def test_a_floor_never_goes_back(heard: list[tuple[str, Status | Position]]) -> None:
    """R18: whatever comes in, in whatever order: each floor contains the one before, by the whole history."""
    last = heard[-1][1]
    assert isinstance(last, Status)
    truth = TermHistory(last.history)
    floors = Floors()
    before = NO_POSITION
    answers: list[Position] = []
    for _, what in heard:
        if isinstance(what, Status):
            floors.learn(what)
        else:
            floors.raise_to(what)
            answers.append(what)
        now = floors.needed(Settings())
        for earlier in (before, *answers):
            assert earlier == NO_POSITION or truth.covers(now, earlier), f"{now} after {earlier}"
        before = now


@given(st.text())
def test_other_words_give_our_error(text: str) -> None:
    for parse in (parse_level, parse_ack, parse_token):
        try:
            parse(text)
        except ProtocolViolation:
            continue
