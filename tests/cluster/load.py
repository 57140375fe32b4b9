"""Load with accounting: clients that write distinct rows and remember what they were told about each."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

from tests.cluster.client import Client, Failed, NoReply
from tests.cluster.harness import eventually

__all__ = ["Load", "OwnReads", "read_own_writes"]

_STRIDE = 100_000_000  # ids of one client lie in a range of its own


class Load:
    """`clients` threads that insert into `w` until told to stop.

    acked: ids whose write was answered with success. not_done: ids the cluster promised it did not write.
    unknown: ids for which no answer, or a typed "unknown", came.
    """

    def __init__(self, url: str, *, clients: int = 8, payload_bytes: int = 0) -> None:
        self.acked: set[int] = set()
        self.not_done: set[int] = set()
        self.unknown: set[int] = set()
        self.silent: set[int] = set()  # of unknown: the connection ended without an answer
        self.codes: Counter[str] = Counter()
        self.problems: list[BaseException] = []
        self._url = url
        self._payload_bytes = payload_bytes
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
        if self.problems:
            raise self.problems[0]

    def wait_acked(self, more: int, timeout_seconds: float = 60.0) -> None:
        """Wait until so many more writes have been acknowledged."""
        goal = len(self.acked) + more
        eventually(lambda: len(self.acked) >= goal, f"{more} more writes", timeout_seconds=timeout_seconds)

    def _run(self, number: int) -> None:
        sql = f"INSERT INTO w (id, v) VALUES (?, randomblob({self._payload_bytes}))"
        try:
            with Client(self._url) as client:
                for count in itertools.count():
                    if self._stopping.is_set():
                        return
                    self._write(client, sql, number * _STRIDE + count)
        except BaseException as error:
            self.problems.append(error)
            raise

    def _write(self, client: Client, sql: str, row: int) -> None:
        into, code = self.acked, ""
        try:
            client.execute(sql, row)
        except Failed as error:
            code = error.code
            done = code in ("WALSHIP_OUTCOME_UNKNOWN",)
            into = self.unknown if done else self.not_done
        except NoReply as error:
            code = "no reply" if error.sent else "no connection"
            into = self.unknown if error.sent else self.not_done
        with self._lock:
            into.add(row)
            if code:
                self.codes[code] += 1
            if code == "no reply":
                self.silent.add(row)
        if code:
            self._stopping.wait(0.005)  # a refusal costs nothing; do not spin on it


@dataclass(slots=True)
class OwnReads:
    """What `read_own_writes` saw. Times in seconds."""

    misses: int = 0
    served: Counter[str] = field(default_factory=Counter)
    write_seconds: list[float] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    elapsed_seconds: float = 0.0

    def share_of(self, names: list[str]) -> float:
        return sum(self.served[name] for name in names) / sum(self.served.values())

    def __str__(self) -> str:
        write, read = sorted(self.write_seconds), sorted(self.read_seconds)
        count = len(read)

        def at(values: list[float], quantile: float) -> str:
            return f"{values[int(len(values) * quantile)] * 1e3:.1f} ms"

        return (
            f"{count} write+read pairs in {self.elapsed_seconds:.1f} s ({count / self.elapsed_seconds:.0f}/s), "
            f"{self.misses} misses, served by {dict(sorted(self.served.items()))}; write p50 {at(write, 0.5)} "
            f"p99 {at(write, 0.99)}, read p50 {at(read, 0.5)} p99 {at(read, 0.99)}"
        )


def read_own_writes(url: str, *, clients: int, writes: int) -> OwnReads:
    """`writes` in all from concurrent clients, each followed at once by a read of the row just written."""
    seen, lock = OwnReads(), threading.Lock()
    problems: list[BaseException] = []

    def run(number: int) -> None:
        try:
            with Client(url) as client:
                for count in range(writes // clients):
                    row = number * _STRIDE + count
                    start = time.perf_counter()
                    client.execute("INSERT INTO w (id, v) VALUES (?, ?)", row, count)
                    written = time.perf_counter()
                    result = client.execute("SELECT v FROM w WHERE id = ?", row)
                    read = time.perf_counter()
                    with lock:
                        seen.misses += result.rows != [(count,)]
                        seen.served[result.served_by or "?"] += 1
                        seen.write_seconds.append(written - start)
                        seen.read_seconds.append(read - written)
        except BaseException as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    seen.elapsed_seconds = time.perf_counter() - start
    return seen
