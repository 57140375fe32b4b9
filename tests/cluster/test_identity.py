"""No reply ever carries another client's data: many clients over one shared link, some of them killed at any moment."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.cluster.harness import Cluster
from tests.node.socket_client import Socket, connected

CLIENTS = 64
SECONDS = 6.0
MARK = re.compile(r"<(\d+)>")


@dataclass
class Client:
    """One life of one client. Everything it asks for and gets bears its mark, and nothing else does."""

    url: str
    number: int
    rng: random.Random
    counts: dict[str, int]
    asked: int = 0

    @property
    def mark(self) -> str:
        return f"<{self.number}>"

    def check(self, answer: str, kind: str) -> None:
        found = MARK.findall(answer)
        assert set(found) == {str(self.number)}, f"{kind} of client {self.number} got marks of {set(found)}"
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def sql(self) -> str:
        """A read, a write or a big read, all of them showing the mark."""
        self.asked += 1
        choice = self.rng.random()
        if choice < 0.5:
            return f"SELECT '{self.mark}', {self.asked}"
        if choice < 0.7:
            return f"INSERT INTO marked VALUES ({self.number}, '{self.mark}') RETURNING mark"
        if choice < 0.8:
            return f"SELECT mark FROM marked WHERE client = {self.number} UNION ALL SELECT '{self.mark}'"
        if choice < 0.9:
            return f"SELECT no_such_column AS '{self.mark}' FROM \"table {self.mark}\""  # an error that names it
        rows = self.rng.randrange(1, 3000)
        return (
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) "
            f"SELECT i, '{self.mark}' || hex(zeroblob(20)) FROM n"
        )


@asynccontextmanager
async def cut_off(url: str, version: str) -> AsyncIterator[Socket]:
    """A connection that ends without a goodbye."""
    async with connected(url, version) as socket:
        try:
            yield socket
        finally:
            socket.connection.transport.abort()


async def over_socket(client: Client) -> None:
    async with cut_off(client.url, client.rng.choice(["hrana2", "hrana3"])) as socket:
        stream = 1
        while True:
            sent: list[int] = []
            for _ in range(client.rng.randrange(1, 6)):
                stream += 1
                await socket.send("open_stream", stream_id=stream)
                sent.append(await socket.send("execute", stream_id=stream, stmt={"sql": client.sql()}))
                if client.rng.random() < 0.9:
                    await socket.send("close_stream", stream_id=stream)
            for request_id in sent:
                client.check(json.dumps(await socket.answer(request_id)), "socket")


async def by_cursor(client: Client) -> None:
    async with cut_off(client.url, "hrana3") as socket:
        while True:
            batch = {"steps": [{"stmt": {"sql": client.sql()}}, {"stmt": {"sql": client.sql()}}]}
            await socket.ask("open_cursor", stream_id=1, cursor_id=1, batch=batch)
            texts: list[str] = []
            done = False
            while not done:
                answer = await socket.ask("fetch_cursor", cursor_id=1, max_count=500)
                texts.append(json.dumps(answer["entries"]))
                done = answer["done"]
            client.check("".join(texts), "socket cursor")
            await socket.ask("close_cursor", cursor_id=1)


async def over_http(client: Client) -> None:
    async with httpx.AsyncClient(base_url=client.url, timeout=30) as http:
        baton: str | None = None
        while True:
            stmt = {"sql": client.sql()}
            kind = client.rng.choice(["/v1/execute", "/v2/pipeline", "/v3/pipeline", "/v3/cursor"])
            body: dict[str, Any] = {"stmt": stmt}
            if kind.endswith("cursor"):
                body = {"baton": baton, "batch": {"steps": [{"stmt": stmt}]}}
            elif kind.endswith("pipeline"):
                closes = client.rng.random() < 0.7
                body = {"baton": baton, "requests": [{"type": "execute", "stmt": stmt}]}
                body["requests"] += [{"type": "close"}] if closes else []
            answer = await http.post(kind, json=body)
            client.check(answer.text, kind)
            if kind.endswith("cursor"):
                baton = json.loads(answer.text.partition("\n")[0])["baton"]
            elif kind.endswith("pipeline"):
                baton = answer.json()["baton"]


LIVES = (over_socket, over_socket, by_cursor, over_http)


async def lives(url: str, slot: int, until: float, counts: dict[str, int]) -> int:
    """One client after the other until the time is over, each killed at a random moment; how many there were."""
    rng = random.Random(slot)
    loop = asyncio.get_running_loop()
    life = 0
    while loop.time() < until:
        client = Client(url, slot + CLIENTS * life, rng, counts)
        life += 1
        try:
            async with asyncio.timeout(rng.uniform(0.2, 3.0)):
                await LIVES[slot % len(LIVES)](client)
        except TimeoutError:
            continue  # killed
    return life


async def test_no_reply_carries_another_clients_data(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster()
    counts: dict[str, int] = {}
    async with connected(cluster.url) as canary:
        await canary.run("CREATE TABLE marked(client INTEGER, mark TEXT)")
        await canary.run("CREATE INDEX by_client ON marked(client)")
        until = asyncio.get_running_loop().time() + SECONDS
        async with asyncio.TaskGroup() as tasks:
            slots = [tasks.create_task(lives(cluster.url, slot, until, counts)) for slot in range(CLIENTS)]
        lived = sum(slot.result() for slot in slots)
        assert await canary.run("SELECT count(*) FROM marked WHERE mark != '<' || client || '>'") == [[0]]
        assert (await canary.run("SELECT count(*) FROM marked"))[0][0] > 0
    assert lived > 2 * CLIENTS
    assert counts.keys() == {"socket", "socket cursor", "/v1/execute", "/v2/pipeline", "/v3/pipeline", "/v3/cursor"}
    assert sum(counts.values()) > 1000, counts
    for process in cluster.processes.values():
        assert "Traceback" not in process.log_path.read_text("utf-8", "replace")
