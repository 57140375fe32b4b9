"""Batons: the token by which a client goes on with its stream over plain HTTP (hrana.md 1.4).

A baton is 33 bytes, base64 without padding (44 characters)::

    offset  size  field
    0       8     stream id, u64 big-endian
    8       8     sequence, u64 big-endian; differs in every reply of a stream
    16      1     bit 0: a transaction is open on the stream; bits 1 to 7: its settings, a number of whoever signs
    17      16    HMAC-SHA256(key, bytes 0..16), first 16 bytes

The transaction bit lets a process that no longer knows the stream decide: a stream that was in autocommit can be
revived silently, one with an open transaction cannot, since its earlier statements are gone. The settings keep a
revived stream from being weaker than its client asked for. All who share the key can revive each other's streams.
Whether a sequence was used before is the business of whoever keeps the streams.
"""

from __future__ import annotations

import binascii
import hmac
import struct
from dataclasses import dataclass

from walship.errors import ProtocolViolation, StatementFailed

__all__ = ["ALREADY_USED", "CLOSED", "INVALID", "STREAM_EXPIRED", "Baton", "open_baton", "sign", "stream_expired"]

INVALID = "Received an invalid baton"
ALREADY_USED = "Received a baton that has already been used"
CLOSED = "Stream for this baton was closed"
STREAM_EXPIRED = "STREAM_EXPIRED"

_PLAIN = struct.Struct(">QQB")
_MAC_SIZE = 16
_TEXT_SIZE = 44
_IN_TRANSACTION = 1


@dataclass(frozen=True, slots=True)
class Baton:
    """What a baton says. `stream` and `sequence` are unsigned 64-bit numbers, `settings` is below 128."""

    stream: int
    sequence: int
    in_transaction: bool = False
    settings: int = 0

    def __str__(self) -> str:
        return f"stream {self.stream} at {self.sequence}" + (", in a transaction" if self.in_transaction else "")


def stream_expired() -> StatementFailed:
    """The stream is gone together with its open transaction or the state of its connection (hrana.md 1.4)."""
    return StatementFailed("The stream has expired due to inactivity", STREAM_EXPIRED)


def sign(key: bytes, baton: Baton) -> str:
    """The text to hand to the client: 44 characters of the standard base64 alphabet."""
    flags = baton.settings << 1 | (_IN_TRANSACTION if baton.in_transaction else 0)
    plain = _PLAIN.pack(baton.stream, baton.sequence, flags)
    return binascii.b2a_base64(plain + _mac(key, plain), newline=False).decode("ascii")


def open_baton(key: bytes, text: str) -> Baton:
    """Read a baton that `sign` made with the same key. Raises ProtocolViolation with sqld's message otherwise."""
    if len(text) != _TEXT_SIZE:
        raise ProtocolViolation(INVALID)
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ProtocolViolation(INVALID) from error
    plain = data[: _PLAIN.size]
    if len(data) != _PLAIN.size + _MAC_SIZE or not hmac.compare_digest(data[_PLAIN.size :], _mac(key, plain)):
        raise ProtocolViolation(INVALID)
    stream, sequence, flags = _PLAIN.unpack(plain)
    return Baton(stream, sequence, bool(flags & _IN_TRANSACTION), flags >> 1)


def _mac(key: bytes, plain: bytes) -> bytes:
    return hmac.digest(key, plain, "sha256")[:_MAC_SIZE]
