"""Leaders come and go; clients of the proxy notice a pause and no more (failover.md 3.9; I15, I18, I19)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.failover import SILENCE_SECONDS, Lookout, Seen
from tests.proxy.conftest import CLOSE, Cluster, Start, execute, rows_of
from tests.waiting import eventually
from walship.formats.link import Outcome, Reason, Role
from walship.formats.position import Position

# --- what becomes of a write --------------------------------------------------------------------------------------


async def table(cluster: Cluster) -> None:
    await cluster.client.run("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")


def take_over(cluster: Cluster) -> None:
    """The leader dies, and the first follower leads the next term."""
    cluster.leader.role = Role.FOLLOWER
    cluster.leader.draining = True
    cluster.followers[0].lead()
    cluster.leader.cut()


async def test_a_write_whose_answer_is_lost_is_answered_and_not_run_again(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("INSERT INTO t VALUES (7, 'once')"), CLOSE])
    assert response.status_code == 200, response.text
    executed, closed = response.json()["results"]
    assert executed["response"]["result"] | {"query_duration_ms": 0} == {
        "cols": [],
        "rows": [],
        "affected_row_count": 1,
        "last_insert_rowid": "7",
        "replication_index": None,
        "rows_read": 0,
        "rows_written": 0,
        "query_duration_ms": 0,
    }
    assert closed == {"type": "ok", "response": {"type": "close"}}
    assert response.headers["walship-position"] == "1.2"
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]]
    assert len(cluster.leader.asked_outcomes) == 1


async def test_another_leader_knows_what_the_one_before_committed(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.mute = True
    heard = asyncio.create_task(cluster.client.post([execute("INSERT INTO t VALUES (1, 'a')"), CLOSE]))
    await eventually(lambda: cluster.history.txid == 2)
    take_over(cluster)
    response = await heard
    assert response.status_code == 200, response.text
    assert response.headers["walship-served-by"] == "follower1"
    assert response.headers["walship-position"] == "1.2", "where the one before committed it"
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]]


async def test_what_was_not_done_is_sent_again_under_another_token(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.silent = True
    heard = asyncio.create_task(cluster.client.post([execute("INSERT INTO t VALUES (1, 'a') RETURNING v"), CLOSE]))
    await eventually(lambda: cluster.proxy.backends.get("leader").connection.in_flight)  # type: ignore[union-attr]
    take_over(cluster)
    response = await heard
    assert rows_of(response.json()["results"][0]) == [["a"]]
    (asked,) = cluster.followers[0].asked_outcomes
    (again,) = [request for request in cluster.followers[0].served if request.seq]
    assert (asked.floor.term, again.term) == (1, 2), "each attempt is bound to the term it was sent in"
    assert again.incarnation == asked.incarnation
    assert again.seq > asked.seq, "a new attempt has a token of its own"


async def test_rows_that_went_with_a_leader_are_said_to_be_lost(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'a') RETURNING v"), CLOSE])
    assert response.json()["code"] == "WALSHIP_COMMITTED_RESULT_LOST"
    assert "1.2" in response.json()["message"]
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]]


async def test_a_batch_is_committed_once_and_its_results_are_lost(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.break_after_running = 1
    steps = [{"stmt": {"sql": f"INSERT INTO t VALUES ({n}, 'x')"}} for n in range(3)]
    response = await cluster.client.post([{"type": "batch", "batch": {"steps": steps}}, CLOSE])
    assert response.json()["code"] == "WALSHIP_COMMITTED_RESULT_LOST"
    assert await cluster.client.run("SELECT count(*) FROM t") == [[3]]


async def test_a_batch_of_one_statement_is_answered(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.break_after_running = 1
    steps = [{"stmt": {"sql": "INSERT INTO t VALUES (5, 'x')"}}]
    response = await cluster.client.post([{"type": "batch", "batch": {"steps": steps}}, CLOSE])
    result = response.json()["results"][0]["response"]["result"]
    assert result["step_errors"] == [None]
    assert result["step_results"][0]["last_insert_rowid"] == "5"


async def test_running_is_asked_again_and_unknown_is_told(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.outcomes.extend([Outcome.RUNNING, Outcome.RUNNING, Outcome.UNKNOWN])
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'a')"), CLOSE])
    assert response.json()["code"] == "WALSHIP_OUTCOME_UNKNOWN"
    assert len(cluster.leader.asked_outcomes) == 3
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]], "never sent twice"


async def test_without_a_leader_the_outcome_is_unknown_when_the_window_ends(start: Start) -> None:
    cluster = await start(hold_seconds=0.3)
    await table(cluster)
    cluster.leader.outcomes.extend([Outcome.RUNNING] * 100)
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'a')"), CLOSE])
    assert response.json()["code"] == "WALSHIP_OUTCOME_UNKNOWN"


async def test_a_node_that_says_it_does_not_know_is_asked_for_the_outcome(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.refusals.append(Reason.OUTCOME_UNKNOWN)
    assert await cluster.client.run("INSERT INTO t VALUES (1, 'a') RETURNING v") == [["a"]]
    assert len(cluster.leader.asked_outcomes) == 1


async def test_no_leader_below_the_highest_term_heard_of_gets_anything(start: Start) -> None:
    """I18: also when only a follower's status tells of the newer term."""
    cluster = await start(hold_seconds=0.4)
    await table(cluster)
    cluster.followers[0].term = 9
    await eventually(lambda: cluster.proxy.backends.highest_term == 9)
    before = len(cluster.leader.served)
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'a')"), CLOSE])
    assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_UNAVAILABLE")
    assert len(cluster.leader.served) == before


