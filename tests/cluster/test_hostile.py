"""Hostile input against real processes: a correct error, bounded memory, no traceback, nobody else harmed.

One cluster for the file. A canary reads through the proxy and through a node all the time; at the end it must have had
no error, no process may have used much memory, and no log may hold a traceback (docs/security.md).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.cluster.client import Client, Failure
from tests.cluster.harness import Cluster

MIB = 1 << 20
MOST_MEMORY_BYTES = 700 * MIB  # a process at rest takes about 90; bodies, answers and values have their bounds above
STATEMENT_SECONDS = 1.5
PATHS = ("/v1/execute", "/v1/batch", "/v2/pipeline", "/v3/pipeline", "/v3/cursor")
DOORS = ("proxy", "n1")
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Canary:
    """An honest client, reading a row again and again through one door."""

    def __init__(self, url: str) -> None:
        self.reads, self.slowest_seconds, self.failures = 0, 0.0, [""][:0]
        self._url, self._end = url, threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"canary {url}")
        self._thread.start()

    def _run(self) -> None:
        with Client(self._url) as client:
            while not self._end.wait(0.01):
                started = time.monotonic()
                try:
                    assert client.execute("SELECT x FROM canary WHERE id = 1").value == "alive"
                except (*Failure, AssertionError) as error:
                    self.failures.append(repr(error))
                self.reads += 1
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)

    def end(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    words = ("--statement-seconds", str(STATEMENT_SECONDS), "--write-seconds", str(STATEMENT_SECONDS))
    cluster = Cluster(tmp_path_factory.mktemp("hostile"), nodes=2, node_words=words)
    canaries: list[Canary] = []
    try:
        cluster.start()
        with cluster.client() as client:
            client.execute("CREATE TABLE canary (id INTEGER PRIMARY KEY, x TEXT)")
            client.execute("INSERT INTO canary VALUES (1, 'alive')")
            client.execute("CREATE TABLE t (x)")
        cluster.wait_level()
        canaries += [Canary(cluster.url), Canary(cluster.processes["n2"].url)]
        yield cluster
        for canary in canaries:
            canary.end()
            assert not canary.failures
            assert canary.reads > 100
            assert canary.slowest_seconds < 8.0  # a machine that runs other tests too; alone it is well below one
        for process in cluster.processes.values():
            assert process.alive
            assert peak_memory(process.pid) < MOST_MEMORY_BYTES, process.name
            log = process.log_path.read_text("utf-8", "replace")
            assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
    finally:
        for canary in canaries:
            canary.end()
        cluster.end()


def peak_memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read())
    assert found
    return int(found[1]) * 1024


HTTP = httpx.Client(timeout=30, verify=False)  # no TLS here, and its setup costs more than a request


def post(cluster: Cluster, door: str, path: str, body: bytes) -> httpx.Response:
    return HTTP.post(cluster.processes[door].url + path, content=body)


def is_a_clear_error(response: httpx.Response) -> bool:
    """Not 5xx; a message in words; JSON when it says so."""
    if response.headers["content-type"].startswith("application/json"):
        assert response.json()["message"]
    return 400 <= response.status_code < 500 and bool(response.text)


def run(cluster: Cluster, door: str, *requests: dict[str, Any], baton: str | None = None) -> httpx.Response:
    body = json.dumps({"baton": baton, "requests": requests}).encode()
    return post(cluster, door, "/v3/pipeline", body)


def execute(sql: str, *args: object) -> dict[str, Any]:
    return {"type": "execute", "stmt": {"sql": sql, "args": list(args)}}


def code_of(response: httpx.Response, number: int = 0) -> str:
    assert response.status_code == 200, response.text
    result = response.json()["results"][number]
    return str(result["error"]["code"]) if result["type"] == "error" else "ok"


# --- bodies that are no requests --------------------------------------------------------------------------------

MALFORMED = {
    "nothing": b"",
    "no json": b"hello",
    "half": b'{"requests":[{"type":"execute"',
    "not utf-8": b'{"requests":[{"type":"execute","stmt":{"sql":"\xff\xfe"}}]}',
    "lone surrogate": b'{"requests":[{"type":"execute","stmt":{"sql":"\\ud800"}}],"stmt":{"sql":"\\ud800"}}',
    "a number": b"17",
    "an array": b"[]",
    "null": b"null",
    "nesting": b'{"requests":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "nesting in an unknown field": b'{"requests":[],"x":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "nested conditions": b'{"requests":[{"type":"batch","batch":{"steps":[{"stmt":{"sql":"select 1"},"condition":'
    + b'{"type":"not","cond":' * 90_000
    + b'{"type":"is_autocommit"}'
    + b"}" * 90_000
    + b"}]}}]}",
    "a huge integer": b'{"requests":[{"type":"execute","stmt":{"sql_id":' + b"9" * 100_000 + b"}}]}",
    "a huge float": b'{"requests":[{"type":"execute","stmt":{"sql_id":1e99999}}]}',
    "an unknown type": b'{"requests":[{"type":"explode"}],"batch":{"steps":[{"stmt":{"sql":1}}]}}',
    "a type that is none": b'{"requests":[{"type":{"type":"execute"}}]}',
    "both texts": b'{"requests":[{"type":"execute","stmt":{"sql":"select 1","sql_id":1}}]}',
    "zeros": b"\0" * 10_000,
    "gzip": b"\x1f\x8b\x08\x00" + b"\0" * 100,
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_request_is_a_clear_error(cluster: Cluster, door: str, path: str, name: str) -> None:
    assert is_a_clear_error(post(cluster, door, path, MALFORMED[name]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
near_values = st.fixed_dictionaries(
    {"type": st.sampled_from(["null", "integer", "float", "text", "blob", "x"])},
    optional={"value": json_values, "base64": st.text(max_size=8)},
)
near_statements = st.fixed_dictionaries(
    {},
    optional={
        "sql": st.text(max_size=40) | st.sampled_from(["select ?", "select 1", "", ";", "begin", "rollback"]),
        "sql_id": st.integers(-(2**33), 2**33),
        "args": st.lists(near_values, max_size=3),
        "named_args": st.lists(st.fixed_dictionaries({"name": st.text(max_size=3), "value": near_values}), max_size=2),
        "want_rows": st.none() | st.booleans() | json_values,
    },
)
near_conditions = st.recursive(
    st.fixed_dictionaries({"type": st.sampled_from(["ok", "error", "is_autocommit"]), "step": st.integers(-2, 3)}),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("not"), "cond": inner})
        | st.fixed_dictionaries({"type": st.sampled_from(["and", "or"]), "conds": st.lists(inner, max_size=2)})
    ),
    max_leaves=4,
)
near_batches = st.fixed_dictionaries(
    {
        "steps": st.lists(
            st.fixed_dictionaries({"stmt": near_statements}, optional={"condition": near_conditions}), max_size=4
        )
    }
)
near_requests = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["close", "execute", "batch", "sequence", "describe", "store_sql", "close_sql", "get_autocommit", "x"]
        )
    },
    optional={"stmt": near_statements, "batch": near_batches, "sql": st.text(max_size=30), "sql_id": st.integers()},
)
near_bodies = st.fixed_dictionaries(
    {"requests": st.lists(near_requests, max_size=4), "batch": near_batches, "stmt": near_statements},
    optional={"baton": st.none() | st.text(max_size=50)},
)


@pytest.mark.parametrize("door", DOORS)
@FUZZ
@given(path=st.sampled_from(PATHS), body=json_values | near_bodies)
def test_no_json_makes_a_server_error(cluster: Cluster, door: str, path: str, body: object) -> None:
    """What is nearly a request, and what is none: an answer or a clear error, never a 5xx of ours.

    On /v1 an error of SQLite is 500 by protocol (hrana.md 1.5).
    """
    response = post(cluster, door, path, json.dumps(body).encode())
    if response.status_code == 500 and path.startswith("/v1"):
        assert response.json()["code"].startswith("SQLITE_")
    elif response.status_code == 501:
        assert response.json()["code"] == "ARGS_BOTH_POSITIONAL_AND_NAMED"
    else:
        assert response.status_code == 200 or is_a_clear_error(response), response.text


# --- batons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_a_used_baton_is_refused_and_the_stream_goes_on(cluster: Cluster, door: str) -> None:
    first = run(cluster, door, execute("SELECT 1")).json()["baton"]
    second = run(cluster, door, execute("SELECT 2"), baton=first).json()["baton"]
    assert is_a_clear_error(run(cluster, door, execute("SELECT 3"), baton=first))
    assert run(cluster, door, execute("SELECT 4"), baton=second).status_code == 200


@pytest.mark.parametrize("door", DOORS)
def test_no_forged_baton_is_taken(cluster: Cluster, door: str) -> None:
    good = run(cluster, door, execute("SELECT 1")).json()["baton"]
    data = base64.b64decode(good)
    forged = [base64.b64encode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]).decode() for at in range(len(data))]
    forged += ["", "x", good[:-1], good + "A", "A" * 44, "é" * 44, "=" * 44, good.lower(), "x" * MIB]
    for baton in forged:
        if baton != good:
            assert is_a_clear_error(run(cluster, door, execute("SELECT 1"), baton=baton)), baton[:60]


# --- sizes and times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("announced", [True, False])
def test_100_megabytes_are_413(cluster: Cluster, door: str, announced: bool) -> None:
    """By their content-length before they are read; as chunks, as soon as they are too many."""
    with open_socket(cluster, door) as at:
        how = b"content-length: 100000000" if announced else b"transfer-encoding: chunked"
        at.sendall(b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\n" + how + b"\r\n\r\n")
        if not announced:
            with contextlib.suppress(OSError):
                for _ in range(20):
                    at.sendall(b"100000\r\n" + b" " * MIB + b"\r\n")
        assert at.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_many_large_bodies_at_once_stay_within_the_memory(cluster: Cluster) -> None:
    sockets = [open_socket(cluster, "proxy") for _ in range(40)]
    head = b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (15 * MIB)
    answers = set()

    def send(at: socket.socket) -> None:
        with contextlib.suppress(OSError):
            at.sendall(head + b" " * (15 * MIB - 1))
            at.settimeout(2)
            answers.add(at.recv(4096)[:12])

    threads = [threading.Thread(target=send, args=(at,)) for at in sockets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in sockets:
        at.close()
    assert b"HTTP/1.1 429" in answers


def open_socket(cluster: Cluster, door: str) -> socket.socket:
    parts = urlsplit(cluster.processes[door].url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=15)


@pytest.mark.parametrize("door", DOORS)
def test_a_head_without_end_is_431(cluster: Cluster, door: str) -> None:
    with open_socket(cluster, door) as at:
        with contextlib.suppress(OSError):
            for _ in range(100):
                at.sendall(b"GET /" if _ == 0 else b"a" * 1000)
        assert at.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_slow_heads_and_slow_bodies_are_408_and_cost_nobody_anything(cluster: Cluster) -> None:
    """200 connections at once that begin and stop."""
    starts = [b"POST /v2/pipeline HT", b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{"]
    slow = []
    for number in range(200):
        at = open_socket(cluster, DOORS[number % 2])
        at.sendall(starts[number // 2 % 2])
        slow.append(at)
    assert code_of(run(cluster, "proxy", execute("INSERT INTO t VALUES (1)"))) == "ok"
    for at in slow:
        with at:
            assert at.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert at.recv(1) == b""


@pytest.mark.parametrize("door", DOORS)
def test_half_closed_and_broken_off_connections_leave_nothing(cluster: Cluster, door: str) -> None:
    body = json.dumps({"requests": [execute("SELECT 1")]}).encode()
    whole = b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for size in (1, 20, len(whole) // 2, len(whole) - 1, len(whole)):
        for half in (True, False):
            with open_socket(cluster, door) as at:
                at.sendall(whole[:size])
                if half:
                    at.shutdown(socket.SHUT_WR)
                    at.recv(4096)  # an answer, or the end of the connection: never a hang
    for at in [open_socket(cluster, door) for _ in range(100)]:
        at.close()


@pytest.mark.parametrize("door", DOORS)
def test_pipelined_requests_are_answered_in_order(cluster: Cluster, door: str) -> None:
    def request(number: int) -> bytes:
        body = json.dumps({"requests": [execute(f"SELECT {number}"), {"type": "close"}]}).encode()
        return b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    with open_socket(cluster, door) as at:
        at.sendall(b"".join(map(request, range(300))))
        answers = b""
        while answers.count(b'"results"') < 300:
            piece = at.recv(1 << 20)
            assert piece
            answers += piece
    assert [int(n) for n in re.findall(rb'"rows":\[\[\{"type":"integer","value":"(\d+)"', answers)] == list(range(300))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2/pipeline HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET /walship/link HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"GET /walship/replication HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n\0\0\0\0",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_answer_or_an_end(cluster: Cluster, door: str, head: bytes) -> None:
    with open_socket(cluster, door) as at:
        at.sendall(head)
        at.shutdown(socket.SHUT_WR)
        answer = at.recv(4096)
        assert not answer or re.match(rb"HTTP/1\.[01] (4\d\d|204) ", answer), answer


# --- SQL --------------------------------------------------------------------------------------------------------

ENDLESS = "WITH RECURSIVE c(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM c) "


@pytest.mark.parametrize("door", DOORS)
def test_statements_have_limits_with_typed_errors(cluster: Cluster, door: str) -> None:
    cases = {
        ENDLESS + "SELECT count(*) FROM c": "SQLITE_INTERRUPT",
        "SELECT length(zeroblob(1000000000))": "SQLITE_TOOBIG",
        "SELECT printf('%.*c', 900000000, 'x')": "SQLITE_TOOBIG",
        "SELECT hex(randomblob(60000000))": "SQLITE_TOOBIG",
        "SELECT randomblob(30000000)": "RESPONSE_TOO_LARGE",
        ENDLESS + "SELECT x, 'a fairly long text for each row' FROM c": "RESPONSE_TOO_LARGE",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000: "SQLITE_UNKNOWN",
        "SELECT 1" + " + 1" * 5000: "SQLITE_UNKNOWN",
        "SELECT 'a' LIKE '" + "%a" * 5000 + "'": "SQLITE_UNKNOWN",
        "SELECT load_extension('/tmp/x')": "BLOCKED",
        "ATTACH '/etc/passwd' AS x": "BLOCKED",
        "VACUUM INTO '/tmp/x.db'": "BLOCKED",
        "PRAGMA writable_schema = ON": "BLOCKED",
        "SELECT readfile('/etc/passwd')": "SQL_INPUT_ERROR",
        "SELECT \0": "SQL_PARSE_ERROR",
        ENDLESS + "INSERT INTO t SELECT x FROM c": "SQLITE_INTERRUPT",
        "INSERT INTO t VALUES (zeroblob(500000000))": "SQLITE_TOOBIG",
    }
    found = {sql: code_of(run(cluster, door, execute(sql), {"type": "close"})) for sql in cases}
    assert found == cases
    assert code_of(run(cluster, door, execute("SELECT count(*) FROM t WHERE typeof(x) = 'blob'"))) == "ok"


def test_an_endless_write_is_undone_and_others_go_on(cluster: Cluster) -> None:
    before = run(cluster, "proxy", execute("SELECT count(*) FROM t")).json()["results"][0]
    assert code_of(run(cluster, "proxy", execute(ENDLESS + "INSERT INTO t SELECT x FROM c"))) == "SQLITE_INTERRUPT"
    after = run(cluster, "proxy", execute("SELECT count(*) FROM t")).json()["results"][0]
    assert after["response"]["result"]["rows"] == before["response"]["result"]["rows"]
    assert code_of(run(cluster, "proxy", execute("INSERT INTO canary VALUES (NULL, 'after')"))) == "ok"


@pytest.mark.parametrize("door", DOORS)
def test_counts_have_limits(cluster: Cluster, door: str) -> None:
    assert is_a_clear_error(run(cluster, door, *[execute("SELECT 1")] * 20_000))
    steps = [{"stmt": {"sql": "SELECT 1"}}] * 20_000
    assert is_a_clear_error(run(cluster, door, {"type": "batch", "batch": {"steps": steps}}))
    stored = [{"type": "store_sql", "sql_id": number, "sql": "SELECT 1"} for number in range(60)]
    answer = run(cluster, door, *stored)
    assert answer.status_code == 400 or code_of(answer, 59) == "SQL_STORE_TOO_MANY"
    answer = run(cluster, door, {"type": "store_sql", "sql_id": 1, "sql": "SELECT '" + "x" * 6000 + "'"})
    assert code_of(answer) == "SQL_STORE_TOO_LARGE"
    values = [{"type": "integer", "value": "1"}] * 40_000
    assert code_of(run(cluster, door, execute("SELECT ?", *values))) == "ARGS_INVALID"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("filler", ["x", "'", "(", "1+", "a ", ";", "/*", "--\n", "select 1;"])
def test_a_text_of_two_megabytes_stops_nobody(cluster: Cluster, door: str, filler: str) -> None:
    text = "SELECT " + filler * (2 * MIB // len(filler))
    response = run(cluster, door, execute(text))
    assert response.status_code == 200 or is_a_clear_error(response)


# --- WebSocket --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
async def test_websocket_floods_are_closed_or_wait(cluster: Cluster, door: str) -> None:
    """Garbage closes its connection with a code; a flood that reads no answer is not read from any further."""
    url = cluster.processes[door].url.replace("http", "ws")

    async def ends_with(message: str | bytes) -> int | None:
        async with connect(url, subprotocols=["hrana3"], compression=None) as ws:  # type: ignore[list-item]
            with contextlib.suppress(ConnectionClosed):
                await ws.send(message)
                while True:
                    await ws.recv()
            return ws.close_code

    async with asyncio.timeout(60):
        assert await ends_with("hello") == 1007
        assert await ends_with(b"\0\1") == 1003
        assert await ends_with('{"type":"explode"}') in (1007, 1008)
        assert (
            await ends_with('{"type":"request","request_id":1,"request":{"type":"open_stream","stream_id":1}}') == 1008
        )
        assert await ends_with('{"x":' + "[" * 300_000 + "]" * 300_000 + "}") == 1007
        async with connect(url, subprotocols=["hrana3"], compression=None, max_queue=1) as ws:  # type: ignore[list-item]
            await ws.send('{"type":"hello","jwt":null}')
            await ws.send('{"type":"request","request_id":0,"request":{"type":"open_stream","stream_id":1}}')
            statement = {"sql": "SELECT hex(zeroblob(50000))"}
            with contextlib.suppress(TimeoutError, ConnectionClosed):
                async with asyncio.timeout(5):
                    for number in range(1, 20_000):
                        request = {"type": "execute", "stream_id": 1, "stmt": statement}
                        await ws.send(json.dumps({"type": "request", "request_id": number, "request": request}))
            ws.transport.abort()
