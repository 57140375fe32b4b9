"""The scrub: once after a node's start, every page of its database against the checksums that history gives (R8)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from walship.engine.follower import Follower
from walship.engine.leader import Leader
from walship.engine.replica import Replica
from walship.engine.snapshot import Snapshot
from walship.engine.verify import differing_pages
from walship.engine.writer import Writer
from walship.errors import CorruptData, Draining
from walship.formats.checksum import PageChecksums

__all__ = ["Pinned", "pin_follower", "pin_leader", "scrub"]

_log = logging.getLogger("walship.node")

_BYTES_PER_SECOND = 200 << 20  # a background scan must not own the disk

Pinned = tuple[Snapshot, PageChecksums]
"""An image of the database, and the checksums of its pages at that position."""


async def pin_leader(leading: Leader, writer: Writer, replica: Replica) -> Pinned:
    """Raises Unavailable, Draining."""
    return await writer.run(lambda: (leading.pin_snapshot()[1], replica.checksums.copy()))


async def pin_follower(follower: Follower, replica: Replica) -> Pinned:
    """Raises Unavailable, Draining."""

    def pin() -> Pinned:
        return Snapshot.pin(replica.database), replica.checksums.copy()

    pinned: Pinned = await follower.run_between_batches(pin)
    return pinned


def scrub(pinned: Pinned, stopping: Callable[[], bool]) -> str | None:
    """What is wrong with the pages, or None; closes the image. Blocks. Raises Draining once `stopping()` is true."""
    snapshot, expected = pinned
    started = time.monotonic()

    def pace(read_bytes: int) -> None:
        ahead = read_bytes / _BYTES_PER_SECOND - (time.monotonic() - started)
        if ahead > 0.01 and not stopping():
            time.sleep(min(ahead, 0.1))
        if stopping():
            raise Draining("the node stops")

    try:
        differing = list(differing_pages(snapshot, expected, pace))
    except CorruptData as error:
        return f"the database cannot be read: {error}"
    finally:
        snapshot.close()
    if not differing:
        return None
    shown = ", ".join(map(str, differing[:10]))
    return f"{len(differing)} pages differ from history (first: {shown})"