# --- holding ------------------------------------------------------------------------------------------------------


async def test_two_hundred_writes_without_a_leader_are_all_done_once(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.draining = True
    await eventually(lambda: cluster.proxy.backends.leader is None)

    async with asyncio.TaskGroup() as tasks:
        for n in range(200):
            tasks.create_task(cluster.client.run("INSERT INTO t VALUES (?, 'x')", n))
        await eventually(lambda: len(cluster.proxy.hold.buffer) > 50)
        take_over(cluster)
    assert await cluster.client.run("SELECT count(*), count(DISTINCT id) FROM t") == [[200, 200]]
    assert len(cluster.proxy.hold.buffer) == 0
    assert b"walship_proxy_held_requests 0.0" in cluster.proxy.metrics()


async def test_above_the_limit_a_write_is_refused_at_once(start: Start) -> None:
    cluster = await start(hold_requests=2)
    await table(cluster)
    cluster.leader.draining = True
    await eventually(lambda: cluster.proxy.backends.leader is None)
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(cluster.client.run("INSERT INTO t VALUES (?, 'x')", n)) for n in range(2)]
        await eventually(lambda: len(cluster.proxy.hold.buffer) == 2)
        response = await cluster.client.post([execute("INSERT INTO t VALUES (9, 'x')"), CLOSE])
        assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_UNAVAILABLE")
        assert "send it again in a second" in response.json()["message"]
        cluster.leader.draining = False
    assert [task.result() for task in held] == [[], []]
    assert await cluster.client.run("SELECT count(*) FROM t") == [[2]]


async def test_a_refusal_between_two_leaders_is_no_error(start: Start) -> None:
    """A switchover: the old leader refuses for a while, then another one serves."""
    cluster = await start()
    await table(cluster)
    cluster.leader.refusals.extend([Reason.DRAINING, Reason.NOT_LEADER, Reason.FENCED])
    async with asyncio.TaskGroup() as tasks:
        writes = [tasks.create_task(cluster.client.run("INSERT INTO t VALUES (?, 'x')", n)) for n in range(20)]
        await eventually(lambda: not cluster.leader.refusals)
        take_over(cluster)
    assert all(write.result() == [] for write in writes)
    assert await cluster.client.run("SELECT count(*) FROM t") == [[20]]


# --- streams ------------------------------------------------------------------------------------------------------


