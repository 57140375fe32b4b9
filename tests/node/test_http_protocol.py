"""The one port: what upgrades, what stays HTTP, and how both end. The contract with the pinned uvicorn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
import uvicorn

from walship.errors import ProtocolViolation, UsageError
from walship.front.listen import Address, listen
from walship.node.http_server import serving

Message = MutableMapping[str, Any]


async def hello(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[..., Awaitable[None]]
) -> None:
    assert scope["type"] == "http"
    body = (await receive()).get("body", b"")
    text = f"{scope['method']} {scope['path']} ".encode() + body
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


UPGRADE = b"GET /walship/link HTTP/1.1\r\nHost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: walship-link\r\n\r\n"
PLAIN = b"GET /walship/link HTTP/1.1\r\nHost: a\r\n\r\n"


async def connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(address.host, address.port)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        return await reader.readuntil(b"\r\n\r\n")


def test_the_uvicorn_this_was_written_for_is_installed() -> None:
    """perf.md 1: the subclass leans on internals, so another version needs another look."""
    assert uvicorn.__version__ == "0.54.0"


async def test_an_upgrade_hands_the_connection_over() -> None:
    async with serving(hello, listen("127.0.0.1", 0), upgrades={"/walship/link": echo}, drain_seconds=1) as address:
        reader, writer = await connect(address)
        writer.write(UPGRADE + b"early bytes")
        head = await read_head(reader)
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"Upgrade: walship-link\r\n" in head
        assert await reader.readexactly(11) == b"early bytes"
        big = bytes(range(256)) * 20_000
        writer.write(big)
        assert await reader.readexactly(len(big)) == big
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def test_an_upgrade_may_arrive_byte_by_byte() -> None:
    async with serving(hello, listen("127.0.0.1", 0), upgrades={"/walship/link": echo}, drain_seconds=1) as address:
        reader, writer = await connect(address)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in UPGRADE:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_head(reader)).startswith(b"HTTP/1.1 101")
        writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        PLAIN,
        UPGRADE.replace(b"keep-alive, Upgrade", b"keep-alive"),
        UPGRADE.replace(b"/walship/link", b"/walship/other"),
        UPGRADE.replace(b"/walship/link", b"/walship/link?a=1"),
        b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /walship/" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v2/pipeline HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_everything_else_is_plain_http(request_bytes: bytes) -> None:
    async with serving(hello, listen("127.0.0.1", 0), upgrades={"/walship/link": echo}, drain_seconds=1) as address:
        reader, writer = await connect(address)
        for _ in range(2):  # keep-alive works as before
            writer.write(request_bytes)
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
            assert (await reader.read(1 << 16)).startswith(request_bytes[:4])
        writer.close()


async def test_a_request_cut_anywhere_is_still_answered() -> None:
    request = b"GET /walship/link HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    async with serving(hello, listen("127.0.0.1", 0), upgrades={"/walship/link": echo}, drain_seconds=1) as address:
        for cut in range(1, len(request), 7):
            reader, writer = await connect(address)
            writer.write(request[:cut])
            await writer.drain()
            await asyncio.sleep(0)
            writer.write(request[cut:])
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
            writer.close()


async def test_a_handler_that_fails_for_a_known_reason_ends_only_its_connection() -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.TaskGroup():
            raise ProtocolViolation("nonsense")

    handlers = {"/walship/link": broken, "/walship/replication": echo}
    async with serving(hello, listen("127.0.0.1", 0), upgrades=handlers, drain_seconds=1) as address:
        other_reader, other = await connect(address)
        other.write(UPGRADE.replace(b"/link", b"/replication"))
        await read_head(other_reader)
        reader, writer = await connect(address)
        writer.write(UPGRADE)
        await read_head(reader)
        assert await reader.read() == b""
        other.write(b"still here")
        assert await other_reader.readexactly(10) == b"still here"
        writer.close()
        other.close()


async def test_a_bug_in_a_handler_surfaces() -> None:
    async def buggy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ZeroDivisionError

    async def server() -> None:
        async with serving(
            hello, listen("127.0.0.1", 0), upgrades={"/walship/link": buggy}, drain_seconds=1
        ) as address:
            _, writer = await connect(address)
            writer.write(UPGRADE)
            try:
                await asyncio.sleep(5)
            finally:
                writer.close()

    with pytest.raises(BaseExceptionGroup) as caught:
        await server()
    assert caught.group_contains(ZeroDivisionError)


async def test_leaving_waits_for_handlers_that_end_and_cancels_the_others() -> None:
    ended: list[str] = []
    leaving = asyncio.Event()

    async def ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await leaving.wait()
        ended.append("by itself")

    async def stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    handlers = {"/walship/link": ends, "/walship/replication": stays}
    async with serving(hello, listen("127.0.0.1", 0), upgrades=handlers, drain_seconds=0.2) as address:
        connections = [await connect(address) for _ in range(2)]
        for (reader, writer), path in zip(connections, (b"link", b"replication"), strict=True):
            writer.write(UPGRADE.replace(b"link", path, 1))
            await read_head(reader)
        leaving.set()
    assert sorted(ended) == ["by itself", "cancelled"]
    for reader, writer in connections:
        assert await reader.read() == b""
        writer.close()


async def test_an_upgraded_connection_is_not_uvicorns_to_wait_for() -> None:
    """Its handler ends when it is told; uvicorn, which never hears of the end, would wait out the deadline."""
    told = asyncio.Event()

    async def ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await told.wait()

    async with asyncio.timeout(5):
        async with serving(
            hello, listen("127.0.0.1", 0), upgrades={"/walship/link": ends}, drain_seconds=30
        ) as address:
            reader, writer = await connect(address)
            writer.write(UPGRADE)
            await read_head(reader)
            told.set()
    writer.close()


async def test_leaving_lets_a_running_request_finish() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Message, receive: Any, send: Any) -> None:
        begun.set()
        await go_on.wait()
        await hello(scope, receive, send)

    async with serving(slow, listen("127.0.0.1", 0), drain_seconds=5) as address:
        reader, writer = await connect(address)
        writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        await begun.wait()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_idle_connections_do_not_hold_up_the_end() -> None:
    async with serving(hello, listen("127.0.0.1", 0), drain_seconds=30) as address:
        reader, writer = await connect(address)
        silent_reader, silent = await connect(address)
        silent.write(b"GET /walship/li")
        writer.write(PLAIN)
        await read_head(reader)
    async with asyncio.timeout(2):
        await silent_reader.read()
    writer.close()
    silent.close()


def test_a_busy_port_is_an_error_in_words() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(UsageError, match="already in use"):
        listen("127.0.0.1", listener.getsockname()[1])


def test_a_host_that_is_not_ours_is_an_error_in_words() -> None:
    with pytest.raises(UsageError, match=r"--listen"):
        listen("192.0.2.1", 0)
