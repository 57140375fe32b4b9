"""Changes of voters and acks: what is allowed, what follows by itself, and who may write the record."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.coordination.membership import (
    MAX_VOTERS,
    Change,
    Kind,
    Standing,
    changed,
    consequences,
    mark_cluster,
    swap_cluster,
)
from walship.coordination.record import ClusterRecord, Seen, create_cluster, read_cluster
from walship.coordination.store import open_store
from walship.engine.acks import AckRule, AckTracker
from walship.errors import CompareFailed, Fenced, Refused
from walship.formats.position import Position

LEADER = "a"
NODES = {name: Standing(True) for name in "bcde"} | {"late": Standing(False, "it is 70000 commits behind")}


def record(voters: str = "abc", acks: int = 1, **fields: object) -> ClusterRecord:
    return ClusterRecord(cluster_id="ab" * 16, created_ms=1, voters=tuple(voters), acks=acks, **fields)  # type: ignore[arg-type]


def change(before: ClusterRecord, kind: Kind, name: str = "", acks: int | None = None) -> ClusterRecord:
    return changed(before, Change(kind, name, acks), leader=LEADER, nodes=NODES)


def test_a_change_counts_and_moves_one_thing() -> None:
    after = change(record(), Kind.ADD, "d")
    assert (after.voters, after.acks, after.gen) == (("a", "b", "c", "d"), 1, 1)
    after = change(after, Kind.REMOVE, "b")
    assert (after.voters, after.acks, after.gen) == (("a", "c", "d"), 1, 2)
    after = change(after, Kind.ACK, acks=2)
    assert (after.voters, after.acks, after.gen) == (("a", "c", "d"), 2, 3)


@pytest.mark.parametrize(("kind", "name", "acks"), [(Kind.ADD, "b", None), (Kind.REMOVE, "e", None), (Kind.ACK, "", 1)])
def test_what_holds_already_changes_nothing(kind: Kind, name: str, acks: int | None) -> None:
    before = record()
    assert change(before, kind, name, acks) is before


def test_all_follows_the_voters() -> None:
    every = change(record(), Kind.ACK)
    assert (every.acks, every.ack_all) == (2, True)
    assert change(every, Kind.ADD, "d").acks == 3
    assert change(every, Kind.REMOVE, "c").acks == 1
    assert change(every, Kind.ACK, acks=2).ack_all is False


@pytest.mark.parametrize(
    ("before", "kind", "name", "acks", "words"),
    [
        (record(), Kind.REMOVE, "a", None, "hand the lead over first"),
        (record(), Kind.ADD, "nobody", None, "no node named 'nobody'"),
        (record(), Kind.ADD, "late", None, "70000 commits behind"),
        (record(), Kind.ACK, "", 3, "can never be met"),
        (record(), Kind.ACK, "", -1, "can never be met"),
        (record(acks=2), Kind.REMOVE, "c", None, "walship voters ack 1"),
        (record("ab"), Kind.REMOVE, "b", None, "walship voters ack 0"),
        (record("ab", ack_all=True), Kind.REMOVE, "b", None, "walship voters ack 0"),
        (record("".join(chr(97 + n) for n in range(MAX_VOTERS))), Kind.ADD, "z", None, "16 voters are the most"),
    ],
)
def test_what_is_not_allowed_says_what_to_do(
    before: ClusterRecord, kind: Kind, name: str, acks: int | None, words: str
) -> None:
    nodes = NODES | {"z": Standing(True)}
    with pytest.raises(Refused, match=words):
        changed(before, Change(kind, name, acks), leader=LEADER, nodes=nodes)


def test_no_acknowledgments_is_a_choice_that_is_told() -> None:
    after = change(record(), Kind.ACK, acks=0)
    assert after.acks == 0
    assert "orphan" in consequences(after)[0]
    assert "Two voters" in consequences(record("ab"))[0]
    assert "One voter" in consequences(record("a", 0))[0]
    assert "while one of them is away" in consequences(record(acks=2))[0]
    assert consequences(record()) == []


MEMBERS = st.sampled_from("abcde")
CHANGES = st.one_of(
    st.builds(Change, st.sampled_from([Kind.ADD, Kind.REMOVE]), MEMBERS),
    st.builds(Change, st.just(Kind.ACK), acks=st.one_of(st.none(), st.integers(-1, 6))),
)


@given(st.lists(CHANGES, max_size=20))
def test_whatever_is_ordered_the_rule_can_be_met_and_is_never_lowered_unasked(orders: list[Change]) -> None:
    now = record()
    for order in orders:
        try:
            after = changed(now, order, leader=LEADER, nodes=NODES)
        except Refused:
            continue
        assert LEADER in after.voters
        assert 0 <= after.acks < len(after.voters)
        assert after.gen == now.gen + (after != now)
        if order.kind is not Kind.ACK and not now.ack_all:
            assert after.acks == now.acks
        if order.kind is not Kind.ACK and now.acks:
            assert after.acks
        now = after


@given(
    st.dictionaries(st.sampled_from("bcde"), st.integers(0, 9)),
    st.tuples(st.sets(st.sampled_from("bcde"), min_size=1), st.integers(1, 4)),
    st.tuples(st.sets(st.sampled_from("bcde"), min_size=1), st.integers(1, 4)),
)
def test_under_two_rules_every_promotion_by_either_meets_what_was_acknowledged(
    durable: dict[str, int], old: tuple[set[str], int], new: tuple[set[str], int]
) -> None:
    """R3 and m8: any voters - n voters hold each position that is covered while both rules are in force."""
    rules = [AckRule(min(acks, len(others)), frozenset({LEADER, *others})) for others, acks in (old, new)]
    tracker = AckTracker(2, rules[0], Position(1, 0))
    for name, txid in durable.items():
        tracker.record(f"id of {name}", Position(2, txid), name)
    tracker.propose(rules[1])
    covered = tracker.covered(Position(2, 9))
    if covered.term < 2:
        return
    has = {LEADER: 9} | durable
    for rule in rules:
        assert rule.voters is not None
        for asked in itertools.combinations(sorted(rule.voters), len(rule.voters) - rule.required):
            assert max(has.get(name, -1) for name in asked) >= covered.txid


def test_a_voter_whose_disk_was_lost_counts_once_and_for_what_it_has_now() -> None:
    tracker = AckTracker(2, AckRule(2, frozenset("abc")), Position(1, 0))
    tracker.record("b1", Position(2, 9), "b")
    tracker.record("b2", Position(2, 3), "b")
    assert tracker.covered(Position(2, 9)) == Position(1, 0)
    tracker.record("c1", Position(2, 9), "c")
    assert tracker.covered(Position(2, 9)) == Position(2, 3)


def test_who_does_not_vote_covers_nothing() -> None:
    tracker = AckTracker(2, AckRule(1, frozenset("ab")), Position(1, 0))
    tracker.record("d1", Position(2, 9), "d")
    assert tracker.covered(Position(2, 9)) == Position(1, 0)
    assert tracker.covered(Position(2, 9), 1) == Position(1, 0)


async def test_a_mark_keeps_the_changes_of_older_terms_out(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    try:
        await create_cluster(store, record())
        seen = await mark_cluster(store, 2)
        assert seen.record.term == 2
        assert await mark_cluster(store, 2) == seen
        await mark_cluster(store, 3)
        late = change(seen.record, Kind.ADD, "d")
        with pytest.raises(CompareFailed):
            await swap_cluster(store, seen, late, still=lambda: True)
        with pytest.raises(Fenced, match="term 2 is over"):
            await mark_cluster(store, 2)
        now = await read_cluster(store)
        assert now is not None
        assert (now.record.voters, now.record.term) == (("a", "b", "c"), 3)
    finally:
        await store.close()


async def test_who_does_not_lead_any_more_writes_nothing(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    try:
        seen = Seen(record(), (await create_cluster(store, record())).version)
        with pytest.raises(Fenced, match="nothing was changed"):
            await swap_cluster(store, seen, change(seen.record, Kind.ADD, "d"), still=lambda: False)
    finally:
        await store.close()