async def test_a_commit_whose_answer_is_lost_is_answered(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    response = await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'a')")])
    baton = response.json()["baton"]
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("COMMIT")], baton=baton)
    assert response.json()["results"][0]["type"] == "ok", response.text
    assert await cluster.client.run("SELECT v FROM t") == [["a"]]
    response = await cluster.client.post([execute("SELECT v FROM t")], baton=response.json()["baton"])
    assert rows_of(response.json()["results"][0]) == [["a"]]


@pytest.mark.parametrize("end", ["ROLLBACK", "INSERT OR ROLLBACK INTO t VALUES (0, 'b')"])
async def test_what_follows_a_rollback_is_asked_about_too(start: Start, end: str) -> None:
    """It is in autocommit, although the request has no COMMIT: "rolled back" would be a lie, a second try a twin."""
    cluster = await start()
    await table(cluster)
    await cluster.client.run("INSERT INTO t VALUES (0, 'old')")
    response = await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'a')")])
    cluster.leader.break_after_running = 1
    requests = [execute(end), execute("INSERT INTO t VALUES (2, 'c')")]
    response = await cluster.client.post(requests, baton=response.json()["baton"])
    assert response.json()["code"] == "WALSHIP_COMMITTED_RESULT_LOST", response.text
    assert await cluster.client.run("SELECT v FROM t ORDER BY id") == [["old"], ["c"]]


