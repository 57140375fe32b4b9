"""What a level and a number of acknowledgments mean on one node (R14, R18)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.service.bench import CLOSE, Bench, execute, leading
from walship.engine.writer import WriterLimits
from walship.errors import OutcomeUnknown
from walship.hrana.types import Level
from walship.service.limits import Limits


@pytest.fixture
async def unacknowledged(tmp_path: Path) -> AsyncIterator[Bench]:
    """A leader whose followers say nothing from now on; it waits 0.2 s for them."""
    limits = WriterLimits(ack_timeout_seconds=0.2, ack_stall_seconds=60)
    async with leading(tmp_path / "n1", Limits(), writer_limits=limits, acknowledging=False) as bench:
        await bench.call(execute("CREATE TABLE t (v)"), CLOSE, ack=0)
        yield bench


async def test_a_linearizable_call_is_proven_before_it_runs_and_others_are_not(bench: Bench) -> None:
    await bench.rows("SELECT 1")
    assert bench.host.proofs == 0
    await bench.rows("SELECT 1", level=Level.LINEARIZABLE)
    await bench.run("CREATE TABLE t (v)", level=Level.LINEARIZABLE)
    assert bench.host.proofs == 2


async def test_an_interactive_commit_waits_for_the_acknowledgments_it_asks_for(unacknowledged: Bench) -> None:
    """PRAGMA walship_ack on a stream counts for its transactions too."""
    bench = unacknowledged
    first, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"), level=Level.ANY)
    reply, [committed] = await bench.on(first.stream, execute("COMMIT"), ack=0)
    assert committed["type"] == "ok"
    assert reply.position == bench.host.watermarks.durable

    second, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (2)"), level=Level.ANY)
    with pytest.raises(OutcomeUnknown):
        await bench.on(second.stream, execute("COMMIT"))


async def test_a_single_write_waits_for_the_acknowledgments_it_asks_for(unacknowledged: Bench) -> None:
    await unacknowledged.call(execute("INSERT INTO t VALUES (1)"), CLOSE, ack=0)
    with pytest.raises(OutcomeUnknown):
        await unacknowledged.call(execute("INSERT INTO t VALUES (2)"), CLOSE)
