"""Client streams at a node's own front door: which baton stands for which stream of the service.

Pure but for the randomness passed in. A stream here is a random id, the sequence its next baton must carry, and the
service's stream behind it. The table is bounded: what falls out of it, or was known to a process that is gone, is
revived when its baton says that nothing was lost with it, and has expired when there was: an open transaction, or
settings of its connection (hrana.md 1.4, R21). Both are what the baton calls `in_transaction`. Such a loss is told
once; then the baton is good again, since PyPI libsql never forgets its last one, whatever the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from walship.errors import Overloaded, ProtocolViolation
from walship.hrana.baton import ALREADY_USED, Baton, open_baton, sign, stream_expired

__all__ = ["Stream", "StreamTable"]

DEFAULT_MAX_STREAMS: Final = 16_384
_U64: Final = (1 << 64) - 1


@dataclass(slots=True, eq=False)
class Stream:
    """One client stream. `service_stream` 0 = the service keeps nothing for it (yet).

    `changed`: settings or TEMP objects were left on its connection, for as long as the stream lives.
    """

    id: int
    sequence: int
    service_stream: int = 0
    in_transaction: bool = False
    changed: bool = False
    busy: bool = False

    @property
    def has_state(self) -> bool:
        """Would something be lost if it were begun anew?"""
        return self.in_transaction or self.changed


class StreamTable:
    """The streams that clients hold batons of. Requests on one stream are serial: a baton works once."""

    def __init__(self, key: bytes, random_u64: Callable[[], int], *, max_streams: int = DEFAULT_MAX_STREAMS) -> None:
        self._key = key
        self._random_u64 = random_u64
        self._max_streams = max_streams
        self._streams: dict[int, Stream] = {}
        self._told: dict[int, None] = {}  # streams whose loss their clients know of, oldest first

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, baton: str | None) -> Stream:
        """The stream a request is for, marked busy; end it with `finish`, `undo` or `drop`.

        Raises ProtocolViolation for a baton that is not ours or was used, StatementFailed STREAM_EXPIRED when its
        open transaction is gone (once), Overloaded when too many streams are open.
        """
        if baton is None:
            return self._new()
        said = open_baton(self._key, baton)
        stream = self._streams.get(said.stream)
        if stream is None:
            if said.in_transaction and said.stream not in self._told:
                self._remember_told(said.stream)
                raise stream_expired()
            stream = self._new()
            self._told.pop(said.stream, None)
            return stream
        if stream.busy or stream.sequence != said.sequence:
            raise ProtocolViolation(ALREADY_USED)
        stream.busy = True
        stream.sequence = (stream.sequence + 1) & _U64
        return stream

    def finish(self, stream: Stream, service_stream: int, *, in_transaction: bool) -> str | None:
        """The stream may be used again; returns the baton for that. 0 as `service_stream` ends it, without a baton.

        Call it before the client can see the answer: the next request may be there before the last byte is out.
        """
        stream.busy = False
        stream.service_stream = service_stream
        stream.in_transaction = in_transaction
        self._streams.pop(stream.id, None)
        if service_stream == 0:
            return None
        # Put at the end: the front of the dict is what was idle longest.
        self._streams[stream.id] = stream
        return sign(self._key, Baton(stream.id, stream.sequence, stream.has_state))

    def undo(self, stream: Stream) -> None:
        """Nothing happened: the same baton may be sent again. A stream that had none yet is forgotten."""
        stream.busy = False
        stream.sequence = (stream.sequence - 1) & _U64
        if stream.service_stream == 0:
            self._streams.pop(stream.id, None)

    def drop(self, stream: Stream) -> None:
        """Forget the stream, whose client is being told why; its batons are good for a new beginning."""
        self._streams.pop(stream.id, None)
        self._remember_told(stream.id)

    def _remember_told(self, id: int) -> None:
        if len(self._told) >= self._max_streams:
            del self._told[next(iter(self._told))]
        self._told[id] = None

    def _new(self) -> Stream:
        if len(self._streams) >= self._max_streams:
            self._evict()
        stream = Stream(self._random_u64(), self._random_u64(), busy=True)
        self._streams[stream.id] = stream
        return stream

    def _evict(self) -> None:
        idle = next((each for each in self._streams.values() if not each.busy and not each.has_state), None)
        if idle is None:
            raise Overloaded(f"{self._max_streams} streams are open; nothing was run. Close some, or try again later.")
        del self._streams[idle.id]
