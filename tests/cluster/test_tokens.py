"""Tokens on real processes: who is let in where, who may write, and that no log ever shows one (docs/security.md)."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.cluster.harness import Cluster
from tests.hrana.tokens import Issuer
from walship.coordination.record import read_cluster
from walship.coordination.store import open_store

STATIC = "static-token-5d41402abc4b2a76"
ISSUER = Issuer()
STRANGER = Issuer()
DOORS = ("proxy", "n1", "n2")
PATHS = ("/v1/execute", "/v1/batch", "/v2/pipeline", "/v3/pipeline", "/v3/cursor")
SHOWN: list[str] = []  # every token any test sent


def token(**claims: Any) -> str:
    return ISSUER.token(**claims)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("tokens")
    keys = root / "keys.pem"
    keys.write_bytes(ISSUER.pem)
    words = ("--auth-jwt-key", str(keys), "--log-level", "debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WALSHIP_AUTH_TOKEN", STATIC)
        cluster = Cluster(root, nodes=2, node_words=words, proxy_words=words)
        try:
            cluster.start()
            assert post(cluster, "proxy", "/v2/pipeline", "CREATE TABLE t (x)", STATIC).status_code == 200
            yield cluster
        finally:
            cluster.end()


def body_of(path: str, sql: str, baton: str | None = None) -> dict[str, Any]:
    stmt = {"sql": sql}
    if path == "/v1/execute":
        return {"stmt": stmt}
    if path == "/v1/batch":
        return {"batch": {"steps": [{"stmt": stmt}]}}
    if path == "/v3/cursor":
        return {"baton": baton, "batch": {"steps": [{"stmt": stmt}]}}
    return {"baton": baton, "requests": [{"type": "execute", "stmt": stmt}]}


def post(
    cluster: Cluster, door: str, path: str, sql: str, shown: str | None, baton: str | None = None
) -> httpx.Response:
    headers = {}
    if shown is not None:
        SHOWN.append(shown)
        headers["authorization"] = f"Bearer {shown}".strip()
    return httpx.post(cluster.processes[door].url + path, json=body_of(path, sql, baton), headers=headers, timeout=20)


def ok(response: httpx.Response) -> bool:
    return response.status_code == 200 and '"error":{' not in response.text and '"type":"error"' not in response.text


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", DOORS)
def test_without_a_good_token_nothing_is_run(cluster: Cluster, door: str, path: str) -> None:
    def code(shown: str | None) -> tuple[int, str]:
        return refused(post(cluster, door, path, "SELECT 1", shown))

    assert code(None) == (401, "AUTH_HTTP_HEADER_MISSING")
    assert code("") == (401, "AUTH_JWT_MISSING")
    assert code(STATIC[:-1]) == (401, "AUTH_JWT_INVALID")
    assert code(STRANGER.token()) == (401, "AUTH_JWT_INVALID")
    assert code(token(exp=time.time() - 1)) == (401, "AUTH_JWT_EXPIRED")
    assert code(token(nbf=time.time() + 100)) == (401, "AUTH_JWT_IMMATURE")
    assert code(token(id="other")) == (403, "AUTH_NAMESPACE")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", DOORS)
def test_every_kind_of_good_token_reads(cluster: Cluster, door: str, path: str) -> None:
    for shown in (STATIC, token(), token(a="ro"), token(p={"ro": {"ns": ["default"]}}, exp=time.time() + 60)):
        assert ok(post(cluster, door, path, "SELECT count(*) FROM t", shown))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", ["proxy", "n1"])
def test_a_token_may_write_if_it_says_so(cluster: Cluster, door: str, path: str) -> None:
    assert ok(post(cluster, door, path, "INSERT INTO t VALUES (1)", token(a="rw")))
    assert refused(post(cluster, door, path, "INSERT INTO t VALUES (1)", token(a="ro"))) == (403, "AUTH_READ_ONLY")


WRITES = (
    "INSERT INTO t VALUES (2)",
    "WITH x AS (SELECT 2) INSERT INTO t SELECT * FROM x",
    "/* select */ DELETE FROM t",
    "UPDATE t SET x = 3 RETURNING x",
    "REPLACE INTO t VALUES (2)",
    "CREATE TABLE other (x)",
    "DROP TABLE t",
    "ALTER TABLE t ADD COLUMN y",
    "VACUUM",
    "REINDEX",
    "ANALYZE",
    "PRAGMA user_version = 7",
    "PRAGMA application_id = 7",
    "BEGIN IMMEDIATE; INSERT INTO t VALUES (2); COMMIT",
    "BEGIN; INSERT INTO t VALUES (2); COMMIT",
    "SAVEPOINT a; INSERT INTO t VALUES (2); RELEASE a",
    "SELECT 1; INSERT INTO t VALUES (2)",
    "PRAGMA foreign_keys = ON; INSERT INTO t VALUES (2)",
    "CREATE TEMP TABLE u (x); INSERT INTO t VALUES (2)",
    "PRAGMA walship_ack = 0; INSERT INTO t VALUES (2)",
)


@pytest.mark.parametrize("door", DOORS)
def test_no_statement_writes_with_a_read_only_token(cluster: Cluster, door: str) -> None:
    """However it is dressed: one by one, and as scripts, on a stream and off it."""
    reader = token(a="ro")

    def state() -> tuple[Any, ...]:
        at = cluster.status("n1")["positions"]["captured"]
        answer = post(cluster, "n1", "/v2/pipeline", "SELECT count(*), sum(x) FROM t", STATIC).json()
        return at, answer["results"][0]["response"]["result"]["rows"]

    before = state()
    url = cluster.processes[door].url + "/v3/pipeline"
    SHOWN.append(reader)
    for sql in WRITES:
        for request in (
            {"type": "sequence", "sql": sql},
            {"type": "batch", "batch": {"steps": [{"stmt": {"sql": part}} for part in sql.split("; ")]}},
        ):
            for requests in ([request], [request, {"type": "close"}]):
                answer = httpx.post(
                    url, json={"requests": requests}, headers={"authorization": f"Bearer {reader}"}, timeout=20
                )
                assert answer.status_code in (200, 400, 403, 409), (sql, answer.text)
    assert state() == before


@pytest.mark.parametrize("door", ["proxy", "n1"])
def test_a_read_only_token_reads_in_transactions(cluster: Cluster, door: str) -> None:
    reader, baton = token(a="ro"), None
    for sql in ("BEGIN", "SELECT count(*) FROM t", "SAVEPOINT a", "RELEASE a", "COMMIT"):
        answer = post(cluster, door, "/v3/pipeline", sql, reader, baton)
        assert ok(answer), (sql, answer.text)
        baton = answer.json()["baton"]


@pytest.mark.parametrize("door", ["proxy", "n1"])
def test_a_read_only_token_cannot_go_on_with_a_writing_transaction(cluster: Cluster, door: str) -> None:
    """A baton is no right: what counts is the token of the request."""
    first = post(cluster, door, "/v3/pipeline", "BEGIN IMMEDIATE", STATIC)
    baton = first.json()["baton"]
    answer = post(cluster, door, "/v3/pipeline", "INSERT INTO t VALUES (77)", token(a="ro"), baton)
    assert refused(answer) == (403, "AUTH_READ_ONLY")
    rows = post(cluster, "n1", "/v2/pipeline", "SELECT 1 FROM t WHERE x = 77", STATIC).json()
    assert rows["results"][0]["response"]["result"]["rows"] == []


@pytest.mark.parametrize("door", DOORS)
def test_what_is_open_and_what_is_closed(cluster: Cluster, door: str) -> None:
    url = cluster.processes[door].url
    for path in ("/health", "/version", "/v2", "/v3", "/status", "/metrics"):
        assert httpx.get(url + path).status_code == 200, path
    for path in ("/dump", "/info", "/export/1", "/sync/1/1/2", "/", "/admin/orphans", "/no-such-page"):
        assert httpx.get(url + path).status_code == 401, path
    preflight = httpx.options(url + "/v2/pipeline", headers={"access-control-request-method": "POST"})
    assert preflight.status_code == 204


def test_a_401_says_how_to_authenticate(cluster: Cluster) -> None:
    for door in DOORS:
        answer = post(cluster, door, "/v2/pipeline", "SELECT 1", None)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("door", DOORS)
async def test_hello_carries_the_token_over_websocket(cluster: Cluster, door: str) -> None:
    url = cluster.processes[door].url.replace("http", "ws")

    async def hello(shown: str | None, *sql: str) -> list[Any]:
        SHOWN.append(shown or "")
        async with connect(url, subprotocols=["hrana3"], open_timeout=5) as socket:  # type: ignore[list-item]
            await socket.send(json.dumps({"type": "hello", "jwt": shown}))
            answers = [json.loads(await socket.recv())]
            if not sql:
                return answers
            requests: list[dict[str, Any]] = [{"type": "open_stream", "stream_id": 1}]
            requests += [{"type": "execute", "stream_id": 1, "stmt": {"sql": text}} for text in sql]
            for number, request in enumerate(requests):
                await socket.send(json.dumps({"type": "request", "request_id": number, "request": request}))
                answers.append(json.loads(await socket.recv()))
            return answers

    async with asyncio.timeout(20):
        (no,) = await hello(None)
        assert (no["type"], no["error"]["code"]) == ("hello_error", "AUTH_JWT_MISSING")
        (no,) = await hello(STRANGER.token())
        assert (no["type"], no["error"]["code"]) == ("hello_error", "AUTH_JWT_INVALID")
        answers = await hello(token(a="ro"), "SELECT 1", "INSERT INTO t VALUES (1)")
        assert [each["type"] for each in answers] == ["hello_ok", "response_ok", "response_ok", "response_error"]
        assert answers[-1]["error"]["code"] == "AUTH_READ_ONLY"
        assert (await hello(STATIC, "SELECT 1"))[-1]["type"] == "response_ok"


def knock(url: str, path: str, credential: str | None) -> bytes:
    parts = urlsplit(url)
    shown = "" if credential is None else f"authorization: Walship {credential}\r\n"
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as at:
        at.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n{shown}connection: upgrade\r\nupgrade: x\r\n\r\n".encode())
        return at.recv(65536).split(b"\r\n")[0]


async def test_only_the_cluster_opens_the_clusters_ports(cluster: Cluster) -> None:
    """Behind them is no token: a link may write, and replication gives everything away."""
    store = open_store(f"file://{cluster.root}/store")
    seen = await read_cluster(store)
    await store.close()
    assert seen is not None
    url = cluster.processes["n1"].url
    for purpose in ("link", "replication"):
        other = "link" if purpose == "replication" else "replication"
        for wrong in (None, "", "0" * 64, STATIC, seen.record.secret, seen.record.credential(other)):
            assert b" 401 " in knock(url, f"/walship/{purpose}", wrong)
        assert b" 101 " in knock(url, f"/walship/{purpose}", seen.record.credential(purpose))
    SHOWN.extend([seen.record.secret, seen.record.credential("link"), seen.record.credential("replication")])
    assert repr(seen.record).find(seen.record.secret) < 0


def test_the_records_are_for_their_owner_only(cluster: Cluster) -> None:
    assert (cluster.root / "store").stat().st_mode & 0o077 == 0


CLIENT = """
import sys
name, url, token = sys.argv[1:]
if name == "libsql":
    import libsql
    connection = libsql.connect(url, auth_token=token)
