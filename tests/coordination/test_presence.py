"""Which proxies live: when one may answer from its own knowledge alone (R18)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from walship.coordination import presence as module
from walship.coordination.baton_key import BATON_KEY
from walship.coordination.file_store import HeldLock
from walship.coordination.presence import PROXIES, TRUST_SECONDS, Presence
from walship.coordination.store import Store, open_store
from walship.errors import UsageError

CHILD = """
import sys, time
from walship.coordination.file_store import HeldLock
lock = HeldLock(__import__("pathlib").Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Hall:
    """A store, and proxies that join it."""

    def __init__(self, store: Store, url: str) -> None:
        self.store, self.url, self.clock = store, url, Clock()
        self.joined: list[Presence] = []

    async def join(self, name: str = "proxy") -> Presence:
        joined = await Presence.join(self.store, self.url, name, "http://127.0.0.1:1", clock=self.clock)
        self.joined.append(joined)
        return joined


@pytest.fixture
async def hall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hall]:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.0)  # nobody writes here; the order is what is tested
    url = f"file://{tmp_path}/store"
    hall = Hall(open_store(url), url)
    yield hall
    for each in hall.joined:
        await each.leave()
    await hall.store.close()


async def test_one_that_sees_nobody_else_is_alone_and_has_to_learn_once(hall: Hall) -> None:
    one = await hall.join()
    assert one.alone
    assert one.doubt > 0


async def test_two_know_of_each_other_at_their_next_look(hall: Hall) -> None:
    one = await hall.join()
    other = await hall.join("other")
    assert other.others == ("proxy",)
    assert not other.alone
    await one.look()
    assert one.others == ("other",)
    assert not one.alone


async def test_knowing_to_be_alone_runs_out(hall: Hall) -> None:
    """A proxy that was stopped, or whose store is away, must not go on believing it."""
    one = await hall.join()
    hall.clock.now += TRUST_SECONDS
    assert not one.alone


async def test_trust_ends_before_a_newcomer_may_write() -> None:
    assert TRUST_SECONDS < module.JOIN_SECONDS


async def test_a_newcomer_waits_when_another_lives(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    await hall.join()
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await hall.join("other")
    assert loop.time() - began >= 0.2


async def test_after_another_was_there_its_writes_have_to_be_learned(hall: Hall) -> None:
    one = await hall.join()
    other = await hall.join("other")
    await one.look()
    during = one.doubt
    await other.leave()
    await one.look()
    assert one.alone
    assert one.doubt == during  # the question must have been asked after the last look that saw the other

    await one.look()
    assert one.doubt == during


async def test_after_a_time_without_a_look_another_may_have_come_and_gone(hall: Hall) -> None:
    one = await hall.join()
    before = one.doubt
    hall.clock.now += TRUST_SECONDS / 2
    await one.look()
    assert one.doubt == before
    hall.clock.now += TRUST_SECONDS
    await one.look()
    assert one.alone
    assert one.doubt > before


async def test_one_that_was_killed_is_gone_whatever_its_record_says(hall: Hall, tmp_path: Path) -> None:
    """The kernel drops the lock; no timer decides."""
    one = await hall.join()
    lock = tmp_path / "store" / "proxies" / "other.lock"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, str(lock), stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"held\n"
        await hall.store.put_if(f"{PROXIES}other", b'{"name":"other","url":"http://127.0.0.1:2"}', version=None)
        await one.look()
        assert not one.alone
        child.kill()
        await child.wait()
        await one.look()
        assert one.alone
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_a_record_that_cannot_be_read_is_some_proxys_all_the_same(hall: Hall, tmp_path: Path) -> None:
    one = await hall.join()
    await hall.store.put_if(f"{PROXIES}later", b"of a later version", version=None)
    with HeldLock(tmp_path / "store" / "proxies" / "later.lock"):
        await one.look()
        assert one.others == ("later",)
    await one.look()
    assert one.alone


async def test_a_name_that_a_live_one_has_gets_a_number(hall: Hall) -> None:
    names = [(await hall.join()).name for _ in range(3)]
    assert names == ["proxy", "proxy-2", "proxy-3"]
    assert set(await hall.store.list(PROXIES)) == {f"{PROXIES}{name}" for name in names}


async def test_the_name_of_one_that_left_is_free(hall: Hall) -> None:
    await (await hall.join()).leave()
    assert (await hall.join()).name == "proxy"


async def test_the_baton_key_is_no_proxy(hall: Hall) -> None:
    await hall.store.put_if(BATON_KEY, b"k" * 32, version=None)
    assert (await hall.join()).alone
    with pytest.raises(UsageError):
        await hall.join("baton-key")
