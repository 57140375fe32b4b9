"""A way around: a proxy that cannot reach the leader reaches it through a follower that can (failover.md 3.9).

The proxy upgrades at `/walship/relay` of the follower and then speaks the link protocol, as it would with the leader;
the follower connects to the leader's `/walship/link` and passes bytes on, both ways, without looking at them. It goes
nowhere else: the address is that of the leader this node follows now, never one that the other side names.

Bounded: a few connections, buffers of some KB whose filling stops the reading, and a peer that takes nothing for 30 s
ends it. The two directions end together: half a link is of no use to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from walship.errors import Unavailable

__all__ = ["LINK_PATH", "RELAY_PATH", "Relay"]

log = logging.getLogger("walship.relay")

LINK_PATH: Final = "/walship/link"
RELAY_PATH: Final = "/walship/relay"

DIAL_SECONDS: Final = 1.0  # the proxy has its writers waiting, and other followers to try
STALL_SECONDS: Final = 30.0
MOST_RELAYS: Final = 64  # a proxy needs one
READ_BYTES: Final = 64 << 10
HIGH_WATER: Final = 256 << 10
MAX_HEAD: Final = 16 << 10


class Relay:
    """Serves `GET /walship/relay`.

    Args:
        leader_url: the URL of the leader that this node follows, None while it follows none or leads itself.
        credential: what the leader asks of whoever links; empty when it asks nothing.
    """

    def __init__(
        self, leader_url: Callable[[], str | None], *, credential: str = "", most_relays: int = MOST_RELAYS
    ) -> None:
        self._leader_url, self._credential, self._most = leader_url, credential, most_relays
        self.relays = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes between this proxy and the leader until either ends. Raises Unavailable when it cannot begin."""
        try:
            if self.relays >= self._most:
                raise Unavailable(f"{self.relays} proxies are relayed already; this one was refused")
            self.relays += 1
            try:
                await self._serve(reader, writer)
            finally:
                self.relays -= 1
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        url = self._leader_url()
        if url is None:
            raise Unavailable("this node follows no leader now, so it cannot relay")
        there, out = await self._dial(url)
        log.info("relay a proxy to leader url=%s", url)
        try:
            for each in (writer, out):
                each.transport.set_write_buffer_limits(high=HIGH_WATER)
            pipes = [asyncio.create_task(_pipe(reader, out)), asyncio.create_task(_pipe(there, writer))]
            try:
                await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pipe in pipes:
                    pipe.cancel()
                await asyncio.gather(*pipes, return_exceptions=True)
        finally:
            out.close()

    async def _dial(self, url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A link to the leader, open. Raises Unavailable."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        shown = f"authorization: Walship {self._credential}\r\n" if self._credential else ""
        head = (
            f"GET {LINK_PATH} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{shown}"
            "connection: upgrade\r\nupgrade: walship-link\r\n\r\n"
        )
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                reader, writer = await asyncio.open_connection(
                    parts.hostname or "127.0.0.1",
                    parts.port or (443 if secure else 80),
                    limit=MAX_HEAD,
                    ssl=True if secure else None,
                )
                writer.write(head.encode())
                first = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
                if first.split(b" ")[1:2] != [b"101"]:
                    raise Unavailable(f"the leader at {url} refused the link: {first[:80].decode('latin-1')}")
        except BaseException as error:
            if writer is not None:
                writer.close()
            if isinstance(error, OSError | asyncio.IncompleteReadError | asyncio.LimitOverrunError):
                raise Unavailable(
                    f"the leader at {url} cannot be reached from here either: {error or 'silent'}"
                ) from error
            raise
        return reader, writer


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, until it ends."""
    with contextlib.suppress(OSError):  # TimeoutError is one
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            async with asyncio.timeout(STALL_SECONDS):
                await writer.drain()
