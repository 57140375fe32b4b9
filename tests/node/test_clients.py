"""Unmodified clients against a node's own front door: PyPI `libsql` and `turso-serverless` (hrana.md 2)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.node.real_host import RealHost
from walship.front.listen import listen
from walship.node.app import NodeApp
from walship.node.http_server import serving

SCRIPT = str(Path(__file__).with_name("clients.py"))


@asynccontextmanager
async def running(host: RealHost, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One client in its own process; leaving waits for its good end."""
    app = NodeApp(host.service, host, name=host.name)
    async with serving(app, listen("127.0.0.1", 0), drain_seconds=1) as address, asyncio.timeout(20):
        pipe = asyncio.subprocess.PIPE
        client = await asyncio.create_subprocess_exec(
            sys.executable, SCRIPT, name, address.url, stdin=pipe, stdout=pipe, stderr=pipe
        )
        try:
            yield client
            _, errors = await client.communicate()
        finally:
            if client.returncode is None:
                client.kill()
                await client.wait()
    assert client.returncode == 0, errors.decode()


@pytest.mark.parametrize("name", ["libsql_everyday", "turso_everyday"])
async def test_a_client_creates_writes_rolls_back_and_reads(leader: RealHost, name: str) -> None:
    async with running(leader, name):
        pass


async def test_an_idle_libsql_connection_lives_on(leader: RealHost) -> None:
    """hrana.md 1.4: the loudest complaint about sqld."""
    async with running(leader, "libsql_idle") as client:
        assert client.stdout is not None
        assert client.stdin is not None
        assert await client.stdout.readline() == b"idle\n"
        assert leader.service.status().streams == 1
        await leader.service._end_streams()  # what expiry does, without the waiting
        client.stdin.write(b"\n")


async def test_a_write_to_a_follower_tells_the_client_where_the_leader_is(follower: RealHost) -> None:
    """R23."""
    async with running(follower, "libsql_on_follower"):
        pass
