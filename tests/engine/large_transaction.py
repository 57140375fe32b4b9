"""A process of its own, so that its peak memory means something: one large transaction through leader and follower."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.engine.nodes import cluster, scanned
from walship.errors import HistoryMismatch


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM")


async def main(directory: Path, megabytes: int) -> None:
    async with cluster(directory, setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)) as (leader, follower):
        leader.commit("INSERT INTO t(body) VALUES('warm')")
        await follower.catch_up(leader)
        before = peak_bytes()
        leader.write("BEGIN", *["INSERT INTO t(body) VALUES(randomblob(1000000))"] * megabytes, "COMMIT")
        leader.leader.commit_group()
        committed = peak_bytes()
        await follower.ship(leader)
        await follower.applied(leader.tip.position, 200)
        applied = peak_bytes()
        follower.follower.mismatch(HistoryMismatch("for the test"))
        await follower.seed(leader.leader.pin_snapshot)
        equal = scanned(follower.database) == leader.tip.checksum
        seeded = peak_bytes()
        result = {
            "equal": equal,
            "grown_bytes": seeded - before,
            "commit": committed - before,
            "apply": applied - committed,
            "seed": seeded - applied,
        }
        sys.stdout.write(json.dumps(result) + "\n")


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
