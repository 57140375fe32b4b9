"""The embedded store: compare-and-swap between processes, watches, and locks that die with their process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from tests.coordination.test_store import ADDER, next_change
from walship.coordination.file_store import FileStore, HeldLock, holder_alive
from walship.coordination.store import Change, Versioned, open_store
from walship.errors import StoreUnavailable, UsageError

HOLDER = """
import sys
from pathlib import Path
from walship.coordination.file_store import HeldLock

lock = HeldLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[FileStore]:
    store = FileStore(directory)
    try:
        yield store
    finally:
        await store.close()


async def test_watch_is_woken_by_another_process_before_the_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inotify: with the poll out of the way, a change made through another handle still arrives."""
    monkeypatch.setattr("walship.coordination.file_store.POLL_SECONDS", 600.0)
    async with opened(tmp_path) as store, contextlib.aclosing(store.watch("")) as changes:
        version = await store.put_if("n", b"0", version=None)
        assert await next_change(changes) == Change("n", Versioned(b"0", version))
        waiting = asyncio.ensure_future(next_change(changes))
        adder = await asyncio.create_subprocess_exec(sys.executable, "-c", ADDER, f"file://{tmp_path}", "1")
        assert await adder.wait() == 0
        change = await waiting
    assert change.state is not None
    assert change.state.value == b"1"


async def test_a_locked_store_is_unavailable_within_its_deadline(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put_if("a", b"1", version=None)
        blocker = apsw.Connection(str(tmp_path / "store.db"))
        blocker.execute("BEGIN EXCLUSIVE")
        short = FileStore(tmp_path, deadline_seconds=0.2)
        with pytest.raises(StoreUnavailable, match="did not answer within"):
            await short.put_if("b", b"1", version=None)
        blocker.execute("ROLLBACK")
        blocker.close()
        await short.close()
        assert "a" in await store.list("")


async def test_another_sqlite_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(tmp_path / "store.db"))) as db:
        db.execute("CREATE TABLE mine (x)")
    async with opened(tmp_path) as store:
        with pytest.raises(UsageError, match="not a walship store"):
            await store.get("a")


async def test_a_damaged_store_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"nonsense " * 500)
    async with opened(tmp_path) as store:
        with pytest.raises(StoreUnavailable, match="not a database"):
            await store.get("a")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file://relative/dir", "relative paths"),
        ("file:relative", "names no directory"),
        ("file:///C:/data", "Windows"),
        ("file:///", "names no directory"),
        ("/plain/path", "not a cluster URL"),
        ("", "not a cluster URL"),
        ("s3://bucket", "not a cluster URL"),
        ("file:///a?mode=ro", "takes no"),
    ],
)
def test_store_urls_that_cannot_work_are_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_store(url)


async def test_a_url_may_carry_escaped_blanks(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/with%20blank")
    await store.put_if("a", b"", version=None)
    await store.close()
    assert (tmp_path / "with blank" / "store.db").exists()


def test_a_held_lock_is_seen_until_its_process_is_killed(tmp_path: Path) -> None:
    """failover.md 3.3: the flock is proof of death, however the process ends."""
    path = tmp_path / "lock"
    assert not holder_alive(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert holder_alive(path)
        with pytest.raises(UsageError, match=f"in use by another live process .pid {holder.pid}."):
            HeldLock(path)
        holder.kill()
        holder.wait()
    assert not holder_alive(path)
    with HeldLock(path):
        assert holder_alive(path)
    assert not holder_alive(path)


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = HeldLock(tmp_path / "lock")
    with subprocess.Popen(["sleep", "30"], close_fds=False) as child:
        lock.release()
        assert not holder_alive(tmp_path / "lock")
        child.kill()
