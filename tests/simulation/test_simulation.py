"""The failover cores under 2,000 seeds of faults; each rule's mutant is caught; planned changes and store outages."""

from __future__ import annotations

import pytest

from tests.simulation.cluster import FOCUS, Cluster, simulate
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import Violation

SEEDS = 2000
SLICE = 200
MUTANT_SEEDS = 50


@pytest.mark.parametrize("first", range(0, SEEDS, SLICE))
def test_every_invariant_holds(first: int) -> None:
    """I1 to I9, I12, I15, I18, I20, I22. `python -m tests.simulation SEED --verbose` replays a seed."""
    terms = writes = 0
    for seed in range(first, first + SLICE):
        try:
            judge = simulate(seed).judge
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        terms, writes = terms + judge.elections, writes + len(judge.acked)
    assert terms > SLICE * 2, "the faults have made no elections"
    assert writes > SLICE * 50, "the clients have hardly written"


@pytest.mark.soak
def test_every_invariant_holds_in_many_more() -> None:
    for seed in range(SEEDS, SEEDS + 20_000):
        simulate(seed)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_that_is_dropped_is_missed(name: str) -> None:
    rules, focus = MUTANTS[name]
    caught = None
    for seed in range(MUTANT_SEEDS):
        try:
            simulate(seed, rules(), focus=focus)
        except Violation as violation:
            caught = violation
            break
    assert caught is not None, f"{MUTANT_SEEDS} seeds did not notice that a rule was dropped"


@pytest.mark.parametrize("focus", FOCUS)
def test_a_seed_replays(focus: str, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        simulate(7, focus=focus, verbose=True)
        return capsys.readouterr().out

    first = told()
    assert first == told()
    assert "Serve" in first


def quiet_cluster(seed: int) -> Cluster:
    cluster = Cluster(seed, shape=(3, 1), focus="handoff", one_host=False)
    for machine in cluster.machines:
        machine.fsync = 0.0005
    cluster.world.run(1.0)
    assert cluster.leader is not None
    return cluster


@pytest.mark.parametrize("seed", range(20))
def test_a_switchover_costs_no_election_and_no_write(seed: int) -> None:
    """I16: the record goes from hand to hand; nothing waits for a lease, nothing is lost."""
    cluster = quiet_cluster(seed)
    for _ in range(5):
        before = cluster.leader
        assert before is not None
        assert before.process is not None
        target = next(machine for machine in cluster.machines if machine is not before)
        term = cluster.judge.record_term
        before.process.switchover(target.name)
        cluster.world.run(cluster.world.now + 0.8)
        assert cluster.leader is target
        assert cluster.judge.record_term == term + 1
    cluster.heal()
    assert max(proxy.longest_seconds for proxy in cluster.proxies) < 0.8


@pytest.mark.parametrize("seed", range(20))
def test_without_a_store_there_is_no_second_leader(seed: int) -> None:
    """I17: the leader says ok until its lease ends, nobody claims, and all goes on when the store is back."""
    cluster = quiet_cluster(seed)
    leader, term = cluster.leader, cluster.judge.record_term
    assert leader is not None
    assert leader.process is not None
    cluster.store.down_until = cluster.world.now + 10 * cluster.lease_seconds
    cluster.world.run(cluster.world.now + 2 * cluster.lease_seconds)
    assert not leader.process.ready()
    known = set(cluster.judge.acked)
    cluster.world.run(cluster.store.down_until)
    assert set(cluster.judge.acked) == known
    assert cluster.judge.record_term == term
    cluster.heal()
    assert known <= cluster.judge.acked.keys()


@pytest.mark.parametrize("seed", range(10))
def test_who_still_hears_the_leader_leaves_it_time_after_an_outage(seed: int) -> None:
    """A store that was away for nearly a whole lease costs no failover: the leader renews first (3.3)."""
    cluster = quiet_cluster(seed)
    cluster.store_deadline = 0.1  # a holder that waits longer than T/4 for an answer loses its lease to its own wait
    term = cluster.judge.record_term
    cluster.store.down_until = cluster.world.now + 0.8 * cluster.lease_seconds
    cluster.world.run(cluster.world.now + 4 * cluster.lease_seconds)
    assert cluster.judge.record_term == term
    cluster.heal()
