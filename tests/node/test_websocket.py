"""Hrana over WebSocket at a node, byte by byte as a client sees it (hrana.md 1.6), and the clients that speak it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import websockets
from websockets.frames import Frame, Opcode

from tests.node.real_host import RealHost, real_leader
from tests.node.socket_client import Socket, connected, value_rows
from tests.node.test_clients import running
from tests.waiting import eventually
from walship.errors import AuthFailed
from walship.front import websocket as shell
from walship.front.listen import Address, listen
from walship.front.protocol import Bounds
from walship.hrana.auth import FULL, READ_ONLY, Authenticator, Gate
from walship.node.app import NodeApp
from walship.node.http_server import serving
from walship.service.limits import Limits

pytestmark = pytest.mark.filterwarnings("error")


@asynccontextmanager
async def served(host: RealHost, *, gate: Gate | None = None, drain_seconds: float = 2.0) -> AsyncIterator[str]:
    app = NodeApp(host.service, host, name=host.name, gate=gate or Gate(Authenticator()), drain_seconds=drain_seconds)
    async with serving(app, listen("127.0.0.1", 0), drain_seconds=drain_seconds) as address, asyncio.timeout(30):
        yield address.url


@pytest.fixture
async def url(leader: RealHost) -> AsyncIterator[str]:
    async with served(leader) as url:
        yield url


# --- the handshake ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "chosen"), [(("hrana2", "hrana1"), "hrana2"), (("hrana1", "hrana3", "hrana3-protobuf"), "hrana3")]
)
async def test_the_best_common_subprotocol_is_answered(url: str, offered: tuple[str, ...], chosen: str) -> None:
    async with connected(url, *offered, hello=False) as client:
        assert client.connection.subprotocol == chosen


async def test_without_a_subprotocol_version_1_is_spoken_and_none_answered(url: str) -> None:
    async with websockets.connect(url.replace("http", "ws")) as connection:
        assert connection.subprotocol is None
        client = Socket(connection)
        await client.hello()
        await client.ask("open_stream", stream_id=1)
        assert await client.run("SELECT 1") == [[1]]
        await client.send("describe", stream_id=1, sql="SELECT 1")
        assert (await client.closed())[0] == 1008


async def test_no_common_subprotocol_is_http_400(url: str) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await websockets.connect(url.replace("http", "ws"), subprotocols=[websockets.Subprotocol("chat")])
    assert caught.value.response.status_code == 400
    assert b"Only these WebSocket subprotocols are supported: hrana3" in (caught.value.response.body or b"")


async def test_other_paths_are_not_found(url: str) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await websockets.connect(url.replace("http", "ws") + "/v2", subprotocols=[websockets.Subprotocol("hrana2")])
    assert caught.value.response.status_code == 404


async def test_compression_is_not_offered(url: str) -> None:
    async with connected(url) as client:
        assert client.connection.response is not None
        assert "Sec-WebSocket-Extensions" not in client.connection.response.headers


# --- tokens -------------------------------------------------------------------------------------------------------


async def test_a_token_comes_with_hello_and_may_be_renewed(leader: RealHost) -> None:
    async with served(leader, gate=Gate(Authenticator(token="secret"))) as url:
        async with connected(url, hello=False) as client:
            assert await client.hello("secret") == {"type": "hello_ok"}
            await client.ask("open_stream", stream_id=1)
            assert await client.run("SELECT 1") == [[1]]
            assert (await client.hello("wrong"))["error"]["code"] == "AUTH_FAILED"
            assert (await client.closed())[0] == 1000
        async with connected(url, hello=False) as client:
            assert (await client.hello())["error"]["code"] == "AUTH_JWT_MISSING"
            assert (await client.closed())[0] == 1000


async def test_a_token_that_only_reads_writes_nothing(leader: RealHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Authenticator, token: str | None) -> object:
        if token is None:
            raise AuthFailed(401, "AUTH_JWT_MISSING", "no token")
        return FULL if token == "rw" else READ_ONLY

    monkeypatch.setattr(Authenticator, "check_token", check)
    async with served(leader) as url, connected(url, hello=False) as client:
        await client.hello("ro")
        await client.ask("open_stream", stream_id=1)
        error = await client.fails("execute", stream_id=1, stmt={"sql": "CREATE TABLE t(a)"})
        assert error["code"] == "AUTH_READ_ONLY"
        assert await client.run("SELECT 1") == [[1]]
        await client.hello("rw")
        assert await client.run("CREATE TABLE t(a)") == []


# --- what ends a connection ---------------------------------------------------------------------------------------


async def test_binary_closes_1003(url: str) -> None:
    async with connected(url) as client:
        await client.connection.send(b"\x00\x01")
        assert (await client.closed())[0] == 1003


async def test_what_is_not_json_closes_1007(url: str) -> None:
    async with connected(url) as client:
        await client.connection.send("{")
        assert (await client.closed())[0] == 1007


async def test_text_that_is_not_utf_8_closes_1007_without_a_traceback(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(url) as client:
        client.connection.protocol.writes.append(Frame(Opcode.TEXT, b'{"type":"\xff"}').serialize(mask=True))
        client.connection.send_data()
        assert (await client.closed())[0] == 1007
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_broken_rule_closes_1008_with_its_name(url: str) -> None:
    async with connected(url) as client:
        await client.send("execute", stream_id=9, stmt={"sql": "SELECT 1"})
        assert await client.closed() == (1008, "Stream 9 not found")


async def test_a_message_that_is_too_large_closes_1009(leader: RealHost) -> None:
    app = NodeApp(leader.service, leader, name=leader.name)
    async with (
        serving(app, listen("127.0.0.1", 0), drain_seconds=1, message_max_bytes=1000) as address,
        connected(address.url) as client,
    ):
        await client.connection.send("x" * 1001)
        assert (await client.closed())[0] == 1009


async def test_who_does_not_say_hello_is_not_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "HELLO_SECONDS", 0.05)
    async with connected(url, hello=False) as client:
        assert (await client.closed())[0] == 1008


# --- statements ---------------------------------------------------------------------------------------------------


async def test_everything_may_be_sent_before_the_first_answer(url: str) -> None:
    """hrana.md 1.6: clients pipeline hello, open_stream, store_sql, execute and close_stream."""
    async with connected(url, "hrana2", hello=False) as client:
        await client.say(type="hello", jwt=None)
        opened = await client.send("open_stream", stream_id=7)
        await client.send("store_sql", sql_id=1, sql="SELECT 41 + 1")
        ran = await client.send("execute", stream_id=7, stmt={"sql_id": 1})
        closed = await client.send("close_stream", stream_id=7)
        assert await client.hear() == {"type": "hello_ok"}
        assert (await client.answer(opened))["response"] == {"type": "open_stream"}
        assert value_rows((await client.answer(ran))["response"]["result"]) == [[42]]
        assert (await client.answer(closed))["response"] == {"type": "close_stream"}


async def test_requests_of_one_stream_run_in_order(url: str) -> None:
    async with connected(url) as client:
        await client.run("CREATE TABLE t(a)")
        sent = [
            await client.send("execute", stream_id=1, stmt={"sql": f"INSERT INTO t VALUES ({number})"})
            for number in range(40)
        ]
        for request_id in sent:
            assert (await client.answer(request_id))["type"] == "response_ok"
        assert [row[0] for row in await client.run("SELECT a FROM t ORDER BY rowid")] == list(range(40))


async def test_a_stream_waits_for_no_other(url: str) -> None:
    """One holds the write turn, one waits for it; a third reads meanwhile."""
    async with connected(url) as client:
        await client.run("CREATE TABLE t(a)")
        for stream in (2, 3):
            await client.ask("open_stream", stream_id=stream)
        await client.run("BEGIN IMMEDIATE")
        waiting = await client.send("execute", stream_id=2, stmt={"sql": "INSERT INTO t VALUES (2)"})
        assert await client.run("SELECT count(*) FROM t", 3) == [[0]]
        await client.run("INSERT INTO t VALUES (1)")
        await client.run("COMMIT")
        assert (await client.answer(waiting))["type"] == "response_ok"
        assert await client.run("SELECT a FROM t ORDER BY a", 3) == [[1], [2]]


async def test_a_transaction_is_the_streams_own_and_ends_with_it(url: str) -> None:
    async with connected(url) as client:
        await client.ask("open_stream", stream_id=2)
        await client.run("CREATE TABLE t(a)")
        await client.run("BEGIN")
        await client.run("INSERT INTO t VALUES (1)")
        assert (await client.ask("get_autocommit", stream_id=1))["is_autocommit"] is False
        assert (await client.ask("get_autocommit", stream_id=2))["is_autocommit"] is True
        assert await client.run("SELECT count(*) FROM t", 2) == [[0]]
        await client.ask("close_stream", stream_id=1)
        assert await client.run("INSERT INTO t VALUES (2) RETURNING a", 2) == [[2]]
        assert await client.run("SELECT a FROM t", 2) == [[2]]


async def test_a_client_that_goes_away_leaves_no_transaction(leader: RealHost, url: str) -> None:
    async with connected(url) as client:
        await client.run("CREATE TABLE t(a)")
        await client.run("BEGIN IMMEDIATE")
        client.connection.transport.abort()
    async with connected(url) as client:
        assert await client.run("INSERT INTO t VALUES (1) RETURNING a") == [[1]]
    await eventually(lambda: leader.service.status().streams == 0)


async def test_errors_of_statements_end_nothing(url: str) -> None:
    async with connected(url) as client:
        error = await client.fails("execute", stream_id=1, stmt={"sql": "SELEC 1"})
        assert error["code"] == "SQL_PARSE_ERROR"
        batch = {
            "steps": [
                {"stmt": {"sql": "SELECT x"}},
                {"stmt": {"sql": "SELECT 1"}, "condition": {"type": "error", "step": 0}},
            ]
        }
        result = (await client.ask("batch", stream_id=1, batch=batch))["result"]
        assert [step is None for step in result["step_results"]] == [True, False]
        await client.ask("sequence", stream_id=1, sql="CREATE TABLE t(a); INSERT INTO t VALUES (1);")
        described = (await client.ask("describe", stream_id=1, sql="SELECT a FROM t WHERE a = :x"))["result"]
        assert described["params"] == [{"name": ":x"}]


async def test_an_expired_transaction_is_told_once(tmp_path: Path) -> None:
    """R21: reported lost, not silently reset; and the stream then goes on."""
    limits = Limits(transaction_idle_seconds=0.0)
    async with real_leader(tmp_path, limits) as host, served(host) as url, connected(url) as client:
        await client.run("BEGIN")
        await client.run("SELECT count(*) FROM sqlite_schema")
        await host.service.sweep()
        error = await client.fails("execute", stream_id=1, stmt={"sql": "SELECT 1"})
        assert error["code"] == "STREAM_EXPIRED"
        assert await client.run("SELECT 1") == [[1]]


async def test_a_forgotten_stream_goes_on(leader: RealHost, url: str) -> None:
    async with connected(url) as client:
        assert await client.run("SELECT 1") == [[1]]
        await leader.service._end_streams()
        leader.service._connections._closing = False
        assert await client.run("SELECT 2") == [[2]]


# --- cursors ------------------------------------------------------------------------------------------------------

MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT i, hex(zeroblob(50)) FROM n"


def steps(*texts: str) -> dict[str, object]:
    return {"steps": [{"stmt": {"sql": sql}} for sql in texts]}


async def test_a_cursor_is_fetched_in_pieces(url: str) -> None:
    async with connected(url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=5, batch=steps(MANY.format(5000)))
        entries: list[dict[str, object]] = []
        done, fetches = False, 0
        while not done:
            answer = await client.ask("fetch_cursor", cursor_id=5, max_count=700)
            assert len(answer["entries"]) <= 700
            entries += answer["entries"]
            done, fetches = answer["done"], fetches + 1
        assert [entry["type"] for entry in entries] == ["step_begin", *["row"] * 5000, "step_end"]
        assert fetches >= 8
        await client.ask("close_cursor", cursor_id=5)
        assert await client.run("SELECT 1") == [[1]]


async def test_one_answer_of_a_cursor_is_bounded_in_bytes(url: str) -> None:
    async with connected(url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch=steps(MANY.format(30_000)))
        answer = await client.ask("fetch_cursor", cursor_id=1, max_count=4_000_000_000)
        assert 1000 < len(answer["entries"]) < 30_000
        assert not answer["done"]


async def test_a_cursor_given_up_holds_nothing(leader: RealHost, url: str) -> None:
    async with connected(url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch=steps(MANY.format(100_000)))
        assert leader.service.status().cursors == 1
        await client.ask("close_cursor", cursor_id=1)
        assert leader.service.status().cursors == 0
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch=steps(MANY.format(100_000)))
        await client.ask("close_stream", stream_id=1)
        assert leader.service.status().cursors == 0


async def test_a_request_may_overtake_a_cursor_of_its_stream(url: str) -> None:
    async with connected(url) as client:
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch=steps(MANY.format(3000)))
        assert await client.run("SELECT 1") == [[1]]
        answer = await client.ask("fetch_cursor", cursor_id=1, max_count=10_000)
        assert (len(answer["entries"]), answer["done"]) == (3002, True)


async def test_a_cursor_that_failed_to_open_says_so_until_it_is_closed(follower: RealHost) -> None:
    async with served(follower) as url, connected(url) as client:
        error = await client.fails("open_cursor", stream_id=1, cursor_id=1, batch=steps("CREATE TABLE t(a)"))
        assert error["code"] == "WALSHIP_NOT_LEADER"
        assert (await client.fails("fetch_cursor", cursor_id=1, max_count=1))["code"] == "CURSOR_NOT_OPEN"
        await client.ask("close_cursor", cursor_id=1)
        await client.ask("open_cursor", stream_id=1, cursor_id=1, batch=steps("SELECT 1"))


# --- bounds -------------------------------------------------------------------------------------------------------


async def test_a_full_lane_stops_the_reading(leader: RealHost, url: str) -> None:
    """A client that sends without end gets no further than a few requests beyond what runs."""
    async with connected(url) as holder, connected(url) as flooder:
        await holder.run("CREATE TABLE t(a)")
        await holder.run("BEGIN IMMEDIATE")
        sent = 0
        text = json.dumps("x" * 10_000)
        message = '{"type":"request","request_id":1,"request":{"type":"execute","stream_id":1,"stmt":{"sql":%s}}}'
        try:
            async with asyncio.timeout(1):
                while True:
                    insert = f"INSERT INTO t VALUES ({sent}) -- {text}"
                    await flooder.connection.send(message % json.dumps(insert))
                    sent += 1
        except TimeoutError:
            pass
        assert sent < 2000  # what the kernel's buffers hold, and no more
        await holder.run("COMMIT")
        assert (await flooder.hear())["type"] == "response_ok"
        flooder.connection.transport.abort()


async def test_a_client_that_does_not_read_is_cut_off(leader: RealHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "STALL_SECONDS", 0.2)
    app = NodeApp(leader.service, leader, name=leader.name)
    async with (
        asyncio.timeout(20),
        serving(app, listen("127.0.0.1", 0), drain_seconds=1) as address,
        connected(address.url) as client,
    ):
        client.connection.transport.pause_reading()
        for _ in range(30):
            await client.send("execute", stream_id=1, stmt={"sql": MANY.format(20_000)})
        await eventually(lambda: app._door.connections == 0)
        assert leader.service.status().active_calls == 0
        client.connection.transport.abort()


async def test_clients_that_do_not_read_share_a_bound(leader: RealHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has most waiting goes; the others, and who reads, go on."""
    monkeypatch.setattr(shell, "SHARED_UNSENT_BYTES", 8 << 20)
    app = NodeApp(leader.service, leader, name=leader.name)
    async with (
        asyncio.timeout(20),
        serving(app, listen("127.0.0.1", 0), drain_seconds=1) as address,
        connected(address.url) as hog,
        connected(address.url) as reader,
    ):
        hog.connection.transport.pause_reading()
        for stream in range(2, 30):
            await hog.send("open_stream", stream_id=stream)
            await hog.send("execute", stream_id=stream, stmt={"sql": MANY.format(20_000)})
        await eventually(lambda: app._door.connections == 1)
        assert await reader.run("SELECT 1") == [[1]]
        assert app._door.unsent_bytes == app._door.jobs == app._door.job_bytes == 0
        hog.connection.transport.abort()


