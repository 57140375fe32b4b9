"""Messages: what one side says is what the other reads; anything else is a violation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replication.talk import HEARTBEAT, HELLO, SEED_ME, SEEDED, WELCOME
from walship.errors import ProtocolViolation
from walship.formats.checksum import FLAG
from walship.formats.position import Position, Tip
from walship.replication.messages import (
    MAX_HISTORY,
    Ack,
    AckFlags,
    Goodbye,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Refusal,
    RefusalReason,
    Welcome,
)

U64 = st.integers(0, (1 << 64) - 1)
POSITIONS = st.builds(Position, U64, U64)
MESSAGES = [
    HELLO,
    SEED_ME,
    WELCOME,
    SEEDED,
    HEARTBEAT,
    Ack(Position(3, 11), Position(3, 10), AckFlags.DISK_SHORT),
    Ack.seeding(),
    Refusal(RefusalReason.BUSY, "later", "http://north"),
    Goodbye(GoodbyeReason.TERM_ENDED, "so long"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_what_is_said_is_what_is_read(message: Hello | Welcome | Heartbeat | Ack | Refusal | Goodbye) -> None:
    assert type(message).parse(message.to_body()) == message


@given(tip=POSITIONS, acked=POSITIONS, time_ms=st.integers(0, 1 << 60), keep_from=U64, monotonic_ms=U64, number=U64)
def test_a_heartbeat_survives_the_wire(
    tip: Position, acked: Position, time_ms: int, keep_from: int, monotonic_ms: int, number: int
) -> None:
    heartbeat = Heartbeat(tip, acked, time_ms, keep_from, monotonic_ms, number)
    assert Heartbeat.parse(heartbeat.to_body()) == heartbeat


@given(durable=POSITIONS, applied=POSITIONS, number=U64)
def test_an_ack_survives_the_wire(durable: Position, applied: Position, number: int) -> None:
    ack = Ack(durable, applied, AckFlags.APPLY_LAGS, number)
    assert Ack.parse(ack.to_body()) == ack


@given(position=POSITIONS, checksum=U64, name=st.text(max_size=30))
def test_a_hello_survives_the_wire(position: Position, checksum: int, name: str) -> None:
    hello = replace(HELLO, tip=Tip(position, checksum, 7), name=name)
    assert Hello.parse(hello.to_body()) == hello


def test_a_key_of_a_later_version_is_ignored() -> None:
    body = json.loads(HELLO.to_body())
    assert Hello.parse(json.dumps({**body, "colour": "blue"}).encode()) == HELLO


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        HELLO.to_body().replace(b'"term":3', b'"term":-1'),
        HELLO.to_body().replace(b'"term":3', b'"term":99999999999999999999'),
        HELLO.to_body().replace(b'"voter":true', b'"voter":"yes"'),
        HELLO.to_body().replace(b'"south"', b'"' + b"s" * 1000 + b'"'),
        HELLO.to_body().replace(b'"n1"', b'""'),
    ],
    ids=["empty", "list", "no text", "deep", "no keys", "negative", "too large", "type", "long name", "no nonce"],
)
def test_a_hello_that_is_none_is_a_violation(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        Hello.parse(body)


@pytest.mark.parametrize("change", [{"term": 0}, {"history": ((1, 1),) * (MAX_HISTORY + 1)}, {"keep_from": -1}])
def test_a_welcome_that_contradicts_itself_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        replace(WELCOME, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [Heartbeat, Ack])
def test_a_binary_message_of_another_size_is_a_violation(shape: type[Heartbeat] | type[Ack]) -> None:
    for size in (0, shape.SIZE - 1, shape.SIZE + 1):
        with pytest.raises(ProtocolViolation):
            shape.parse(bytes(size))


def test_messages_read_well_in_a_log() -> None:
    assert str(HELLO) == f"hello of south (bbbbbbbb, voter) at {HELLO.tip}"
    assert "asking for a snapshot (empty)" in str(SEED_ME)
    assert str(WELCOME) == "welcome by north in term 3: log from 3.10"
    assert str(Ack.seeding()) == "ack: seeding"
    assert str(Tip(Position(1, 2), FLAG, 3)) in str(replace(HELLO, tip=Tip(Position(1, 2), FLAG, 3)))
