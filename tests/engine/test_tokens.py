"""Commit tokens: an absent one means `not done` only where it would be there (R19, tests/model/m5.pml)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import apsw
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from tests.engine.nodes import LIMITS, FollowerNode, LeaderNode, crash_image
from tests.engine.test_writer import QUICK, insert, writing
from tests.waiting import eventually
from walship.engine.attempts import Attempt, Pending
from walship.engine.tokens import Name, Tokens
from walship.engine.writer import WriterLimits
from walship.errors import NotDone, OutcomeUnknown
from walship.formats.checksum import FLAG
from walship.formats.frame import CommitToken, FrameFlags, FrameHeader, SnapshotHeader
from walship.formats.link_words import Outcome
from walship.formats.position import Position

CLUSTER = bytes(16)
START = Position(1, 0)


def header(previous: Position, position: Position, time_ms: int, tokens: list[CommitToken], flags: int) -> FrameHeader:
    return FrameHeader(
        FrameFlags(flags), CLUSTER, 1, position.term, previous.txid + 1, position.txid, previous, FLAG, FLAG, 1, 4096,
        time_ms, Position(0, 0), tuple(tokens),
    )  # fmt: skip


class Life(RuleBasedStateMachine):
    """One log's frames, forgotten, cut, rebuilt and handed on; beside it everything that was ever committed in them."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens(START, keep_ms=1000, most=6)
        self.frames = [START]
        self.committed: list[tuple[Name, Position]] = []
        self.sent: dict[Name, Position] = {}
        self.time_ms = 0
        self.seq = 0

    @property
    def tip(self) -> Position:
        return self.frames[-1]

    @initialize(target=attempts)
    def begin(self) -> Name:
        return self._send()

    @rule(target=attempts)
    def send(self) -> Name:
        return self._send()

    def _send(self) -> Name:
        self.seq += 1
        self.sent[1, self.seq] = self.tip
        return 1, self.seq

    @rule(name=attempts, passed_ms=st.integers(0, 400), rebuilt=st.booleans(), part=st.booleans())
    def commit(self, name: Name, passed_ms: int, *, rebuilt: bool, part: bool) -> None:
        if self.sent[name].term != self.tip.term:
            return  # it is bound to its term
        position = Position(self.tip.term, self.tip.txid + 1)
        self.time_ms += passed_ms
        token = CommitToken(*name, position.txid, 1, None, had_rows=False, part=part)
        self.tokens.feed(header(self.tip, position, self.time_ms, [] if rebuilt else [token], int(rebuilt)))
        self.committed.append((name, position))
        self.frames.append(position)

    @rule(back=st.integers(0, 3))
    def new_term(self, back: int) -> None:
        """An election; the log is cut to where the new leader's begins."""
        self.frames = self.frames[: max(1, len(self.frames) - back)]
        self.tokens.cut(self.tip)
        self.committed = [(name, at) for name, at in self.committed if at.order() <= self.tip.order()]
        previous, position = (
            self.tip,
            Position(max(self.frames[-1].term, *(p.term for p in self.sent.values())) + 1, self.tip.txid),
        )
        self.tokens.feed(header(previous, position, self.time_ms, [], int(FrameFlags.TERM_START)))
        self.frames.append(position)

    @rule()
    def seed(self) -> None:
        """Another node takes a snapshot and answers from then on."""
        since, tokens = self.tokens.export()
        other = Tokens(Position(9, 9), keep_ms=1000, most=6)
        other.adopt(SnapshotHeader(CLUSTER, 1, self.tip, FLAG, 1, 4096, self.time_ms, since, tokens))
        self.tokens = other
        self.frames = [self.tip]

    @invariant()
    def absent_means_not_done(self) -> None:
        for name, sent_after in self.sent.items():
            found = self.tokens.lookup(name)
            committed = [at for other, at in self.committed if other == name]
            if found is not None:
                assert committed
                assert found.position.order() >= min(at.order() for at in committed)
            elif committed:
                assert not self.tokens.covers(sent_after), f"{name} was committed and would be answered not done"
        assert len(self.tokens) <= 6


Life.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def test_what_was_sent_after_the_last_forgotten_commit_is_answered() -> None:
    tokens = Tokens(START, keep_ms=1000)
    token = CommitToken(1, 1, 1, 1, None, had_rows=False)
    tokens.feed(header(START, Position(1, 1), 0, [token], 0))
    tokens.feed(header(Position(1, 1), Position(1, 2), 5000, [], 0))
    assert tokens.lookup((1, 1)) is None
    assert not tokens.covers(START)
    assert tokens.covers(Position(1, 1))
    assert tokens.covers(Position(2, 0))


