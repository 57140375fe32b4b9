"""The cluster's records: founding (R1), claiming and announcing terms (R2), registering nodes (R3)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from walship.coordination.ballot import Candidate
from walship.coordination.file_store import FileStore
from walship.coordination.record import (
    ClusterRecord,
    LeaderRecord,
    NodeRecord,
    Phase,
    Seen,
    TermRecord,
    TermStart,
    announce_leader,
    claim_next_term,
    create_cluster,
    decode,
    encode,
    hand_over,
    read_cluster,
    read_leader,
    read_nodes,
    read_terms,
    register_node,
    release,
    renew,
    term_key,
)
from walship.errors import CompareFailed, CorruptState, Fenced, Refused, UsageError

START = TermStart(prev_term=0, prev_txid=0, checksum=1 << 63)
CLUSTER = ClusterRecord(cluster_id="ab" * 16, created_ms=1, voters=("node1", "node2", "node3"), acks=1)


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileStore]:
    store = FileStore(tmp_path)
    yield store
    await store.close()


async def claim(
    store: FileStore, seen: Seen[LeaderRecord] | None, holder: str = "n1", promised: int = 0
) -> Seen[LeaderRecord]:
    return await claim_next_term(store, seen, holder=holder, name=holder, url=f"http://{holder}", promised=promised)


def node(**changes: object) -> NodeRecord:
    base = NodeRecord(node_id="01" * 16, name="node1", url="http://127.0.0.1:1", boot_nonce="a", pid=7)
    return msgspec.structs.replace(base, **changes)


async def test_a_cluster_is_founded_once(store: FileStore) -> None:
    """R1: the whole voter list is in the first compare-and-swap."""
    await create_cluster(store, CLUSTER)
    with pytest.raises(CompareFailed):
        await create_cluster(store, msgspec.structs.replace(CLUSTER, cluster_id="cd" * 16))
    seen = await read_cluster(store)
    assert seen is not None
    assert seen.record == CLUSTER


@pytest.mark.parametrize(
    ("voters", "acks"), [((), 0), (("a", "a"), 0), (("a",), 1), (("a", "b", "c"), 3), (("a",), -1)]
)
async def test_a_cluster_that_could_never_acknowledge_is_refused(
    store: FileStore, voters: tuple[str, ...], acks: int
) -> None:
    with pytest.raises(UsageError):
        await create_cluster(store, msgspec.structs.replace(CLUSTER, voters=voters, acks=acks))
    assert await read_cluster(store) is None


async def test_of_two_claims_on_one_record_one_wins(store: FileStore) -> None:
    first = await announce_leader(store, await claim(store, None), start=START)
    won = await claim(store, first, "n2")
    assert (won.record.term, won.record.phase) == (2, Phase.CLAIMING)
    with pytest.raises(CompareFailed):
        await claim(store, first, "n3")
    seen = await read_leader(store)
    assert seen is not None
    assert seen == won


async def test_a_store_older_than_the_promise_is_fenced(store: FileStore) -> None:
    """R1: a record whose term lies below `promised` is refused, whoever asks."""
    first = await claim(store, None)
    with pytest.raises(Fenced, match=r"term 1, but this node promised .* 5"):
        await claim(store, first, promised=5)
    with pytest.raises(Fenced):
        await claim(store, None, promised=1)
    assert await read_leader(store) == first


async def test_serving_is_in_the_history_of_terms(store: FileStore) -> None:
    serving = await announce_leader(store, await claim(store, None), start=START, url="http://n1:2")
    assert serving.record.phase is Phase.SERVING
    assert serving.record.url == "http://n1:2"
    later = TermStart(prev_term=1, prev_txid=41, checksum=1 << 63 | 5)
    await announce_leader(store, await claim(store, serving), start=later)
    assert [(term.term, term.start) for term in await read_terms(store)] == [(1, START), (2, later)]


async def test_an_overtaken_claim_cannot_be_announced(store: FileStore) -> None:
    overtaken = await claim(store, None)
    await claim(store, overtaken, "n2")
    with pytest.raises(CompareFailed):
        await announce_leader(store, overtaken, start=START)


async def test_an_announcement_whose_answer_was_lost_may_be_repeated(store: FileStore) -> None:
    """The term record is there already, and it is ours: go on with the compare-and-swap."""
    mine = await claim(store, None)
    term = TermRecord(term=1, holder="n1", name="n1", start=START)
    await store.put_if(term_key(1), encode(term), version=None)
    assert (await announce_leader(store, mine, start=START)).record.phase is Phase.SERVING


async def test_a_name_of_a_live_node_is_refused_to_another_process(store: FileStore) -> None:
    """R3: a second live holder is refused; a dead one's name may be taken over."""
    await register_node(store, node())
    with pytest.raises(Refused, match=r"runs already .pid 7"):
        await register_node(store, node(boot_nonce="b"), alive=lambda _other: True)
    await register_node(store, node(url="http://127.0.0.1:2"), alive=lambda _other: True)
    await register_node(store, node(boot_nonce="b", node_id="02" * 16), alive=lambda _other: False)
    assert {name: record.boot_nonce for name, record in (await read_nodes(store)).items()} == {"node1": "b"}


