"""The bounds of a connection, on real sockets with short times. The contract with the pinned uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.waiting import eventually
from walship.front.body import Bodies, BodyRefused
from walship.front.listen import listen
from walship.front.protocol import MAX_HEAD_BYTES, Bounds
from walship.node.http_server import serving

Open = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
LIMIT_BYTES = 1 << 20
BIG = b"x" * (16 << 20)  # several times what the kernel keeps for a connection


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of what was sent; /big with 16 MiB."""
    try:
        body = await application.bodies.read(scope["headers"], receive)  # type: ignore[attr-defined]
    except BodyRefused as refused:
        await refused.answer(receive, send)
        return
    if body is None:
        return
    application.bodies.release(body)  # type: ignore[attr-defined]
    status, answer = 200, BIG if scope["path"] == "/big" else b"%d" % len(body)
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@contextlib.asynccontextmanager
async def server(**bounds: Any) -> AsyncIterator[Open]:
    application.bodies = Bodies(LIMIT_BYTES, total_bytes=3 << 20)  # type: ignore[attr-defined]
    writers: list[asyncio.StreamWriter] = []
    async with serving(application, listen("127.0.0.1", 0), bounds=Bounds(**bounds), drain_seconds=1) as address:

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writers.append(writer)
            return reader, writer

        try:
            yield connect
        finally:
            for writer in writers:
                writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One answer with a content-length: status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split(" ")[1]), await reader.readexactly(size)


async def ends(reader: asyncio.StreamReader) -> bool:
    """Is the connection closed by the server within a few seconds?"""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            return await reader.read(1) == b""
    return True


def refused(status: int, body: bytes) -> tuple[int, str]:
    return status, json.loads(body)["code"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 6 + 1),
    ],
    ids=["target", "value", "count"],
)
async def test_a_head_without_end_is_431(head: bytes) -> None:
    async with server() as connect:
        reader, writer = await connect()
        for at in range(0, len(head), 8192):
            writer.write(head[at : at + 8192])
            await writer.drain()
            await asyncio.sleep(0)
        assert refused(*await answer(reader)) == (431, "REQUEST_HEAD_TOO_LARGE")
        assert await ends(reader)


async def test_a_head_that_comes_too_slowly_is_408_however_it_drips() -> None:
    async with server(head_seconds=0.3) as connect:
        reader, writer = await connect()

        async def drip() -> None:
            for letter in "GET /x HTTP/1.1\r\nhost: abcdefghijklmnopqrstuvwxyz":
                writer.write(letter.encode())
                await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drip())
        assert refused(*await answer(reader)) == (408, "REQUEST_TIMEOUT")
        assert await ends(reader)
        dripping.cancel()
        await asyncio.wait({dripping})


@pytest.mark.parametrize("start", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n5\r\nabc"])
async def test_a_body_that_stops_is_408(start: bytes) -> None:
    async with server(body_pause_seconds=0.2) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + start)
        assert refused(*await answer(reader)) == (408, "REQUEST_TIMEOUT")
        assert await ends(reader)


async def test_a_body_that_drips_for_too_long_in_all_is_408() -> None:
    async with server(body_pause_seconds=5, body_seconds=0.3) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")

        async def drip() -> None:
            for _ in range(1000):
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drip())
        assert refused(*await answer(reader)) == (408, "REQUEST_TIMEOUT")
        dripping.cancel()
        await asyncio.wait({dripping})


async def test_a_body_in_time_is_taken_and_the_connection_goes_on() -> None:
    async with server(head_seconds=0.3, body_pause_seconds=0.3) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\nabc")
            await asyncio.sleep(0.1)
            writer.write(b"def")
            assert await answer(reader) == (200, b"6")
        await asyncio.sleep(0.5)  # longer than either bound: an idle connection is not a slow one
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert await answer(reader) == (200, b"0")


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"])
async def test_a_content_length_too_large_is_413_before_the_body_is_sent(expect: bytes) -> None:
    """A client that waits to be asked for 100 MB is not asked."""
    async with server() as connect, asyncio.timeout(2):
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + expect + b"content-length: 100000000\r\n\r\n")
        assert refused(*await answer(reader)) == (413, "REQUEST_TOO_LARGE")


async def test_a_client_that_sends_too_much_can_read_why() -> None:
    async with server() as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (LIMIT_BYTES + 1))
        writer.write(b"x" * (LIMIT_BYTES + 1))
        assert refused(*await answer(reader)) == (413, "REQUEST_TOO_LARGE")


async def test_a_chunked_body_too_large_is_413() -> None:
    async with server() as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        writer.write(b"0\r\n\r\n")
        assert refused(*await answer(reader)) == (413, "REQUEST_TOO_LARGE")


async def test_large_bodies_of_many_clients_are_bounded_together() -> None:
    """Each holds what it has sent; the one that would pass the sum is refused, and room comes back when they go."""
    async with server() as connect:
        waiting = [await connect() for _ in range(3)]
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % LIMIT_BYTES
        for _, writer in waiting:
            writer.write(head + b"x" * (LIMIT_BYTES - 1))
        bodies: Bodies = application.bodies  # type: ignore[attr-defined]
        await eventually(lambda: bodies.held_bytes == 3 * (LIMIT_BYTES - 1))
        reader, writer = await connect()
        writer.write(head + b"x" * LIMIT_BYTES)
        assert refused(*await answer(reader)) == (429, "WALSHIP_OVERLOADED")
        waiting[0][1].close()
        for reader, writer in waiting[1:]:
            writer.write(b"x")
            assert await answer(reader) == (200, b"%d" % LIMIT_BYTES)
        await eventually(lambda: bodies.held_bytes == 0)


async def test_one_client_too_many_is_told_so() -> None:
    async with server(max_connections=2) as connect:
        kept = [await connect() for _ in range(2)]
        for reader, writer in kept:
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            assert await answer(reader) == (200, b"0")
        reader, writer = await connect()
        assert refused(*await answer(reader)) == (429, "WALSHIP_OVERLOADED")
        assert await ends(reader)
        kept[0][1].close()
        await kept[0][1].wait_closed()

        async def again() -> bool:
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            return (await answer(reader))[0] == 200

        async with asyncio.timeout(5):
            while not await again():
                pass


async def test_a_client_that_reads_nothing_is_cut() -> None:
    async with server(stall_seconds=0.3) as connect:
        reader, writer = await connect()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n" * 4)
        await asyncio.sleep(1.0)
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(4 * len(BIG))


async def test_what_waits_for_slow_clients_is_bounded_together() -> None:
    """The one that waits longest is cut; the newest gets its answer."""
    async with server(unsent_bytes=20 << 20) as connect:
        first = await connect()
        first[0]._transport.pause_reading()  # type: ignore[attr-defined]
        first[1].write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.2)
        for _ in range(2):
            slow = await connect()
            slow[0]._transport.pause_reading()  # type: ignore[attr-defined]
            slow[1].write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.1)
        first[0]._transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await answer(first[0])
        slow[0]._transport.resume_reading()  # type: ignore[attr-defined]
        assert await answer(slow[0]) == (200, BIG)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with server() as connect:
        reader, writer = await connect()
        writer.write(
            b"".join(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % n + b"x" * n for n in range(200))
        )
        assert [await answer(reader) for _ in range(200)] == [(200, b"%d" % n) for n in range(200)]


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100]
)
async def test_what_is_not_http_is_400_and_nothing_after_it_is_run(data: bytes) -> None:
    async with server() as connect:
        reader, writer = await connect()
        writer.write(data)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert (await answer(reader))[0] == 400
        assert await ends(reader)
