"""Clients that open a transaction for every request of theirs, as ORMs do: a process of its own.

    python -m bench.transactions_load HOST PORT CLIENTS SECONDS BEGIN

A transaction is four requests on one stream, with a pause before each as the program between them would make: BEGIN
(the word given), a statement, a SELECT, COMMIT. Nine of ten only read; the tenth updates its client's own row first.
Prints one line of JSON. An answer with any error in it counts as an error, and ends its transaction.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

from bench.harness import percentile

THINK_SECONDS = 0.01
WRITES_ONE_IN = 10


class Client:
    """One keep-alive connection and its transactions, one after the other."""

    def __init__(self, number: int, begin: str) -> None:
        self.number, self.begin = number, begin
        self.read_seconds: list[float] = []
        self.writes = 0
        self.errors: list[str] = []
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def run(self, host: str, port: int, until: float) -> None:
        self._reader, self._writer = await asyncio.open_connection(host, port)
        count = self.number  # so that the writers are spread over time
        while time.perf_counter() < until:
            count += 1
            writes = count % WRITES_ONE_IN == 0
            started = time.perf_counter()
            if not await self._transaction(writes=writes):
                continue
            if writes:
                self.writes += 1
            else:
                self.read_seconds.append(time.perf_counter() - started)
        self._writer.close()

    async def _transaction(self, *, writes: bool) -> bool:
        read = "SELECT n FROM counters WHERE id BETWEEN 1 AND 8"
        first = f"UPDATE counters SET n = n + 1 WHERE id = {self.number}" if writes else read
        baton = None
        for last, sql in ((False, self.begin), (False, first), (False, read), (True, "COMMIT")):
            await asyncio.sleep(THINK_SECONDS)
            reply = await self._ask(baton, sql, close=last)
            if b'"type":"error"' in reply or not reply.startswith(b'{"baton"'):
                self.errors.append(reply.decode("utf-8", "replace")[:300])
                return False
            baton = json.loads(reply)["baton"]
        return True

    async def _ask(self, baton: str | None, sql: str, *, close: bool) -> bytes:
        requests: list[dict[str, Any]] = [{"type": "execute", "stmt": {"sql": sql}}]
        if close:
            requests.append({"type": "close"})
        body = json.dumps({"baton": baton, "requests": requests}).encode()
        self._writer.write(b"POST /v3/pipeline HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        return await self._reader.readexactly(int(length.split(b":")[1]))


async def run(host: str, port: int, clients: int, seconds: float, begin: str) -> dict[str, float | str]:
    started = time.perf_counter()
    all_ = [Client(number, begin) for number in range(1, clients + 1)]
    async with asyncio.TaskGroup() as group:
        for client in all_:
            group.create_task(client.run(host, port, started + seconds))
    elapsed = time.perf_counter() - started
    reads = [taken for client in all_ for taken in client.read_seconds]
    writes = sum(client.writes for client in all_)
    errors = [error for client in all_ for error in client.errors]
    return {
        "rate": (len(reads) + writes) / elapsed,
        "transactions": len(reads) + writes,
        "writes": writes,
        "errors": len(errors),
        "last_error": errors[-1] if errors else "",
        "p50_ms": 1e3 * percentile(reads, 0.50) if reads else 0.0,
        "p99_ms": 1e3 * percentile(reads, 0.99) if reads else 0.0,
    }


def main() -> None:
    host, port, clients, seconds, begin = sys.argv[1:]
    print(json.dumps(uvloop.run(run(host, int(port), int(clients), float(seconds), begin))))


if __name__ == "__main__":
    main()
