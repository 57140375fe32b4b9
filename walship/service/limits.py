"""Every bound of the service in one place, each with its reason. Nothing a client sends may grow without one."""

from __future__ import annotations

from dataclasses import dataclass

import apsw

from walship.config import NodeConfig

__all__ = ["Limits", "limit_values"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one node's service. The defaults suit two cores and a few thousand clients."""

    response_bytes: int = 10 * 1024 * 1024
    """One statement's result as JSON, and one call's results together times three (hrana.md 1.5: 10 and 32 MB)."""
    chunk_bytes: int = 64 * 1024
    """A cursor hands out about this much at a time."""
    step_stride: int = 1_000
    """VM instructions between two calls of the progress handler: +2 % on a scan, nothing on a point read."""
    worker_stride: int = 10_000
    """The same on a worker, whose reads are long."""
    inline_steps: int = 50_000
    """What a read may cost on the loop thread before it moves to a worker: about 0.5 ms."""
    tick_steps: int = 200_000
    """What all reads of one batch may cost together before the loop gets its turn."""
    slow_texts: int = 1_024
    """How many SQL texts are remembered as slow."""
    slow_seconds: float = 30.0
    """How long such a memory lasts: one unlucky run must not banish a text for ever."""
    read_workers: int = 2
    """Threads at nice 19 for reads that are not short."""
    read_queue: int = 1_024
    """Reads that may wait, inline or for a worker; beyond it Overloaded."""
    read_seconds: float = 30.0
    """A read on a worker is interrupted after this long."""
    write_seconds: float = 300.0
    """A statement that writes, outside of a transaction of its client's, is interrupted and undone after this long:
    others wait for it. Long enough for an index on a large table; a transaction has the turn's own limits (R21)."""
    value_bytes: int = 64 << 20
    """The largest text, blob or row a statement may make or touch: SQLite's own gigabyte is a node's whole memory."""
    inline_value_bytes: int = 1 << 20
    """The same for a read on the loop thread; what is larger moves to a worker."""
    streams: int = 4_096
    """Streams remembered, with or without a connection."""
    connections: int = 128
    """Streams and cursors that own a connection at one time (hrana.md 1.5: 128)."""
    idle_connections: int = 32
    """Clean connections kept open for the next transaction: opening one costs 0.1 ms and a look at the whole schema."""
    stream_threads: int = 8
    """Threads that run the statements of streams with an own connection."""
    transaction_idle_seconds: float = 10.0
    """A stream with an open transaction is closed after this long without a request."""
    state_idle_seconds: float = 300.0
    """One whose connection has PRAGMA settings or TEMP objects, but no transaction; sooner when connections run out."""
    stream_idle_seconds: float = 600.0
    """A stream without a connection is forgotten after this long; its baton can be revived by the front door."""
    expired_seconds: float = 300.0
    """How long an expired transaction is remembered, for the better error (hrana.md 1.4)."""
    stored_texts: int = 50
    """SQL texts stored per stream (hrana.md 1.5)."""
    stored_bytes: int = 5_000
    """Size of each, in UTF-8 bytes."""
    requests: int = 10_000
    """Requests in one call, and steps in one batch."""
    ack_seconds: float = 5.0
    """How long a read on the leader waits until what it saw is acknowledged (R17)."""
    stream_wait_seconds: float = 30.0
    """How long a call waits for an earlier call of the same stream."""

    @classmethod
    def of(cls, config: NodeConfig) -> Limits:
        """With what a node's settings say; what idles otherwise than in a transaction, in proportion."""
        of_default = config.stream_idle_seconds / cls().transaction_idle_seconds
        return cls(
            read_seconds=config.statement_seconds,
            write_seconds=config.write_seconds,
            value_bytes=config.value_max_bytes,
            transaction_idle_seconds=config.stream_idle_seconds,
            state_idle_seconds=cls().state_idle_seconds * of_default,
            stream_idle_seconds=cls().stream_idle_seconds * of_default,
        )


def limit_values(connection: apsw.Connection, size_bytes: int) -> None:
    """Bound what one value may take, and what one instruction may cost: functions on large values are not
    interrupted by a progress handler."""
    connection.limit(apsw.SQLITE_LIMIT_LENGTH, size_bytes)
    connection.limit(apsw.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)


_MAX_PATTERN_BYTES = 4096  # matching costs pattern times text
