"""The bounds of the writer, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WriterLimits", "WriterStatistics"]


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """Bounds of the writer (R5, R14, R21).

    reserve_bytes: with less than this free for -wal or log no write is admitted, while what runs can still end well.

    admission_wait_seconds: how long a write waits for room before it is refused as not done.
    ack_timeout_seconds: after this a durable commit without enough acknowledgments is reported as outcome unknown;
        a large one gets the time to ship it, at `ack_bytes_per_second`, in addition.
    foreign_poll_seconds: an idle writer looks this often for commits of other programs.
    """

    reserve_bytes: int = 32 << 20
    queued_jobs: int = 4096
    group_jobs: int = 512
    unacked_bytes: int = 16 << 20
    unacked_groups: int = 10_000
    ack_stall_seconds: float = 0.25
    admission_wait_seconds: float = 5.0
    ack_timeout_seconds: float = 10.0
    ack_bytes_per_second: float = 8 << 20
    turn_idle_seconds: float = 5.0
    turn_seconds: float = 30.0
    foreign_poll_seconds: float = 0.1


@dataclass(frozen=True, slots=True)
class WriterStatistics:
    jobs: int
    groups: int
    queued: int
    unacked_bytes: int
    turns: int
    turns_expired: int
    failed: str | None
