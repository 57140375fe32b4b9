"""The floor of replication: one asyncio TCP connection between two processes, and nothing else.

    python -m bench.baselines.push receive DIRECTORY       prints its port
    python -m bench.baselines.push send DIRECTORY PORT

Commands of the sender: `bare COUNT INTERVAL BYTES` pushes messages of that size; `durable ...` commits a row first,
fdatasyncs SQLite's -wal, pushes, and the receiver writes the message to a file, fdatasyncs it and runs the same
INSERT on its own database: what any replication with these promises must do at least. Both answer [number, time] at
the commit (bare: at the write). Of the receiver: `seen`, [number, time] when it was there (durable: readable there).
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import time
from pathlib import Path

import apsw
import uvloop

from bench.observed_node import INSERT, TABLE
from bench.stdio import answer_commands, paced

HEAD = struct.Struct(">IQ?")  # bytes that follow, number, durable


class Files:
    """A database whose -wal can be synced by us, and a log file."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.database = apsw.Connection(str(directory / "push.db"))
        for sql in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", TABLE):
            self.database.execute(sql).fetchall()
        self.wal_fd = os.open(directory / "push.db-wal", os.O_RDONLY)
        self.log_fd = os.open(directory / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)


class Receiver(asyncio.Protocol):
    seen: list[tuple[int, int]] = []  # noqa: RUF012 - one connection, one receiver in this process

    def __init__(self, files: Files) -> None:
        self._files = files
        self._received = bytearray()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while len(received) >= HEAD.size:
            size, number, durable = HEAD.unpack_from(received)
            if len(received) < HEAD.size + size:
                return
            if durable:
                os.write(self._files.log_fd, received[HEAD.size : HEAD.size + size])
                os.fdatasync(self._files.log_fd)
                self._files.database.execute(INSERT)
            self.seen.append((number, time.monotonic_ns()))
            del received[: HEAD.size + size]


async def receive(directory: Path) -> None:
    files = Files(directory)
    server = await asyncio.get_running_loop().create_server(lambda: Receiver(files), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)

    async def answer(words: list[str]) -> object:
        seen = list(Receiver.seen)
        Receiver.seen.clear()
        return seen

    await answer_commands(answer)


async def send(directory: Path, port: int) -> None:
    files = Files(directory)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
    print("connected", flush=True)
    number = 0

    async def answer(words: list[str]) -> object:
        durable, count, size = words[0] == "durable", int(words[1]), int(words[3])
        payload = os.urandom(size)
        sent: list[tuple[int, int]] = []

        async def step() -> None:
            nonlocal number
            number += 1
            if durable:
                files.database.execute(INSERT)
            sent.append((number, time.monotonic_ns()))
            if durable:
                os.fdatasync(files.wal_fd)
            transport.write(HEAD.pack(size, number, durable) + payload)

        await paced(count, float(words[2]), step)
        return sent

    await answer_commands(answer)


def main() -> None:
    what, directory, *port = sys.argv[1:]
    uvloop.run(receive(Path(directory)) if what == "receive" else send(Path(directory), int(port[0])))


if __name__ == "__main__":
    main()
