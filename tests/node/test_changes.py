"""Changes of side inside one real node, at the moments that no election orders: a stop, a cancellation, a stale record.

No HTTP and no other node: what is called here is what the elector, a peer's SEAL and the shutdown call.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from tests.waiting import eventually
from walship.config import NodeConfig
from walship.coordination.record import (
    CLUSTER,
    GENERATIONS,
    LEADER,
    LeaderRecord,
    Phase,
    Seen,
    TermStart,
    announce_leader,
    claim_next_term,
    encode,
    read_leader,
)
from walship.coordination.store import open_store
from walship.engine.durable_state import Truth
from walship.errors import WalshipError
from walship.node.join import join
from walship.node.leading import boottime
from walship.node.node import Node
from walship.node.role import Event, Role


@asynccontextmanager
async def leading_node(directory: Path) -> AsyncIterator[Node]:
    """The only voter of its cluster, leading term 1. Its background is not running."""
    config = NodeConfig(name="n1", data_dir=directory / "n1", cluster_url=f"file://{directory}/store", init=True)
    config.data_dir.mkdir()
    store = open_store(config.cluster_url)
    try:
        node = Node(config, store, await join(config, store), "http://127.0.0.1:1")
        await node.start()
        yield node
        await node.close()
    finally:
        await store.close()


async def claimed(node: Node) -> Seen[LeaderRecord]:
    """The node follows, and holds the next term by compare-and-swap."""
    assert node.led is not None
    await node.sides.step_down(node.led.term, "the test says so")
    assert node.role is Role.FOLLOWER
    claim = await claim_next_term(
        node.store,
        await read_leader(node.store),
        holder=node.node_id,
        name=node.name,
        url=node.url,
        nonce=node.boot_nonce,
        promised=node.member.state.state.promised,
    )
    await node.sides.promise(claim.record.term)
    return claim


async def test_a_stop_between_the_opening_of_a_term_and_its_serving_ends_in_order(tmp_path: Path) -> None:
    async with leading_node(tmp_path) as node:
        claim = await claimed(node)
        start = await node.sides.begin_term(claim.record.term)
        node.become(Event.STOP)
        seen = await announce_leader(node.store, claim, start=start)
        await node.sides.serve_term(seen, boottime())  # what comes too late ends nothing
        assert node.led is None
    assert node.member.state.state.truth is Truth.LOG  # the opened term was ended, not dropped


async def test_a_record_that_is_newer_than_the_opened_term_leaves_the_term_to_be_stepped_down_from(
    tmp_path: Path,
) -> None:
    async with leading_node(tmp_path) as node:
        claim = await claimed(node)
        await node.sides.begin_term(claim.record.term)
        newer = msgspec.structs.replace(claim.record, term=claim.record.term + 1, holder="f" * 32, phase=Phase.SERVING)
        await node.sides.serve_term(Seen(newer, claim.version + 1), boottime())
        await node.sides.step_down(claim.record.term, "somebody else leads")
        assert node.sides.following is not None
        assert node.role is Role.FOLLOWER


async def test_who_gives_up_waiting_for_a_promotion_does_not_leave_it_half_done(tmp_path: Path) -> None:
    async with leading_node(tmp_path) as node:
        claim = await claimed(node)
        path = node.member.state.state.database_path
        node.database.fence.release()
        foreign = sqlite3.connect(path, isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")  # the promotion waits for SQLite's WRITE lock
        try:
            promotion = asyncio.create_task(node.sides.begin_term(claim.record.term))
            await eventually(lambda: node.sides.following is None)
            promotion.cancel()
        finally:
            foreign.execute("ROLLBACK")
            foreign.close()
        with contextlib.suppress(asyncio.CancelledError, WalshipError):
            await promotion
        await node.sides.step_down(claim.record.term, "it was cancelled")
        assert node.sides.following is not None
        assert node.role is Role.FOLLOWER


async def test_who_gives_up_waiting_for_a_step_down_does_not_end_the_node(tmp_path: Path) -> None:
    async with leading_node(tmp_path) as node:
        assert node.led is not None
        begun, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            go_on.wait(30)

        work = asyncio.create_task(node.led.writer.run(hold))
        await eventually(begun.is_set)
        stepping = asyncio.create_task(node.sides.step_down(node.led.term, "the test says so"))
        await eventually(lambda: node.led is not None and node.led.acks is None)
        stepping.cancel()
        go_on.set()
        with contextlib.suppress(asyncio.CancelledError):
            await stepping
        await work
        await eventually(lambda: node.led is None and node.sides.following is not None)
        assert not node.stop.is_set()


async def test_a_record_that_cannot_be_read_does_not_end_the_node(tmp_path: Path) -> None:
    async with leading_node(tmp_path) as node:
        await eventually(lambda: node.embedded._record is not None)
        for key in (LEADER, GENERATIONS, CLUSTER, "nodes/n9"):
            there = await node.store.get(key)
            await node.store.put_if(key, b"{}", version=there.version if there is not None else None)
        reads = asyncio.create_task(node.elector._read())
        serving = asyncio.create_task(node.serve())
        await asyncio.wait({reads})
        assert reads.exception() is None
        # Whatever watches has seen them: they come with the first look, in the order in which the tasks began.
        await eventually(lambda: node.service is not None)
        done, _ = await asyncio.wait({serving}, timeout=0.5)
        assert not done
        assert not node.stop.is_set()
        node.stop.set()
        assert await serving is None


async def test_a_node_that_is_overtaken_while_it_starts_to_lead_again_follows(tmp_path: Path) -> None:
    async with leading_node(tmp_path):
        pass
    config = NodeConfig(name="n1", data_dir=tmp_path / "n1", cluster_url=f"file://{tmp_path}/store")
    store = open_store(config.cluster_url)
    try:
        node = Node(config, store, await join(config, store), "http://127.0.0.1:1")
        begin_term = node.sides.begin_term

        async def overtaken(term: int) -> TermStart:
            start = await begin_term(term)
            there = await read_leader(store)
            assert there is not None
            other = msgspec.structs.replace(there.record, term=term + 1, holder="f" * 32, name="n2", nonce="f" * 16)
            await store.put_if(LEADER, encode(other), version=there.version)
            return start

        node.sides.begin_term = overtaken  # type: ignore[method-assign]
        await node.start()
        assert node.led is None
        assert node.sides.following is not None
        assert node.role is Role.FOLLOWER
        await node.close()
    finally:
        await store.close()


async def foreign_write(path: str) -> str:
    """What another program hears that begins to write without patience; empty when it may."""
    code = (
        "import sqlite3, sys\n"
        "try:\n"
        "    sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0).execute('BEGIN IMMEDIATE')\n"
        "except sqlite3.Error as error:\n"
        "    print(error)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path, stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode().strip()


async def test_other_programs_write_only_while_the_node_serves(tmp_path: Path) -> None:
    """R10: what they commit in a term that is never announced would be history nowhere."""
    async with leading_node(tmp_path) as node:
        path = node.member.state.state.database_path
        claim = await claimed(node)
        start = await node.sides.begin_term(claim.record.term)
        assert await foreign_write(path) == "database is locked"
        await node.sides.serve_term(await announce_leader(node.store, claim, start=start), boottime())
        await eventually(lambda: not node.database.fence.held)
        assert await foreign_write(path) == ""
