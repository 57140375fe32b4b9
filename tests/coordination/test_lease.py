"""The lease from both sides (failover.md 3.2), on made-up clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.coordination.lease import Lease, Observation

T = 3.0
VALID = T - (0.1 * T + 0.05)


def test_nothing_is_valid_before_the_first_renewal() -> None:
    lease = Lease(T)
    assert not lease.valid(0.0)
    assert lease.renew_at is None


def test_a_lease_counts_from_before_the_renewal_was_sent() -> None:
    lease = Lease(T)
    lease.extend(100.0)
    assert lease.valid(100.0 + VALID - 0.001)
    assert not lease.valid(100.0 + VALID)
    assert lease.remaining(101.0) == pytest.approx(VALID - 1)
    assert lease.renew_at == 100.0 + T / 4


def test_an_answer_that_overtook_another_does_not_shorten_it() -> None:
    lease = Lease(T)
    lease.extend(101.0)
    lease.extend(100.0)
    assert lease.valid(101.0 + VALID - 0.001)


def test_a_lease_that_ran_out_goes_on_with_a_renewal() -> None:
    """Nobody else claimed meanwhile, or the compare-and-swap would have failed."""
    lease = Lease(T)
    lease.extend(100.0)
    assert not lease.valid(110.0)
    lease.extend(110.0)
    assert lease.valid(110.5)


def test_the_end_is_for_ever() -> None:
    lease = Lease(T)
    lease.extend(100.0)
    lease.end()
    lease.extend(100.5)  # was under way
    assert not lease.valid(100.6)
    assert lease.renew_at is None


def test_after_a_handoff_in_doubt_only_a_renewal_begun_since_helps() -> None:
    """R12a; m4 BUMP."""
    lease = Lease(T)
    lease.extend(100.0)
    lease.demand_renewal(100.5)
    assert lease.must_renew
    assert not lease.valid(100.6)
    lease.extend(100.4)  # sent before the doubt: names the version before the one that the handoff names
    assert not lease.valid(100.6)
    lease.extend(100.7)
    assert lease.valid(100.8)
    assert not lease.must_renew


def test_a_challenger_counts_from_its_first_sight_of_a_version() -> None:
    seen = Observation()
    assert not seen.expired(1e9, T)
    seen.seen((1, 5), 10.0)
    seen.seen((1, 5), 12.0)
    assert seen.unchanged_for(12.0) == 2.0
    assert not seen.expired(10.0 + 1.1 * T - 0.001, T)
    assert seen.expired(10.0 + 1.1 * T + 0.001, T)
    seen.seen((1, 6), 13.0)
    assert seen.unchanged_for(13.5) == 0.5


def test_what_was_never_seen_has_no_age() -> None:
    with pytest.raises(ValueError, match="no record"):
        _ = Observation().since


@given(
    seconds=st.floats(0.5, 60),
    holder_rate=st.floats(0.975, 1.025),
    challenger_rate=st.floats(0.975, 1.025),
    landed=st.floats(0, 5),
    noticed=st.floats(0, 5),
)
def test_the_two_sides_never_overlap(
    seconds: float, holder_rate: float, challenger_rate: float, landed: float, noticed: float
) -> None:
    """Begun at 0 of real time, in the store `landed` later, seen by the challenger `noticed` after that."""
    lease, observation = Lease(seconds), Observation()
    lease.extend(0.0)
    valid_until = (seconds - lease.margin_seconds) / holder_rate
    seen_at = landed + noticed
    observation.seen(1, seen_at * challenger_rate)
    expired_at = observation.expires_at(seconds) / challenger_rate
    assert valid_until < expired_at
