"""A deposed leader and the one that took over, with commits that the first made alone; and a rewind between them.

Run as a script it is a node that rewinds and dies at the failpoint in the environment (WALSHIP_FAILPOINT):

    python rewinding.py NEW_LEADER_DIRECTORY DEPOSED_DIRECTORY
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from tests.engine.nodes import FollowerNode, LeaderNode
from walship.engine.sparse import open_chunks
from walship.formats.checksum import PageChecksums

SETUP = ("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",)


async def part(directory: Path, *, rows: int = 400, lost: int = 3, acks: int = 1) -> tuple[LeaderNode, FollowerNode]:
    """`new` leads term 2 and has commits of its own; `old` led term 1, has `lost` commits that nobody took, and now
    follows. Both hold `rows` rows of about a page."""
    old = LeaderNode(directory / "old", setup=SETUP)
    new = FollowerNode(directory / "new")
    await new.seed(old.leader.pin_snapshot)
    old.commit("BEGIN", *(f"INSERT INTO t VALUES({number}, randomblob(3000))" for number in range(rows)), "COMMIT")
    await new.catch_up(old)
    await new.stop()
    for number in range(lost):
        old.commit(
            f"INSERT INTO t VALUES({10_000 + number}, 'lost')", f"UPDATE t SET body = 'lost{number}' WHERE id = 7"
        )
    old.abandon()
    leader = LeaderNode(directory / "new")
    leader.commit("INSERT INTO t VALUES(20000, 'kept')")
    leader.commit("UPDATE t SET body = randomblob(3000) WHERE id = 300")
    return leader, FollowerNode(directory / "old", acks=acks)


async def rewind(
    leader: LeaderNode, follower: FollowerNode, claim: Callable[[PageChecksums], None] = lambda _have: None
) -> int:
    """What subscriber and publisher do: greet, compare, send what differs, install. Returns the bytes of pages sent."""
    follower.follower.history(list(leader.replica.log.terms().starts()), differs=False)
    have = PageChecksums.parse(await follower.follower.page_checksums())
    claim(have)
    header, snapshot, chunks = open_chunks(leader.leader, leader.replica, have)
    sent_bytes = 0
    try:
        seed = await follower.follower.seed(header)
        for chunk in chunks:
            await seed.write(chunk)
            sent_bytes += len(chunk)
    finally:
        snapshot.close()
    await seed.install()
    return sent_bytes


async def _main() -> None:
    leader, follower = LeaderNode(Path(sys.argv[1])), FollowerNode(Path(sys.argv[2]))
    if follower.follower.tip != leader.tip:
        await rewind(leader, follower)
    await leader.stop()
    await follower.stop()


if __name__ == "__main__":
    asyncio.run(_main())
