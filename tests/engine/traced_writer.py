"""A process for strace: one group of eight commits between two marks written to standard error."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.engine.nodes import LeaderNode


async def main() -> None:
    leader = LeaderNode(Path(sys.argv[1]), setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
    writer = leader.start_writer()
    await writer.submit(lambda c: c.execute("INSERT INTO t VALUES(0, 'first frames of the generation')").fetchall())
    turn = await writer.turn()  # holds the writer back until all eight have queued
    jobs = [
        asyncio.ensure_future(writer.submit(lambda c, n=n: c.execute("INSERT INTO t VALUES(?, 'x')", (n,)).fetchall()))
        for n in range(1, 9)
    ]
    await asyncio.sleep(0)
    os.write(2, b"begin-group\n")
    await turn.release()
    await asyncio.gather(*jobs)
    os.write(2, b"answered\n")
    await leader.stop()


asyncio.run(main())
