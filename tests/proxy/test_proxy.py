"""The proxy end to end: HTTP in, links to real sockets out, SQLite behind them (R17, R18, R21, R22)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest

from proxy.app import run
from proxy.streams import StreamLimits
from tests.proxy.conftest import CLOSE, Cluster, Start, execute, proxy_serving, rows_of
from tests.proxy.small_node import SmallNode
from tests.waiting import eventually
from walship.config import ProxyConfig
from walship.errors import UsageError
from walship.formats.link import Reason, Role, Verb
from walship.front.listen import listen


async def table(cluster: Cluster) -> None:
    await cluster.client.run("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)")


def texts_seen(node: SmallNode) -> bytes:
    return b"\n".join(request.body for request in node.served)


async def test_a_write_goes_to_the_leader_and_a_read_to_a_follower(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    await cluster.client.run("INSERT INTO t VALUES (1, 'one')")
    response = await cluster.client.post([execute("SELECT v FROM t"), CLOSE])
    assert rows_of(response.json()["results"][0]) == [["one"]]
    assert response.headers["walship-served-by"].startswith("follower")
    assert response.headers["walship-position"] == "1.2"
    assert b"SELECT v" not in texts_seen(cluster.leader)


async def test_a_read_that_writes_is_found_out_by_sqlite_and_remembered(start: Start) -> None:
    """R22: the follower prepares, answers "not read-only"; the text goes to the leader from then on."""
    cluster = await start()
    await table(cluster)
    sql = "WITH x(a) AS (VALUES (1)) INSERT INTO t SELECT a + (SELECT count(*) FROM t), 'x' FROM x RETURNING id"
    # The words say WRITE here; a function with an effect would be what only SQLite knows. Ask by a text that hides it.
    hidden = "SELECT * FROM t WHERE id = 99"
    cluster.followers[0].refusals.extend([Reason.NOT_READ_ONLY] * 1)
    cluster.followers[1].refusals.extend([Reason.NOT_READ_ONLY] * 1)
    assert await cluster.client.run(hidden) == []
    assert await cluster.client.run(hidden) == []
    asked = sum(hidden.encode() in request.body for node in cluster.followers for request in node.served)
    assert asked == 1
    assert texts_seen(cluster.leader).count(hidden.encode()) == 2
    assert await cluster.client.run(sql) == [[1]]


async def test_a_lagging_follower_never_serves_a_session_read_of_ones_own_write(start: Start) -> None:
    """R18 session: never misses a write acknowledged through this proxy."""
    cluster = await start(followers=1, wait_seconds=0.02)
    await table(cluster)
    cluster.followers[0].lag()
    await cluster.client.run("INSERT INTO t VALUES (1, 'new')")
    response = await cluster.client.post([execute("SELECT v FROM t"), CLOSE])
    assert rows_of(response.json()["results"][0]) == [["new"]]
    assert response.headers["walship-served-by"] == "leader"


async def test_level_any_takes_what_a_lagging_follower_has(start: Start) -> None:
    cluster = await start(followers=1)
    await table(cluster)
    cluster.followers[0].lag()
    await cluster.client.run("INSERT INTO t VALUES (1, 'new')")
    assert await cluster.client.run("SELECT v FROM t", walship_consistency="any") == []


async def test_a_read_waits_for_the_nearest_follower(start: Start) -> None:
    """The bounded wait, instead of loading the leader."""
    cluster = await start(followers=1, wait_seconds=5.0)
    await table(cluster)
    follower = cluster.followers[0]
    follower.lag()
    await cluster.client.run("INSERT INTO t VALUES (1, 'new')")
    served = len(follower.served)
    async with asyncio.TaskGroup() as tasks:
        read = tasks.create_task(cluster.client.post([execute("SELECT v FROM t"), CLOSE]))
        await eventually(lambda: len(follower.served) > served)
        follower.catch_up()
    assert rows_of(read.result().json()["results"][0]) == [["new"]]
    assert read.result().headers["walship-served-by"] == "follower1"


async def test_a_position_token_makes_any_proxy_show_that_write(start: Start) -> None:
    """The reply header of one proxy is the request header of another."""
    cluster = await start(followers=1, wait_seconds=0.01)
    await table(cluster)
    async with proxy_serving(cluster.store, ProxyConfig(cluster_url="", wait_seconds=0.01)) as other:
        cluster.followers[0].lag()
        response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'new')"), CLOSE])
        token = response.headers["walship-position"]
        await eventually(lambda: other.unhealthy() is None)
        response = await cluster.client.http.post(
            f"{other.url}/v3/pipeline",
            json={"requests": [execute("SELECT v FROM t"), CLOSE]},
            headers={"walship-min-position": token, "walship-consistency": "any"},
        )
        assert rows_of(response.json()["results"][0]) == [["new"]]


async def test_reads_go_on_without_a_leader_and_writes_wait_for_one(start: Start) -> None:
    cluster = await start(deadline_seconds=0.3)
    await table(cluster)
    await cluster.client.run("INSERT INTO t VALUES (1, 'one')")
    cluster.leader.draining = True
    await eventually(lambda: cluster.proxy.backends.leader is None)
    assert await cluster.client.run("SELECT v FROM t") == [["one"]]
    response = await cluster.client.post([execute("INSERT INTO t VALUES (2, 'two')"), CLOSE])
    assert response.status_code == 503
    assert response.json()["code"] == "WALSHIP_UNAVAILABLE"
    assert "Nothing was changed" in response.json()["message"]


async def test_a_write_waits_for_the_leader_to_come_back(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.draining = True
    await eventually(lambda: cluster.proxy.backends.leader is None)
    async with asyncio.TaskGroup() as tasks:
        write = tasks.create_task(cluster.client.run("INSERT INTO t VALUES (1, 'late') RETURNING v"))
        await asyncio.sleep(0)
        cluster.leader.draining = False
    assert write.result() == [["late"]]


async def test_a_read_whose_link_breaks_is_repeated_elsewhere(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    for follower in cluster.followers:
        follower.break_after_running = 1
    assert await cluster.client.run("SELECT count(*) FROM t") == [[0]]


@pytest.mark.parametrize("reason", [Reason.DRAINING, Reason.FENCED, Reason.NOT_LEADER, Reason.UNAVAILABLE])
async def test_a_write_refused_before_it_ran_is_sent_again(start: Start, reason: Reason) -> None:
    cluster = await start()
    await table(cluster)
    cluster.leader.refusals.append(reason)
    assert await cluster.client.run("INSERT INTO t VALUES (1, 'one') RETURNING v") == [["one"]]
    assert await cluster.client.run("SELECT count(*) FROM t") == [[1]]


async def test_an_overloaded_leader_is_not_pressed(start: Start) -> None:
    """R14: typed, not done, and the client decides when to come again."""
    cluster = await start()
    await table(cluster)
    cluster.leader.refusals.append(Reason.OVERLOADED)
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'one')"), CLOSE])
    assert (response.status_code, response.json()["code"]) == (429, "WALSHIP_OVERLOADED")


@pytest.mark.parametrize("reason", [Reason.DRAINING, Reason.OVERLOADED, Reason.BEHIND, Reason.UNAVAILABLE])
async def test_a_refused_read_goes_elsewhere(start: Start, reason: Reason) -> None:
    cluster = await start()
    await table(cluster)
    for follower in cluster.followers:
        follower.refusals.append(reason)
    assert await cluster.client.run("SELECT count(*) FROM t") == [[0]]


async def test_a_floor_of_a_lost_history_is_the_proxys_own_affair_unless_it_is_a_clients_token(start: Start) -> None:
    """R18: nodes know of a new term before this proxy, whose floor lies beyond the start of that term."""
    cluster = await start()
    await table(cluster)
    nodes = [cluster.leader, *cluster.followers]
    for node in nodes:
        node.refusals.append(Reason.WRITE_LOST)
    assert await cluster.client.run("SELECT count(*) FROM t") == [[0]]
    assert not any(node.refusals for node in nodes)
    position = (await cluster.client.post([execute("SELECT 1"), CLOSE])).headers["walship-position"]
    for node in nodes:
        node.refusals.append(Reason.WRITE_LOST)
    response = await cluster.client.http.post(
        "/v3/pipeline",
        json={"requests": [execute("SELECT 1"), CLOSE]},
        headers={"walship-min-position": position},
    )
    assert (response.status_code, response.json()["code"]) == (409, "WALSHIP_WRITE_LOST")


async def test_an_interactive_transaction_is_pinned_until_it_ends(start: Start) -> None:
    """R21: the whole stream belongs to the leader from BEGIN until autocommit returns; then its reads are free."""
    cluster = await start()
    await table(cluster)
    post = cluster.client.post
    one = (await post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'mine')")])).json()
    two = await post([execute("SELECT v FROM t")], baton=one["baton"])
    assert rows_of(two.json()["results"][0]) == [["mine"]]
    assert two.headers["walship-served-by"] == "leader"
    assert await cluster.client.run("SELECT v FROM t") == []
    three = await post([execute("COMMIT")], baton=two.json()["baton"])
    four = await post([execute("SELECT v FROM t"), CLOSE], baton=three.json()["baton"])
    assert rows_of(four.json()["results"][0]) == [["mine"]]
    assert four.headers["walship-served-by"].startswith("follower")
    assert four.json()["baton"] is None


async def test_last_insert_rowid_is_the_streams_own_across_requests(start: Start) -> None:
    """R21: `changes()` and its like are answered per stream, also outside of a transaction."""
    cluster = await start()
    await table(cluster)
    post = cluster.client.post
    one = (await post([execute("INSERT INTO t VALUES (41, 'x')")])).json()
    await cluster.client.run("INSERT INTO t VALUES (77, 'y')")
    two = await post([execute("SELECT v FROM t WHERE id = 41")], baton=one["baton"])
    assert two.headers["walship-served-by"].startswith("follower")
    three = await post([execute("SELECT last_insert_rowid()"), CLOSE], baton=two.json()["baton"])
    assert rows_of(three.json()["results"][0]) == [[41]]


async def test_an_expired_transaction_is_told_and_its_node_stream_closed(start: Start) -> None:
    cluster = await start(limits=StreamLimits(transaction_idle_seconds=0.2))
    await table(cluster)
    baton = (await cluster.client.post([execute("BEGIN IMMEDIATE")])).json()["baton"]
    await eventually(lambda: any(request.verb is Verb.CLOSE_STREAM for request in cluster.leader.served))
    response = await cluster.client.post([execute("COMMIT")], baton=baton)
    assert (response.status_code, response.json()["code"]) == (400, "STREAM_EXPIRED")
    again = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'free again')")], baton=baton)
    assert again.status_code == 200, "told once, the client goes on with the only baton it has"


async def test_a_transaction_whose_node_is_lost_is_reported_not_reset(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    baton = (await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'x')")])).json()["baton"]
    generation = cluster.proxy.backends.get("leader").generation  # type: ignore[union-attr]
    cluster.leader.cut()
    await eventually(lambda: cluster.proxy.backends.get("leader").generation > generation)  # type: ignore[union-attr]
    response = await cluster.client.post([execute("COMMIT")], baton=baton)
    assert (response.status_code, response.json()["code"]) == (400, "STREAM_EXPIRED")


async def test_an_idle_stream_survives_a_restart_of_the_proxy(start: Start) -> None:
    """hrana.md 1.4: the fix for STREAM_EXPIRED; batons of autocommit streams are good under the cluster's key."""
    cluster = await start()
    await table(cluster)
    baton = (await cluster.client.post([execute("SELECT 1")])).json()["baton"]
    async with proxy_serving(cluster.store, ProxyConfig(cluster_url="")) as other:
        await eventually(lambda: other.unhealthy() is None)
        body = {"baton": baton, "requests": [execute("SELECT 2")]}
        response = await cluster.client.http.post(f"{other.url}/v3/pipeline", json=body)
        assert rows_of(response.json()["results"][0]) == [[2]]
        again = await cluster.client.http.post(f"{other.url}/v3/pipeline", json=body)
        assert (again.status_code, again.text) == (400, "Received a baton that has already been used")


