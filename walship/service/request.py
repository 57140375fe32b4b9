"""What a client asks of one node's database, and what it gets back, without any transport.

A `Call` is one decoded request list (a Hrana pipeline) with the routing facts that travel beside it; a `Reply` is the
finished result objects and the position they show. The HTTP front door and the proxy link both speak this.

Who raises what: everything about the request as a whole is raised (`NotDone` and its branches, `OutcomeUnknown`,
`WriteLost`, `ProtocolViolation`; and `StatementFailed` with the code `STREAM_EXPIRED` when the stream named had an
open transaction and sat idle too long). Errors of single statements are inside `results`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from walship.formats.position import Position
from walship.hrana.types import Level, StreamRequest

if TYPE_CHECKING:
    from walship.engine.database import Database
    from walship.engine.watermarks import Watermarks
    from walship.engine.writer import Writer

__all__ = ["Call", "CursorReply", "Host", "Reply"]


@dataclass(frozen=True, slots=True)
class Call:
    """One request list for one stream.

    `stream` 0 asks for a new stream; another number names one that an earlier reply gave. `floor` is the position a
    read must cover (R17), waited for at most `wait_seconds`. `read_only` refuses with NotReadOnly what would write,
    instead of writing it. `keep` asks that a stream without state be remembered too (stored SQL, `changes()`), as the
    front door's batons need. `ack` overrides the acknowledgment rule for the writes of this call.

    `term` binds the call to the leader of exactly that term, 0 to none. `token` names this attempt to write (R19): for
    a call that ends with no transaction open, since only then what it did is what was committed.
    """

    requests: list[StreamRequest]
    stream: int = 0
    floor: Position | None = None
    level: Level = Level.SESSION
    read_only: bool = False
    keep: bool = False
    wait_seconds: float = 0.05
    ack: int | None = None
    version: int = 3
    term: int = 0
    token: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """`results`: one JSON object per request, in order. `stream` is 0 when it is closed or was not kept.

    `position` covers everything the results show. `autocommit` is the stream's state after the call.
    """

    results: list[bytes]
    position: Position
    stream: int
    autocommit: bool


@dataclass(slots=True)
class CursorReply:
    """A batch whose rows are streamed. `lines` yields whole JSON lines, many to a chunk, without the head line.

    `stream` is known at once. `position` and `autocommit` are final when `lines` has ended; while it runs `position`
    already covers the rows given out. Whoever stops early must `aclose()` the iterator: it holds a read transaction.
    """

    stream: int
    position: Position
    autocommit: bool
    lines: AsyncIterator[bytes]


class Host(Protocol):
    """The node a service stands in: what it may touch. `writer` is None on a follower."""

    @property
    def name(self) -> str: ...

    @property
    def database(self) -> Database: ...

    @property
    def writer(self) -> Writer | None: ...

    @property
    def watermarks(self) -> Watermarks: ...

    @property
    def leader(self) -> tuple[str | None, str | None, int]:
        """Name, URL and term of the leader as far as this node knows."""
        ...

    async def read_index(self, timeout_seconds: float) -> Position:
        """A position that covers everything acknowledged or shown before this call, proven to be the leader's (R18).

        Raises NotLeader, Behind, and StatementFailed where the cluster's rule asks for no acknowledgments.
        """
        ...
