"""A whole small cluster in one process that is meant to die: a leader, its writer, a follower, four clients.

Run as a script this is a nursery: it imports everything once and forks a child per line of JSON on standard input

    {"directory": ..., "failpoint": "name:N" or "", "writes": n}

answering with two lines: the child's process id, then its exit status (negative: the signal). The child appends each
acknowledged id to the file `acked` in the directory, so that nothing in its memory is needed to know what it promised;
and to `sent` each id, which is its commit token too, with the term and txid of the leader when it was sent (R19).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import traceback
from pathlib import Path

import walship.engine.leader as leader_module
import walship.engine.marks as marks_module
from tests.engine.nodes import FollowerNode, LeaderNode
from walship.engine import failpoints
from walship.engine.attempts import Attempt
from walship.engine.log import LogLimits
from walship.errors import HistoryMismatch

TOKENS_OF = 7  # incarnation
LIMITS = LogLimits(max_bytes=1 << 30, segment_bytes=128 << 10)


async def ship_or_seed(follower: FollowerNode, leader: LeaderNode) -> None:
    """What a subscriber does: continue if history allows it, else take a snapshot; then everything in the log."""
    if follower.follower.tip is not None:
        try:
            await follower.ship(leader)
        except HistoryMismatch as error:
            follower.follower.mismatch(error)
    if follower.follower.tip is None:
        writer = leader.writer
        pinned = leader.leader.pin_snapshot() if writer is None else await writer.run(leader.leader.pin_snapshot)
        await follower.seed(lambda: pinned)
        await follower.ship(leader)


async def live(directory: Path, writes: int) -> None:
    leader_module.CHECKPOINT_BYTES = 200 << 10  # often, so that a short life sees several
    marks_module.EVERY_BYTES = 100 << 10
    leader = LeaderNode(directory / "leader", limits=LIMITS)
    follower = FollowerNode(directory / "follower", limits=LIMITS)
    writer = leader.start_writer(required=1)
    acked = os.open(directory / "acked", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sent = os.open(directory / "sent", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    done = asyncio.Event()

    async def follow() -> None:
        count = 0
        while not done.is_set():
            await ship_or_seed(follower, leader)
            count += 1
            if count == 40:  # a second snapshot, under a live database
                follower.follower.mismatch(HistoryMismatch("for the test"))
            await asyncio.sleep(0.001)

    async def acknowledge() -> None:
        seen = None
        while True:
            seen = await follower.follower.progress(seen)
            leader.acks.record("b", seen[0])
            leader.move_acked()

    async def client(number: int) -> None:
        numbers = random.Random(number)
        for _ in range(writes // 4):
            ident = random.getrandbits(50)
            size = numbers.choice((20, 200, 3000))
            os.write(sent, b"%d %d %d\n" % (ident, leader.leader.term, leader.tip.position.txid))
            await writer.submit(
                lambda c, i=ident, s=size: c.execute("INSERT INTO t VALUES(?, randomblob(?))", (i, s)).fetchall(),
                attempt=Attempt((TOKENS_OF, ident)),
            )
            os.write(acked, b"%d\n" % ident)

    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follow())
        acknowledging = tasks.create_task(acknowledge())
        await writer.submit(lambda c: c.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, b)").fetchall())
        async with asyncio.TaskGroup() as clients:
            for number in range(4):
                clients.create_task(client(number))
        done.set()
        await following
        acknowledging.cancel()
    await leader.stop()
    await follower.stop()
    assert not leader.failures
    assert not follower.failures


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                failpoints.reach = failpoints.armed(order["failpoint"])
                asyncio.run(live(Path(order["directory"]), order["writes"]))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a forked child must not return into the nursery's loop
                traceback.print_exc()
                os._exit(1)
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
