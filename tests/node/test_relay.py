"""The relay: bytes both ways to the leader and nowhere else, bounded, closed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.waiting import eventually
from walship.errors import Unavailable
from walship.node.relay import Relay

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Leader:
    """Upgrades like a node, then repeats what it gets."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
        self.writers: list[asyncio.StreamWriter] = []
        self.reads = True
        self.ended = 0
        self.url = ""

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        if not self.reads:
            return
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        self.ended += 1
        writer.close()


@contextlib.asynccontextmanager
async def leading() -> AsyncIterator[Leader]:
    leader = Leader()
    server = await asyncio.start_server(leader.take, "127.0.0.1", 0)
    leader.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield leader
    finally:
        server.close()
        for writer in leader.writers:
            writer.close()


@contextlib.asynccontextmanager
async def relaying(relay: Relay) -> AsyncIterator[tuple[int, list[BaseException]]]:
    """The relay behind a socket; what it raised is collected."""
    failures: list[BaseException] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await relay.serve(reader, writer)
        except Unavailable as error:
            failures.append(error)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], failures
    finally:
        server.close()


async def test_bytes_go_both_ways_and_the_leader_is_shown_the_credential() -> None:
    async with leading() as leader, relaying(Relay(lambda: leader.url, credential="secret")) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = bytes(range(256)) * 4096
        writer.write(data)
        async with asyncio.timeout(20):
            assert await reader.readexactly(len(data)) == data
        assert leader.heads[0].startswith(b"GET /walship/link HTTP/1.1\r\n")
        assert b"authorization: Walship secret\r\n" in leader.heads[0]
        writer.close()
        await eventually(lambda: leader.ended == 1)


async def test_the_leaders_end_is_the_proxys_end() -> None:
    relay: Relay
    async with leading() as leader, relaying(relay := Relay(lambda: leader.url)) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        leader.writers[0].transport.abort()
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        await eventually(lambda: relay.relays == 0)
        writer.close()


async def test_a_leader_that_takes_nothing_stops_the_reading() -> None:
    async with leading() as leader, relaying(Relay(lambda: leader.url)) as (port, _):
        leader.reads = False
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.transport.set_write_buffer_limits(high=1 << 16)
        taken = 0
        with contextlib.suppress(TimeoutError):
            while taken < 256 << 20:
                writer.write(bytes(1 << 20))
                async with asyncio.timeout(0.5):
                    await writer.drain()
                taken += 1 << 20
        assert taken < 64 << 20, "kernel buffers and no more"
        writer.transport.abort()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 401 Unauthorized\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n"])
async def test_a_refusal_of_the_leader_ends_it(answer: bytes) -> None:
    async with leading() as leader, relaying(Relay(lambda: leader.url)) as (port, failures):
        leader.answer = answer
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        assert "refused the link" in str(failures[0])
        writer.close()


async def test_without_a_leader_or_with_one_that_is_away_it_does_not_begin() -> None:
    urls = iter([None, "http://127.0.0.1:1"])
    async with relaying(Relay(lambda: next(urls))) as (port, failures):
        for words in ("follows no leader", "cannot be reached from here either"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(20):
                assert await reader.read() == b""
            assert words in str(failures[-1])
            writer.close()


async def test_it_relays_a_few_and_no_more() -> None:
    async with leading() as leader, relaying(Relay(lambda: leader.url, most_relays=1)) as (port, failures):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        second, other = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(20):
            assert await second.read() == b""
        assert "relayed already" in str(failures[0])
        other.close()
        writer.close()
