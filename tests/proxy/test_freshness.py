"""How fresh a request must be: who is asked, how often, and what happens when nobody can say (R18)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from proxy.freshness import Shared
from tests.proxy.conftest import CLOSE, Cluster, Start, execute
from tests.waiting import eventually
from walship.errors import Behind, StatementFailed, Unavailable
from walship.formats.link import ReadLevel, Role
from walship.formats.position import Position
from walship.hrana.types import Level

SESSION, LINEARIZABLE, ANY = ReadLevel.SESSION, ReadLevel.LINEARIZABLE, ReadLevel.ANY


@dataclass
class Others:
    """What a proxy knows of others, set by the test."""

    alone: bool = True
    doubt: int = 1


# --- one question for many -----------------------------------------------------------------------------------------


class Leader:
    """Answers when told to; counts the questions."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.fails = False

    async def question(self) -> Position:
        self.asked += 1
        number = self.asked
        await self.may_answer.wait()
        self.may_answer.clear()
        if self.fails:
            raise Unavailable("gone")
        return Position(1, number)


async def ticks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_asks_while_a_question_is_under_way_gets_the_answer_to_the_next() -> None:
    leader = Leader()
    shared = Shared(leader.question)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(shared.run())
        first = [tasks.create_task(shared.answer()) for _ in range(5)]
        await ticks()
        late = [tasks.create_task(shared.answer()) for _ in range(5)]
        await ticks()
        assert leader.asked == 1
        leader.may_answer.set()
        await ticks()
        assert [task.result() for task in first] == [Position(1, 1)] * 5
        assert not any(task.done() for task in late)
        assert leader.asked == 2
        leader.may_answer.set()
        await ticks()
        assert [task.result() for task in late] == [Position(1, 2)] * 5
        running.cancel()


async def test_a_failed_question_fails_for_those_who_waited_and_for_nobody_else() -> None:
    leader = Leader()
    leader.fails = True
    shared = Shared(leader.question)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(shared.run())
        leader.may_answer.set()
        with pytest.raises(Unavailable):
            await shared.answer()
        leader.fails = False
        leader.may_answer.set()
        assert await shared.answer() == Position(1, 2)
        running.cancel()


async def test_nobody_waits_after_the_end() -> None:
    leader = Leader()
    shared = Shared(leader.question)
    running = asyncio.ensure_future(shared.run())
    waiting = asyncio.ensure_future(shared.answer())
    await ticks()
    running.cancel()
    with pytest.raises(Unavailable):
        await waiting


# --- linearizable --------------------------------------------------------------------------------------------------


async def made(cluster: Cluster) -> Cluster:
    await cluster.client.run("CREATE TABLE t (v)")
    await cluster.client.run("INSERT INTO t VALUES (1)")
    for node in cluster.nodes:
        node.served.clear()
        node.asked.clear()
    return cluster


async def test_a_linearizable_read_is_proven_by_the_leader_and_served_by_a_follower(start: Start) -> None:
    cluster = await made(await start(acks=1))
    assert await cluster.client.run("SELECT v FROM t", walship_consistency="linearizable") == [[1]]
    assert cluster.leader.asked == [LINEARIZABLE]
    assert cluster.leader.served == []
    [request] = [request for node in cluster.followers for request in node.served]
    assert request.floor == cluster.history.position


async def test_a_linearizable_read_waits_for_a_follower_or_asks_the_leader_never_less(start: Start) -> None:
    """Somebody else wrote, and this proxy has not heard of it."""
    cluster = await made(await start(acks=1))
    for node in cluster.followers:
        node.lag()
    cluster.leader._connection.execute("INSERT INTO t VALUES (2)")
    assert await cluster.client.run("SELECT count(*) FROM t", walship_consistency="linearizable") == [[2]]
    for node in cluster.followers:
        node.catch_up()


async def test_a_leader_that_cannot_prove_it_is_asked_again_until_it_can(start: Start) -> None:
    cluster = await made(await start(acks=1))
    cluster.leader.unproven = Behind("too few followers answered")
    reading = asyncio.ensure_future(cluster.client.run("SELECT v FROM t", walship_consistency="linearizable"))
    await eventually(lambda: len(cluster.leader.asked) >= 3)
    assert not reading.done()
    cluster.leader.unproven = None
    assert await reading == [[1]]


async def test_without_proof_in_time_a_linearizable_read_is_refused_and_any_goes_on(start: Start) -> None:
    cluster = await made(await start(acks=1, deadline_seconds=0.3))
    cluster.leader.unproven = Behind("too few followers answered")
    response = await cluster.client.post([execute("SELECT v FROM t"), CLOSE], walship_consistency="linearizable")
    assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_UNAVAILABLE")
    assert await cluster.client.run("SELECT v FROM t", walship_consistency="any") == [[1]]


async def test_a_cluster_without_acks_says_at_once_that_it_cannot(start: Start) -> None:
    cluster = await made(await start(acks=0))
    cluster.leader.unproven = StatementFailed("--ack 0", "LINEARIZABLE_NEEDS_ACK")
    response = await cluster.client.post([execute("SELECT v FROM t"), CLOSE], walship_consistency="linearizable")
    assert (response.status_code, response.json()["code"]) == (400, "LINEARIZABLE_NEEDS_ACK")
    assert len(cluster.leader.asked) == 1


