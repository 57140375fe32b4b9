"""The answer to a hello, on a real log: R3, R9, R11."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.replication.talk import CLUSTER, HELLO, SEED_ME, TIP, frames_after
from walship.engine.log import Log, LogLimits
from walship.formats.checksum import FLAG
from walship.formats.position import Position, Tip
from walship.replication.catchup import FromLog, FromSnapshot, LeaderView, plan
from walship.replication.messages import PROTOCOL, Hello, Refusal, RefusalReason


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log from 3.10 to 3.20, the frames up to 3.16 pruned away or nearly so."""
    limits = LogLimits(max_bytes=1, segment_bytes=600)
    log = Log.open(tmp_path / "log", cluster=CLUSTER, base=TIP, limits=limits)
    for header, data in frames_after(TIP, 10):
        log.append(header, data)
    log.sync()
    with log.pin(Position(3, 16)):
        assert log.prune(keep_from=None, now_ms=0) > 0
    yield log
    log.close()


@pytest.fixture
def view(log: Log) -> LeaderView:
    return LeaderView(cluster=CLUSTER.hex(), term=3, log=log, page_size=4096, leader_url="http://north:1")


def at(log: Log, txid: int) -> Hello:
    """The hello of a follower that holds everything up to `txid`."""
    ref = next(ref for ref in log.frames_after(log.base.position) if ref.header.max_txid == txid)
    return replace(HELLO, tip=ref.header.tip)


def refused(hello: Hello, view: LeaderView) -> RefusalReason:
    answer = plan(hello, view)
    assert isinstance(answer, Refusal)
    return answer.reason


def test_a_follower_whose_tip_is_a_frame_end_continues_from_there(log: Log, view: LeaderView) -> None:
    for txid in (18, 20):
        assert plan(at(log, txid), view) == FromLog(Position(3, txid))


def test_a_follower_at_the_logs_base_continues_from_there(log: Log, view: LeaderView) -> None:
    assert plan(replace(HELLO, tip=log.base), view) == FromLog(log.base.position)


def test_a_follower_older_than_the_log_gets_a_snapshot(view: LeaderView) -> None:
    """R9."""
    answer = plan(HELLO, view)
    assert isinstance(answer, FromSnapshot)
    assert "does not reach back to 3.10" in answer.why


def test_the_same_position_with_another_checksum_gets_a_snapshot(log: Log, view: LeaderView) -> None:
    """R11."""
    hello = at(log, 18)
    assert hello.tip is not None
    answer = plan(replace(hello, tip=replace(hello.tip, checksum=FLAG | 1)), view)
    assert isinstance(answer, FromSnapshot)
    assert "not in the leader's history" in answer.why


@pytest.mark.parametrize("position", [Position(3, 21), Position(2, 18)])
def test_a_position_that_is_not_in_the_log_gets_a_snapshot(position: Position, view: LeaderView) -> None:
    assert isinstance(plan(replace(HELLO, tip=replace(TIP, position=position)), view), FromSnapshot)


def test_a_follower_that_asks_for_a_snapshot_gets_one_and_its_reason_is_kept(view: LeaderView) -> None:
    assert plan(SEED_ME, view) == FromSnapshot("the follower has no log")
    assert plan(replace(SEED_ME, reseed="page 7 is wrong"), view) == FromSnapshot("page 7 is wrong")


def test_another_page_size_gets_a_snapshot(log: Log, view: LeaderView) -> None:
    assert isinstance(plan(replace(at(log, 18), page_size=512), view), FromSnapshot)
    assert isinstance(plan(replace(at(log, 18), page_size=0), view), FromLog)


def test_refusals_name_what_is_wrong(view: LeaderView) -> None:
    assert refused(replace(HELLO, protocol=PROTOCOL + 1), view) is RefusalReason.BAD_PROTOCOL
    assert refused(replace(HELLO, cluster="00" * 16), view) is RefusalReason.WRONG_CLUSTER
    assert refused(HELLO, replace(view, draining=True)) is RefusalReason.DRAINING
    assert refused(HELLO, replace(view, term=0)) is RefusalReason.NOT_LEADER
    assert refused(replace(HELLO, promised=4), view) is RefusalReason.STALE_TERM
    assert refused(HELLO, replace(view, room=False)) is RefusalReason.BUSY


def test_one_who_does_not_lead_says_who_does(view: LeaderView) -> None:
    answer = plan(HELLO, replace(view, term=0))
    assert isinstance(answer, Refusal)
    assert answer.leader == "http://north:1"


def test_a_second_holder_of_an_id_is_refused_and_the_same_process_is_not(log: Log, view: LeaderView) -> None:
    """R3."""
    assert refused(HELLO, replace(view, connected={HELLO.node_id: "n0"})) is RefusalReason.DUPLICATE_NODE
    same = replace(view, connected={HELLO.node_id: HELLO.boot_nonce}, room=False)
    assert isinstance(plan(at(log, 18), same), FromLog)


def test_reasons_stay_within_what_a_welcome_may_carry(view: LeaderView) -> None:
    answer = plan(replace(SEED_ME, reseed="x" * 4000), view)
    assert isinstance(answer, FromSnapshot)
    assert len(answer.why) == 1000


@pytest.mark.parametrize(
    ("hello", "sparse", "differs"),
    [
        (replace(SEED_ME, comparable=True), True, False),
        (replace(HELLO, tip=replace(TIP, checksum=FLAG | 99), comparable=True), True, None),
        (replace(HELLO, tip=Tip(Position(3, 99), FLAG | 9, 2), comparable=True), True, True),
        (replace(HELLO, tip=Tip(Position(3, 99), FLAG | 9, 2)), False, True),
        (replace(SEED_ME, comparable=True, page_size=8192), False, False),
    ],
)
def test_what_can_be_compared_is_compared(hello: Hello, sparse: bool, differs: bool | None, view: LeaderView) -> None:
    answer = plan(hello, view)
    assert isinstance(answer, FromSnapshot)
    assert answer.sparse is sparse
    assert differs is None or answer.differs is differs


def test_a_follower_of_an_older_walship_is_told_so(view: LeaderView) -> None:
    answer = plan(replace(HELLO, protocol=2), view)
    assert isinstance(answer, Refusal)
    assert "speaks replication protocol 3" in answer.message