def test_a_newer_format_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="format 2, this walship reads format 1"):
        decode(ClusterRecord, "cluster", b'{"format": 2, "anything": []}')


@given(
    st.builds(
        LeaderRecord,
        term=st.integers(1, 2**63),
        holder=st.text(),
        name=st.text(),
        url=st.text(),
        phase=st.sampled_from(Phase),
        start=st.none() | st.builds(TermStart, *[st.integers(0, 2**64 - 1)] * 3),
        lease_ms=st.integers(0, 10**6),
        beat=st.integers(0, 2**63),
    ),
    st.data(),
)
def test_a_record_comes_back_whole_or_is_our_error(record: LeaderRecord, data: st.DataObject) -> None:
    text = encode(record)
    assert decode(LeaderRecord, "leader", text) == record
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + bytes([data.draw(st.integers(0, 255))]) + text[at + 1 :]
    with contextlib.suppress(UsageError, CorruptState):
        decode(LeaderRecord, "leader", damaged)


async def test_renewing_counts_and_names_the_version(store: FileStore) -> None:
    claimed = await claim(store, None)
    renewed = await renew(store, claimed)
    assert (renewed.record.beat, renewed.record.term) == (1, 1)
    with pytest.raises(CompareFailed):
        await renew(store, claimed)
    assert await read_leader(store) == renewed


async def test_a_released_term_is_vacant_and_the_next_one_can_be_claimed(store: FileStore) -> None:
    released = await release(store, await claim(store, None))
    assert released.record.phase is Phase.VACANT
    assert (await claim(store, released, "n2")).record.term == 2


async def test_a_claim_is_handed_over_in_its_term(store: FileStore) -> None:
    """R12a: one compare-and-swap; the new holder is named by its process."""
    claimed = await claim(store, None)
    heir = Candidate("id2", "node2", "http://node2", "nonce2")
    handed = await hand_over(store, claimed, to=heir, phase=Phase.CLAIMING)
    record = handed.record
    assert (record.term, record.holder, record.name, record.url, record.nonce) == (
        1,
        "id2",
        "node2",
        "http://node2",
        "nonce2",
    )
    assert (record.phase, record.start) == (Phase.CLAIMING, None)
    with pytest.raises(CompareFailed):
        await announce_leader(store, claimed, start=START)


async def test_a_handoff_opens_the_next_term_at_the_quiet_leaders_position(store: FileStore) -> None:
    serving = await announce_leader(store, await claim(store, None), start=START)
    start = TermStart(prev_term=1, prev_txid=7, checksum=5)
    heir = Candidate("id2", "node2", "http://node2", "nonce2")
    handed = await hand_over(store, await renew(store, serving), to=heir, phase=Phase.HANDOFF, start=start)
    assert (handed.record.term, handed.record.phase, handed.record.start) == (2, Phase.HANDOFF, start)
    assert handed.record.beat == 0


@pytest.mark.parametrize(
    ("phase", "start"), [(Phase.CLAIMING, START), (Phase.HANDOFF, None), (Phase.SERVING, None), (Phase.VACANT, None)]
)
async def test_nothing_else_can_be_handed_over(store: FileStore, phase: Phase, start: TermStart | None) -> None:
    claimed = await claim(store, None)
    with pytest.raises(ValueError, match="handoff"):
        await hand_over(store, claimed, to=Candidate("id2", "n2", "u", "x"), phase=phase, start=start)
    assert await read_leader(store) == claimed


async def test_a_record_of_an_older_walship_has_no_nonce(store: FileStore) -> None:
    claimed = await claim(store, None)
    data = encode(claimed.record).replace(b',"nonce":""', b"")
    assert b"nonce" not in data
    assert decode(LeaderRecord, "leader", data) == claimed.record
