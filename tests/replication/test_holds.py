"""Who still needs the log (R9), on a real log with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.replication.talk import CLUSTER, HELLO, SEED_ME, TIP, frames_after
from walship.engine.log import Log, LogLimits
from walship.errors import HistoryMismatch
from walship.formats.position import Position
from walship.replication.holds import AWAY_SECONDS, Holds

WEST = replace(HELLO, node_id="cc" * 16, name="west", voter=False)


@dataclass
class World:
    log: Log
    holds: Holds
    now: list[float]

    def prune(self) -> int:
        self.log.prune(keep_from=None, now_ms=0)
        return self.log.base.position.txid


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A log from 3.10 to 3.20 that would keep nothing by itself."""
    now = [1000.0]
    limits = LogLimits(max_bytes=1, segment_bytes=300)
    log = Log.open(tmp_path / "log", cluster=CLUSTER, base=TIP, limits=limits, clock=lambda: now[0])
    for header, data in frames_after(TIP, 10):
        log.append(header, data)
    log.sync()
    yield World(log, Holds(log, lambda: log.durable_tip.position, lambda: now[0]), now)
    log.close()


def test_with_nobody_known_nothing_is_needed(world: World) -> None:
    assert world.holds.keep_from() == 20


def test_the_slowest_known_follower_decides(world: World) -> None:
    world.holds.arrived(HELLO)
    world.holds.arrived(WEST)
    world.holds.progress(HELLO.node_id, Position(3, 18))
    world.holds.progress(WEST.node_id, Position(3, 15))
    assert world.holds.keep_from() == 15
    world.holds.progress(WEST.node_id, Position(3, 20))
    assert world.holds.keep_from() == 18


def test_a_voter_that_left_is_waited_for_and_a_non_voter_for_a_while(world: World) -> None:
    world.holds.arrived(HELLO)
    world.holds.arrived(WEST)
    world.holds.progress(HELLO.node_id, Position(3, 18))
    world.holds.progress(WEST.node_id, Position(3, 15))
    world.holds.left(HELLO.node_id)
    world.holds.left(WEST.node_id)
    world.now[0] += AWAY_SECONDS - 1
    assert world.holds.keep_from() == 15
    world.now[0] += 2
    assert world.holds.keep_from() == 18
    world.holds.forget(HELLO.node_id)
    assert world.holds.keep_from() == 20


def test_one_who_comes_back_counts_from_what_it_is_known_to_hold(world: World) -> None:
    """Its tip may hold frames that are not durable there yet."""
    world.holds.arrived(HELLO)
    world.holds.progress(HELLO.node_id, Position(3, 15))
    world.holds.left(HELLO.node_id)
    world.holds.arrived(replace(HELLO, tip=replace(TIP, position=Position(3, 17))))
    assert world.holds.keep_from() == 15


def test_one_that_lost_its_log_holds_nothing_back_until_its_snapshot_is_taken(world: World) -> None:
    world.holds.arrived(HELLO)
    world.holds.arrived(SEED_ME)
    assert world.holds.keep_from() == 20
    world.holds.hold(SEED_ME, Position(3, 16))
    assert world.holds.keep_from() == 16


def test_a_seed_pins_the_log_until_its_follower_has_caught_up(world: World) -> None:
    world.holds.arrived(SEED_ME)
    world.holds.hold(SEED_ME, Position(3, 14))
    assert world.prune() <= 14
    world.holds.progress(SEED_ME.node_id, Position(3, 14))
    assert world.prune() <= 14
    world.holds.progress(SEED_ME.node_id, Position(3, 17))
    assert 14 < world.prune() <= 17
    world.holds.progress(SEED_ME.node_id, Position(3, 20))
    assert world.log.statistics().pins == 0


def test_a_seed_that_gives_signs_of_life_stays_pinned_and_a_silent_one_does_not(world: World) -> None:
    """60 s."""
    world.holds.arrived(SEED_ME)
    world.holds.hold(SEED_ME, Position(3, 14))
    for _ in range(5):
        world.now[0] += 50
        world.holds.alive(SEED_ME.node_id)
        assert world.prune() <= 14
    world.holds.left(SEED_ME.node_id)
    world.now[0] += 61
    assert world.prune() > 14
    world.holds.alive(SEED_ME.node_id)  # too late: it is let go, and the next hello ends in a new seed
    assert world.log.statistics().pins == 0


def test_a_second_seed_of_one_follower_replaces_the_first(world: World) -> None:
    world.holds.hold(SEED_ME, Position(3, 14))
    world.holds.hold(SEED_ME, Position(3, 18))
    assert world.log.statistics().pins == 1


def test_a_snapshot_whose_continuation_is_gone_is_not_begun(world: World) -> None:
    world.prune()
    with pytest.raises(HistoryMismatch):
        world.holds.hold(SEED_ME, Position(3, 11))
    assert world.log.statistics().pins == 0
