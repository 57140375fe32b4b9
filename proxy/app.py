"""The proxy process: composition of its parts, the HTTP server around them, and an orderly end.

Plan. One task group owns the node links, the sweeper of idle streams and the server. SIGTERM or SIGINT begin the end:
`/health` says so and new work is refused (typed, not done); what runs is finished within `drain_seconds`; transactions
still open are closed at their nodes; then the links go. Exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.admin import AdminProxy
from proxy.backends import Backends
from proxy.buffer import Hold, HoldLimits
from proxy.consistency import Floors, Settings
from proxy.dispatch import Dispatcher
from proxy.dump import dump
from proxy.embedded import EmbeddedProxy
from proxy.failover import Failover
from proxy.freshness import Freshness, Neighbours
from proxy.front import Front
from proxy.plan import Known
from proxy.status import cluster_status, refresh_gauges
from proxy.streams import StreamLimits, Streams
from proxy.websocket import SocketStream
from proxy.writes import Writes
from walship import __version__
from walship.config import ProxyConfig, open_gate
from walship.coordination.baton_key import baton_key
from walship.coordination.etcd_url import hide_password
from walship.coordination.presence import Presence
from walship.coordination.store import Store, open_store
from walship.errors import AuthFailed
from walship.front.answer import send_failure, send_preflight
from walship.front.body import Bodies
from walship.front.dump import DUMP_PATH
from walship.front.listen import BACKLOG, Address, listen
from walship.front.pages import plain_pages
from walship.front.protocol import Bounds
from walship.front.websocket import Door
from walship.front.websocket_protocol import websocket_options
from walship.hrana.http import ENDPOINTS, failure
from walship.metrics import ProxyMetrics

__all__ = ["Proxy", "background", "main", "run", "serve"]

log = logging.getLogger("walship.proxy")

SWEEP_SECONDS = 1.0


class Proxy:
    """Everything of one proxy but the socket. Make it on its loop; `run` must be running while it serves."""

    def __init__(
        self,
        config: ProxyConfig,
        store: Store,
        *,
        baton_key: bytes,
        rng: random.Random | None = None,
        stream_limits: StreamLimits | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        rng = rng or random.Random()
        self.config, self.url, self.name = config, "", config.name
        self.numbers = ProxyMetrics()
        self.floors = Floors()
        limits = stream_limits or StreamLimits.of(config.stream_idle_seconds)
        self.streams = Streams(baton_key, rng, limits, Settings(level=config.consistency))
        self._clock = asyncio.get_running_loop().time
        self.backends = Backends(store, self.floors, rng=rng, clock=self._clock, on_lost=self.streams.drop_connection)
        self.freshness = Freshness(self.backends, self.floors, self.numbers, neighbours)
        window = min(config.hold_seconds, config.deadline_seconds)
        self.hold = Hold(
            HoldLimits(window, config.hold_requests, config.hold_max_bytes),
            leads=lambda: self.backends.leader is not None,
            clock=self._clock,
            metrics=self.numbers,
        )
        self.backends.on_news.append(self.hold.look)
        self.failover = Failover(
            self.backends, held=lambda: len(self.hold.buffer), clock=self._clock, metrics=self.numbers
        )
        self.hold.on_empty = self.failover.wake
        self.dispatcher = Dispatcher(
            self.backends,
            self.floors,
            self.freshness,
            Writes(self.backends, self.hold, self.numbers, wait_ms=max(int(config.wait_seconds * 1000), 1)),
            rng=rng,
            wait_seconds=config.wait_seconds,
            deadline_seconds=config.deadline_seconds,
            metrics=self.numbers,
        )
        self.front = Front(
            streams=self.streams,
            dispatcher=self.dispatcher,
            metrics=self.numbers,
            known=self._known,
            bodies=Bodies(config.body_max_bytes),
        )
        self.gate = open_gate(config, self._admin_credential)
        self.admin = AdminProxy(self.backends, self.gate.admin, self._admin_credential)
        self.embedded = EmbeddedProxy(self.backends, self.floors, rng)
        self.door = Door(
            lambda client: SocketStream(self.front, self.streams, self.dispatcher, client),
            self.gate.authenticator.check_token,
            queued_bytes=config.body_max_bytes,
            drain_seconds=config.drain_seconds,
        )
        self.on_drain: Callable[[], None] = lambda: None
        self._pages: ASGIApp = plain_pages(self, [*self.embedded.routes(), *self.admin.routes()])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application: Hrana first, then the pages around it."""
        if scope["type"] == "websocket":  # its token comes with its first message
            await self.door(scope, receive, send)
            return
        if scope["type"] == "http":
            try:
                scope["walship.grant"] = self.gate.admit(scope["method"], scope["path"], scope["headers"])
            except AuthFailed as error:
                await send_failure(send, failure(error))
                return
            if scope["method"] == "POST" and scope["path"] in ENDPOINTS:
                await self.front(scope, receive, send)
                return
            if scope["method"] == "GET" and scope["path"] == DUMP_PATH:
                await dump(self.front, self.streams, self.dispatcher, scope, receive, send)
                return
            if scope["method"] == "OPTIONS":
                await send_preflight(send)
                return
        await self._pages(scope, receive, send)

    async def run(self) -> None:
        """Links and sweeper; ends only by cancellation."""
        async with contextlib.aclosing(self.embedded), contextlib.aclosing(self.admin), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.backends.run(), name="backends")
            tasks.create_task(self.freshness.run(), name="freshness")
            tasks.create_task(self.failover.run(), name="failover")
            tasks.create_task(self._sweep(), name="sweep streams")

    def drain(self) -> None:
        """Begin the end: refuse new work, finish what runs. Idempotent."""
        log.info("drain streams=%d", len(self.streams))
        self.front.draining = True
        self.on_drain()

    async def close_streams(self) -> None:
        """Close every node stream this proxy still holds, so that no write turn waits for its timer."""
        self.front.orphaned_pins.extend(self.streams.pins())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._close_orphans()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.front.orphaned_pins.extend(self.streams.sweep(self._clock()))
            await self._close_orphans()

    async def _close_orphans(self) -> None:
        pins = self.front.orphaned_pins
        while pins:
            await self.dispatcher.close_pin(pins.popleft())

    # --- what the proxy says of itself ------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """The JSON of `/status`."""
        config = self.config
        proxy: dict[str, object] = {
            "name": self.name,
            "url": config.advertise or self.url,
            "version": __version__,
            "position": str(self.floors.position),
            "streams": len(self.streams),
            "draining": self.front.draining,
            "failover": self.failover.status(),
        }
        return cluster_status(self.backends, cluster=self.backends.cluster_record, proxy=proxy, clock=self._clock)

    def _admin_credential(self) -> str:
        cluster = self.backends.cluster_record
        return "" if cluster is None else cluster.credential("admin")

    def _known(self) -> Known:
        cluster = self.backends.cluster_record
        return Known(
            position=lambda: str(self.floors.position),
            status=lambda: msgspec.json.encode(self.status()).decode(),
            default_ack=None if cluster is None else cluster.acks,
            most_acks=None if cluster is None else len(cluster.voters) - 1,
        )

    def unhealthy(self) -> str | None:
        """Why no read could be answered now, or None."""
        if self.front.draining:
            return f"{self.name} is shutting down"
        return None if any(backend.usable for backend in self.backends) else f"{self.name} reaches no node"

    def metrics(self) -> bytes:
        """The body of `/metrics`."""
        refresh_gauges(self.numbers, self.backends, self.streams, len(self.hold.buffer), self._clock())
        return self.numbers.render()


