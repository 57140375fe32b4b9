"""Hrana over WebSocket at the proxy: routing, pinning and errors as over HTTP (hrana.md 1.6, R21, R22)."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from proxy.streams import StreamLimits
from tests.node.socket_client import Socket, connected
from tests.proxy.conftest import Cluster, Start
from tests.waiting import eventually
from walship.formats.link import Outcome, Reason, Verb


async def run(client: Socket, sql: str, stream: int = 1) -> list[list[Any]]:
    return await client.run(sql, stream)


def verbs(cluster: Cluster) -> list[Verb]:
    return [request.verb for node in cluster.nodes for request in node.served]


async def test_writes_go_to_the_leader_and_reads_see_them_on_a_follower(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "INSERT INTO t VALUES (1)")
        before = cluster.served(cluster.leader)
        for _ in range(5):
            assert await run(client, "SELECT a FROM t") == [[1]]
        assert cluster.served(cluster.leader) == before


async def test_a_statement_sent_with_its_close_is_one_request_and_leaves_nothing(start: Start) -> None:
    """As @libsql/client sends them; no node stream has to be closed afterwards."""
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        before = len(verbs(cluster))
        streams = len(cluster.proxy.streams)
        for stream in range(2, 12):
            await client.ask("open_stream", stream_id=stream)
            ran = await client.send("execute", stream_id=stream, stmt={"sql": f"INSERT INTO t VALUES ({stream})"})
            closed = await client.send("close_stream", stream_id=stream)
            assert (await client.answer(ran))["type"] == "response_ok"
            assert (await client.answer(closed))["type"] == "response_ok"
        assert len(verbs(cluster)) <= before + 20
        assert len(cluster.proxy.streams) == streams
        assert not cluster.proxy.front.orphaned_pins


async def test_a_transaction_is_pinned_and_ended_with_its_stream_at_once(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        await run(client, "INSERT INTO t VALUES (1)")
        assert await run(client, "SELECT count(*) FROM t") == [[1]]
        await client.ask("open_stream", stream_id=2)
        assert await run(client, "SELECT count(*) FROM t", 2) == [[0]]
        await client.ask("close_stream", stream_id=1)
        assert Verb.CLOSE_STREAM in verbs(cluster)
        assert await run(client, "INSERT INTO t VALUES (2) RETURNING a", 2) == [[2]]


async def test_a_client_that_goes_away_has_its_transaction_closed(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        client.connection.transport.abort()
        await eventually(lambda: Verb.CLOSE_STREAM in verbs(cluster))
    assert not len(cluster.proxy.streams)


async def test_an_expired_transaction_is_told_once_and_the_stream_goes_on(start: Start) -> None:
    cluster = await start(limits=StreamLimits(transaction_idle_seconds=0.2))
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        await eventually(lambda: cluster.proxy.streams.pinned == 0)
        error = await client.fails("execute", stream_id=1, stmt={"sql": "INSERT INTO t VALUES (1)"})
        assert error["code"] == "STREAM_EXPIRED"
        assert await run(client, "INSERT INTO t VALUES (2) RETURNING a") == [[2]]


async def test_a_transaction_whose_node_is_lost_is_told_once(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        cluster.leader.cut()
        await eventually(lambda: cluster.proxy.streams.pinned == 0)
        error = await client.fails("execute", stream_id=1, stmt={"sql": "INSERT INTO t VALUES (1)"})
        assert error["code"] == "STREAM_EXPIRED"
        assert await run(client, "SELECT count(*) FROM t") == [[0]]


async def test_a_forgotten_stream_goes_on(start: Start) -> None:
    cluster = await start(limits=StreamLimits(idle_seconds=0.1))
    async with connected(cluster.proxy.url) as client:
        assert await run(client, "SELECT 1") == [[1]]
        await eventually(lambda: len(cluster.proxy.streams) == 0)
        assert await run(client, "SELECT 2") == [[2]]


async def test_settings_by_pragma_stay_with_their_stream_and_headers_begin_all(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url, headers={"walship-consistency": "any"}) as client:
        assert await run(client, "PRAGMA walship_consistency") == [["any"]]
        await run(client, "PRAGMA walship_consistency = session")
        assert await run(client, "PRAGMA walship_consistency") == [["session"]]
        await client.ask("open_stream", stream_id=2)
        assert await run(client, "PRAGMA walship_consistency", 2) == [["any"]]


async def test_an_unreadable_header_is_an_error_of_each_request(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url, headers={"walship-consistency": "perfect"}) as client:
        error = await client.fails("execute", stream_id=1, stmt={"sql": "SELECT 1"})
        assert error["code"] == "WALSHIP_PROTOCOL"


async def test_a_refusal_of_the_whole_request_is_its_error(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        cluster.leader.refusals.append(Reason.OVERLOADED)
        error = await client.fails("execute", stream_id=1, stmt={"sql": "CREATE TABLE t(a)"})
        assert error["code"] == "WALSHIP_OVERLOADED"
        cluster.leader.outcomes.append(Outcome.UNKNOWN)
        cluster.leader.break_after_running = 1
        error = await client.fails("execute", stream_id=1, stmt={"sql": "CREATE TABLE t(a)"})
        assert error["code"] == "WALSHIP_OUTCOME_UNKNOWN"


MANY = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000) SELECT i, hex(zeroblob(20)) FROM n"
)


async def test_a_cursor_streams_more_than_the_links_window(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch={"steps": [{"stmt": {"sql": MANY}}]})
        rows, done = 0, False
        while not done:
            answer = await client.ask("fetch_cursor", cursor_id=1, max_count=20_000)
            rows += sum(entry["type"] == "row" for entry in answer["entries"])
            done = answer["done"]
        assert rows == 60_000
        await client.ask("close_cursor", cursor_id=1)
        assert await run(client, "SELECT 1") == [[1]]


async def test_a_cursor_given_up_inside_a_transaction_leaves_it_open(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        await run(client, "INSERT INTO t VALUES (1)")
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch={"steps": [{"stmt": {"sql": MANY}}]})
        await client.ask("fetch_cursor", cursor_id=1, max_count=10)
        await client.ask("close_cursor", cursor_id=1)
        await run(client, "COMMIT")
        assert await run(client, "SELECT count(*) FROM t") == [[1]]


async def test_a_cursor_whose_node_dies_ends_with_an_error_entry(start: Start) -> None:
    cluster = await start(followers=1)
    async with connected(cluster.proxy.url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch={"steps": [{"stmt": {"sql": MANY}}]})
        for node in cluster.nodes:
            node.cut()
        entries: list[dict[str, Any]] = []
        done = False
        while not done:
            answer = await client.ask("fetch_cursor", cursor_id=1, max_count=100_000)
            entries, done = [*entries, *answer["entries"]], answer["done"]
        assert entries[-1]["type"] == "error"
        assert entries[-1]["error"]["code"] == "WALSHIP_UNAVAILABLE"
        assert await run(client, "SELECT 1") == [[1]]


async def test_a_draining_proxy_lets_a_transaction_end_and_says_goodbye(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as idle, connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        await run(client, "BEGIN IMMEDIATE")
        cluster.proxy.drain()
        assert (await idle.closed())[0] == 1012
        await run(client, "INSERT INTO t VALUES (1)")
        await run(client, "COMMIT")
        assert (await client.closed())[0] == 1012
    assert cluster.history.txid == 2


# --- HTTP version 1 -----------------------------------------------------------------------------------------------


async def post(cluster: Cluster, path: str, **body: Any) -> httpx.Response:
    return await cluster.client.http.post(path, json=body)


async def test_v1_runs_statements_and_batches_without_streams(start: Start) -> None:
    cluster = await start()
    assert (await cluster.client.http.get("/v1")).status_code == 200
    done = await post(cluster, "/v1/execute", stmt={"sql": "CREATE TABLE t(a UNIQUE)"})
    assert (done.status_code, done.json()["result"]["rows"]) == (200, [])
    assert done.headers["walship-served-by"] == "leader"
    steps = [{"stmt": {"sql": "INSERT INTO t VALUES (1)"}}, {"stmt": {"sql": "INSERT INTO t VALUES (1)"}}]
    result = (await post(cluster, "/v1/batch", batch={"steps": steps})).json()["result"]
    assert [error and error["code"] for error in result["step_errors"]] == [None, "SQLITE_CONSTRAINT"]
    found = await post(cluster, "/v1/execute", stmt={"sql": "SELECT a FROM t"})
    assert found.json()["result"]["rows"] == [[{"type": "integer", "value": "1"}]]
    assert found.headers["walship-served-by"] != "leader"
    assert len(cluster.proxy.streams) == 0


@pytest.mark.parametrize(
    ("stmt", "status", "code"),
    [
        ({"sql": "SELEC"}, 400, "SQL_PARSE_ERROR"),
        ({"sql": "SELECT ?"}, 400, "ARGS_INVALID"),
        ({"sql": "ATTACH 'x' AS y"}, 400, "BLOCKED"),
        ({"sql": "SELECT * FROM nowhere"}, 500, "SQLITE_UNKNOWN"),
        (
            {
                "sql": "SELECT ?, :a",
                "args": [{"type": "null"}],
                "named_args": [{"name": "a", "value": {"type": "null"}}],
            },
            501,
            "ARGS_BOTH_POSITIONAL_AND_NAMED",
        ),
    ],
)
async def test_v1_answers_errors_by_status(start: Start, stmt: dict[str, Any], status: int, code: str) -> None:
    """hrana.md 1.5."""
    answer = await post(await start(), "/v1/execute", stmt=stmt)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["message"]


async def test_v1_knows_no_later_requests(start: Start) -> None:
    cluster = await start()
    assert (await post(cluster, "/v1/execute", stmt={"sql_id": 1})).status_code == 400
    steps = [{"stmt": {"sql": "SELECT 1"}, "condition": {"type": "is_autocommit"}}]
    assert (await post(cluster, "/v1/batch", batch={"steps": steps})).status_code == 400
    assert (await cluster.client.http.post("/v1/execute", content=b"{")).status_code == 400


async def test_many_streams_at_once_stay_apart(start: Start) -> None:
    cluster = await start()
    async with connected(cluster.proxy.url) as client:
        await run(client, "CREATE TABLE t(a)")
        sent: dict[int, int] = {}
        for stream in range(2, 300):
            await client.send("open_stream", stream_id=stream)
            sent[stream] = await client.send("execute", stream_id=stream, stmt={"sql": f"SELECT {stream}"})
            await client.send("close_stream", stream_id=stream)
        async with asyncio.timeout(20):
            for stream, request_id in sent.items():
                answer = await client.answer(request_id)
                assert answer["response"]["result"]["rows"] == [[{"type": "integer", "value": str(stream)}]]
