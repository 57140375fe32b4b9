"""The routing decision, as a pure function (R17, R18, R22)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from proxy.router import NEAR_LAG_MS, Decision, Need, Verdicts, decide
from walship.formats.link import NO_POSITION, Role
from walship.formats.position import Position, TermHistory

HISTORY = TermHistory([(1, 0), (2, 50), (3, 90)])


@dataclass
class Node:
    name: str
    role: Role
    applied: Position
    term: int = 3
    usable: bool = True
    cost: float = 1.0
    lag_ms: int | None = 0


def choose(need: Need, floor: Position, nodes: list[Node], *, seed: int = 1, **how: object) -> Decision | None:
    return decide(need, floor, nodes, HISTORY, random.Random(seed), wait_ms=50, **how)  # type: ignore[arg-type]


nodes = st.lists(
    st.builds(
        Node,
        st.sampled_from("abcdef"),
        st.sampled_from(Role),
        st.builds(Position, st.integers(1, 3), st.integers(0, 120)),
        st.integers(1, 3),
        st.booleans(),
        st.floats(0, 10),
        st.none() | st.integers(0, 3000),
    ),
    max_size=6,
    unique_by=lambda node: node.name,
)
floors = st.just(NO_POSITION) | st.builds(Position, st.integers(1, 3), st.integers(0, 120))


@given(nodes, floors, st.integers(), st.sets(st.sampled_from("abcdef")))
def test_a_write_never_goes_to_a_follower(nodes: list[Node], floor: Position, seed: int, tried: set[str]) -> None:
    decision = choose(Need.LEADER, floor, nodes, seed=seed, tried=tried)
    leaders = [node for node in nodes if node.role is Role.LEADER and node.usable and node.name not in tried]
    if decision is None:
        assert not leaders
    else:
        [chosen] = [node for node in leaders if node.name == decision.name]
        assert chosen.term == max(node.term for node in leaders)


@given(nodes, floors, st.integers(), st.sets(st.sampled_from("abcdef")), st.booleans())
def test_a_read_goes_to_a_covering_follower_when_there_is_one(
    nodes: list[Node], floor: Position, seed: int, tried: set[str], may_wait: bool
) -> None:
    decision = choose(Need.READ, floor, nodes, seed=seed, tried=tried, may_wait=may_wait)
    usable = [node for node in nodes if node.usable and node.name not in tried]
    covering = {
        node.name
        for node in usable
        if node.role is Role.FOLLOWER and (floor == NO_POSITION or HISTORY.covers(node.applied, floor))
    }
    if covering:
        assert decision is not None
        assert decision.covered
        assert decision.name in covering
    elif any(node.role is Role.LEADER for node in usable):
        assert decision is not None
    if decision is not None:
        chosen = next(node for node in usable if node.name == decision.name)
        assert chosen.role is not Role.STARTING
        assert decision.covered or may_wait


def test_the_cheaper_of_two_is_taken() -> None:
    slow = Node("slow", Role.FOLLOWER, Position(3, 100), cost=2.0)
    fast = Node("fast", Role.FOLLOWER, Position(3, 100), cost=1.0)
    assert {choose(Need.READ, Position(3, 100), [slow, fast], seed=seed).name for seed in range(20)} == {"fast"}  # type: ignore[union-attr]


def test_the_worst_of_many_gets_nothing_and_all_others_something() -> None:
    """Power of two choices: only the worst never wins a draw."""
    many = [Node(name, Role.FOLLOWER, Position(3, 100), cost=cost) for cost, name in enumerate("abcd")]
    chosen = {choose(Need.READ, NO_POSITION, many, seed=seed).name for seed in range(200)}  # type: ignore[union-attr]
    assert chosen == {"a", "b", "c"}


def test_without_a_covering_follower_the_nearest_waits() -> None:
    near = Node("near", Role.FOLLOWER, Position(3, 95), cost=9.0)
    far = Node("far", Role.FOLLOWER, Position(3, 20), cost=0.1)
    leader = Node("leader", Role.LEADER, Position(3, 100))
    assert choose(Need.READ, Position(3, 100), [near, far, leader]) == Decision("near", 50, covered=False)


def test_after_one_wait_it_is_the_leaders_turn() -> None:
    near = Node("near", Role.FOLLOWER, Position(3, 95))
    leader = Node("leader", Role.LEADER, Position(3, 100))
    decision = choose(Need.READ, Position(3, 100), [near, leader], may_wait=False)
    assert decision == Decision("leader", 50, covered=True)


def test_a_follower_that_lags_far_is_not_waited_for_while_a_leader_is_there() -> None:
    behind = Node("behind", Role.FOLLOWER, Position(3, 95), lag_ms=NEAR_LAG_MS + 1)
    leader = Node("leader", Role.LEADER, Position(3, 100))
    assert choose(Need.READ, Position(3, 100), [behind, leader]).name == "leader"  # type: ignore[union-attr]
    assert choose(Need.READ, Position(3, 100), [behind]).name == "behind"  # type: ignore[union-attr]


def test_a_refused_text_goes_to_the_leader_until_it_expires() -> None:
    verdicts = Verdicts(expiry_seconds=10)
    verdicts.note_write(("SELECT effect()",), now=100.0)
    assert verdicts.is_write(("SELECT 1", "SELECT effect()"), now=109.0)
    assert not verdicts.is_write(("SELECT 1",), now=109.0)
    assert not verdicts.is_write(("SELECT effect()",), now=110.0)


def test_of_several_texts_only_the_combination_is_remembered() -> None:
    verdicts = Verdicts()
    verdicts.note_write(("SELECT 1", "SELECT effect()"), now=0.0)
    assert verdicts.is_write(("SELECT 1", "SELECT effect()"), now=1.0)
    assert not verdicts.is_write(("SELECT 1",), now=1.0)


def test_verdicts_are_bounded() -> None:
    verdicts = Verdicts(limit=3)
    for number in range(10):
        verdicts.note_write((f"SELECT {number}",), now=0.0)
    assert len(verdicts) == 3
    assert verdicts.is_write(("SELECT 9",), now=1.0)
