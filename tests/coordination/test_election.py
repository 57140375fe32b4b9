"""The election core, step by step: what it is told, what it asks for (failover.md 3.3, 3.4; R12a)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from walship.coordination import ballot as b
from walship.coordination.election import TRANSITIONS, Election, State
from walship.coordination.record import LeaderRecord, Phase, Seen, TermStart
from walship.formats.position import Position, Tip

T = 3.0
EXPIRED = 1.1 * T + 0.001
ME = b.Candidate("id2", "n2", "http://n2", "x2")
START = TermStart(1, 5, 9)
OLD = LeaderRecord(term=1, holder="id1", name="n1", url="http://n1", phase=Phase.SERVING, nonce="x1")
MINE = LeaderRecord(term=2, holder="id2", name="n2", url="http://n2", phase=Phase.CLAIMING, nonce="x2")


def tip(txid: int, term: int = 1, checksum: int = 9) -> Tip:
    return Tip(Position(term, txid), checksum, 1)


def answer(name: str, txid: int, *, term: int = 1, lag: int = 0) -> b.SealAnswer:
    return b.SealAnswer(name, f"id{name[1:]}", f"http://{name}", f"x{name[1:]}", tip(txid, term), lag)


class Bench:
    """An election of n2 among n1, n2, n3 with one ack; `said` is what the last event brought."""

    def __init__(self, *, acks: int = 1, voters: tuple[str, ...] = ("n1", "n2", "n3"), promised: int = 0) -> None:
        self.election = Election(ME, voters, acks, T, lambda low, high: (low + high) / 2, promised=promised)
        self.now = 0.0
        self.said: list[b.Action] = []

    def tell(self, kind: Any, *values: Any, at: float | None = None, **named: Any) -> list[b.Action]:
        self.now = self.now if at is None else at
        self.said = self.election.handle(kind(self.now, *values, **named))
        return self.said

    def see(self, record: LeaderRecord, version: int, **changes: Any) -> list[b.Action]:
        return self.tell(b.RecordSeen, Seen(msgspec.structs.replace(record, **changes), version))

    @property
    def state(self) -> State:
        return self.election.state

    def following(self, txid: int = 5, **eligible: Any) -> Bench:
        self.tell(b.Eligible, tip(txid), **eligible)
        self.see(OLD, 10)
        return self

    def claiming(self) -> Bench:
        self.following()
        self.tell(b.HolderDied, "x1")
        assert self.said == [b.Claim(Seen(OLD, 10))]
        return self

    def sealing(self, txid: int = 5) -> Bench:
        self.claiming()
        self.tell(b.SwapDone, b.Swap.CLAIM, b.Won(Seen(MINE, 11)))
        assert self.said == [b.Promise(2)]
        self.tell(b.Promised, 2, tip(txid))
        return self

    def announcing(self) -> Bench:
        self.sealing()
        self.tell(b.SealAnswered, 2, answer("n3", 5))
        assert self.said == [b.Promote(2)]
        self.tell(b.Promoted, 2, START)
        assert self.said == [b.Announce(Seen(MINE, 11), START)]
        return self

    def serving(self) -> Bench:
        self.announcing()
        self.tell(b.SwapDone, b.Swap.ANNOUNCE, b.Won(Seen(served(), 12)))
        assert self.said == [b.Serve(2)]
        return self


def served(**changes: Any) -> LeaderRecord:
    return msgspec.structs.replace(MINE, phase=Phase.SERVING, start=START, **changes)


# --- grounds --------------------------------------------------------------------------------------------------


def test_the_table_names_every_state_and_all_can_be_reached() -> None:
    reached = {State.FOLLOWING}
    for _ in State:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(TRANSITIONS) == set(State)


def test_a_live_lease_is_no_ground() -> None:
    bench = Bench().following()
    assert bench.tell(b.Stand, "a proxy lost the leader", at=1.0) == []
    assert bench.tell(b.Tick, at=1.1 * T - 0.01) == []
    assert "n1 is serving in term 1" in bench.election.why
    assert bench.election.wake_at == pytest.approx(1.1 * T)


def test_each_version_of_the_record_starts_the_wait_anew() -> None:
    bench = Bench().following()
    bench.now = 3.0
    bench.see(OLD, 11, beat=1)
    assert bench.tell(b.Tick, at=EXPIRED) == []
    assert bench.election.wake_at == pytest.approx(3.0 + 1.1 * T)


def test_an_older_record_is_ignored() -> None:
    bench = Bench().following()
    assert bench.see(OLD, 9, phase=Phase.VACANT) == []


@pytest.mark.parametrize("phase", list(Phase))
def test_a_dead_holder_is_a_ground_at_once_in_any_phase(phase: Phase) -> None:
    bench = Bench()
    bench.tell(b.Eligible, tip(5))
    bench.tell(b.HolderDied, "x1")
    assert bench.see(OLD, 10, phase=phase) == [b.Claim(Seen(msgspec.structs.replace(OLD, phase=phase), 10))]


def test_the_death_of_another_process_is_none() -> None:
    bench = Bench().following()
    assert bench.tell(b.HolderDied, "x0") == []


def test_a_vacant_record_is_a_ground_at_once() -> None:
    bench = Bench().following()
    assert [type(each) for each in bench.see(OLD, 11, phase=Phase.VACANT)] == [b.Claim]


def test_my_predecessor_is_dead_by_the_lock_on_my_directory() -> None:
    bench = Bench()
    bench.tell(b.Eligible, tip(5))
    assert [type(each) for each in bench.see(MINE, 10, nonce="x2-before", phase=Phase.SERVING)] == [b.Claim]


def test_who_holds_less_lets_others_go_first_unless_asked() -> None:
    late = Bench().following(behind=True)
    assert late.see(OLD, 11, phase=Phase.VACANT) == []
    assert late.election.wake_at == pytest.approx(0.06)
    asked = Bench().following(behind=True)
    asked.tell(b.Stand, "a proxy")
    assert [type(each) for each in asked.see(OLD, 11, phase=Phase.VACANT)] == [b.Claim]


@pytest.mark.parametrize("hinder", ["no voter", "no data", "promised"])
def test_who_cannot_lead_does_not_claim_and_says_why(hinder: str) -> None:
    bench = Bench(promised=3 if hinder == "promised" else 0, voters=("n1",) if hinder == "no voter" else ("n1", "n2"))
    bench.tell(b.Eligible, None if hinder == "no data" else tip(5))
    bench.tell(b.HolderDied, "x1")
    assert bench.see(OLD, 10) == []
    assert bench.state is State.FOLLOWING
    assert {"no voter": "not a voter", "no data": "no whole database", "promised": "promised 3"}[
        hinder
    ] in bench.election.why


# --- checking -------------------------------------------------------------------------------------------------


def test_when_the_lease_ran_out_the_voters_and_the_store_are_asked_first() -> None:
    bench = Bench().following()
    assert bench.tell(b.Tick, at=EXPIRED) == [b.Read(), b.Check(1, ("n1", "n3"))]
    assert bench.tell(b.Checked, "n1", False) == []
    assert bench.tell(b.Checked, "n3", False) == []  # the store has not answered
    assert bench.see(OLD, 10) == [b.Claim(Seen(OLD, 10))]


def test_a_voter_that_does_not_answer_the_check_holds_nobody_up() -> None:
    bench = Bench().following()
    bench.tell(b.Tick, at=EXPIRED)
    assert bench.see(OLD, 10) == []
    assert bench.tell(b.Tick, at=EXPIRED + 0.21) == [b.Claim(Seen(OLD, 10))]


def test_only_voters_are_listened_to_in_a_check() -> None:
    bench = Bench().following()
    bench.tell(b.Tick, at=EXPIRED)
    assert bench.tell(b.Checked, "n9", True) == []
    assert bench.state is State.CHECKING


def test_a_store_that_does_not_answer_is_no_ground() -> None:
    bench = Bench().following()
    bench.tell(b.Tick, at=EXPIRED)
    bench.tell(b.Checked, "n1", False)
    bench.tell(b.Checked, "n3", False)
    assert bench.tell(b.Tick, at=EXPIRED + T / 2) == []
    assert bench.state is State.FOLLOWING


def test_a_renewal_ends_the_check() -> None:
    bench = Bench().following()
    bench.tell(b.Tick, at=EXPIRED)
    assert bench.see(OLD, 11, beat=1) == []
    assert bench.state is State.FOLLOWING


def test_a_voter_that_hears_the_leader_gives_it_one_more_lease_and_no_more() -> None:
    bench = Bench().following()
    bench.tell(b.Tick, at=EXPIRED)
    assert bench.tell(b.Checked, "n3", True) == []
    assert bench.state is State.FOLLOWING
    assert "n3 still hears the leader" in bench.election.why
    assert bench.tell(b.Tick, at=EXPIRED + T / 4 - 0.01) == []
    assert bench.tell(b.Tick, at=EXPIRED + T / 4)[-1] == b.Check(1, ("n1", "n3"))
    bench.tell(b.Checked, "n3", True)
    bench.tell(b.Tick, at=EXPIRED + T + 0.1)
    bench.tell(b.Checked, "n3", True)
    bench.see(OLD, 10)
    assert bench.tell(b.Checked, "n1", False) == [b.Claim(Seen(OLD, 10))]


def test_who_hears_the_leader_itself_does_not_ask() -> None:
    bench = Bench().following()
    bench.tell(b.Heard, 1, at=EXPIRED - 0.1)
    assert bench.tell(b.Tick, at=EXPIRED) == [b.Read()]
    assert bench.state is State.FOLLOWING


def test_heard_means_this_term_within_half_a_lease() -> None:
    bench = Bench()
    bench.tell(b.Heard, 4, at=10.0)
    assert bench.election.heard(10.0 + T / 2, 4)
    assert not bench.election.heard(10.0 + T / 2 + 0.01, 4)
    assert not bench.election.heard(10.0, 5)
    bench.tell(b.Heard, 3, at=11.0)  # a deposed leader
    assert bench.election.heard(11.4, 4)


# --- claiming -------------------------------------------------------------------------------------------------


def test_a_lost_claim_waits_for_the_record_that_won() -> None:
    bench = Bench().claiming()
    assert bench.tell(b.SwapDone, b.Swap.CLAIM, b.LOST) == [b.Read()]
    assert bench.see(OLD, 10) == []  # an old answer
    assert bench.see(OLD, 11, term=2, holder="id3", name="n3", nonce="x3", phase=Phase.CLAIMING) == []
    assert bench.election.wake_at == pytest.approx(1.1 * T)


def test_a_lost_claim_whose_winner_was_seen_before_waits_for_nothing_else() -> None:
    bench = Bench().claiming()
    bench.see(OLD, 11, term=2, holder="id3", name="n3", nonce="x3", phase=Phase.CLAIMING)
    bench.tell(b.SwapDone, b.Swap.CLAIM, b.LOST)
    bench.tell(b.RecordSeen, bench.election.seen)
    assert [type(each) for each in bench.tell(b.HolderDied, "x3")] == [b.Claim]


def test_an_unknown_claim_reads_until_the_store_answers() -> None:
    bench = Bench().claiming()
    assert bench.tell(b.SwapDone, b.Swap.CLAIM, b.UNKNOWN) == [b.Read()]
    assert bench.election.wake_at == pytest.approx(0.1)
    assert bench.tell(b.Tick, at=0.1) == [b.Read()]
    assert bench.see(OLD, 10) == [b.Claim(Seen(OLD, 10))]  # the same compare-and-swap once more


def test_a_claim_that_landed_late_is_taken_up() -> None:
    bench = Bench().claiming()
    bench.tell(b.SwapDone, b.Swap.CLAIM, b.UNKNOWN)
    assert bench.see(MINE, 11) == [b.Promise(2)]


def test_a_claim_that_was_overtaken_before_it_was_known_is_not_taken_up() -> None:
    bench = Bench().claiming()
    bench.see(OLD, 12, term=3, holder="id3", name="n3", nonce="x3", phase=Phase.CLAIMING)
    assert bench.tell(b.SwapDone, b.Swap.CLAIM, b.Won(Seen(MINE, 11))) == []
    assert bench.state is State.FOLLOWING


# --- sealing --------------------------------------------------------------------------------------------------


def test_nothing_is_sealed_before_the_own_promise_is_durable() -> None:
    bench = Bench().claiming()
    bench.tell(b.SwapDone, b.Swap.CLAIM, b.Won(Seen(MINE, 11)))
    assert bench.tell(b.SealAnswered, 2, answer("n3", 5)) == []
    assert bench.tell(b.Tick, at=0.5) == []
    assert bench.tell(b.Promised, 2, tip(5)) == [b.Promote(2)]


def test_seals_go_to_all_others_and_again_to_those_that_failed() -> None:
    bench = Bench(voters=("n1", "n2", "n3", "n4", "n5")).sealing()
    assert bench.said == [b.Seal(2, ("n1", "n3", "n4", "n5"))]
    assert bench.tell(b.SealAnswered, 2, b.SealFailed("n1")) == []
    assert bench.tell(b.SealAnswered, 2, answer("n3", 5)) == []
    assert bench.tell(b.Tick, at=0.1) == [b.Seal(2, ("n1", "n4", "n5"))]


@pytest.mark.parametrize(
    ("voters", "acks", "needed"), [(3, 1, 2), (3, 2, 1), (5, 1, 4), (5, 2, 3), (4, 1, 3), (2, 1, 1)]
)
def test_the_quorum_meets_every_set_that_acknowledged(voters: int, acks: int, needed: int) -> None:
    bench = Bench(acks=acks, voters=tuple(f"n{n}" for n in range(1, voters + 1))).sealing()
    others = [name for name in bench.election.voters if name != "n2"]
    for name in others[: max(0, needed - 2)]:
        assert bench.tell(b.SealAnswered, 2, answer(name, 5)) == []
    if needed > 1:
        assert bench.state is State.SEALING
        bench.tell(b.SealAnswered, 2, answer(others[needed - 2], 5))
    assert bench.said == [b.Promote(2)]


def test_answers_of_strangers_and_of_other_terms_do_not_count() -> None:
    bench = Bench().sealing()
    assert bench.tell(b.SealAnswered, 2, answer("n9", 5)) == []
    assert bench.tell(b.SealAnswered, 1, answer("n3", 5)) == []
    assert bench.tell(b.SealAnswered, 2, answer("n2", 5)) == []


def test_without_acks_all_are_waited_for_a_moment_then_the_best_leads() -> None:
    bench = Bench(acks=0).sealing()
    assert bench.tell(b.SealAnswered, 2, answer("n3", 4)) == []
    assert bench.tell(b.Tick, at=0.2) == [b.Promote(2)]


def test_a_voter_that_holds_more_gets_the_claim() -> None:
    """E5, R12a: no candidate any more before the compare-and-swap is sent."""
    bench = Bench().sealing()
    best = answer("n3", 6)
    assert bench.tell(b.SealAnswered, 2, best) == [b.HandOver(Seen(MINE, 11), best)]
    assert bench.state is State.HANDING
    assert bench.tell(b.Sealed, 2) == []
    assert bench.tell(b.SwapDone, b.Swap.HAND, b.UNKNOWN) == [b.Read()]
    bench.see(MINE, 11)
    assert bench.tell(b.Tick, at=EXPIRED) == []  # the term is spent, and others go first
    assert "handing term 2 to n3" in bench.election.last


def test_a_later_term_is_more_than_a_larger_txid() -> None:
    bench = Bench().sealing(txid=50)
    bench.tell(b.SealAnswered, 2, answer("n3", 6, term=2))
    assert [type(each) for each in bench.said] == [b.HandOver]


def test_among_the_best_the_least_lag_leads_and_a_tie_is_won_by_the_candidate() -> None:
    bench = Bench(acks=0).sealing()
    bench.tell(b.SealAnswered, 2, answer("n1", 6, lag=9))
    quick = answer("n3", 6, lag=2)
    assert bench.tell(b.SealAnswered, 2, quick) == [b.HandOver(Seen(MINE, 11), quick)]
    tie = Bench().sealing()
    assert tie.tell(b.SealAnswered, 2, answer("n3", 5)) == [b.Promote(2)]


def test_a_voter_that_promised_more_ends_the_candidacy() -> None:
    bench = Bench().sealing()
    assert bench.tell(b.SealAnswered, 2, b.SealRefused("n3", 3)) == [b.Read()]
    assert bench.state is State.FOLLOWING
    assert "promised term 3" in bench.election.last


def test_too_few_answers_end_the_candidacy_after_a_lease_and_others_go_first() -> None:
    bench = Bench().sealing()
    bench.tell(b.Tick, at=T - 0.1)
    assert bench.tell(b.Tick, at=T) == [b.Release(Seen(MINE, 11))]
    assert "not n1, n3" in bench.election.last
    assert bench.see(MINE, 12, phase=Phase.VACANT) == []
    assert bench.election.wake_at == pytest.approx(2 * T)
    assert [type(each) for each in bench.tell(b.Tick, at=2 * T)] == [b.Claim]


def test_a_node_that_lost_its_data_gives_the_claim_back() -> None:
    bench = Bench().claiming()
    bench.tell(b.SwapDone, b.Swap.CLAIM, b.Won(Seen(MINE, 11)))
    assert bench.tell(b.Promised, 2, None) == [b.Release(Seen(MINE, 11))]


# --- what is given to this node -------------------------------------------------------------------------------


def test_a_claim_handed_to_this_process_is_sealed_again_in_its_term() -> None:
    bench = Bench().following()
    bench.tell(b.Sealed, 2)
    assert bench.see(MINE, 12) == [b.Promise(2)]
    assert bench.tell(b.Promised, 2, tip(5)) == [b.Seal(2, ("n1", "n3"))]


def test_a_claim_for_an_earlier_process_of_this_node_is_not() -> None:
    bench = Bench().following()
    assert [type(each) for each in bench.see(MINE, 12, nonce="x2-before")] == [b.Claim]


def test_a_term_is_taken_up_once() -> None:
    bench = Bench().announcing()
    bench.tell(b.Sealed, 3)
    assert all(not isinstance(each, b.Promise) for each in bench.see(MINE, 12))


def test_a_handoff_needs_no_seal_if_the_log_ends_where_it_says() -> None:
    bench = Bench().following()
    assert bench.see(MINE, 12, phase=Phase.HANDOFF, start=START) == [b.Promise(2)]
    assert bench.tell(b.Promised, 2, tip(5)) == [b.Promote(2)]


@pytest.mark.parametrize("own", [tip(4), tip(5, checksum=8)])
def test_a_handoff_to_a_log_that_ends_elsewhere_is_sealed_like_any_claim(own: Tip) -> None:
    bench = Bench().following()
    bench.see(MINE, 12, phase=Phase.HANDOFF, start=START)
    assert bench.tell(b.Promised, 2, own) == [b.Seal(2, ("n1", "n3"))]


def test_what_is_given_to_a_node_without_data_is_given_back() -> None:
    bench = Bench()
    bench.tell(b.Eligible, None)
    assert bench.see(MINE, 12) == [b.Release(Seen(MINE, 12))]


# --- announcing and serving -----------------------------------------------------------------------------------


def test_a_failed_promotion_gives_the_term_back() -> None:
    bench = Bench().sealing()
    bench.tell(b.SealAnswered, 2, answer("n3", 5))
    said = bench.tell(b.PromotionFailed, 2, "the checksum differs")
    assert [type(each) for each in said] == [b.StepDown, b.Release]
    assert bench.tell(b.Promoted, 2, START) == []


def test_a_promise_that_cannot_be_kept_gives_the_claim_back_at_once() -> None:
    bench = Bench().claiming()
    bench.tell(b.SwapDone, b.Swap.CLAIM, b.Won(Seen(MINE, 11)))
    assert bench.tell(b.PromotionFailed, 2, "the voters cannot be read") == [b.Release(Seen(MINE, 11))]


def test_an_announcement_of_unknown_outcome_is_looked_up_and_repeated() -> None:
    bench = Bench().announcing()
    assert bench.tell(b.SwapDone, b.Swap.ANNOUNCE, b.UNKNOWN) == [b.Read()]
    assert bench.tell(b.Tick, at=0.1) == [b.Read()]
    assert bench.see(MINE, 11) == [b.Announce(Seen(MINE, 11), START)]
    bench.tell(b.SwapDone, b.Swap.ANNOUNCE, b.LOST)  # the first has landed meanwhile
    assert bench.see(served(), 12) == [b.Serve(2)]


def test_an_announcement_that_lost_to_another_claim_ends_the_term() -> None:
    bench = Bench().announcing()
    bench.tell(b.SwapDone, b.Swap.ANNOUNCE, b.LOST)
    said = bench.see(OLD, 12, term=3, phase=Phase.CLAIMING, nonce="x9")
    assert [type(each) for each in said] == [b.StepDown]


def test_an_announcement_that_lost_to_the_history_ends_the_term() -> None:
    bench = Bench().announcing()
    bench.tell(b.SwapDone, b.Swap.ANNOUNCE, b.LOST)
    assert [type(each) for each in bench.see(MINE, 11)] == [b.StepDown, b.Release]


def test_a_leader_goes_on_through_its_own_renewals() -> None:
    bench = Bench().serving()
    assert bench.see(served(beat=1), 13) == []
    assert bench.election.leads == 2


@pytest.mark.parametrize(
    "record",
    [
        msgspec.structs.replace(OLD, term=3, phase=Phase.CLAIMING, nonce="x9"),
        msgspec.structs.replace(MINE, term=3, holder="id3", nonce="x3", phase=Phase.HANDOFF, start=START),
        msgspec.structs.replace(MINE, phase=Phase.VACANT),
        None,
    ],
    ids=["claimed", "handed off", "vacant", "gone"],
)
def test_a_leader_steps_down_when_the_record_is_not_its_own_any_more(record: LeaderRecord | None) -> None:
    bench = Bench().serving()
    said = bench.tell(b.RecordSeen, None if record is None else Seen(record, 13))
    assert [type(each) for each in said] == [b.StepDown]
    assert bench.election.leads == 0


def test_a_leader_that_gave_up_lets_the_others_go_first() -> None:
    bench = Bench().serving()
    bench.see(MINE, 13, phase=Phase.VACANT)
    assert bench.election.wake_at == pytest.approx(T)


@pytest.mark.parametrize("stage", ["sealing", "announcing", "serving"])
def test_promising_another_a_higher_term_ends_what_this_node_is(stage: str) -> None:
    """R2: the StepDown comes back before the promise is written and answered."""
    bench = getattr(Bench(), stage)()
    said = bench.tell(b.Sealed, 3)
    assert [type(each) for each in said] == ([b.Read] if stage == "sealing" else [b.StepDown, b.Read])
    assert bench.state is State.FOLLOWING


def test_a_seal_of_an_older_term_ends_nothing() -> None:
    bench = Bench().serving()
    assert bench.tell(b.Sealed, 1) == []
    assert bench.election.leads == 2
