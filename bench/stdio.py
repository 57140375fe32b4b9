"""A process of a benchmark that is told what to do: one line of words in, one line of JSON out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["answer_commands", "ask", "paced"]


async def answer_commands(answer: Callable[[list[str]], Awaitable[object]]) -> None:
    """Answer every line of standard input, until it ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await answer(line.decode().split())), flush=True)


def ask(process: subprocess.Popen[str], *words: object) -> Any:
    """The other end of `answer_commands`."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(" ".join(map(str, words)) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


async def paced(count: int, interval_seconds: float, step: Callable[[], Awaitable[None]]) -> None:
    """`step` at fixed times, whatever the ones before took; each waits for the one before."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for number in range(count):
        await asyncio.sleep(max(0.0, begin + number * interval_seconds - loop.time()))
        await step()
