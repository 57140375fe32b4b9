"""Rounds by which a leader proves that it leads (R18): pure, then over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.replication.replicas import Followers, Leader, Replica, node_id
from tests.waiting import eventually
from walship.errors import Behind, Draining, StatementFailed
from walship.formats.position import Position
from walship.replication.messages import AckFlags
from walship.replication.rounds import NEEDS_ACK, Rounds

AT = Position(3, 20)


class Table:
    """Rounds whose announcements are counted."""

    def __init__(self, required: int = 1) -> None:
        self.announced: list[int] = []
        self.durable = AT
        self.rounds = Rounds(
            required, durable=lambda: self.durable, announce=lambda: self.announced.append(self.rounds.number)
        )

    async def ask(self, count: int = 1) -> list[asyncio.Task[Position]]:
        tasks = [asyncio.ensure_future(self.rounds.index(5)) for _ in range(count)]
        await ticks()
        return tasks


async def ticks() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_of_one_tick_share_one_round() -> None:
    table = Table()
    tasks = await table.ask(10)
    assert table.announced == [1]
    table.rounds.echoed("b", 1, AT)
    assert await asyncio.gather(*tasks) == [AT] * 10


async def test_a_request_is_not_answered_by_a_round_begun_before_it() -> None:
    """The round under way proves that the node led then; a leader elected since may have acknowledged more."""
    table = Table()
    [early] = await table.ask()
    late = await table.ask(3)
    table.durable = Position(3, 21)
    table.rounds.echoed("b", 1, AT)
    assert await early == AT
    await ticks()
    assert not any(task.done() for task in late)
    assert table.announced == [1, 2]
    table.rounds.echoed("b", 2, table.durable)
    assert await asyncio.gather(*late) == [table.durable] * 3


@pytest.mark.parametrize(
    ("number", "durable"),
    [(0, AT), (1, Position(3, 19)), (1, Position(2, 20))],
    ids=["an older round", "a voter that lacks a commit", "a voter of another term"],
)
async def test_what_is_no_proof(number: int, durable: Position) -> None:
    table = Table()
    [task] = await table.ask()
    table.rounds.echoed("b", number, durable)
    await ticks()
    assert not task.done()
    table.rounds.echoed("b", 1, AT)
    assert await task == AT


async def test_as_many_voters_must_answer_as_the_rule_asks_for() -> None:
    table = Table(2)
    [task] = await table.ask()
    table.rounds.echoed("b", 1, AT)
    table.rounds.echoed("b", 1, AT)
    await ticks()
    assert not task.done()
    table.rounds.echoed("c", 1, AT)
    assert await task == AT


async def test_a_voter_that_left_is_no_proof() -> None:
    table = Table(2)
    [task] = await table.ask()
    table.rounds.echoed("b", 1, AT)
    table.rounds.forget("b")
    table.rounds.echoed("c", 1, AT)
    await ticks()
    assert not task.done()
    task.cancel()


async def test_without_acknowledgments_it_is_refused() -> None:
    table = Table(0)
    with pytest.raises(StatementFailed) as caught:
        await table.rounds.index(5)
    assert caught.value.statement_code == NEEDS_ACK


async def test_too_few_voters_end_in_behind_and_the_next_request_works() -> None:
    table = Table()
    with pytest.raises(Behind):
        await table.rounds.index(0.01)
    [task] = await table.ask()
    table.rounds.echoed("b", table.rounds.number, AT)
    await ticks()
    table.rounds.echoed("b", table.rounds.number, AT)
    assert await task == AT


async def test_the_end_of_a_term_is_told_to_who_waits() -> None:
    table = Table()
    [task] = await table.ask()
    table.rounds.end()
    with pytest.raises(Draining):
        await task
    with pytest.raises(Draining):
        await table.rounds.index(5)


# --- over sockets ------------------------------------------------------------------------------------------------


def caught_up(leader: Leader, replica: Replica) -> bool:
    return leader.acks.get(node_id(replica), (None,))[0] == leader.watermarks.durable


async def test_a_follower_answers_a_round_at_once(tmp_path: Path) -> None:
    """Not with the ack it sends every half second."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(acks=1), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        began = asyncio.get_running_loop().time()
        for _ in range(20):
            assert await leader.publisher.read_index(5) == leader.log.tip.position
        assert asyncio.get_running_loop().time() - began < 1


async def test_a_follower_that_promised_a_newer_term_proves_nothing(tmp_path: Path) -> None:
    """The point of it all: a voter that sealed for another leader must not confirm this one."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(acks=1), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        south.promised = leader.term + 1
        with pytest.raises(Behind):
            await leader.publisher.read_index(0.3)


async def test_a_follower_that_is_no_voter_proves_nothing(tmp_path: Path) -> None:
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    south.voter = False
    async with leader.serving(acks=1), Followers(leader).following(south):
        await eventually(lambda: caught_up(leader, south))
        with pytest.raises(Behind):
            await leader.publisher.read_index(0.3)


async def test_a_voter_that_acknowledges_late_covers_late(tmp_path: Path) -> None:
    """Its echo comes at once, its fsync later; only both together are the proof."""
    leader, south = Leader(tmp_path / "l"), Replica(tmp_path / "f")
    async with leader.serving(acks=1), Followers(leader).following(south) as [subscriber]:
        subscriber.flags = AckFlags.APPLY_LAGS
        await eventually(lambda: caught_up(leader, south))
        for _ in range(10):
            leader.commit()
            assert await leader.publisher.read_index(5) == leader.watermarks.durable
