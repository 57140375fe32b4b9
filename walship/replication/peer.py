"""What nodes ask each other in an election: one line of JSON there, one line back, over an upgraded connection.

    SEAL   a candidate holds term t by compare-and-swap: promise to refuse every lower term, and say what you hold
    CHECK  a node that thinks the leader is gone asks before it claims: have you heard of it lately? (failover.md 3.3)

A voter that leads steps down before it answers a SEAL, and its answer names what is durable there (R2). Talk that
happens once an election is readable in a capture; nothing here is on a hot path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Self

import msgspec

from walship.errors import ProtocolViolation, Unavailable, WalshipError
from walship.formats.position import Position, Tip
from walship.replication.hangup import hang_up
from walship.replication.upgrade import connect

__all__ = ["PATH", "Answer", "Check", "Checked", "PeerServer", "Question", "Refused", "Seal", "Sealed", "ask"]

_log = logging.getLogger("walship.peer")

PATH = "/walship/peer"
PROTOCOL = "walship-peer/1"
_MAX_LINE_BYTES = 64 << 10
_IDLE_SECONDS = 30.0


class Seal(msgspec.Struct, frozen=True, tag="seal"):
    """Promise `term` to the candidate `name`, and step down if you lead a lower one."""

    cluster: str
    term: int
    node_id: str
    name: str


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Have you heard from the leader of `term`, or of a later one?"""

    cluster: str
    term: int


class Sealed(msgspec.Struct, frozen=True, tag="sealed"):
    """The vow is durable. The tip is what this voter holds durably; `lag_txids` what of it is not applied."""

    name: str
    node_id: str
    url: str
    nonce: str
    term: int
    txid: int
    checksum: int
    commit: int
    lag_txids: int = 0

    @classmethod
    def of(cls, name: str, node_id: str, url: str, nonce: str, tip: Tip, lag_txids: int) -> Self:
        position = tip.position
        return cls(name, node_id, url, nonce, position.term, position.txid, tip.checksum, tip.commit, lag_txids)

    @property
    def tip(self) -> Tip:
        return Tip(Position(self.term, self.txid), self.checksum, self.commit)


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No: a term up to `promised` was promised already, or this node cannot vote now (`promised` 0)."""

    name: str
    promised: int
    message: str


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """`heard_ms`: since the last word of that leader; None when nothing was heard from it."""

    name: str
    heard_ms: int | None


Question = Seal | Check
Answer = Sealed | Checked | Refused

_questions = msgspec.json.Decoder(Question)
_answers = msgspec.json.Decoder(Answer)


async def ask(url: str, question: Question, *, timeout_seconds: float, credential: str = "") -> Answer:
    """Ask the node at `url`. Raises Unavailable when no answer comes in time, ProtocolViolation when it is none."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await connect(
                url, timeout_seconds=timeout_seconds, credential=credential, path=PATH, protocol=PROTOCOL
            )
            try:
                writer.write(msgspec.json.encode(question) + b"\n")
                line = await reader.readline()
            finally:
                hang_up(writer)
    except TimeoutError as error:
        raise Unavailable(f"{url} gave no answer within {timeout_seconds:g} s") from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url} broke off: {error}") from error
    if not line.endswith(b"\n"):
        raise Unavailable(f"{url} closed the connection without an answer")
    try:
        answer: Answer = _answers.decode(line)
    except msgspec.DecodeError as error:
        raise ProtocolViolation(f"{url} gave an answer that is none: {error}") from error
    return answer


class PeerServer:
    """The answering side: gives each question to `answer`, which raises nothing but errors of the tree."""

    def __init__(self, name: str, answer: Callable[[Question], Awaitable[Answer]]) -> None:
        self._name = name
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection until it ends or is idle for long."""
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    line = await reader.readline()
                if not line.endswith(b"\n") or len(line) > _MAX_LINE_BYTES:
                    return
                writer.write(msgspec.json.encode(await self._to(line)) + b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:  # TimeoutError is one; ValueError: a line beyond the reader's bound
            _log.debug("end of a peer's connection reason=%s", error)
        finally:
            hang_up(writer)

    async def _to(self, line: bytes) -> Answer:
        try:
            question = _questions.decode(line)
        except msgspec.DecodeError as error:
            return Refused(self._name, 0, f"this is no question of a peer: {error}"[:500])
        try:
            return await self._answer(question)
        except WalshipError as error:
            return Refused(self._name, 0, str(error)[:1000])
