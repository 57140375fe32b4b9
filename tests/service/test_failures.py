"""When the writer dies under a transaction: nobody waits for ever, and the answer is honest (R5)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.service.bench import Bench, execute, leading
from walship.errors import NotDone, OutcomeUnknown
from walship.hrana.types import Level
from walship.service.limits import Limits


async def test_commit_over_a_failed_disk_is_outcome_unknown_and_the_next_is_not_done(tmp_path: Path) -> None:
    """R5: a failed fdatasync of the -wal ends the writer; whoever held the turn is told, not left waiting."""
    async with leading(tmp_path / "n", Limits(), failing=True) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"))
        _break_disk(bench)
        with pytest.raises(OutcomeUnknown):
            await bench.on(reply.stream, execute("COMMIT"))
        with pytest.raises(NotDone):
            await bench.run("INSERT INTO t VALUES (2)")
        with pytest.raises(NotDone):
            await bench.on(0, execute("BEGIN IMMEDIATE"))
        assert bench.service.status().connections == 0


@pytest.mark.parametrize("kept", [False, True], ids=["read", "stream"])
async def test_a_read_after_the_writer_has_ended_is_answered(tmp_path: Path, kept: bool) -> None:
    """R17: what it saw is never captured any more; it once waited for that, and the node could not end."""
    async with leading(tmp_path / "n", Limits(), failing=True) as bench:
        await bench.run("CREATE TABLE t (a)")
        reply, _ = await bench.on(0, execute("BEGIN"), execute("SELECT 1"))
        _break_disk(bench)
        with pytest.raises(OutcomeUnknown):
            await bench.run("INSERT INTO t VALUES (1)")
        async with asyncio.timeout(5):
            with pytest.raises(NotDone):
                await bench.on(reply.stream if kept else 0, execute("SELECT a FROM t"), level=Level.SESSION)


def _break_disk(bench: Bench) -> None:
    """Let the -wal's descriptor be one that cannot be synced: a pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, bench.host.database.wal_fd)
    os.close(writer)
