"""Batons: what was signed is read back; nothing else is."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.errors import ProtocolViolation
from walship.hrana.baton import INVALID, Baton, open_baton, sign

U64 = st.integers(0, (1 << 64) - 1)
BATONS = st.builds(Baton, U64, U64, st.booleans())
KEY = b"k" * 32


@given(BATONS, st.binary(min_size=1, max_size=40))
def test_a_signed_baton_opens_with_its_key(baton: Baton, key: bytes) -> None:
    text = sign(key, baton)
    assert open_baton(key, text) == baton
    assert "=" not in text


@given(BATONS, st.integers(0, 43), st.sampled_from("ABCDwxyz0189+/-_= \n"))
def test_any_changed_character_makes_it_invalid(baton: Baton, at: int, character: str) -> None:
    """hrana.md 1.4: sqld's message, no more."""
    text = sign(KEY, baton)
    changed = text[:at] + character + text[at + 1 :]
    if changed == text:
        return
    with pytest.raises(ProtocolViolation, match=f"^{INVALID}$"):
        open_baton(KEY, changed)


@given(st.text(max_size=60))
def test_arbitrary_text_is_invalid_and_nothing_worse(text: str) -> None:
    with pytest.raises(ProtocolViolation, match=INVALID):
        open_baton(KEY, text)


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(ProtocolViolation, match=INVALID):
        open_baton(b"other", sign(KEY, Baton(1, 2)))


def test_the_transaction_flag_is_under_the_signature() -> None:
    """Clearing it would let an open transaction be dropped silently (hrana.md 1.4)."""
    data = bytearray(base64.b64decode(sign(KEY, Baton(1, 2, in_transaction=True))))
    data[16] = 0
    with pytest.raises(ProtocolViolation, match=INVALID):
        open_baton(KEY, base64.b64encode(data).decode())
