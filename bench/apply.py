"""Apply rate: a follower's -wal append against SQLite executing the same SQL, in one process.

Random updates of one row a page, 1, 2 and 5 of them a transaction, on 4 KiB pages and a warm cache, without
checkpoints on either side:

- pages applied one transaction at a time, without sync, against SQLite with synchronous=OFF;
- the same with one fdatasync each, and 16 transactions merged with one fdatasync, against synchronous=FULL;
- one large transaction, against SQLite with synchronous=OFF;
- a whole follower that catches up: frames into its log with fdatasync, decoded, page checksums verified, applied;
  against SQLite with synchronous=FULL.

After every measurement the table is read and compared with what SQLite made of the same transactions.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw

from bench import nodes
from bench.harness import Figure, Report, Sample, alternate, compare
from bench.recording import Recording, digest, growth, merged, seed_database, updates
from walship.engine.apply import Applier, Batch
from walship.engine.database import Database
from walship.formats.frame import FrameHeader
from walship.node.recover import FIRST_POSITION

ROWS = 2000
MERGED = 16
Frames = list[tuple[FrameHeader, bytes]]


class Bench:
    """One recording, and the sides that replay it. Each measurement starts from a fresh copy of the same file."""

    def __init__(self, recording: Recording, report: Report, directory: Path) -> None:
        self._recording, self._report, self._directory = recording, report, directory
        self._expected: dict[int, int] = {}  # transactions -> digest by SQLite

    def expect(self, transactions: int) -> None:
        """Learn from SQLite what the table looks like after that many transactions."""
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            self._sqlite(Path(scratch), "OFF", transactions)

    def sqlite(self, synchronous: str, transactions: int) -> Sample:
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            return self._sqlite(Path(scratch), synchronous, transactions)

    def apply(self, batches: Sequence[Batch], transactions: int, *, sync: bool) -> Sample:
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            database = Database.open(Path(shutil.copy(self._recording.base, scratch)))
            reader = database.connect_reader()
            digest(reader)  # the index is mapped and the file cached, as on the other side
            applier = Applier(database)
            clock = _Clock()
            for batch in batches:
                applier.apply(batch, sync=sync, publishing=_nothing)
            sample = clock.sample(transactions)
            self._check("apply", transactions, digest(reader))
            reader.close()
            database.close()
        return sample

    def catch_up(self, frames: Frames) -> Sample:
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            elapsed, found = asyncio.run(_catch_up(self._recording.base, Path(scratch) / "follower", frames))
        self._check("follower", len(frames), found)
        return Sample(len(frames) / elapsed)

    def frames(self, transactions: int) -> Frames:
        """What a leader ships for the first transactions, each a frame of its own."""
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            leader, replica = nodes.lead(self._recording.base, Path(scratch) / "leader")
            start = leader.tip.position
            connection = replica.database.connect_writer()
            for transaction in self._recording.sql[:transactions]:
                self._recording.run_sql(connection, transaction)
                leader.commit_group()
            connection.close()
            first = replica.log.frames_after(FIRST_POSITION)
            frames = [(ref.header, replica.log.read(ref)) for ref in first]
            assert frames[0][0].position == start, "the term-start frame comes first"
            leader.close()
            replica.close()
        return frames

    def _sqlite(self, scratch: Path, synchronous: str, transactions: int) -> Sample:
        path = shutil.copy(self._recording.base, scratch)
        connection = apsw.Connection(str(path))
        connection.wal_autocheckpoint(0)
        connection.execute(f"PRAGMA synchronous={synchronous}")
        digest(connection)
        clock = _Clock()
        for transaction in self._recording.sql[:transactions]:
            self._recording.run_sql(connection, transaction)
        sample = clock.sample(transactions)
        found = digest(connection)
        connection.close()
        if self._expected.setdefault(transactions, found) != found:
            raise AssertionError("SQLite made two things of the same transactions")
        return sample

    def _check(self, side: str, transactions: int, found: int) -> None:
        if transactions not in self._expected:
            self.expect(transactions)
        self._report.check(found == self._expected[transactions], f"{side}: another content than SQLite's")


class _Clock:
    """Wall time and this process's CPU time since it was made. Only the latter survives a crowded machine."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def sample(self, transactions: int) -> Sample:
        cpu_us = 1e6 * (time.process_time() - self._cpu) / transactions
        return Sample(transactions / (time.perf_counter() - self._wall), {"process": cpu_us})


def _by_cpu(sample: Sample) -> float:
    return 1e6 / sample.cpu_us["process"]