async def test_an_outcome_is_asked_for_with_the_acknowledgments_of_the_write(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.break_after_running = 1
    response = await cluster.client.post([execute("PRAGMA walship_ack = 2"), execute("INSERT INTO t VALUES (1, 'a')")])
    assert response.json()["code"] == "WALSHIP_COMMITTED_RESULT_LOST", response.text
    assert [request.ack for request in cluster.leader.asked_outcomes] == [2]


async def test_a_commit_that_was_not_done_is_rolled_back_and_said(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    response = await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'a')")])
    cluster.leader.silent = True
    commit = asyncio.create_task(cluster.client.post([execute("COMMIT")], baton=response.json()["baton"]))
    await eventually(lambda: cluster.proxy.backends.get("leader").connection.in_flight)  # type: ignore[union-attr]
    take_over(cluster)
    assert (await commit).json()["code"] == "TRANSACTION_TIMEOUT"
    assert await cluster.client.run("SELECT count(*) FROM t") == [[0]]


async def test_a_commit_whose_node_does_not_know_is_asked_about(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    response = await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'a')")])
    cluster.leader.refusals.append(Reason.OUTCOME_UNKNOWN)
    response = await cluster.client.post([execute("COMMIT")], baton=response.json()["baton"])
    assert response.json()["code"] == "TRANSACTION_TIMEOUT"
    assert len(cluster.leader.asked_outcomes) == 1


async def test_an_idle_stream_survives_its_leader(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'a')")])
    take_over(cluster)
    response = await cluster.client.post([execute("INSERT INTO t VALUES (2, 'b')")], baton=response.json()["baton"])
    assert response.json()["results"][0]["type"] == "ok", response.text


# --- suspicion ----------------------------------------------------------------------------------------------------


async def test_the_best_follower_is_asked_as_soon_as_the_leader_is_gone(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.draining = True
    cluster.leader.cut()
    await eventually(lambda: any(node.stood for node in cluster.followers))
    take_over(cluster)
    await eventually(lambda: cluster.proxy.failover.lookout.last is not None)
    last: Any = cluster.proxy.status()["proxy"]["failover"]["last"]  # type: ignore[index]
    assert (last["from"], last["to"], last["term"]) == ("leader", "follower1", 2)
    assert b'walship_proxy_failover_seconds_count{phase="hold"} 1.0' in cluster.proxy.metrics()


async def test_a_deposed_leader_that_is_silent_lets_go_of_its_requests(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.silent = True
    write = asyncio.create_task(cluster.client.run("INSERT INTO t VALUES (1, 'a')"))
    await eventually(lambda: cluster.proxy.backends.get("leader").connection.in_flight)  # type: ignore[union-attr]
    cluster.followers[0].lead()  # the old one still believes that it leads
    assert await write == []
    assert "leads in term 2" in str(cluster.proxy.backends.get("leader").last_failure)  # type: ignore[union-attr]
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]]


def node(name: str, txid: int = 0, *, lag_ms: int = 0, silent: float = 0.0, may: bool = True) -> Seen:
    return Seen(name, Role.FOLLOWER, 1, Position(1, txid), lag_ms, silent, may)


LEADER = Seen("a", Role.LEADER, 1, Position(1, 9), 0, 0.0, False)


def test_the_highest_durable_position_then_the_least_lag() -> None:
    lookout = Lookout()
    lookout.look(0.0, [LEADER], "a", 0)
    nodes = [
        node("b", 5),
        node("c", 7, lag_ms=90),
        node("d", 7, lag_ms=10),
        node("e", 8, silent=9),
        node("f", 8, may=False),
    ]
    assert lookout.look(1.0, nodes, None, 0) == "d"
    assert lookout.look(1.05, nodes, None, 0) is None, "not before 100 ms"
    assert lookout.look(1.11, nodes, None, 0) == "d"
    assert lookout.look(30.0, nodes, None, 0) == "d"
    assert lookout.look(30.5, nodes, None, 0) is None, "seldom after so long"


def test_a_silence_is_a_suspicion_and_a_word_ends_it() -> None:
    lookout = Lookout()
    silent = Seen("a", Role.LEADER, 1, Position(1, 9), 0, SILENCE_SECONDS + 0.1, False)
    lookout.look(0.0, [LEADER, node("b")], "a", 0)
    assert lookout.look(1.0, [silent, node("b")], "a", 0) == "b"
    assert lookout.look(1.1, [LEADER, node("b")], "a", 0) is None
    assert lookout.suspected_at is None
    assert lookout.last is None, "the same leadership goes on: nothing has failed over"


def test_the_phases() -> None:
    lookout = Lookout()
    lookout.look(0.0, [LEADER], "a", 0)
    lookout.look(0.5, [node("b")], None, 3)
    new = Seen("b", Role.LEADER, 2, Position(2, 9), 0, 0.0, True)
    lookout.look(0.75, [new], "b", 3)
    assert lookout.last is None, "writes are still held"
    lookout.look(1.0, [new], "b", 0)
    last = lookout.last
    assert last is not None
    assert (last.before, last.leader, last.term) == ("a", "b", 2)
    assert (last.detect_seconds, last.hold_seconds, last.drain_seconds) == (0.5, 0.25, 0.25)


names = st.sampled_from(["a", "b", "c"])
seen = st.builds(
    Seen,
    names,
    st.sampled_from(list(Role)),
    st.integers(0, 3),
    st.builds(Position, st.integers(0, 3), st.integers(0, 9)),
    st.none() | st.integers(0, 500),
    st.sampled_from([0.0, 0.2, 0.5, 2.0, float("inf")]),
    st.booleans(),
)


@given(st.lists(st.tuples(st.floats(0.0, 0.5), st.lists(seen, max_size=3), st.none() | names, st.integers(0, 2))))
def test_only_who_may_lead_is_asked_and_never_too_often(
    steps: list[tuple[float, list[Seen], str | None, int]],
) -> None:
    lookout, now, asked = Lookout(), 0.0, -1.0
    for seconds, nodes, leader, held in steps:
        now += seconds
        name = lookout.look(now, nodes, leader, held)
        if name is None:
            continue
        (found,) = {each.name: each for each in nodes if each.name == name}.values()
        assert found.may_lead
        assert found.role is Role.FOLLOWER
        assert name != leader
        assert now - asked >= 0.1
        asked = now
        best = max(each.durable.order() for each in {each.name: each for each in nodes}.values() if _able(each, leader))
        assert found.durable.order() == best


def _able(each: Seen, leader: str | None) -> bool:
    return each.may_lead and each.role is Role.FOLLOWER and each.silent_seconds <= 1.0 and each.name != leader
