"""What every coordination store promises (store.py), on each of them: a directory, and a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.coordination.etcd import Etcd
from walship.coordination.store import Change, Store, Versioned, open_store
from walship.errors import CompareFailed, StoreUnavailable

ADDER = """
import asyncio, sys
from walship.coordination.store import open_store
from walship.errors import CompareFailed

async def main(url, times):
    store = open_store(url)
    done = 0
    while done < times:
        seen = await store.get("n")
        try:
            if seen is None:
                await store.put_if("n", b"1", version=None)
            else:
                await store.put_if("n", str(int(seen.value) + 1).encode(), version=seen.version)
            done += 1
        except CompareFailed:
            pass
    await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    try:
        yield etcd.start()
    finally:
        etcd.end()


@pytest.fixture(params=["file", "etcd"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A cluster URL with nothing behind it yet."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    etcd: Etcd = request.getfixturevalue("etcd")
    return etcd.url(tmp_path.name)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = open_store(url)
    try:
        yield store
    finally:
        await store.close()


async def next_change(changes: AsyncIterator[Change]) -> Change:
    async with asyncio.timeout(5):
        return await anext(changes)


async def test_put_if_absent_succeeds_once(url: str) -> None:
    async with opened(url) as store:
        version = await store.put_if("leader", b"a", version=None)
        with pytest.raises(CompareFailed, match=f"leader is at version {version}, not absent"):
            await store.put_if("leader", b"b", version=None)
        assert await store.get("leader") == Versioned(b"a", version)


async def test_put_if_refuses_an_old_version(url: str) -> None:
    async with opened(url) as store:
        first = await store.put_if("leader", b"a", version=None)
        second = await store.put_if("leader", b"b", version=first)
        with pytest.raises(CompareFailed):
            await store.put_if("leader", b"c", version=first)
        assert await store.get("leader") == Versioned(b"b", second)


async def test_versions_are_not_reused_after_a_delete(url: str) -> None:
    """Or a compare could be fooled by delete and create (store.py: no A-B-A)."""
    async with opened(url) as store:
        first = await store.put_if("k", b"a", version=None)
        await store.delete("k", version=first)
        assert await store.get("k") is None
        assert await store.put_if("k", b"a", version=None) > first
        with pytest.raises(CompareFailed):
            await store.delete("k", version=first)


async def test_list_takes_a_prefix_literally(url: str) -> None:
    async with opened(url) as store:
        for key in ("nodes/a", "nodes/b", "nodes_c", "terms/1", "node%"):
            await store.put_if(key, key.encode(), version=None)
        assert list(await store.list("nodes/")) == ["nodes/a", "nodes/b"]
        assert list(await store.list("node%")) == ["node%"]
        assert len(await store.list("")) == 5


async def test_changes_by_several_processes_all_count(url: str) -> None:
    """Four processes increment one record by compare-and-swap from nothing; no increment is lost."""
    command = [sys.executable, "-c", ADDER, url, "25"]
    adders = [await asyncio.create_subprocess_exec(*command) for _ in range(4)]
    assert [await adder.wait() for adder in adders] == [0, 0, 0, 0]
    async with opened(url) as store:
        state = await store.get("n")
    assert state is not None
    assert state.value == b"100"


async def test_watch_begins_with_the_present_and_goes_on_with_changes(url: str) -> None:
    async with opened(url) as store, opened(url) as other:
        version = await other.put_if("nodes/a", b"1", version=None)
        async with contextlib.aclosing(store.watch("nodes/")) as changes:
            assert await next_change(changes) == Change("nodes/a", Versioned(b"1", version))
            await other.put_if("leader", b"not under the prefix", version=None)
            newer = await other.put_if("nodes/a", b"2", version=version)
            assert await next_change(changes) == Change("nodes/a", Versioned(b"2", newer))
            await other.delete("nodes/a", version=newer)
            assert await next_change(changes) == Change("nodes/a", None)


async def test_a_watch_ends_when_the_store_closes(url: str) -> None:
    store = open_store(url)
    await store.put_if("a", b"", version=None)
    changes = store.watch("")
    assert (await next_change(changes)).key == "a"
    waiting = asyncio.ensure_future(next_change(changes))
    await store.list("")
    await store.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.get("a")


async def test_deleting_what_is_not_there_is_a_lost_compare(url: str) -> None:
    async with opened(url) as store:
        with pytest.raises(CompareFailed, match="k is absent, not at version 7"):
            await store.delete("k", version=7)


async def test_values_may_be_any_bytes(url: str) -> None:
    """Also none: an empty value is not an absent one."""
    async with opened(url) as store:
        for key, value in (("all", bytes(range(256))), ("none", b"")):
            version = await store.put_if(key, value, version=None)
            assert await store.get(key) == Versioned(value, version)


async def test_of_many_who_change_one_version_one_wins(url: str) -> None:
    async with opened(url) as store, opened(url) as other:
        first = await store.put_if("k", b"", version=None)
        stores = [store, other] * 8
        done = await asyncio.gather(
            *(each.put_if("k", bytes([number]), version=first) for number, each in enumerate(stores)),
            return_exceptions=True,
        )
        (won,) = [number for number, each in enumerate(done) if isinstance(each, int)]
        assert sum(isinstance(each, CompareFailed) for each in done) == len(stores) - 1
        seen = await other.get("k")
        assert seen is not None
        assert (seen.value, seen.version) == (bytes([won]), done[won])
