"""What a node says of a call is true of what it committed: a commit is never called `not done` (R19)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.bench import Bench, batch, execute, leading
from tests.waiting import eventually
from walship.engine.writer import WriterLimits
from walship.errors import OutcomeUnknown, TransactionTimeout
from walship.formats.link_words import Outcome
from walship.formats.position import Position
from walship.hrana.types import Level
from walship.service.limits import Limits
from walship.service.request import Call

NAME = (7, 1)
COMMITS = batch("BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)", "COMMIT", "PRAGMA foreign_keys = ON")
_PATIENT = WriterLimits(ack_timeout_seconds=30, ack_stall_seconds=60)


def count(bench: Bench) -> int:
    return int(bench.host.database.connect_reader().execute("SELECT count(*) FROM t").get)


@pytest.mark.parametrize("as_cursor", [False, True], ids=["pipeline", "cursor"])
async def test_a_commit_whose_reply_waits_in_vain_for_others_is_unknown(tmp_path: Path, as_cursor: bool) -> None:
    """Its position covers commits of others too, which are never acknowledged: that is no reason to say `not done`."""
    limits = Limits(ack_seconds=0.1)
    async with leading(tmp_path / "n", limits, writer_limits=_PATIENT, acknowledging=False) as bench:
        await bench.call(execute("CREATE TABLE t (a)"), ack=0)
        marks = bench.host.watermarks
        before = marks.durable
        call = Call([] if as_cursor else [COMMITS], level=Level.SESSION, term=1, token=NAME)
        work = bench.service.cursor(call, COMMITS.batch) if as_cursor else bench.service.pipeline(call)
        first = asyncio.ensure_future(work)
        await eventually(lambda: marks.durable.txid == before.txid + 1)
        other = asyncio.ensure_future(bench.run("INSERT INTO t VALUES (2)"))
        await eventually(lambda: marks.durable.txid == before.txid + 2)
        marks.acked = Position(before.term, before.txid + 1)
        with pytest.raises(OutcomeUnknown):
            await first
        assert bench.host.writer is not None
        assert bench.host.writer.attempts.outcome(NAME, before)[0] is Outcome.DONE
        marks.acked = marks.durable
        await other


@pytest.mark.parametrize("token", [None, NAME], ids=["plain", "token"])
async def test_a_commit_is_acknowledged_although_the_next_transaction_is_open(
    tmp_path: Path, token: tuple[int, int] | None
) -> None:
    """COMMIT and BEGIN in one request keep the write turn; the commit in between is not answered before its time."""
    async with leading(tmp_path / "n", Limits(), writer_limits=_PATIENT, acknowledging=False) as bench:
        await bench.call(execute("CREATE TABLE t (a)"), ack=0)
        marks = bench.host.watermarks
        reply, _ = await bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"), level=Level.ANY)
        before = marks.durable
        again = batch("COMMIT", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)")
        call = asyncio.ensure_future(bench.on(reply.stream, again, level=Level.ANY, term=1, token=token))
        await eventually(lambda: call.done() or marks.durable.txid == before.txid + 1)
        assert not call.done(), "a commit was answered that nobody acknowledged"
        marks.acked = marks.durable
        second, results = await call
        assert results[0]["type"] == "ok"
        assert second.stream
        assert not second.autocommit
        assert bench.host.writer is not None
        if token is not None:
            outcome, found = bench.host.writer.attempts.outcome(NAME, before)
            assert outcome is Outcome.DONE
            assert found is not None
            assert found.position == marks.acked
        commit = asyncio.ensure_future(bench.on(second.stream, execute("COMMIT")))
        await eventually(lambda: marks.durable.txid == before.txid + 2)
        marks.acked = marks.durable
        await commit
        assert count(bench) == 2


async def test_a_commit_is_not_refused_because_its_stream_cannot_be_kept(tmp_path: Path) -> None:
    async with leading(tmp_path / "n", Limits(streams=1)) as bench:
        await bench.run("CREATE TABLE t (a)")
        await bench.on(0, execute("INSERT INTO t VALUES (1)"))
        reply, results = await bench.on(0, execute("INSERT INTO t VALUES (2)"))
        assert results[0]["type"] == "ok"
        assert reply.stream == 0
        assert count(bench) == 2


async def test_a_transaction_lost_while_its_reply_waits_is_not_answered_as_autocommit(tmp_path: Path) -> None:
    """Else the rest of it would be committed alone."""
    patient = WriterLimits(ack_timeout_seconds=30, ack_stall_seconds=60, turn_seconds=0.1, foreign_poll_seconds=0.01)
    async with leading(tmp_path / "n", Limits(ack_seconds=30), writer_limits=patient, acknowledging=False) as bench:
        await bench.call(execute("CREATE TABLE t (a)"), ack=0)
        marks = bench.host.watermarks
        call = asyncio.ensure_future(
            bench.on(0, execute("BEGIN IMMEDIATE"), execute("INSERT INTO t VALUES (1)"), level=Level.SESSION)
        )
        assert bench.host.writer is not None
        await eventually(lambda: bench.host.writer.statistics().turns_expired == 1)  # type: ignore[union-attr]
        marks.acked = marks.durable
        with pytest.raises(TransactionTimeout):
            await call
