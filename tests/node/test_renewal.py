"""The lease thread against a real file store: what it makes of versions and records that it does not expect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.waiting import eventually
from walship.coordination.lease import Lease
from walship.coordination.record import LEADER, LeaderRecord, Phase, Seen, encode, read_leader, renew
from walship.coordination.store import Store, open_store
from walship.node.leading import boottime
from walship.node.renewal import Renewal

RECORD = LeaderRecord(
    term=3, holder="a" * 32, name="n1", url="http://n1", phase=Phase.SERVING, lease_ms=400, nonce="0123456789abcdef"
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = open_store(f"file://{tmp_path}/store")
    try:
        yield store
    finally:
        await store.close()


class Renewed:
    """One `Renewal` from `seen` on, with what it reported."""

    def __init__(self, directory: Path, seen: Seen[LeaderRecord]) -> None:
        self.lost: list[Seen[LeaderRecord] | None] = []
        self.failures: list[BaseException] = []
        self.lease = Lease(0.4)
        self.lease.extend(boottime())
        self.renewal = Renewal(
            f"file://{directory}/store", seen, self.lease, boottime, self.lost.append, self.failures.append
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.renewal.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.renewal.stop)


async def test_a_version_of_its_own_that_it_was_not_told_of_does_not_end_the_renewals(
    store: Store, tmp_path: Path
) -> None:
    """A handoff was tried with a version that a renewal, whose answer was lost, had moved on from."""
    old = Seen(RECORD, await store.put_if(LEADER, encode(RECORD), version=None))
    moved = await renew(store, old)
    renewed = Renewed(tmp_path, old)
    async with renewed.running():
        await eventually(lambda: renewed.renewal.seen.version > moved.version)
        assert renewed.lost == []
        assert renewed.lease.valid(boottime())


async def test_somebody_elses_record_ends_them(store: Store, tmp_path: Path) -> None:
    old = Seen(RECORD, await store.put_if(LEADER, encode(RECORD), version=None))
    other = LeaderRecord(term=4, holder="b" * 32, name="n2", url="http://n2", phase=Phase.CLAIMING, lease_ms=400)
    await store.put_if(LEADER, encode(other), version=old.version)
    renewed = Renewed(tmp_path, old)
    async with renewed.running():
        await eventually(lambda: renewed.lost != [])
        assert renewed.lost == [await read_leader(store)]


async def test_what_nobody_foresaw_is_handed_to_the_node(store: Store, tmp_path: Path) -> None:
    """A leader whose lease thread is gone would lead on, without a lease and without a word."""
    seen = Seen(RECORD, await store.put_if(LEADER, encode(RECORD), version=None))
    renewed = Renewed(tmp_path, Seen(RECORD, seen.version))

    def broken() -> float:
        raise RuntimeError("the clock is broken")

    renewed.renewal._clock = broken
    async with renewed.running():
        await eventually(lambda: renewed.failures != [])
        assert isinstance(renewed.failures[0], RuntimeError)


async def test_a_renewal_that_landed_before_a_pause_counts_from_its_own_beginning(store: Store, tmp_path: Path) -> None:
    """Challengers count from when that one was seen, whatever was tried since."""
    old = Seen(RECORD, await store.put_if(LEADER, encode(RECORD), version=None))
    await renew(store, old)
    renewed = Renewed(tmp_path, old)
    longer = Lease(60.0)
    longer.extend(boottime() - 30.0)
    longer.demand_renewal(boottime())
    landed: list[float] = []
    longer.extend = landed.append  # type: ignore[method-assign, assignment]
    renewal = Renewal(
        f"file://{tmp_path}/store",
        old,
        longer,
        boottime,
        renewed.lost.append,
        renewed.failures.append,
        unknown_since=1.0,
    )
    renewal.start()
    try:
        await eventually(lambda: len(landed) > 1)
    finally:
        await asyncio.to_thread(renewal.stop)
    assert landed[0] == 1.0
