"""`walship failover explain`: the words, from values of the shape of /status."""

from __future__ import annotations

from typing import Any

from walship.cli.failover import Seen, explain


def node(role: str = "follower", *, term: int = 5, why: str = "n2 is serving in term 5", **more: Any) -> dict[str, Any]:
    election = {"state": "following", "why": why, "voters": 3, "needed": 2, "last": None}
    return {"role": role, "term": term, "voter": True, "unhealthy_reason": None, "election": election | more}


def last(term: int = 5, outcome: str = "serving: n2 serves term 5", ended: float | None = 61.2) -> dict[str, Any]:
    return {
        "term": term,
        "cause": "the process of n1 that held term 4 is dead",
        "phases": {"detect": 0.004, "claim": 0.002, "seal": 0.006, "open": 0.01, "publish": 0.003},
        "answers": [{"name": "n2", "said": "holds 4.10"}, {"name": "n3", "said": "holds 4.10"}],
        "outcome": outcome,
        "ended_seconds_ago": ended,
    }


def text(seen: Seen) -> str:
    return "\n".join(explain(seen))


def test_a_finished_election_is_told_with_its_cause_phases_answers_and_outcome() -> None:
    told = text({"n1": "http://n1 does not answer", "n2": node("leader", last=last()), "n3": node()})
    assert told.startswith("n2 leads in term 5.\nLast candidate: n2, for term 5, ended 61 s ago.\n")
    assert "because: the process of n1 that held term 4 is dead" in told
    assert "detect 0.004 s, claim 0.002 s, seal 0.006 s, open 0.010 s, publish 0.003 s (0.025 s in all)" in told
    assert "n2 holds 4.10; n3 holds 4.10" in told
    assert "outcome: serving: n2 serves term 5" in told
    assert "n1: does not answer (http://n1 does not answer)" in told
    assert "voters answer" not in told


def test_without_enough_voters_it_says_that_none_can_be_and_whom_to_bring_back() -> None:
    told = text({"n1": "down", "n2": "down", "n3": node(why="waiting")})
    assert told.startswith("Nobody leads. The newest term that a node knows is 5.\nNo node has been a candidate")
    assert "1 of 3 voters answer, and 2 are needed" in told
    assert "Bring back n1, n2" in told


def test_with_enough_voters_and_no_leader_it_says_what_each_waits_for() -> None:
    told = text({"n1": "down", "n2": node(why="the lease of n1 may be live for 2.1 s"), "n3": node()})
    assert "2 of 3 voters answer, and 2 are needed: an election can succeed." in told
    assert "n2: follower, following; the lease of n1 may be live for 2.1 s" in told


def test_of_two_that_say_they_lead_the_higher_term_counts() -> None:
    assert text({"n1": node("leader", term=4), "n2": node("leader")}).startswith("n2 leads in term 5.")


def test_the_newest_candidacy_comes_first_and_one_under_way_before_an_ended_one_of_its_term() -> None:
    given_up = last(outcome="given up: of 2 voters needed 1 answered; not n2, n3", ended=3.0)
    seen = {"n1": node(last=given_up), "n2": node(last=last(outcome="under way", ended=None)), "n3": node(last=last(4))}
    lines = explain(seen)
    assert lines[1] == "Last candidate: n2, for term 5."
    assert [line for line in lines if line.startswith("Before: ")] == [
        "Before: n1, for term 5, ended 3 s ago: given up: of 2 voters needed 1 answered; not n2, n3",
        "Before: n3, for term 4, ended 61 s ago: serving: n2 serves term 5",
    ]


def test_a_node_that_serves_nothing_says_so_and_an_older_one_tells_nothing() -> None:
    down = node() | {"unhealthy_reason": "n1 is shutting down"}
    told = text({"n1": down, "n2": {"role": "follower", "term": 4}})
    assert "n1: follower, following; n2 is serving in term 5; it serves nothing: n1 is shutting down" in told
    assert "n2: follower, ?; it tells nothing of its election" in told
    assert "No node tells of its election" in text({"n2": {"role": "follower", "term": 4}})