async def run(config: ProxyConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` gets the URL really bound.

    Raises UsageError when the address cannot be bound or the cluster URL is wrong, StoreUnavailable when the store does
    not answer at the start.
    """
    store = open_store(config.cluster_url)
    try:
        listener = listen(config.listen_host, config.listen_port)
        with contextlib.closing(listener):
            async with _presence(config, store, listener) as presence:
                neighbours = presence if config.session_scope == "cluster" else None
                proxy = Proxy(config, store, baton_key=await baton_key(store), neighbours=neighbours)
                proxy.name = presence.name
                async with background(proxy):
                    await serve(proxy, listener, on_ready)
                    await proxy.close_streams()
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def _presence(config: ProxyConfig, store: Store, listener: socket.socket) -> AsyncIterator[Presence]:
    """This proxy among the others, for the time of the block; begins when it may acknowledge writes (R18)."""
    url = config.advertise or Address.of(listener).url
    presence = await Presence.join(store, config.cluster_url, config.name, url)
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(presence.run(), name="look for other proxies")
        try:
            yield presence
        finally:
            looking.cancel()
            await presence.leave()


def main(config: ProxyConfig) -> int:
    """`run` on uvloop, for the command line. Returns the exit code."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(config))
    return 0


@contextlib.asynccontextmanager
async def background(proxy: Proxy) -> AsyncIterator[None]:
    """What a proxy does beside answering requests, for the time of the block."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(proxy.run(), name="proxy")
        try:
            yield
        finally:
            running.cancel()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would raise the signal again at the end, and the exit code is 0 here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(proxy: Proxy, listener: socket.socket, on_ready: Callable[[str], None] | None = None) -> None:
    """Answer requests until `proxy.drain` is called, by a signal or otherwise; returns when what ran is done."""
    proxy.url = Address.of(listener).url
    bounds = Bounds()
    config = uvicorn.Config(
        proxy,
        http=bounds.protocol(),
        **websocket_options(proxy.config.body_max_bytes, bounds),
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,  # longer than the idle pools of common HTTP clients, so that they close first
        timeout_graceful_shutdown=int(proxy.config.drain_seconds),
    )
    server = _Server(config)

    def stop() -> None:
        server.should_exit = True

    proxy.on_drain = stop
    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGINT)
    with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not the main thread: a test's loop
        for number in handled:
            loop.add_signal_handler(number, proxy.drain)
    log.info("listen url=%s cluster=%s", proxy.url, hide_password(proxy.config.cluster_url))
    if on_ready is not None:
        on_ready(proxy.url)
    try:
        await server.serve(sockets=[listener])
    finally:
        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
            for number in handled:
                loop.remove_signal_handler(number)
