"""A node's front door over real HTTP: real uvicorn, real service, real SQLite."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.node.real_host import RealHost
from tests.waiting import eventually
from walship.front.listen import listen
from walship.hrana.baton import ALREADY_USED, INVALID
from walship.node.app import NodeApp
from walship.node.http_server import serving


@asynccontextmanager
async def front_door(host: RealHost, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = NodeApp(host.service, host, name=host.name, **options)
    async with (
        serving(app, listen("127.0.0.1", 0), drain_seconds=2) as address,
        httpx.AsyncClient(base_url=address.url, timeout=20) as client,
    ):
        yield client


@pytest.fixture
async def door(leader: RealHost) -> AsyncIterator[httpx.AsyncClient]:
    async with front_door(leader) as client:
        yield client


@pytest.fixture
async def follower_door(follower: RealHost) -> AsyncIterator[httpx.AsyncClient]:
    async with front_door(follower) as client:
        yield client


def execute(sql: str, *args: int) -> dict[str, Any]:
    return {
        "type": "execute",
        "stmt": {"sql": sql, "args": [{"type": "integer", "value": str(arg)} for arg in args]},
    }


CLOSE = {"type": "close"}


def series(length: int) -> str:
    return f"with recursive series(value) as (select 1 union all select value + 1 from series limit {length})"


async def post(
    client: httpx.AsyncClient, *requests: dict[str, Any], baton: str | None = None, **headers: str
) -> httpx.Response:
    body = {"baton": baton, "requests": list(requests)}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/v3/pipeline", json=body, headers=named)


def rows(response: httpx.Response, index: int = 0) -> list[list[Any]]:
    assert response.status_code == 200, response.text
    result = response.json()["results"][index]
    assert result["type"] == "ok", result
    return [[value.get("value") for value in row] for row in result["response"]["result"]["rows"]]


async def test_a_write_and_its_read_come_back_with_their_position(door: httpx.AsyncClient) -> None:
    written = await post(door, execute("create table t(a)"), execute("insert into t values(?)", 7), CLOSE)
    assert [result["type"] for result in written.json()["results"]] == ["ok"] * 3
    assert written.json()["baton"] is None
    assert written.headers["walship-served-by"] == "n1"
    read = await post(door, execute("select a from t"), CLOSE, walship_min_position=written.headers["walship-position"])
    assert rows(read) == [["7"]]
    assert read.headers["content-type"] == "application/json"


async def test_an_interactive_transaction_goes_on_by_its_batons(door: httpx.AsyncClient) -> None:
    """hrana.md 1.4: each baton is used once, and the last one is null."""
    await post(door, execute("create table t(a)"), CLOSE)
    begun = await post(door, execute("begin immediate"), execute("insert into t values(1)"))
    baton = begun.json()["baton"]
    assert baton
    assert rows(await post(door, execute("select count(*) from t"), CLOSE)) == [["0"]]
    done = await post(door, execute("commit"), CLOSE, baton=baton)
    assert done.json()["baton"] is None
    assert rows(await post(door, execute("select count(*) from t"), CLOSE)) == [["1"]]
    again = await post(door, execute("select 1"), baton=baton)
    assert again.status_code == 400


async def test_a_baton_works_once(door: httpx.AsyncClient) -> None:
    first = (await post(door, execute("select 1"))).json()["baton"]
    second = (await post(door, execute("select 2"), baton=first)).json()["baton"]
    assert second not in (None, first)
    used = await post(door, execute("select 3"), baton=first)
    assert (used.status_code, used.headers["content-type"], used.text) == (400, "text/plain", ALREADY_USED)
    assert rows(await post(door, execute("select 4"), baton=second)) == [["4"]]


@pytest.mark.parametrize("baton", ["", "x", "A" * 44])
async def test_a_forged_baton_is_refused(door: httpx.AsyncClient, baton: str) -> None:
    refused = await post(door, execute("select 1"), baton=baton)
    assert (refused.status_code, refused.text) == (400, INVALID)


async def test_stored_sql_lives_on_its_stream(door: httpx.AsyncClient) -> None:
    stored = await post(door, {"type": "store_sql", "sql_id": 1, "sql": "select 41 + 1"})
    used = await post(door, {"type": "execute", "stmt": {"sql_id": 1}}, baton=stored.json()["baton"])
    assert rows(used) == [["42"]]


async def test_a_stream_that_held_nothing_is_revived(leader: RealHost, door: httpx.AsyncClient) -> None:
    """hrana.md 1.4, pitfall 1: an idle connection must not die for good."""
    baton = (await post(door, execute("select 1"))).json()["baton"]
    await leader.service._end_streams()
    assert rows(await post(door, execute("select 2"), baton=baton)) == [["2"]]


async def test_a_revived_stream_survives_the_process(leader: RealHost) -> None:
    key = b"k" * 32
    async with front_door(leader, baton_key=key) as client:
        idle = (await post(client, execute("select 1"))).json()["baton"]
        open_ = (await post(client, execute("begin"), execute("select 1"))).json()["baton"]
    async with front_door(leader, baton_key=key) as client:
        assert rows(await post(client, execute("select 2"), baton=idle)) == [["2"]]
        expired = await post(client, execute("select 3"), baton=open_)
    assert (expired.status_code, expired.json()["code"]) == (400, "STREAM_EXPIRED")


async def test_changed_settings_of_a_connection_are_reported_lost_and_not_reset(leader: RealHost) -> None:
    """R21."""
    key = b"k" * 32
    async with front_door(leader, baton_key=key) as client:
        baton = (await post(client, execute("pragma foreign_keys = on"))).json()["baton"]
    async with front_door(leader, baton_key=key) as client:
        lost = await post(client, execute("select 1"), baton=baton)
    assert (lost.status_code, lost.json()["code"]) == (400, "STREAM_EXPIRED")


async def test_a_refused_request_leaves_its_baton_usable(
    leader: RealHost, door: httpx.AsyncClient, follower_door: httpx.AsyncClient
) -> None:
    """Clients that never forget a baton would be locked out by one refusal otherwise."""
    baton = (await post(follower_door, execute("select 1"))).json()["baton"]
    refused = await post(follower_door, execute("create table t(a)"), baton=baton)
    assert refused.status_code == 503
    assert rows(await post(follower_door, execute("select 2"), baton=baton)) == [["2"]]


async def test_a_write_on_a_follower_names_the_leader(follower_door: httpx.AsyncClient) -> None:
    """R23."""
    refused = await post(follower_door, execute("create table t(a)"), CLOSE)
    body = refused.json()
    assert refused.status_code == 503
    assert (body["code"], body["leader"], body["url"]) == ("WALSHIP_NOT_LEADER", "n1", "http://n1:1")
    assert refused.headers["walship-served-by"] == "n2"


async def test_a_follower_reads_and_waits_for_a_token(
    leader: RealHost, follower: RealHost, door: httpx.AsyncClient, follower_door: httpx.AsyncClient
) -> None:
    """R17, R23: a token beyond what is applied is waited for, within a bound, then refused as behind."""
    written = await post(door, execute("create table t(a)"), CLOSE)
    token = written.headers["walship-position"]
    behind = await post(follower_door, execute("select count(*) from t"), CLOSE, walship_min_position=token)
    assert (behind.status_code, behind.json()["code"]) == (503, "WALSHIP_BEHIND")
    follower.watermarks.publishing = leader.watermarks.captured
    follower.watermarks.applied = leader.watermarks.captured
    assert rows(await post(follower_door, execute("select count(*) from t"), walship_min_position=token)) == [["0"]]


@pytest.mark.parametrize(
    "headers", [{"walship_consistency": "eventually"}, {"walship_min_position": "12"}, {"walship_min_position": "é.1"}]
)
async def test_a_header_that_makes_no_sense_is_refused(door: httpx.AsyncClient, headers: dict[str, str]) -> None:
    body = {"requests": [execute("select 1")]}
    named = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    refused = await door.post("/v2/pipeline", json=body, headers=named)  # type: ignore[arg-type]
    assert (refused.status_code, refused.json()["code"]) == (400, "WALSHIP_USAGE")


@pytest.mark.parametrize("level", ["any", "session", "global", "SESSION"])
async def test_levels_are_taken_by_name(door: httpx.AsyncClient, level: str) -> None:
    assert rows(await post(door, execute("select 1"), walship_consistency=level)) == [["1"]]


async def test_a_statement_error_is_inside_the_reply(door: httpx.AsyncClient) -> None:
    results = (await post(door, execute("select nonsense from nothing"), execute("select 1"))).json()["results"]
    assert [result["type"] for result in results] == ["error", "ok"]
    assert results[0]["error"]["code"].startswith("SQL")


@pytest.mark.parametrize("body", [b"", b"{", b'{"requests":[{"type":"get_autocommit"}]}'])
async def test_a_malformed_request_is_plain_text_400(door: httpx.AsyncClient, body: bytes) -> None:
    refused = await door.post("/v2/pipeline", content=body)
    assert (refused.status_code, refused.headers["content-type"]) == (400, "text/plain")


async def test_a_body_beyond_the_limit_is_refused_unread(leader: RealHost) -> None:
    async with front_door(leader, max_body_bytes=1000) as client:
        fits = await client.post("/v3/pipeline", content=b'{"requests":[]}'.ljust(1000))
        declared = await client.post("/v3/pipeline", content=b"x" * 1001)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 100

        streamed = await client.post("/v3/pipeline", content=chunks())
    assert fits.status_code == 200
    for refused in (declared, streamed):
        assert (refused.status_code, refused.json()["code"]) == (413, "REQUEST_TOO_LARGE")


async def test_a_cursor_streams_its_lines(door: httpx.AsyncClient) -> None:
    batch = {
        "steps": [
            {"stmt": {"sql": f"{series(30_000)} select value from series"}},
            {"stmt": {"sql": "select 'b'"}},
        ]
    }
    async with door.stream("POST", "/v3/cursor", json={"batch": batch}) as response:
        assert response.status_code == 200
        assert response.headers["walship-served-by"] == "n1"
        lines = [json.loads(line) async for line in response.aiter_lines()]
    assert set(lines[0]) == {"baton", "base_url"}
    assert [line["type"] for line in lines[1:] if line["type"] != "row"] == ["step_begin", "step_end"] * 2
    values = [line["row"][0]["value"] for line in lines[1:] if line["type"] == "row"]
    assert values == [*map(str, range(1, 30001)), "b"]


async def test_the_baton_of_a_cursor_can_be_used_while_its_rows_still_come(door: httpx.AsyncClient) -> None:
    """PyPI libsql sends the next request as soon as it has seen the last row."""
    batch = {"steps": [{"stmt": {"sql": f"{series(100_000)} select value, hex(zeroblob(50)) from series"}}]}
    async with door.stream("POST", "/v3/cursor", json={"batch": batch}) as response:
        lines = response.aiter_lines()
        baton = json.loads(await anext(lines))["baton"]
        assert rows(await post(door, execute("select 1"), CLOSE, baton=baton)) == [["1"]]
        assert len([line async for line in lines]) == 100_002


async def test_a_stream_whose_transaction_ended_is_revived(leader: RealHost, door: httpx.AsyncClient) -> None:
    begun = (await post(door, execute("begin"), execute("select 1"))).json()["baton"]
    ended = (await post(door, execute("commit"), baton=begun)).json()["baton"]
    await leader.service._end_streams()
    assert rows(await post(door, execute("select 2"), baton=ended)) == [["2"]]


async def test_a_cursor_abandoned_by_its_client_ends(leader: RealHost, door: httpx.AsyncClient) -> None:
    """Otherwise its read transaction would keep the -wal from restarting."""
    batch = {"steps": [{"stmt": {"sql": f"{series(10**9)} select value, zeroblob(1000) from series"}}]}
    async with door.stream("POST", "/v3/cursor", json={"batch": batch}) as response:
        async for _ in response.aiter_bytes():
            break
    await eventually(lambda: leader.service.status().cursors == 0)


async def test_a_transaction_begun_by_a_cursor_goes_on(door: httpx.AsyncClient) -> None:
    """The serverless clients do everything by cursors (hrana.md 2.2)."""

    async def cursor(sql: str, baton: str | None) -> tuple[str | None, list[dict[str, Any]]]:
        body = {"baton": baton, "batch": {"steps": [{"stmt": {"sql": sql}}]}}
        lines = [json.loads(line) for line in (await door.post("/v3/cursor", json=body)).text.splitlines()]
        return lines[0]["baton"], lines[1:]

    await post(door, execute("create table t(a)"), CLOSE)
    baton, _ = await cursor("begin immediate", None)
    baton, _ = await cursor("insert into t values(1)", baton)
    baton, lines = await cursor("rollback", baton)
    assert [line["type"] for line in lines] == ["step_begin", "step_end"]
    baton, lines = await cursor("select count(*) from t", baton)
    assert lines[1]["row"] == [{"type": "integer", "value": "0"}]
    closed = await post(door, CLOSE, baton=baton)
    assert closed.json()["baton"] is None


async def test_the_pages_around_hrana(leader: RealHost, door: httpx.AsyncClient) -> None:
    """design.md 6, hrana.md 1.1."""
    assert (await door.get("/v2")).text == "Hello, this is HTTP API v2 (Hrana over HTTP)"
    assert (await door.get("/v3")).status_code == 200
    assert (await door.get("/health")).status_code == 200
    assert (await door.get("/version")).text.startswith("walship ")
    assert (await door.get("/status")).json()["name"] == "n1"
    assert "walship_up" in (await door.get("/metrics")).text
    leader.sick = "no leader"
    assert (await door.get("/health")).status_code == 503


@pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("POST", "/v4/pipeline"), ("GET", "/walship/link")])
async def test_an_unknown_path_is_an_empty_404(door: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await door.request(method, path)
    assert (answer.status_code, answer.content) == (404, b"")


async def test_web_clients_may_call_from_anywhere(door: httpx.AsyncClient) -> None:
    asked = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    preflight = await door.options("/v2/pipeline", headers=asked)
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    answer = await post(door, execute("select 1"), CLOSE)
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_concurrent_clients_get_their_own_rows(door: httpx.AsyncClient) -> None:
    async def ask(number: int) -> None:
        assert rows(await post(door, execute("select ?, 'mine'", number), CLOSE)) == [[str(number), "mine"]]

    async with asyncio.TaskGroup() as group:
        for number in range(64):
            group.create_task(ask(number))
