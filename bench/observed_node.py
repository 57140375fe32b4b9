"""`walship node` with a window: it says when its own commits happened, or when others' became visible to a reader.

    python -m bench.observed_node NAME DIRECTORY CLUSTER_URL [--init VOTERS]

The node is composed and run by `walship.node.run.run`. Commands: `commit COUNT INTERVAL_SECONDS` on the leader
answers [row, time of the commit, time of the acknowledgment] for each; `seen` on a follower answers [row, time] for
each new highest row a reader could see, once per change of the watermarks; `log_bytes`. Times are CLOCK_MONOTONIC in
nanoseconds, which is one clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path

import apsw
import uvloop

from bench.stdio import answer_commands, paced
from walship.config import NodeConfig
from walship.node import node as node_module

TABLE = "CREATE TABLE IF NOT EXISTS bench (id INTEGER PRIMARY KEY, value BLOB)"
INSERT = "INSERT INTO bench (value) VALUES (randomblob(100))"


class ObservedNode(node_module.Node):
    """A node that answers the commands above."""

    async def serve(self) -> BaseException | None:
        self._seen: list[tuple[int, int]] = []
        self._highest = 0
        self._reader: apsw.Connection | None = None
        if self.writer is None:
            self.watermarks.on_change(self._look)
        async with asyncio.TaskGroup() as tasks:
            commands = tasks.create_task(answer_commands(self._answer), name="commands")
            failure = await super().serve()
            commands.cancel()
        if self._reader is not None:
            self._reader.close()
        return failure

    async def _answer(self, words: list[str]) -> object:
        if words[0] == "commit":
            return await self._commit(int(words[1]), float(words[2]))
        if words[0] == "log_bytes":
            return self.log.statistics().size_bytes
        seen, self._seen = self._seen, []
        return seen

    async def _commit(self, count: int, interval_seconds: float) -> list[tuple[int, int, int]]:
        writer = self.writer
        assert writer is not None, "only the leader commits"
        done: list[tuple[int, int, int]] = []

        def insert(connection: apsw.Connection) -> tuple[int, int]:
            connection.execute(INSERT)
            return connection.last_insert_rowid(), time.monotonic_ns()

        async def step() -> None:
            result = await writer.submit(insert)
            done.append((*result.value, time.monotonic_ns()))

        await writer.submit(lambda connection: connection.execute(TABLE).fetchall())
        await paced(count, interval_seconds, step)
        return done

    def _look(self) -> None:
        """What a SELECT shows now. Costs this loop some 10 us, as a client's read would."""
        if self.replica is None:
            return
        if self._reader is None:
            self._reader = self.database.connect_reader()
        try:
            row = int(self._reader.execute("SELECT ifnull(max(id), 0) FROM bench").get)
        except apsw.SQLError:
            return  # no table yet
        if row > self._highest:
            self._highest = row
            self._seen.append((row, time.monotonic_ns()))


def main() -> None:
    name, directory, cluster_url, *init = sys.argv[1:]
    logging.basicConfig(level="WARNING")
    voters = tuple(init[1].split(",")) if init else ()
    config = NodeConfig(
        name=name,
        data_dir=Path(directory),
        cluster_url=cluster_url,
        init=bool(init),
        voters=voters,
        ack=int(bool(init)),
    )
    node_module.Node = ObservedNode  # type: ignore[misc]
    sys.exit(uvloop.run(node_module.run(config)))


if __name__ == "__main__":
    main()
