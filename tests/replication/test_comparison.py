"""Page checksums on their way to the leader, and what the talk allows around them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.replication.talk import HELLO, SEEDED, SNAPSHOT, Talk
from walship.errors import CorruptData, ProtocolViolation
from walship.formats.checksum import FLAG, PAGE_CHECKSUMS_LAYOUT, PageChecksums
from walship.replication.comparison import PIECE_BYTES, Comparison, pieces
from walship.replication.messages import Ack, StreamSource
from walship.replication.protocol import PagesReceived, Phase, SnapshotBegan

COMPARABLE = replace(HELLO, comparable=True)
PAGES = replace(SEEDED, source=StreamSource.PAGES)
SPARSE = replace(SNAPSHOT, sparse=True)


def some(pages: int) -> PageChecksums:
    checksums = PageChecksums(4096)
    checksums.set_many({pgno: FLAG | pgno * 7919 for pgno in range(1, pages + 1)}, pages)
    return checksums


@pytest.mark.parametrize("pages", [0, 1, 1000, PIECE_BYTES // 8 + 5])
def test_what_is_cut_is_put_together(pages: int) -> None:
    comparison = Comparison()
    for piece in pieces(some(pages).to_bytes()):
        assert not comparison.complete
        comparison.receive(piece)
    assert comparison.complete
    assert comparison.result() == some(pages)


def test_bytes_may_be_cut_anywhere_and_none_may_be_wrong_or_too_many() -> None:
    record = some(20).to_bytes()
    comparison = Comparison()
    for at in range(len(record)):
        comparison.receive(record[at : at + 1])
    assert comparison.result() == some(20)
    damaged = Comparison()
    damaged.receive(record[:40] + b"\x7f" + record[41:])
    with pytest.raises(CorruptData):
        damaged.result()
    longer = Comparison()
    with pytest.raises(ProtocolViolation):
        longer.receive(record + b"x")


def test_no_follower_makes_the_leader_hold_more_than_the_bound() -> None:
    head = PAGE_CHECKSUMS_LAYOUT.pack(b"WSC1", 4096, (8 << 20) + 1, FLAG)
    with pytest.raises(ProtocolViolation, match="bound"):
        Comparison().receive(head)


def test_a_follower_says_what_it_has_and_gets_the_rest() -> None:
    talk = Talk(COMPARABLE)
    talk.greet(PAGES)
    assert talk.follower.phase is talk.leader.phase is Phase.COMPARING
    assert talk.to_leader(talk.follower.send_pages(b"some")) == [PagesReceived(b"some")]
    assert talk.to_leader(talk.follower.send_ack(Ack.seeding())) == [Ack.seeding()]
    assert talk.to_follower(talk.leader.send_snapshot_header(SPARSE)) == [SnapshotBegan(SPARSE)]


def test_the_leader_may_send_everything_after_all() -> None:
    talk = Talk(COMPARABLE)
    talk.greet(PAGES)
    assert talk.to_follower(talk.leader.send_snapshot_header(SNAPSHOT)) == [SnapshotBegan(SNAPSHOT)]


def test_a_follower_that_cannot_compare_is_not_asked_to() -> None:
    talk = Talk(HELLO)
    with pytest.raises(ProtocolViolation, match="cannot be compared"):
        talk.greet(PAGES)


def test_a_sparse_snapshot_without_a_comparison_is_a_violation() -> None:
    talk = Talk(COMPARABLE)
    talk.greet(SEEDED)
    with pytest.raises(ProtocolViolation, match="nothing was said"):
        talk.to_follower(talk.leader.send_snapshot_header(SPARSE))


def test_a_sparse_snapshot_is_another_thing_on_the_wire() -> None:
    assert type(SPARSE).parse(SPARSE.to_body()) == SPARSE
    assert SPARSE.to_body()[:4] != SNAPSHOT.to_body()[:4]
