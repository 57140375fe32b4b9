"""What waits in the writer's queue, and how it is run and answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import apsw

from walship.engine.attempts import Attempt
from walship.engine.turn import Done
from walship.formats.position import Position

__all__ = ["Call", "Group", "Job", "answer", "fail", "nothing", "reached", "resolve", "run_job"]


@dataclass(slots=True, eq=False)
class Job:
    run: Callable[[apsw.Connection], Any]
    future: asyncio.Future[Done[Any]]
    ack: int | None
    attempt: Attempt | None = None
    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Call:
    """A function to run between two groups."""

    run: Callable[[], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class Group:
    """A group that is durable here and waits for acknowledgments."""

    position: Position
    size_bytes: int
    jobs: list[Job]
    timer: asyncio.TimerHandle | None = None


def run_job(job: Job, connection: apsw.Connection) -> None:
    """Run one job as its own transaction. What it leaves open is rolled back: the connection is shared."""
    try:
        job.value = job.run(connection)
    except Exception as error:  # noqa: BLE001 - the caller's error, delivered to the caller
        job.error = error
    if connection.in_transaction:
        connection.execute("ROLLBACK")
        if job.error is None:
            job.error = AssertionError("a writer job ended inside a transaction; it was rolled back")
    if job.attempt is not None:
        job.attempt.ended = True


def nothing(_connection: apsw.Connection) -> None:
    return None


def answer(job: Job, position: Position) -> None:
    if job.error is not None:
        fail(job.future, job.error)
    else:
        resolve(job.future, Done(job.value, position))


def resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def reached(have: Position, want: Position) -> bool:
    """Both are of this leader's own term or of its start, where (term, txid) order is the order of history."""
    return have.order() >= want.order()