async def test_the_default_level_is_the_proxys(start: Start) -> None:
    cluster = await made(await start(acks=1, consistency=Level.LINEARIZABLE))
    assert await cluster.client.run("SELECT v FROM t") == [[1]]
    assert await cluster.client.run("PRAGMA walship_consistency") == [["linearizable"]]
    asked = len(cluster.leader.asked)
    assert asked
    assert await cluster.client.run("SELECT v FROM t", walship_consistency="session") == [[1]]
    assert len(cluster.leader.asked) == asked


async def test_describe_asks_for_proof_too(start: Start) -> None:
    cluster = await made(await start(acks=1))
    describe = {"type": "describe", "sql": "SELECT v FROM t"}
    response = await cluster.client.post([describe, CLOSE], walship_consistency="linearizable")
    assert response.status_code == 200
    assert cluster.leader.asked == [LINEARIZABLE]


async def test_an_open_transaction_asks_once_when_it_begins(start: Start) -> None:
    cluster = await made(await start(acks=1))
    baton = None
    for sql in ("BEGIN IMMEDIATE", "INSERT INTO t VALUES (7)", "SELECT count(*) FROM t", "COMMIT"):
        response = await cluster.client.post([execute(sql)], baton=baton, walship_consistency="linearizable")
        assert response.json()["results"][0]["type"] == "ok", response.text
        baton = response.json()["baton"]
    assert cluster.leader.asked == [LINEARIZABLE]


# --- session among several proxies ---------------------------------------------------------------------------------


async def test_a_proxy_that_is_alone_asks_once_and_then_relies_on_itself(start: Start) -> None:
    others = Others()
    cluster = await made(await start(neighbours=others))
    for _ in range(3):
        await cluster.client.run("SELECT v FROM t")
    assert len(cluster.leader.asked) <= 1
    others.doubt += 1
    for _ in range(3):
        await cluster.client.run("SELECT v FROM t")
    assert cluster.leader.asked[-1] is SESSION
    assert len(cluster.leader.asked) <= 2


async def test_with_another_proxy_each_session_read_covers_what_the_leader_says(start: Start) -> None:
    cluster = await made(await start(neighbours=Others(alone=False)))
    for number in range(2, 6):
        cluster.leader._connection.execute("INSERT INTO t VALUES (?)", (number,))  # through the other proxy
        assert await cluster.client.run("SELECT count(*) FROM t") == [[number]]
    assert cluster.leader.asked == [SESSION] * 4
    assert cluster.leader.served == []


async def test_any_asks_nobody(start: Start) -> None:
    cluster = await made(await start(neighbours=Others(alone=False)))
    await cluster.client.run("SELECT v FROM t", walship_consistency="any")
    assert cluster.leader.asked == []


async def test_without_a_leader_enough_voters_stand_in_for_it(start: Start) -> None:
    cluster = await made(await start(acks=1, neighbours=Others(alone=False)))
    cluster.leader.role = Role.FOLLOWER
    await eventually(lambda: cluster.proxy.backends.leader is None)
    assert await cluster.client.run("SELECT v FROM t") == [[1]]
    assert all(node.asked == [ANY] for node in cluster.nodes)


async def test_without_a_leader_and_enough_voters_a_session_read_is_refused_in_time(start: Start) -> None:
    cluster = await made(await start(acks=0, deadline_seconds=0.3, neighbours=Others(alone=False)))
    cluster.leader.role = Role.FOLLOWER
    cluster.followers[0].draining = True
    await eventually(lambda: cluster.proxy.backends.leader is None)
    await eventually(lambda: sum(node.usable for node in cluster.proxy.backends) == 2)
    response = await cluster.client.post([execute("SELECT v FROM t"), CLOSE])
    assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_UNAVAILABLE")
    assert await cluster.client.run("SELECT v FROM t", walship_consistency="any") == [[1]]


# --- tokens --------------------------------------------------------------------------------------------------------


async def test_a_token_of_a_lost_history_is_refused_at_once_by_header_and_by_pragma(start: Start) -> None:
    cluster = await made(await start())
    token = str(Position(1, cluster.history.txid + 5))
    cluster.history.terms.add(2, cluster.history.txid)
    cluster.history.term = 2
    await eventually(lambda: cluster.proxy.floors.term == 2)
    by_header = await cluster.client.post([execute("SELECT 1"), CLOSE], walship_min_position=token)
    by_pragma = await cluster.client.post([execute(f"PRAGMA walship_wait_for = '{token}'"), CLOSE])
    for response in (by_header, by_pragma):
        assert (response.status_code, response.json()["code"]) == (409, "WALSHIP_WRITE_LOST")


async def test_a_token_of_the_future_is_behind_after_the_deadline(start: Start) -> None:
    cluster = await made(await start(deadline_seconds=0.3))
    for token in ("1.999", "9.1"):
        response = await cluster.client.post([execute("SELECT 1"), CLOSE], walship_min_position=token)
        assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_BEHIND")


async def test_a_long_cursor_names_its_position_and_raises_the_floor_before_its_rows(start: Start) -> None:
    """Whoever has seen its first row must not see less in the next read, although the cursor goes on."""
    cluster = await made(await start(followers=1))
    cluster.leader._connection.execute("INSERT INTO t VALUES (2)")  # unknown to this proxy
    node = cluster.followers[0]
    node.may_end_cursors.clear()
    body = {"batch": {"steps": [{"stmt": {"sql": "SELECT count(*) FROM t"}}]}}
    headers = {"walship-consistency": "session"}
    async with cluster.client.http.stream("POST", "/v3/cursor", json=body, headers=headers) as response:
        assert response.headers["walship-position"] == str(cluster.history.position)
        assert cluster.proxy.floors.position == cluster.history.position
        node.may_end_cursors.set()
        assert b'"2"' in await response.aread()
