"""WebSocket and /dump on real processes: npm @libsql/client, tokens, floods, a dump that a shell reads, stops."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import websockets

from tests.cluster.harness import Cluster, content_of, eventually
from tests.node.socket_client import connected

NODE_MODULES = Path(__file__).resolve().parents[2] / "examples" / "node"

NPM_CLIENT = """
import { createClient } from "@libsql/client";
import assert from "node:assert/strict";

const client = createClient({ url: process.argv[2], intMode: "bigint" });
await client.execute("CREATE TABLE npm(id INTEGER PRIMARY KEY, name TEXT, data BLOB)");
await client.batch([
    { sql: "INSERT INTO npm VALUES (?, ?, ?)", args: [9007199254740993n, "é", new Uint8Array([0, 255])] },
    { sql: "INSERT INTO npm(name) VALUES (:name)", args: { name: "two" } },
], "write");
const { rows } = await client.execute("SELECT * FROM npm ORDER BY id");
assert.equal(rows[0].id, 9007199254740993n);
assert.deepEqual(new Uint8Array(rows[0].data), new Uint8Array([0, 255]));
for (const [ends, count] of [["rollback", 2n], ["commit", 3n]]) {
    const transaction = await client.transaction("write");
    await transaction.execute("INSERT INTO npm(name) VALUES ('x')");
    await transaction[ends]();
    assert.equal((await client.execute("SELECT count(*) AS n FROM npm")).rows[0].n, count);
}
await client.executeMultiple("CREATE TABLE more(a); INSERT INTO more VALUES (1); INSERT INTO more VALUES (2);");
await client.migrate(["ALTER TABLE more ADD COLUMN b", "UPDATE more SET b = a"]);
await assert.rejects(client.execute("INSERT INTO npm(id) VALUES (9007199254740993)"), { code: "SQLITE_CONSTRAINT" });
const answers = await Promise.all(Array.from({ length: 200 }, (_, n) => client.execute(`SELECT ${n} AS n`)));
answers.forEach((answer, n) => assert.equal(answer.rows[0].n, BigInt(n)));
client.close();
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("sockets"))
    try:
        yield cluster.start()
    finally:
        cluster.end()


@pytest.mark.skipif(not (NODE_MODULES / "node_modules").exists(), reason="npm install in examples/node was not run")
def test_npm_libsql_client_over_websocket(cluster: Cluster, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node is not None
    url = cluster.url.replace("http", "ws", 1)
    command = [node, "--input-type=module", "-", url]
    done = subprocess.run(command, input=NPM_CLIENT, cwd=NODE_MODULES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def peak_bytes(cluster: Cluster, name: str) -> int:
    """VmHWM of a process."""
    status = Path(f"/proc/{cluster.processes[name].pid}/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 shell here")
def test_a_dump_through_the_proxy_is_whole_and_costs_no_memory(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.client() as client:
        client.execute("CREATE TABLE big(id INTEGER PRIMARY KEY, text TEXT)")
        client.execute(
            "INSERT INTO big WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000) "
            "SELECT i, 'row ' || i || hex(zeroblob(500)) FROM n"
        )
    cluster.wait_level()
    before = {name: peak_bytes(cluster, name) for name in ("proxy", *cluster.names)}
    script = tmp_path / "dump.sql"
    with (
        httpx.stream("GET", f"{cluster.url}/dump?preserve_row_ids=true", timeout=60) as answer,
        script.open("wb") as file,
    ):
        assert answer.status_code == 200
        assert answer.headers["walship-served-by"] in cluster.followers
        for chunk in answer.iter_bytes():
            file.write(chunk)
    assert script.stat().st_size > 40_000_000
    grown = {name: peak_bytes(cluster, name) - size for name, size in before.items()}
    assert all(size < 12_000_000 for size in grown.values()), grown
    copy = tmp_path / "copy.db"
    with script.open("rb") as file:
        subprocess.run(["sqlite3", "-bail", str(copy)], stdin=file, check=True, timeout=60)
    assert content_of(copy, "SELECT count(*), sum(length(text)) FROM big") == [(40_000, 40_348_894)]


async def test_floods_end_in_errors_and_bounded_memory(cluster: Cluster) -> None:
    """Twenty clients send without reading; a canary meanwhile reads on."""
    before = peak_bytes(cluster, "proxy")
    big = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT hex(i) FROM n"

    async def flood(number: int) -> None:
        async with connected(cluster.url) as client:
            client.connection.transport.pause_reading()
            try:
                async with asyncio.timeout(4):
                    for stream in range(2, 1000):
                        await client.send("open_stream", stream_id=stream)
                        await client.send("execute", stream_id=stream, stmt={"sql": big if number % 2 else "SELECT 1"})
                    await asyncio.sleep(10)
            except TimeoutError:
                client.connection.transport.abort()

    async with connected(cluster.url) as canary, asyncio.TaskGroup() as tasks:
        floods = [tasks.create_task(flood(number)) for number in range(20)]
        while not all(each.done() for each in floods):
            async with asyncio.timeout(20):
                assert await canary.run("SELECT 1") == [[1]]
            await asyncio.sleep(0.05)
    assert peak_bytes(cluster, "proxy") - before < 400_000_000
    with cluster.client() as client:
        assert client.execute("SELECT 1").value == 1
    assert "Traceback" not in cluster.processes["proxy"].log_path.read_text("utf-8", "replace")


async def test_a_proxy_that_stops_lets_its_sockets_end(start_cluster: Callable[..., Cluster]) -> None:
    words = ("--drain-seconds", "2")
    cluster = start_cluster(nodes=1, ack=0, proxy_words=words, node_words=words)
    log = cluster.processes["proxy"].log_tail
    for name in ("proxy", "n1"):
        async with connected(cluster.processes[name].url) as client:
            await client.run(f"CREATE TABLE {name}(a)")
            await client.run("BEGIN IMMEDIATE")
            stopping = asyncio.create_task(asyncio.to_thread(cluster.processes[name].stop))
            if name == "proxy":
                await asyncio.to_thread(eventually, lambda: "drain" in log(), "the proxy drains")
                await client.run("COMMIT")
            assert (await client.closed())[0] == 1012
            assert await stopping == 0


async def test_tokens_over_websocket_are_kept_out_of_the_log(start_cluster: Callable[..., Cluster]) -> None:
    words = ("--auth-token", "a-secret-token", "--log-level", "debug")
    cluster = start_cluster(nodes=1, ack=0, proxy_words=words, node_words=words)
    for name in ("proxy", "n1"):
        url = cluster.processes[name].url
        async with connected(url, hello=False) as client:
            assert (await client.hello("another-secret"))["error"]["code"] == "AUTH_FAILED"
            assert (await client.closed())[0] == 1000
        async with connected(url, hello=False) as client:
            assert await client.hello("a-secret-token") == {"type": "hello_ok"}
            await client.ask("open_stream", stream_id=1)
            assert await client.run("SELECT 1") == [[1]]
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(url.replace("http", "ws") + "/?authToken=a-secret-token", subprotocols=["x"])  # type: ignore[list-item]
        log = cluster.processes[name].log_path.read_text("utf-8", "replace")
        assert "a-secret-token" not in log
        assert "another-secret" not in log
        assert json.dumps("hello") not in log
