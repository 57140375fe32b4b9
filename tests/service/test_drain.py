"""Draining: what is let end, what is stopped, and what its callers are told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import CLOSE, Bench, code_of, execute, leading
from tests.waiting import eventually
from walship.errors import Draining, OutcomeUnknown
from walship.service.limits import Limits

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT max(i) FROM n"


async def test_drain_lets_a_transaction_end_and_refuses_new_work(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    draining = asyncio.ensure_future(bench.service.drain(5.0))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await bench.run("SELECT 1")
    done, _ = await bench.on(reply.stream, execute("COMMIT"), CLOSE)
    await draining
    assert done.autocommit
    assert bench.service.status().streams == 0


async def test_drain_rolls_back_what_does_not_end(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    await bench.service.drain(0.05)
    assert bench.service.status().connections == 0
    assert bench.host.database.connect_reader().execute("SELECT count(*) FROM t").fetchall() == [(0,)]


async def test_drain_tells_who_waits_for_acknowledgments_that_the_outcome_is_unknown(tmp_path: Path) -> None:
    """A typed answer, and a stop that does not wait for followers that are away."""
    async with leading(tmp_path / "n", Limits(), acknowledging=False) as bench:
        call = asyncio.ensure_future(bench.run("CREATE TABLE t (a)"))
        await eventually(lambda: bench.host.watermarks.durable != bench.host.watermarks.acked)
        await bench.service.drain(0.1)
        async with asyncio.timeout(5):
            with pytest.raises(OutcomeUnknown):
                await call


async def test_drain_ends_although_a_write_in_the_writer_thread_does_not(bench: Bench) -> None:
    """A stop must end: what is not committed when its time is up is not done, in the shared writer too."""
    await bench.run("CREATE TABLE t (a)")
    call = asyncio.ensure_future(bench.run(ENDLESS))
    await eventually(lambda: bench.host.writer is not None and bench.host.writer.statistics().queued == 1)
    await bench.service.drain(0.1)
    async with asyncio.timeout(5):
        assert code_of(await call) == "SQLITE_INTERRUPT"


async def test_drain_ends_although_a_statement_does_not(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    running = asyncio.ensure_future(bench.on(reply.stream, execute(ENDLESS)))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    await bench.service.drain(0.05)
    _, answers = await running
    assert code_of(answers[0]) == "SQLITE_INTERRUPT"
    assert bench.host.database.connect_reader().execute("SELECT count(*) FROM t").fetchall() == [(0,)]