else:
    import turso_serverless
    connection = turso_serverless.connect(url, auth_token=token)
print(connection.execute("SELECT 41 + 1").fetchone()[0])
"""


@pytest.mark.parametrize("name", ["libsql", "turso_serverless"])
def test_unmodified_clients_show_their_token(cluster: Cluster, name: str) -> None:
    def run(shown: str) -> subprocess.CompletedProcess[str]:
        SHOWN.append(shown)
        words = [sys.executable, "-c", CLIENT, name, cluster.url, shown]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)

    assert run(token(a="ro")).stdout == "42\n"
    wrong = run("wrong-token-of-a-client")
    assert wrong.returncode != 0
    assert "401" in wrong.stderr


def test_status_shows_its_token_where_it_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "walship", "status", cluster.url, "--json", "--auth-token", STATIC]
    assert json.loads(subprocess.run(words, capture_output=True, timeout=30, check=True).stdout)["leader"] == "n1"


def test_zz_no_token_is_in_any_log(cluster: Cluster) -> None:
    """Last, when all were sent; the processes log at DEBUG."""
    assert len(SHOWN) > 20
    secret = {shown for shown in SHOWN if len(shown) > 8}
    pieces = {
        piece for shown in secret for piece in shown.split(".") if len(piece) > 30 and piece != "default"
    } | secret
    heads = {ISSUER.token().split(".")[0]}  # the head of every JWT of this kind is the same, and no secret
    for door in DOORS:
        log = cluster.processes[door].log_path.read_text()
        found = [piece for piece in pieces - heads if piece in log]
        assert not found
        assert "Traceback" not in log
