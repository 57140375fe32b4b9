"""The words of the proxy-node link: what may stand in the fields of its messages (`walship.formats.link`)."""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum

import msgspec

from walship.errors import ProtocolViolation

__all__ = [
    "Outcome",
    "OutcomeBody",
    "ReadLevel",
    "Reason",
    "ReplyFlags",
    "RequestFlags",
    "Role",
    "StatusFlags",
    "Verb",
]


class Verb(IntEnum):
    """What a REQUEST asks for.

    READ_INDEX runs nothing: its REPLY carries a position only. By `level` that is, LINEARIZABLE: one that covers all
    that was acknowledged or shown before, from a leader that proved by a round that it leads; SESSION: the same by
    the leader's own knowledge; ANY: what the node asked has on disk, be it leader or follower.
    DUMP has a body of its own (`DumpBody`); its chunks are SQL text. A REFUSED behind chunks: they are not all.

    OUTCOME asks a serving leader what became of an attempt whose answer was lost (R19): `incarnation` and `seq` are the
    attempt's; `floor` is (the term that the attempt was bound to, the newest txid of that leader that the proxy knew
    when it sent it, 0 if none); `term` is 0, `ack` as it was: before so many acknowledgments it is `running`.
    The REPLY's JSON is an `OutcomeBody`, its position the commit's. While it
    is `running` the node waits up to `wait_ms`. Any other leader, or none: NOT_LEADER, FENCED, UNAVAILABLE; ask again.
    STAND asks a node to stand for election now; its REPLY is empty.
    """

    PIPELINE = 1
    CURSOR = 2
    CLOSE_STREAM = 3
    READ_INDEX = 4
    DUMP = 5
    OUTCOME = 6
    STAND = 7


class ReadLevel(IntEnum):
    """How fresh a read must be (R18), as numbers; names and meaning are those of `walship.hrana.types.Level`."""

    ANY = 0
    SESSION = 1
    LINEARIZABLE = 2


class RequestFlags(IntFlag):
    """READ_ONLY: refuse with NOT_READ_ONLY what would write. KEEP: keep a stream that has no state."""

    NONE = 0
    READ_ONLY = 1
    KEEP = 2


class ReplyFlags(IntFlag):
    """AUTOCOMMIT: no transaction is open on the stream afterwards."""

    NONE = 0
    AUTOCOMMIT = 1


class Role(IntEnum):
    STARTING = 0
    LEADER = 1
    FOLLOWER = 2


class StatusFlags(IntFlag):
    """SERVING: takes requests. DRAINING: finishes what it has and takes no more.

    LED: leads `term`, its term-start is acknowledged and its lease is live. CANDIDATE: a voter that could stand.
    """

    NONE = 0
    SERVING = 1
    DRAINING = 2
    LED = 4
    CANDIDATE = 8


class Reason(IntEnum):
    """Why a request was refused: one word for each error a node may answer a whole request with."""

    NOT_READ_ONLY = 1
    BEHIND = 2
    NOT_LEADER = 3
    OVERLOADED = 4
    DRAINING = 5
    FENCED = 6
    UNAVAILABLE = 7
    PROTOCOL = 8
    OUTCOME_UNKNOWN = 9
    TRANSACTION_TIMEOUT = 10
    STATEMENT = 11
    WRITE_LOST = 12
    STORAGE = 13
    NOT_DONE = 14
    FAILED = 15
    COMMITTED = 16


class Outcome(StrEnum):
    """What became of an attempt (R19).

    DONE: committed and acknowledged. RUNNING: on its way; ask again. NOT_DONE: it changed nothing and never will, so
    it may be sent again under a new token. UNKNOWN: committed or not, nobody can tell any more.
    """

    DONE = "done"
    RUNNING = "running"
    NOT_DONE = "not_done"
    UNKNOWN = "unknown"


class OutcomeBody(msgspec.Struct, frozen=True):
    """The JSON of an OUTCOME's REPLY. All but `outcome` counts only when that is DONE.

    `changes` and `last_insert_rowid` are those of the attempt's last statement (`None`: it inserted nothing);
    `had_rows`: that statement has columns, so rows may have been lost with the answer.
    """

    outcome: Outcome
    txid: int = 0
    changes: int = 0
    last_insert_rowid: int | None = None
    had_rows: bool = False

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, body: bytes) -> OutcomeBody:
        """Raises ProtocolViolation when `body` is anything else."""
        try:
            return _DECODE_OUTCOME(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolViolation(f"link: an unreadable outcome: {error}") from error


_DECODE_OUTCOME = msgspec.json.Decoder(OutcomeBody).decode