def test_a_rebuilt_frame_makes_its_whole_term_unknown_and_no_later_one() -> None:
    tokens = Tokens(START)
    tokens.feed(header(START, Position(1, 3), 0, [], int(FrameFlags.REBUILT)))
    assert not tokens.covers(Position(1, 2))
    assert tokens.covers(Position(2, 0))


def filling(attempt: Attempt, job: Callable[[apsw.Connection], object]) -> Callable[[apsw.Connection], object]:
    def run(connection: apsw.Connection) -> object:
        value = job(connection)
        attempt.changes, attempt.last_insert_rowid = connection.changes(), connection.last_insert_rowid()
        return value

    return run


class TestWriter:
    async def test_each_job_of_a_group_has_the_txid_of_its_own_last_commit(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            before = leader.tip.position.txid
            attempts = [Attempt((7, number)) for number in range(6)]

            def twice(connection: apsw.Connection) -> None:
                insert(10)(connection)
                insert(11)(connection)

            jobs = [insert(1), insert(1), twice, lambda c: c.execute("UPDATE t SET id = 9 WHERE id = 77").fetchall()]
            jobs += [lambda c: c.execute("SELECT * FROM t").fetchall(), insert(12)]
            gate = asyncio.Event()
            loop = asyncio.get_running_loop()
            held = asyncio.create_task(
                writer.run(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(20))
            )
            await asyncio.sleep(0)
            tasks = [
                asyncio.create_task(writer.submit(filling(a, job), attempt=a))
                for a, job in zip(attempts, jobs, strict=True)
            ]  # all in one group, behind the one that is held
            await eventually(lambda: len(writer.attempts.running) == 6)
            outcomes = {writer.attempts.outcome(a.name, Position(leader.leader.term, before))[0] for a in attempts}
            assert outcomes == {Outcome.RUNNING}  # and not burned: they run below
            gate.set()
            await held
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[1], apsw.ConstraintError)
            found = [leader.replica.log.tokens.lookup(attempt.name) for attempt in attempts]
            assert [each and each.token.txid - before for each in found] == [1, None, 3, None, None, 4]
            assert found[2] is not None
            assert (found[2].token.changes, found[2].token.last_insert_rowid, found[2].token.part) == (1, 11, False)
            assert writer.attempts.running == set()

    async def test_an_answer_of_not_done_is_kept(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            sent = leader.tip.position
            assert writer.attempts.outcome((7, 1), sent)[0] is Outcome.NOT_DONE
            with pytest.raises(NotDone, match="before it arrived"):
                await writer.submit(insert(1), attempt=Attempt((7, 1)))
            await writer.submit(insert(1), attempt=Attempt((7, 2)))
            assert writer.attempts.outcome((7, 2), sent)[0] is Outcome.DONE
            with pytest.raises(OutcomeUnknown, match="run already"):
                await writer.submit(insert(2), attempt=Attempt((7, 2)))
            assert leader.tip.position.txid == sent.txid + 1

    async def test_it_is_running_until_it_is_acknowledged(self, tmp_path: Path) -> None:
        async with writing(tmp_path, required=1, limits=replace(QUICK, ack_timeout_seconds=0.05)) as (leader, writer):
            sent = leader.tip.position
            task = asyncio.create_task(writer.submit(insert(1), attempt=Attempt((7, 1))))
            await eventually(lambda: leader.replica.log.tokens.lookup((7, 1)) is not None)
            assert writer.attempts.outcome((7, 1), sent)[0] is Outcome.RUNNING
            with pytest.raises(OutcomeUnknown):
                await task
            assert writer.attempts.outcome((7, 1), sent)[0] is Outcome.RUNNING
            leader.acks.record("b", leader.tip.position)
            leader.move_acked()
            outcome, found = writer.attempts.outcome((7, 1), sent)
            assert outcome is Outcome.DONE
            assert found is not None
            assert found.position == leader.tip.position

    async def test_a_frame_in_the_middle_of_an_attempt_says_part(self, tmp_path: Path) -> None:
        """Somebody's checkpoint makes the writer log while a job runs; who has no more than that frame says unknown."""
        async with writing(tmp_path) as (leader, writer):
            sent = leader.tip.position

            def job(connection: apsw.Connection) -> None:
                insert(1)(connection)
                leader.leader.commit_group()  # what the busy handler does
                crash_image(leader.directory, tmp_path / "middle")
                insert(2)(connection)
                leader.leader.commit_group()

            await writer.submit(job, attempt=Attempt((7, 1)))
            # All of it was logged before it ended. How it ended is known here, and the next frame says so.
            assert writer.attempts.outcome((7, 1), sent)[0] is Outcome.DONE
            await writer.submit(insert(3))
            crash_image(leader.directory, tmp_path / "after")
        middle, after = LeaderNode(tmp_path / "middle"), LeaderNode(tmp_path / "after")
        for node, part in ((middle, True), (after, False)):
            found = node.replica.log.tokens.lookup((7, 1))
            assert found is not None
            assert found.token.part is part
            await node.stop()

    @pytest.mark.parametrize("looked", [False, True])
    async def test_a_turn_s_commit_carries_its_token(self, tmp_path: Path, looked: bool) -> None:
        limits = WriterLimits(foreign_poll_seconds=0.01)
        async with writing(tmp_path, limits=limits) as (leader, writer):
            attempt = Attempt((7, 1))
            turn = await writer.turn()
            turn.attempt = attempt
            writer.attempts.begin(attempt)
            connection = leader.database.connect_writer()

            def hook(_connection: apsw.Connection, _name: str, frames: int) -> int:
                attempt.frame = frames
                return apsw.SQLITE_OK

            connection.set_wal_hook(hook)
            connection.execute("INSERT INTO t VALUES(1, 'x')")
            tip = leader.tip
            if looked:  # a look that was under way when the turn was named
                turn.attempt = None
                leader.leader.pending.present = lambda: attempt
                await eventually(lambda: leader.tip != tip)
                token = leader.replica.log.tokens.lookup((7, 1))
                assert token is not None
                assert token.token.part
                turn.attempt = attempt
            attempt.ended = True
            await turn.release()
            writer.attempts.end(attempt)
            connection.close()
            outcome, found = writer.attempts.outcome((7, 1), tip.position)
            assert outcome is Outcome.DONE
            assert found is not None
            assert found.token.txid == tip.position.txid + 1

    async def test_an_attempt_that_ends_between_capture_and_token_is_not_forgotten(self, tmp_path: Path) -> None:
        """Its end is noted on the loop, while the writer thread logs what was captured for a reason of its own."""
        attempt = Attempt((7, 1), frame=3, ended=True)
        pending = Pending()
        pending.present = lambda: attempt
        (token,) = pending.take(lambda _frame: 4, 5)
        assert not token.part
        pending.add(attempt)
        assert len(pending.take(lambda _frame: 4, 5)) == 1, "once is enough"

    async def test_it_is_running_until_as_many_acknowledge_as_it_asked_for(self, tmp_path: Path) -> None:
        """PRAGMA walship_ack: what was not confirmed by so many is not answered as if it were."""
        async with writing(tmp_path) as (leader, writer):
            before = leader.tip.position
            attempt = Attempt((7, 1))
            await writer.submit(insert(1), attempt=attempt)
            assert writer.attempts.outcome((7, 1), before)[0] is Outcome.DONE
            assert writer.attempts.outcome((7, 1), before, 1)[0] is Outcome.RUNNING
            leader.acks.record("f", leader.tip.position)
            assert writer.attempts.outcome((7, 1), before, 1)[0] is Outcome.DONE


class TestElsewhere:
    async def test_a_node_that_starts_again_answers_from_its_log(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            await writer.submit(insert(1), attempt=Attempt((7, 1), changes=3))
        again = LeaderNode(tmp_path / "n")
        found = again.replica.log.tokens.lookup((7, 1))
        assert found is not None
        assert (found.token.changes, found.position) == (3, leader.tip.position)
        assert again.replica.log.tokens.covers(Position(leader.leader.term, leader.tip.position.txid))
        await again.stop()

    async def test_a_commit_that_was_counted_again_makes_its_term_unknown(self, tmp_path: Path) -> None:
        """R2: kill -9 between SQLite's commit and the log; the frame that the next start makes has no tokens."""
        async with writing(tmp_path) as (leader, _):
            sent = leader.tip.position
            connection = leader.database.connect_writer()
            connection.execute("INSERT INTO t VALUES(1, 'x')")
            crash_image(leader.directory, tmp_path / "crashed")
            connection.close()
        again = LeaderNode(tmp_path / "crashed")
        tokens = again.replica.log.tokens
        assert again.recovered_tip.position.txid == sent.txid + 1
        assert tokens.lookup((7, 1)) is None
        assert not tokens.covers(sent)
        assert tokens.covers(again.tip.position)
        await again.stop()

    async def test_followers_know_and_a_snapshot_carries_them(self, tmp_path: Path) -> None:
        async with writing(tmp_path) as (leader, writer):
            await writer.submit(insert(1), attempt=Attempt((7, 1)))
            since = leader.replica.log.tokens.complete_since
            follower = FollowerNode(tmp_path / "f", limits=LIMITS)
            pinned = await writer.run(leader.leader.pin_snapshot)
            await follower.seed(lambda: pinned)
            await writer.submit(insert(2), attempt=Attempt((7, 2)))
            await follower.ship(leader)
            await follower.applied(leader.tip.position)
            tokens = follower.replica.log.tokens
            assert tokens.lookup((7, 1)) is not None
            assert tokens.lookup((7, 2)) == leader.replica.log.tokens.lookup((7, 2))
            assert tokens.complete_since == since
            await follower.stop()
