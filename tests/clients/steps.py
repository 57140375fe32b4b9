"""What every client is asked to do, and how its program tells of it.

A program is a process of its own (PyPI `libsql` keeps the interpreter's lock while it waits, and JavaScript is no
module of ours). It does the steps in order, writes one JSON object a line for each, `{"step", "result", "detail"}`,
says `{"step": "paused"}` with its connections open, and goes on with the last step at a line on its standard input.
`result` is `ok`, `absent` (the client itself does not offer that; `detail` says so) or `error`.
`js/steps.mjs` is the same for JavaScript.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

__all__ = ["BIG_ROWS", "STEPS", "VALUES", "WORKERS", "Absent", "Program", "each_in", "expect", "fill_sql", "main"]

STEPS = ("ddl", "dml", "types", "batch", "commit", "rollback", "constraint", "big", "concurrent", "idle")
BIG_ROWS = 10_000
WORKERS = 6
ROUNDS = 5

# i64 limits and what a double cannot hold, floats at the ends of their range, text with everything that JSON, SQL or a
# C string could trip over, and blobs whose base64 needs each kind of padding.
VALUES: tuple[object, ...] = (
    None,
    0,
    -1,
    2**53 + 1,
    2**63 - 1,
    -(2**63),
    0.1,
    -2.5e-300,
    1.7976931348623157e308,
    5e-324,
    "",
    'it\'s "quoted"\\ \n\t é 漢字 😀 \u2028',
    "x" * 100_000,
    b"",
    b"\x00",
    b"\x00\xff",
    bytes(range(256)) * 300,
)


class Absent(Exception):
    """The client library has no way to do this step; the message says why, for the table."""


def expect(found: object, wanted: object) -> None:
    """Equal, and of the same types, so that 1 is not 1.0. Raises AssertionError with both."""
    assert found == wanted, f"found {found!r:.300}, wanted {wanted!r:.300}"
    if isinstance(wanted, (list, tuple)):
        assert isinstance(found, (list, tuple))
        for one, other in zip(found, wanted, strict=True):
            expect(one, other)
    else:
        assert type(found) is type(wanted), f"found {type(found)}, wanted {type(wanted)}"


def fill_sql(table: str) -> str:
    """Fill `table(n, label)` with BIG_ROWS rows on the server: sending them is not what is tested."""
    return (
        f"INSERT INTO {table} (n, label) WITH RECURSIVE counter(n) AS "
        f"(SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < {BIG_ROWS}) SELECT n, 'row ' || n FROM counter"
    )


def each_in(pool: type[Executor], work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments, worker)` for every worker at once. `pool`: threads, or processes for what keeps the GIL."""
    settings = {"mp_context": multiprocessing.get_context("spawn")} if pool is ProcessPoolExecutor else {}
    with pool(WORKERS, **settings) as workers:  # type: ignore[call-arg]
        for future in [workers.submit(work, *arguments, worker) for worker in range(WORKERS)]:
            future.result(60)


THREADS, PROCESSES = ThreadPoolExecutor, ProcessPoolExecutor


class Program(ABC):
    """The steps of one client. `table` begins the names of its tables: all clients share one database."""

    def __init__(self, client: str, url: str) -> None:
        self.client, self.url = client, url
        self.table = client.replace("-", "_")

    def made_sql(self) -> str:
        """Counts what `ddl` made: four tables, and the index of a UNIQUE column."""
        names = ", ".join(f"'{self.table}_{name}'" for name in ("items", "values", "big", "work"))
        return f"SELECT count(*) FROM sqlite_master WHERE tbl_name IN ({names})"

    @abstractmethod
    def ddl(self) -> None:
        """Tables `_items(id, name unique, size, note)`, `_values(n, value)`, `_big(n, label)`, `_work(worker, n)`."""

    @abstractmethod
    def dml(self) -> None: ...

    @abstractmethod
    def types(self) -> None:
        """Each of VALUES, written and read back the same."""

    @abstractmethod
    def batch(self) -> None: ...

    @abstractmethod
    def commit(self) -> None:
        """An interactive transaction: sees its own rows; no one else does before the commit, everyone after."""

    @abstractmethod
    def rollback(self) -> None: ...

    @abstractmethod
    def constraint(self) -> None:
        """A unique constraint: the client's own error, and the connection works on."""

    @abstractmethod
    def big(self) -> None: ...

    @abstractmethod
    def concurrent(self) -> None: ...

    @abstractmethod
    def hold(self) -> None:
        """Open and use what `idle` finds again after the pause."""

    @abstractmethod
    def idle(self) -> None: ...


def _tell(step: str, result: str, detail: str = "") -> None:
    sys.stdout.write(json.dumps({"step": step, "result": result, "detail": detail}) + "\n")
    sys.stdout.flush()


def _do(program: Program, step: str) -> None:
    try:
        getattr(program, step)()
    except Absent as absent:
        _tell(step, "absent", str(absent))
    except Exception:  # noqa: BLE001  each client has its own tree, and the test wants to see all steps
        _tell(step, "error", traceback.format_exc())
    else:
        _tell(step, "ok")


def main(make: Callable[[str, str], Program]) -> None:
    client, url = sys.argv[1:]
    program = make(client, url)
    for step in STEPS[:-1]:
        _do(program, step)
    program.hold()
    _tell("paused", "ok")
    sys.stdin.readline()
    _do(program, STEPS[-1])
