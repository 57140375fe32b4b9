"""The load generator, a process of its own: many closed-loop connections that send one precomputed request each.

    python -m bench.load HOST PORT CONNECTIONS SECONDS < body.json

Prints one line of JSON: what was answered, and percentiles of the latency. It parses no more of HTTP than the
length of the answer, and counts as an error every answer that is not 200 with one affected row.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Final

import uvloop

from bench.harness import percentile

EXPECTED: Final = b'"affected_row_count":1'
_LENGTH: Final = b"content-length: "


class Client(asyncio.Protocol):
    """One keep-alive connection: a request, its answer, the next request."""

    def __init__(self, request: bytes, load: Load) -> None:
        self._request, self._load = request, load
        self._received = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._send()

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        head = received.find(b"\r\n\r\n")
        if head < 0:
            return
        at = received.find(_LENGTH, 0, head)
        if at < 0:
            self._load.errors += 1
            return
        end = head + 4 + int(received[at + len(_LENGTH) : received.index(b"\r", at)])
        if len(received) < end:
            return
        self._received = b""
        if received.startswith(b"HTTP/1.1 200") and EXPECTED in received:
            self._load.answered(time.perf_counter() - self._sent_at)
        else:
            self._load.errors += 1
            self._load.last_error = received.decode("utf-8", "replace")[-300:]
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.gone(exc)

    def _send(self) -> None:
        transport = self._transport
        assert transport is not None
        if self._load.over:
            transport.close()
            return
        self._sent_at = time.perf_counter()
        transport.write(self._request)


class Load:
    """Counts; `over` tells the connections to send no more, so that everything sent is also answered."""

    def __init__(self, connections: int) -> None:
        self.over = False
        self.errors = 0
        self.last_error = ""
        self.seconds: list[float] = []
        self.done = asyncio.Event()
        self._open = connections

    def answered(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def gone(self, error: Exception | None) -> None:
        self._open -= 1
        if error is not None or not self.over:
            self.errors += 1
            self.last_error = self.last_error or f"a connection ended: {error}"
        if self._open == 0:
            self.done.set()


async def run(host: str, port: int, connections: int, seconds: float, body: bytes) -> dict[str, float | str]:
    request = (
        b"POST /v3/pipeline HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    load = Load(connections)
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: Client(request, load), host, port)
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - started
    within = len(load.seconds)
    load.over = True
    async with asyncio.timeout(20):
        await load.done.wait()
    return {
        "answered": len(load.seconds),
        "rate": within / elapsed,
        "errors": load.errors,
        "last_error": load.last_error,
        "p50_us": 1e6 * percentile(load.seconds, 0.50) if load.seconds else 0.0,
        "p99_us": 1e6 * percentile(load.seconds, 0.99) if load.seconds else 0.0,
    }


def main() -> None:
    host, port, connections, seconds = sys.argv[1:]
    body = sys.stdin.buffer.read()
    print(json.dumps(uvloop.run(run(host, int(port), int(connections), float(seconds), body))))


if __name__ == "__main__":
    main()