async def _catch_up(base: Path, directory: Path, frames: Frames) -> tuple[float, int]:
    failures: list[BaseException] = []
    follower, watermarks = nodes.follow(base, directory, failures)
    assert follower.replica is not None
    started = time.perf_counter()
    for header, data in frames:
        await follower.receive(header, data)
    applied = await watermarks.wait_applied(frames[-1][0].position, 30)
    elapsed = time.perf_counter() - started
    if failures or not applied:
        raise RuntimeError(f"the follower did not apply all frames: {failures}")
    reader = follower.replica.database.connect_reader()
    found = digest(reader)
    reader.close()
    await follower.stop()
    follower.replica.close()
    return elapsed, found


def _nothing() -> None:
    return None


def run(directory: Path, *, quick: bool) -> Report:
    rounds, fast, slow = (3, 400, 48) if quick else (7, 1600, 240)
    report = Report("apply against native SQLite (4 KiB pages)")
    base = directory / "base.db"
    seed_database(base, ROWS)
    for pages in (1, 2, 5):
        recording = updates(base, directory / "recorded.db", rows=ROWS, transactions=fast, rows_each=pages)
        _updates(Bench(recording, report, directory), recording, report, pages, rounds, fast, slow)
    _large(directory, base, report, rounds, 4_000 if quick else 20_000)
    return report


def _updates(bench: Bench, recording: Recording, report: Report, pages: int, rounds: int, fast: int, slow: int) -> None:
    what = f"{pages} page{'s' * (pages > 1)}"
    batches, sixteen = recording.batches, merged(recording.batches, MERGED)
    quickly = alternate(
        {
            "SQLite off": lambda: bench.sqlite("OFF", fast),
            "apply": lambda: bench.apply(batches, fast, sync=False),
        },
        rounds=rounds,
        baseline="SQLite off",
    )
    sides: dict[str, Callable[[], Sample]] = {
        "SQLite full": lambda: bench.sqlite("FULL", slow),
        "apply, fdatasync": lambda: bench.apply(batches[:slow], slow, sync=True),
        "16 merged": lambda: bench.apply(sixteen, fast, sync=True),
    }
    if pages == 1:
        frames = bench.frames(fast)
        sides["follower"] = lambda: bench.catch_up(frames)
    synced = alternate(sides, rounds=rounds, baseline="SQLite full")
    words = {
        "SQLite off": "SQLite, synchronous=OFF",
        "apply": "apply, no sync",
        "SQLite full": "SQLite, synchronous=FULL",
        "apply, fdatasync": "apply, fdatasync each",
        "16 merged": f"apply, {MERGED} merged, one fdatasync",
        "follower": "whole follower catching up",
    }
    both = quickly | synced
    report.figures += [Figure.of(f"{what}: {words[side]}", "tx/s", both[side]) for side in words if side in both]
    report.ratios += [
        compare(f"{what}: apply / SQLite off", quickly, "apply", "SQLite off", goal=0.4),
        compare(f"{what}: apply / SQLite off, by CPU time", quickly, "apply", "SQLite off", goal=0.4, of=_by_cpu),
        compare(f"{what}: apply, fdatasync / SQLite full", synced, "apply, fdatasync", "SQLite full", goal=0.7),
        compare(f"{what}: 16 merged, fdatasync / SQLite full", synced, "16 merged", "SQLite full", goal=3.0),
    ]
    if "follower" in synced:
        ratio = compare(f"{what}: whole follower / SQLite full", synced, "follower", "SQLite full", goal=1.0)
        report.ratios.append(ratio)


def _large(directory: Path, base: Path, report: Report, rounds: int, added: int) -> None:
    recording = growth(base, directory / "recorded.db", rows=ROWS, added=added)
    bench = Bench(recording, report, directory)
    count = len(recording.batches[0].pgnos)

    def pages(sample: Sample) -> Sample:
        return Sample(sample.value * count, {"process": sample.cpu_us["process"] / count})

    samples = alternate(
        {
            "SQLite off": lambda: pages(bench.sqlite("OFF", 1)),
            "apply": lambda: pages(bench.apply(recording.batches, 1, sync=False)),
        },
        rounds=rounds,
        baseline="SQLite off",
    )
    name = f"one transaction of {count:,} pages"
    report.figures += [
        Figure.of(f"{name}: SQLite, synchronous=OFF", "pages/s", samples["SQLite off"]),
        Figure.of(f"{name}: apply, no sync", "pages/s", samples["apply"]),
    ]
    report.ratios += [
        compare(f"{name}: apply / SQLite off", samples, "apply", "SQLite off", goal=1.0),
        compare(f"{name}: apply / SQLite off, by CPU time", samples, "apply", "SQLite off", goal=1.0, of=_by_cpu),
    ]