async def test_stored_sql_is_known_wherever_the_next_request_goes(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    post = cluster.client.post
    one = (await post([{"type": "store_sql", "sql_id": 3, "sql": "SELECT 3"}])).json()
    by_id = {"type": "execute", "stmt": {"sql_id": 3}}
    two = (
        await post([by_id, {"type": "batch", "batch": {"steps": [{"stmt": {"sql_id": 3}}]}}], baton=one["baton"])
    ).json()
    assert rows_of(two["results"][0]) == [[3]]
    assert two["results"][1]["response"]["result"]["step_results"][0]["rows"] == [[{"type": "integer", "value": "3"}]]


async def test_walship_pragmas_are_answered_by_the_proxy(start: Start) -> None:
    cluster = await start(followers=1)
    await table(cluster)
    post = cluster.client.post
    one = await post([execute("PRAGMA walship_consistency"), execute("PRAGMA walship_consistency = 'any'")])
    result = one.json()["results"]
    assert [rows_of(item) for item in result] == [[["session"]], [["any"]]]
    assert result[0]["response"]["result"]["cols"][0]["name"] == "walship_consistency"
    cluster.followers[0].lag()
    await cluster.client.run("INSERT INTO t VALUES (1, 'new')")
    two = await post([execute("SELECT v FROM t")], baton=one.json()["baton"])
    assert rows_of(two.json()["results"][0]) == []  # `any` stays with the stream
    [[position]] = await cluster.client.run("PRAGMA walship_position")
    assert position == str(cluster.proxy.floors.position)
    [[status]] = await cluster.client.run("PRAGMA walship_status")
    assert json.loads(status)["leader"] == "leader"


async def test_a_cursor_streams_more_than_its_window(start: Start) -> None:
    """A slow client holds up its own cursor only: chunks beyond the window come with grants."""
    cluster = await start(followers=1)
    sql = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 60000) SELECT n, 'some text' FROM c"
    body = {"baton": None, "batch": {"steps": [{"stmt": {"sql": sql}}]}}
    async with cluster.client.http.stream("POST", "/v3/cursor", json=body) as response:
        lines = [line async for line in response.aiter_lines()]
    head = json.loads(lines[0])
    rows = [json.loads(line) for line in lines if line.startswith('{"type":"row"')]
    assert len(rows) == 60000
    assert rows[-1]["row"][0]["value"] == "60000"
    assert json.loads(lines[-1])["type"] == "step_end"
    follow = await cluster.client.post([execute("SELECT 1"), CLOSE], baton=head["baton"])
    assert follow.status_code == 200