async def test_one_connection_does_not_run_everything_at_once(
    leader: RealHost, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an open transaction goes on although all others wait for it."""
    monkeypatch.setattr(shell, "RUNNING", 4)
    async with connected(url) as client:
        await client.run("CREATE TABLE t(a)")
        await client.run("BEGIN IMMEDIATE")
        sent: list[int] = []
        for stream in range(2, 12):
            await client.send("open_stream", stream_id=stream)
            sent.append(
                await client.send("execute", stream_id=stream, stmt={"sql": f"INSERT INTO t VALUES ({stream})"})
            )
        await client.run("INSERT INTO t VALUES (1)")
        assert leader.service.status().active_calls == 4
        await client.run("COMMIT")
        for request_id in sent:
            assert (await client.answer(request_id))["type"] == "response_ok"
        assert await client.run("SELECT count(*) FROM t") == [[11]]


async def test_pings_without_end_cost_nothing(url: str) -> None:
    """A client that sends pings and does not read the pongs is not read from either."""
    async with connected(url) as client:
        transport = client.connection.transport
        transport.pause_reading()
        pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 2000
        try:
            for _ in range(100):  # 26 MB, of which the kernel's buffers hold less than half
                transport.write(pings)
                await eventually(lambda: transport.get_write_buffer_size() < 1 << 20, timeout_seconds=0.5)
            pytest.fail("all pings were taken")
        except TimeoutError:
            transport.abort()


async def test_a_message_in_endless_pieces_costs_nothing(url: str) -> None:
    async with connected(url) as client:
        transport = client.connection.transport
        transport.write(Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True))
        transport.write(Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 50_000)
        transport.write(Frame(Opcode.CONT, b'{"type":"hello"}').serialize(mask=True))
        assert (await client.hear())["type"] == "hello_ok"


# --- the end ------------------------------------------------------------------------------------------------------


async def test_a_stopping_server_says_goodbye(leader: RealHost) -> None:
    async with served(leader) as url:
        client = await _left_open(url)
    assert (await client.closed())[0] == 1012


async def test_a_stopping_server_lets_a_transaction_end(leader: RealHost) -> None:
    app = NodeApp(leader.service, leader, name=leader.name, drain_seconds=5)
    context = serving(app, listen("127.0.0.1", 0), drain_seconds=5)
    address: Address = await context.__aenter__()
    client = await _left_open(address.url)
    await client.run("CREATE TABLE t(a)")
    await client.run("BEGIN IMMEDIATE")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(context.__aexit__(None, None, None))
        await asyncio.sleep(0.3)  # uvicorn looks every 0.1 s
        await client.run("INSERT INTO t VALUES (1)")
        await client.run("COMMIT")
        assert (await client.closed())[0] == 1012


async def _left_open(url: str) -> Socket:
    connection = await websockets.connect(url.replace("http", "ws"), subprotocols=[websockets.Subprotocol("hrana3")])
    client = Socket(connection)
    await client.hello()
    await client.ask("open_stream", stream_id=1)
    return client


async def test_too_many_connections_are_refused(leader: RealHost) -> None:
    app = NodeApp(leader.service, leader, name=leader.name)
    app._door.max_connections = 1
    async with serving(app, listen("127.0.0.1", 0), drain_seconds=1, bounds=Bounds()) as address:
        async with connected(address.url):
            with pytest.raises(websockets.InvalidStatus) as caught:
                await websockets.connect(address.url.replace("http", "ws"))
            assert caught.value.response.status_code == 503
        async with connected(address.url):
            pass


async def test_a_half_open_handshake_is_no_fault(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        raw.setblocking(False)
        answer = await asyncio.get_running_loop().sock_recv(raw, 1000)
    assert b" 400 " in answer.split(b"\r\n")[0] + b" "
    assert not [record for record in caplog.records if record.exc_info]


# --- unmodified clients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["libsql_client_ws", "libsql_client_http"])
async def test_pypi_libsql_client(leader: RealHost, name: str) -> None:
    async with running(leader, name):
        pass
