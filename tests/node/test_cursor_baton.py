"""The baton at the head of a cursor is good before the last byte is out (hrana.md 1.4, 2.1).

PyPI `libsql` sends its next request the moment it has read the last row, and its `executescript` swallows every error,
HTTP 400 included: a stream freed one turn of the loop too late once showed as "no such table" of the statement after.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter

from tests.node.real_host import RealHost
from walship.front.listen import listen
from walship.node.app import NodeApp
from walship.node.http_server import serving

ROUNDS = 400


def request(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


def receive(connection: socket.socket, data: bytes, until: bytes) -> bytes:
    while until not in data:
        more = connection.recv(65536)
        assert more, data
        data += more
    return data


def impatient(port: int) -> Counter[bytes]:
    """Uses each cursor's baton on a second connection as soon as the line that ends its last step is here.

    In a thread: on the server's own loop it would never be quick enough to meet the fault.
    """
    seen: Counter[bytes] = Counter()
    batch = {"steps": [{"stmt": {"sql": "select 1"}}]}
    follow_up = [{"type": "execute", "stmt": {"sql": "select 2"}}, {"type": "close"}]
    with (
        socket.create_connection(("127.0.0.1", port), 10) as cursors,
        socket.create_connection(("127.0.0.1", port), 10) as pipelines,
    ):
        cursors.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipelines.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ROUNDS):
            cursors.sendall(request("/v3/cursor", {"baton": None, "batch": batch}))
            answer = receive(cursors, b"", b'"step_end"')
            head = next(line for line in answer.split(b"\n") if line.startswith(b'{"baton"'))
            pipelines.sendall(request("/v3/pipeline", {"baton": json.loads(head)["baton"], "requests": follow_up}))
            reply = receive(pipelines, b"", b"\r\n\r\n")
            seen[reply.split(b"\r\n")[0]] += 1
            fields, _, body = reply.partition(b"\r\n\r\n")
            length = next(line for line in fields.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            while len(body) < int(length.split(b":")[1]):
                body += pipelines.recv(65536)
            receive(cursors, answer, b"\r\n0\r\n\r\n")
    return seen


async def test_a_client_that_does_not_wait_for_the_last_byte_is_never_told_that_its_baton_was_used(
    leader: RealHost,
) -> None:
    app = NodeApp(leader.service, leader, name=leader.name)
    async with serving(app, listen("127.0.0.1", 0), drain_seconds=1) as address:
        seen = await asyncio.to_thread(impatient, address.port)
    assert seen == {b"HTTP/1.1 200 OK": ROUNDS}
