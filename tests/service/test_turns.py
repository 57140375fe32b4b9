"""Turns and transactions that expire, and clients that vanish in the middle of one (R21)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import Bench, batch, execute, leading, rows_of
from tests.waiting import eventually
from walship.engine.writer import WriterLimits
from walship.errors import ProtocolViolation, StatementFailed, TransactionTimeout
from walship.service.limits import Limits


async def test_idle_turn_is_lost_when_others_wait(tmp_path: Path) -> None:
    """R21: rolled back, the waiting write goes on, and the next request of the stream is TRANSACTION_TIMEOUT."""
    limits = WriterLimits(turn_idle_seconds=0.1)
    async with leading(tmp_path / "n", Limits(), writer_limits=limits) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
        assert (await bench.run("INSERT INTO t VALUES (2)"))["type"] == "ok"
        with pytest.raises(TransactionTimeout):
            await bench.on(reply.stream, execute("COMMIT"))
        assert await bench.rows("SELECT a FROM t") == [[2]]
        assert bench.service.status().connections == 0


async def test_turn_held_too_long_by_a_running_statement_is_stopped(tmp_path: Path) -> None:
    """R21: 30 s in all; the statement is interrupted and nothing of the transaction is kept."""
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT max(i) FROM n"
    async with leading(tmp_path / "n", Limits(), writer_limits=WriterLimits(turn_seconds=0.2)) as bench:
        await bench.run("CREATE TABLE t (a)")
        with pytest.raises(TransactionTimeout):
            await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"), execute(slow))
        assert await bench.rows("SELECT count(*) FROM t") == [[0]]
        assert bench.service.status().streams == 0


_LONG_READ = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000000) SELECT count(*) FROM n"


@pytest.mark.parametrize(("steps", "kept"), [((_LONG_READ, "COMMIT"), 0), (("COMMIT", _LONG_READ), 1)])
async def test_turn_held_too_long_is_told_as_what_became_of_it(
    tmp_path: Path, steps: tuple[str, ...], kept: int
) -> None:
    """R21: the statement interrupted may be a read, after or before the COMMIT: "nothing was kept" must be true."""
    async with leading(tmp_path / "n", Limits(), writer_limits=WriterLimits(turn_seconds=0.2)) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"))
        if kept:
            await bench.on(reply.stream, batch(*steps))
            await bench.on(reply.stream, execute("SELECT 1"))
        else:
            with pytest.raises(TransactionTimeout):
                await bench.on(reply.stream, batch(*steps))
        assert await bench.rows("SELECT count(*) FROM t") == [[kept]]
        await bench.run("INSERT INTO t VALUES (2)")  # the turn is free, the connection clean


async def test_vanished_client_is_rolled_back_and_its_turn_given_back(bench: Bench) -> None:
    await bench.run("CREATE TABLE t (a)")
    await bench.run(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 1000) INSERT INTO t SELECT i FROM n"
    )
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (-1)"))
    slow = execute("INSERT INTO t SELECT a.a FROM t a, t b LIMIT 300000")
    task = asyncio.ensure_future(bench.on(reply.stream, slow))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await bench.run("INSERT INTO t VALUES (-2)"))["type"] == "ok"
    await eventually(lambda: bench.service.status().streams == 0)
    assert await bench.rows("SELECT count(*) FROM t WHERE a = -1") == [[0]]


async def test_idle_transaction_expires_and_says_so(tmp_path: Path) -> None:
    """hrana.md 1.4: STREAM_EXPIRED only if a transaction was open; an idle stream without one lives on."""
    now = [0.0]
    async with leading(tmp_path / "n", Limits(), clock=lambda: now[0]) as bench:
        await bench.run("CREATE TABLE t (a)")
        idle, _ = await bench.on(0, execute("SELECT 1"))
        open_, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
        now[0] += 11
        await bench.service.sweep()
        with pytest.raises(StatementFailed) as caught:
            await bench.on(open_.stream, execute("COMMIT"))
        assert caught.value.statement_code == "STREAM_EXPIRED"
        _, answers = await bench.on(idle.stream, execute("SELECT count(*) FROM t"))
        assert rows_of(answers[0]) == [[0]]


async def test_nobody_gets_at_a_stream_whose_caller_vanished(bench: Bench) -> None:
    """Its statement still runs; another call must not run beside it on the same connection."""
    await bench.run("CREATE TABLE t (a)")
    reply, _ = await bench.on(0, execute("BEGIN"), execute("INSERT INTO t VALUES (1)"))
    fill = (
        "INSERT INTO t SELECT i FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n)"
    )
    running = asyncio.ensure_future(bench.on(reply.stream, execute(f"{fill} LIMIT 300000")))
    await eventually(lambda: bench.service._streams[reply.stream]._running)
    second = asyncio.ensure_future(bench.on(reply.stream, execute("COMMIT")))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(ProtocolViolation):
        await second
    await eventually(lambda: bench.service.status().connections == 0)
    assert await bench.rows("SELECT count(*) FROM t") == [[0]]
