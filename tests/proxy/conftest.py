"""A proxy in front of three small nodes, and a client that speaks Hrana over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.app import Proxy, background, serve
from proxy.freshness import Neighbours
from proxy.streams import StreamLimits
from tests.proxy.small_node import History, SmallNode
from tests.waiting import eventually
from walship.config import ProxyConfig
from walship.coordination.record import ClusterRecord, create_cluster
from walship.coordination.store import Store, open_store
from walship.formats.link import Role
from walship.front.listen import listen

KEY = b"k" * 32
PATIENCE_SECONDS = 10.0


def value_of(cell: dict[str, Any]) -> Any:
    return int(cell["value"]) if cell["type"] == "integer" else cell.get("value")


def rows_of(result: dict[str, Any]) -> list[list[Any]]:
    """The rows of one `execute` result."""
    assert result["type"] == "ok", result
    return [[value_of(cell) for cell in row] for row in result["response"]["result"]["rows"]]


def execute(sql: str, *args: int | str) -> dict[str, Any]:
    values = [
        {"type": "integer", "value": str(arg)} if isinstance(arg, int) else {"type": "text", "value": arg}
        for arg in args
    ]
    return {"type": "execute", "stmt": {"sql": sql, "args": values}}


CLOSE = {"type": "close"}


class Client:
    """One HTTP client of the proxy."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, requests: list[Any], *, baton: str | None = None, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post("/v3/pipeline", json={"baton": baton, "requests": requests}, headers=names)

    async def run(self, sql: str, *args: int | str, **headers: str) -> list[list[Any]]:
        """One statement on a stream of its own, as @libsql/client sends it."""
        response = await self.post([execute(sql, *args), CLOSE], **headers)
        assert response.status_code == 200, response.text
        return rows_of(response.json()["results"][0])


@dataclass
class Cluster:
    store: Store
    history: History
    leader: SmallNode
    followers: list[SmallNode]
    proxy: Proxy
    client: Client
    stack: contextlib.AsyncExitStack

    @property
    def nodes(self) -> list[SmallNode]:
        return [self.leader, *self.followers]

    def served(self, node: SmallNode) -> int:
        return len(node.served)


Start = Callable[..., Awaitable[Cluster]]


@contextlib.asynccontextmanager
async def proxy_serving(
    store: Store, config: ProxyConfig, limits: StreamLimits | None = None, neighbours: Neighbours | None = None
) -> AsyncIterator[Proxy]:
    """A proxy as `proxy.app.run` makes it, without signals."""
    proxy = Proxy(config, store, baton_key=KEY, rng=random.Random(7), stream_limits=limits, neighbours=neighbours)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        async with background(proxy), asyncio.TaskGroup() as tasks:
            ready = asyncio.Event()
            tasks.create_task(serve(proxy, listener, lambda _url: ready.set()))
            await ready.wait()
            try:
                yield proxy
            finally:
                proxy.drain()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a cluster: `await start(followers=2, limits=..., **config)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def begin(
            followers: int = 2,
            limits: StreamLimits | None = None,
            *,
            leader: bool = True,
            acks: int = 0,
            neighbours: Neighbours | None = None,
            **config: Any,
        ) -> Cluster:
            store = open_store(f"file://{tmp_path / 'store'}")
            stack.push_async_callback(store.close)
            history = History(tmp_path / "data.db")
            nodes = [SmallNode("leader", history, Role.LEADER)]
            nodes += [SmallNode(f"follower{n}", history, Role.FOLLOWER) for n in range(1, followers + 1)]
            names = tuple(node.name for node in nodes)
            await create_cluster(store, ClusterRecord(cluster_id="0" * 32, created_ms=0, voters=names, acks=acks))
            for node in nodes if leader else nodes[1:]:
                await stack.enter_async_context(node.serving(store))
            settings = ProxyConfig(cluster_url="", drain_seconds=2.0, **config)
            proxy = await stack.enter_async_context(proxy_serving(store, settings, limits, neighbours))
            http = await stack.enter_async_context(
                httpx.AsyncClient(base_url=proxy.url, timeout=20, limits=httpx.Limits(max_connections=100))
            )
            cluster = Cluster(store, history, nodes[0], nodes[1:], proxy, Client(http), stack)
            expected = len(nodes) if leader else len(nodes) - 1
            await eventually(lambda: sum(backend.usable for backend in proxy.backends) == expected)
            return cluster

        yield begin
