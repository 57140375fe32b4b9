"""What is told of a candidacy: phases, answers, how it ended. Driven by the real core."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from walship.coordination.ballot import (
    Candidate,
    Eligible,
    Event,
    HolderDied,
    Promised,
    Promoted,
    RecordSeen,
    SealAnswer,
    SealAnswered,
    SealFailed,
    SealRefused,
    Swap,
    SwapDone,
    Won,
)
from walship.coordination.chronicle import PHASES, Chronicle
from walship.coordination.election import Election, State
from walship.coordination.record import LeaderRecord, Phase, Seen, TermStart
from walship.formats.position import Position, Tip

VOTERS = ("n1", "n2", "n3")
TIP = Tip(Position(4, 10), 7, 3)
START = TermStart(prev_term=4, prev_txid=10, checksum=7)
LEADER = LeaderRecord(term=4, holder="id1", name="n1", url="http://n1", phase=Phase.SERVING, nonce="boot1")
CLAIM = LeaderRecord(term=5, holder="id2", name="n2", url="http://n2", phase=Phase.CLAIMING, nonce="boot2")


class Told:
    """A core and its chronicle, and what the chronicle told."""

    def __init__(self, *, acks: int = 1) -> None:
        me = Candidate("id2", "n2", "http://n2", "boot2")
        self.core = Election(me, VOTERS, acks, 3.0, lambda low, _high: low)
        self.phases: list[tuple[str, float]] = []
        self.ends: list[str] = []
        self.chronicle = Chronicle(lambda phase, seconds: self.phases.append((phase, seconds)), self.ends.append)

    def take(self, *events: Event) -> None:
        for event in events:
            self.core.handle(event)
            self.chronicle.observe(event, self.core)

    def claim(self) -> None:
        """The leader's record seen at 1 s, its process dead at 10 s, the claim won at 10.25 s."""
        self.take(Eligible(0.5, TIP, behind=False), RecordSeen(1.0, Seen(LEADER, 1)), HolderDied(10.0, "boot1"))
        assert self.core.state is State.CLAIMING
        self.take(SwapDone(10.25, Swap.CLAIM, Won(Seen(CLAIM, 2))), Promised(10.5, 5, TIP, 0))


def answer(name: str, tip: Tip = TIP) -> SealAnswer:
    return SealAnswer(name, f"id-{name}", f"http://{name}", f"boot-{name}", tip)


def test_a_won_election_is_told_phase_by_phase() -> None:
    told = Told()
    told.claim()
    told.take(SealAnswered(11.0, 5, answer("n3")), Promoted(11.5, 5, START))
    serving = msgspec.structs.replace(CLAIM, phase=Phase.SERVING, start=START)
    told.take(SwapDone(11.75, Swap.ANNOUNCE, Won(Seen(serving, 3))))
    assert told.core.state is State.SERVING
    last = told.chronicle.last(20.0)
    assert last is not None
    assert last["term"] == 5
    assert last["phases"] == {"detect": 0.0, "claim": 0.25, "seal": 0.75, "open": 0.5, "publish": 0.25}
    assert "is dead" in last["cause"]
    assert last["answers"] == [{"name": "n2", "said": "holds 4.10"}, {"name": "n3", "said": "holds 4.10"}]
    assert last["outcome"].startswith("serving: ")
    assert last["ended_seconds_ago"] == 8.25
    assert [phase for phase, _ in told.phases] == list(PHASES)
    assert told.ends == ["serving"]


def test_a_claim_that_nobody_answers_is_told_with_who_was_missing() -> None:
    told = Told()
    told.claim()
    told.take(SealAnswered(11.0, 5, SealFailed("n1")), SealAnswered(11.0, 5, SealFailed("n3")))
    told.take(Eligible(13.5, TIP, behind=False))  # past the deadline
    last = told.chronicle.last(14.0)
    assert last is not None
    assert last["outcome"].startswith("given up: ")
    assert "of 2 voters needed 1 answered; not n1, n3" in last["outcome"]
    assert {"name": "n3", "said": "did not answer"} in last["answers"]
    assert told.ends == ["given up"]


def test_a_claim_that_is_refused_or_handed_over_is_told() -> None:
    told = Told()
    told.claim()
    told.take(SealAnswered(10.75, 5, SealRefused("n1", 8)))
    last = told.chronicle.last(14.0)
    assert last is not None
    assert {"name": "n1", "said": "has promised term 8"} in last["answers"]
    handing = Told()
    handing.claim()
    handing.take(SealAnswered(11.0, 5, answer("n3", Tip(Position(4, 12), 9, 3))))
    assert handing.core.state is State.HANDING
    handed = msgspec.structs.replace(CLAIM, holder="id-n3", name="n3", nonce="boot-n3")
    handing.take(SwapDone(11.25, Swap.HAND, Won(Seen(handed, 3))))
    assert handing.ends == ["handed over"]
    assert handing.phases[-1] == ("open", 0.25)


def test_detection_without_a_proof_of_death_is_since_the_last_sign_of_life() -> None:
    told = Told()
    vacant = dataclasses.replace(Seen(msgspec.structs.replace(LEADER, phase=Phase.VACANT), 2))
    told.take(Eligible(0.5, TIP, behind=False), RecordSeen(1.0, Seen(LEADER, 1)), RecordSeen(6.0, vacant))
    assert told.core.state is State.CLAIMING
    assert told.phases == [("detect", 0.0)]
    assert told.chronicle.last(7.0) is not None


@pytest.mark.parametrize("now", [0.0, 5.0])
def test_before_any_candidacy_there_is_nothing_to_tell(now: float) -> None:
    assert Told().chronicle.last(now) is None
