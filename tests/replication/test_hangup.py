"""A connection that died between two turns of the loop must not take its node along."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
import uvloop

from walship.replication.hangup import hang_up, send


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_sending_and_hanging_up_after_a_reset_is_quiet_on_either_loop(new_loop: object) -> None:
    """uvloop raises RuntimeError for a write to a lost connection; a killed follower once ended its leader so."""

    async def reset_then_send() -> None:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), "127.0.0.1", 0)
        peer = socket.create_connection(server.sockets[0].getsockname())
        writer = await accepted
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # with RST, as the kernel does for a process killed with data unread
        async with asyncio.timeout(5):
            while not writer.transport.is_closing():
                send(writer, b"heartbeat")
                await asyncio.sleep(0)
        send(writer, b"heartbeat")
        hang_up(writer)
        server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(reset_then_send())