async def test_a_small_cursor_carries_its_position(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    batch = {"steps": [{"stmt": {"sql": "INSERT INTO t VALUES (1, 'one')"}}]}
    response = await cluster.client.http.post("/v3/cursor", json={"batch": batch})
    assert response.headers["walship-position"] == "1.2"
    assert await cluster.client.run("SELECT v FROM t") == [["one"]]


async def test_statement_errors_reach_the_client_with_sqlites_words(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    await cluster.client.run("INSERT INTO t VALUES (1, 'one')")
    response = await cluster.client.post([execute("INSERT INTO t VALUES (1, 'again')"), CLOSE])
    error = response.json()["results"][0]["error"]
    assert error == {"message": "SQLite error: UNIQUE constraint failed: t.id", "code": "SQLITE_CONSTRAINT"}


async def test_sixty_four_clients_never_get_anothers_row(start: Start) -> None:
    """Answers come back over shared links in any order; each must reach who asked, and show the write just made."""
    cluster = await start()
    await table(cluster)

    async def client(number: int) -> None:
        for turn in range(4):
            id, mark = number * 100 + turn, f"mark-{number}-{turn}"
            await cluster.client.run("INSERT INTO t VALUES (?, ?)", id, mark)
            assert await cluster.client.run("SELECT id, v FROM t WHERE id = ?", id) == [[id, mark]]
            if turn % 3 == number % 3:
                cluster.followers[number % 2].cut()

    async with asyncio.TaskGroup() as tasks:
        for number in range(64):
            tasks.create_task(client(number))
    assert await cluster.client.run("SELECT count(*) FROM t") == [[64 * 4]]


async def test_a_silent_node_gets_no_new_reads(start: Start) -> None:
    cluster = await start(followers=1)
    await table(cluster)
    cluster.followers[0].silent = True
    backend = cluster.proxy.backends.get("follower1")
    assert backend is not None
    await eventually(lambda: not backend.usable)
    assert await cluster.client.run("SELECT count(*) FROM t") == [[0]]
    cluster.followers[0].silent = False
    await eventually(lambda: backend.usable)


async def test_a_draining_proxy_refuses_new_work_and_finishes_open_transactions(start: Start) -> None:
    cluster = await start()
    await table(cluster)
    baton = (await cluster.client.post([execute("BEGIN"), execute("INSERT INTO t VALUES (1, 'x')")])).json()["baton"]
    cluster.proxy.front.draining = True
    refused = await cluster.client.post([execute("SELECT 1"), CLOSE])
    assert (refused.status_code, refused.json()["code"]) == (503, "WALSHIP_DRAINING")
    assert (await cluster.client.http.get("/health")).status_code == 503
    done = await cluster.client.post([execute("COMMIT"), CLOSE], baton=baton)
    assert done.json()["results"][0]["type"] == "ok"


async def test_a_starting_proxy_serves_no_session_read_before_it_knows_its_floor(start: Start) -> None:
    """R18: an earlier proxy may have acknowledged more than any follower shows."""
    cluster = await start(leader=False, deadline_seconds=0.2)
    response = await cluster.client.post([execute("SELECT 1"), CLOSE])
    assert (response.status_code, response.json()["code"]) == (503, "WALSHIP_UNAVAILABLE")
    response = await cluster.client.post([execute("SELECT 1"), CLOSE], walship_consistency="any")
    assert rows_of(response.json()["results"][0]) == [[1]]


async def test_a_starting_proxy_without_a_leader_serves_what_enough_voters_hold(start: Start) -> None:
    """R18: with ack 1 and three voters, two of them know of every acknowledged write."""
    cluster = await start(leader=False, acks=1)
    assert await cluster.client.run("SELECT 1") == [[1]]


async def test_the_plain_endpoints(start: Start) -> None:
    cluster = await start()
    http = cluster.client.http
    assert (await http.get("/v2")).text == "Hello, this is HTTP API v2 (Hrana over HTTP)"
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/version")).text.startswith("walship ")
    nowhere = await http.get("/nowhere")
    assert (nowhere.status_code, nowhere.content) == (404, b"")
    preflight = await http.options("/v3/pipeline")
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "Authorization" in preflight.headers["access-control-allow-headers"]  # `*` does not cover it
    await cluster.client.run("SELECT 1")
    assert "walship_reads_total" in (await http.get("/metrics")).text
    status = (await http.get("/status")).json()
    assert status["leader"] == "leader"
    assert {node["role"] for node in status["nodes"]} == {"leader", "follower"}
    assert all(node["healthy"] for node in status["nodes"])


async def test_a_body_above_the_limit_is_refused(start: Start) -> None:
    cluster = await start(body_max_bytes=1000)
    response = await cluster.client.post([execute("SELECT '" + "x" * 2000 + "'"), CLOSE])
    assert response.status_code == 413


async def test_broken_requests_are_protocol_errors(start: Start) -> None:
    cluster = await start()
    http = cluster.client.http
    assert (await http.post("/v3/pipeline", content=b"{")).status_code == 400
    assert (await http.post("/v3/pipeline", json={"baton": "x", "requests": []})).text == "Received an invalid baton"
    response = await cluster.client.post([execute("SELECT 1"), CLOSE], walship_consistency="sometimes")
    assert (response.status_code, "sometimes" in response.text) == (400, True)
    assert Role.LEADER is cluster.leader.role


async def test_sigterm_drains_and_exits_0(start: Start, tmp_path: Path) -> None:
    """A real process: an open transaction's node stream is closed on the way out, and the exit code is 0."""
    cluster = await start()
    await table(cluster)
    script = (
        "import asyncio, sys\nfrom proxy.app import run\nfrom walship.config import ProxyConfig\n"
        "config = ProxyConfig(cluster_url=sys.argv[1], listen_port=0, drain_seconds=2.0)\n"
        "asyncio.run(run(config, on_ready=lambda url: print(url, flush=True)))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, f"file://{tmp_path / 'store'}", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    http = cluster.client.http
    response = await http.post(f"{url}/v3/pipeline", json={"requests": [execute("BEGIN IMMEDIATE")]})
    assert response.json()["baton"]
    process.terminate()
    async with asyncio.timeout(10):
        assert await process.wait() == 0
    await eventually(lambda: any(request.verb is Verb.CLOSE_STREAM for request in cluster.leader.served))


async def test_a_port_in_use_is_one_clear_sentence(tmp_path: Path) -> None:
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            await run(ProxyConfig(cluster_url=f"file://{tmp_path / 'store'}", listen_port=port))


async def test_a_client_that_leaves_its_cursor_holds_up_nobody(start: Start) -> None:
    """The rest is read and dropped; the link and the node go on."""
    cluster = await start(followers=1)
    sql = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 90000) SELECT n, 'some text' FROM c"
    body = {"baton": None, "batch": {"steps": [{"stmt": {"sql": sql}}]}}
    async with cluster.client.http.stream("POST", "/v3/cursor", json=body) as response:
        await anext(response.aiter_lines())
    backend = cluster.proxy.backends.get("follower1")
    assert backend is not None
    assert await cluster.client.run("SELECT 1") == [[1]]
    await eventually(lambda: backend.connection is not None and backend.connection.in_flight == 0)


async def test_a_read_only_transaction_runs_on_a_follower(start: Start) -> None:
    """R21: READONLY goes to a follower, whole or step by step."""
    cluster = await start()
    await table(cluster)
    await cluster.client.run("INSERT INTO t VALUES (1, 'one')")
    steps = [{"stmt": {"sql": sql}} for sql in ("BEGIN TRANSACTION READONLY", "SELECT v FROM t", "COMMIT")]
    response = await cluster.client.post([{"type": "batch", "batch": {"steps": steps}}, CLOSE])
    assert response.headers["walship-served-by"].startswith("follower")
    result = response.json()["results"][0]["response"]["result"]
    assert result["step_errors"] == [None, None, None]
    assert result["step_results"][1]["rows"] == [[{"type": "text", "value": "one"}]]
