"""A small real application on a walship cluster: 28,000 airports, one writer, several readers, three equal files.

It uses an unmodified libSQL client (PyPI `libsql`, or another one by `--client`: airport_clients.py) and knows nothing
of walship but a URL. What it does: load the airports of PyPI `airportsdata`; then, for a while, writer processes write
visits, each reading its own back at once over another connection, while reader processes ask for airports near a
point, countries and totals. Nothing is retried. At the end it says who answered how much, and compares the copies of
all nodes byte for byte.

    python examples/airports.py --up                          # its own cluster, in a temporary directory
    python examples/airports.py --url http://127.0.0.1:8080   # a running one (`make up`)

Exit code 1 when a read missed an acknowledged write, a process failed, or a copy differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import airportsdata
import httpx
from airport_clients import CLIENTS, connect, modules
from rich.console import Console
from rich.table import Table

COLUMNS = ("icao", "iata", "name", "city", "subd", "country", "elevation", "lat", "lon", "tz")
SCHEMA = """
CREATE TABLE IF NOT EXISTS airports (
  icao TEXT PRIMARY KEY, iata TEXT, name TEXT, city TEXT, subd TEXT, country TEXT,
  elevation REAL, lat REAL, lon REAL, tz TEXT);
CREATE INDEX IF NOT EXISTS airports_lat ON airports (lat);
CREATE INDEX IF NOT EXISTS airports_country ON airports (country);
CREATE TABLE IF NOT EXISTS visits (
  run TEXT, number INTEGER, icao TEXT, passengers INTEGER, PRIMARY KEY (run, number)) WITHOUT ROWID;
"""
NEAREST = """
SELECT icao, name, (lat - ?1) * (lat - ?1) + (lon - ?2) * (lon - ?2) AS distance FROM airports
WHERE lat BETWEEN ?1 - 2 AND ?1 + 2 AND lon BETWEEN ?2 - 2 AND ?2 + 2 ORDER BY distance LIMIT 5
"""
OF_COUNTRY = "SELECT icao, name, city FROM airports WHERE country = ? ORDER BY elevation DESC LIMIT 20"
BUSIEST = """
SELECT country, count(*) AS visits, sum(passengers) FROM visits JOIN airports USING (icao)
WHERE run = ? GROUP BY country ORDER BY visits DESC LIMIT 10
"""
PROGRESS = "SELECT count(*), coalesce(max(number), 0) FROM visits WHERE run = ?"
ROWS_A_STATEMENT = 100
START_SECONDS = 60.0


@dataclass(slots=True)
class Outcome:
    """What one process did. `misses` are answers that broke a promise of the cluster, in words."""

    reads: int = 0
    writes: int = 0
    misses: list[str] = field(default_factory=list)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.reads + other.reads, self.writes + other.writes, self.misses + other.misses)


def load(connection: Any, rows: list[dict[str, Any]]) -> None:
    """All airports in one transaction, a hundred a statement: a request per row would be 28,000 round trips.

    (A client that knows no transactions over HTTP commits each statement.)
    """
    for statement in filter(str.strip, SCHEMA.split(";")):
        connection.execute(statement)
        connection.commit()
    for start in range(0, len(rows), ROWS_A_STATEMENT):
        part = rows[start : start + ROWS_A_STATEMENT]
        places = ", ".join([f"({', '.join('?' * len(COLUMNS))})"] * len(part))
        values = tuple(row[column] for row in part for column in COLUMNS)
        connection.execute(f"INSERT OR REPLACE INTO airports ({', '.join(COLUMNS)}) VALUES {places}", values)
    connection.commit()


@dataclass(frozen=True, slots=True)
class Job:
    """What a child process needs: whom to ask, whose visits, and how it is told to begin and to end."""

    client: str
    url: str
    run: str
    acknowledged: Synchronized[int]
    ready: Any
    stop: Any

    def begin(self) -> Iterator[None]:
        """Wait until every process is connected; then once for each round, until told to stop."""
        self.ready.wait(START_SECONDS)
        while not self.stop.is_set():
            yield

    def connect(self) -> contextlib.closing[Any]:
        return contextlib.closing(connect(self.client, self.url))


def write(job: Job, codes: list[str]) -> Outcome:
    """Write visits until told to stop; each is read back at once over a second connection."""
    outcome = Outcome()
    pick = random.Random(job.run)
    with job.connect() as writing, job.connect() as reading:
        for number, _ in enumerate(job.begin(), 1):
            visit = (job.run, number, pick.choice(codes), pick.randrange(1, 400))
            writing.execute("INSERT INTO visits (run, number, icao, passengers) VALUES (?, ?, ?, ?)", visit)
            writing.commit()
            job.acknowledged.value = number
            outcome.writes += 1
            found = reading.execute("SELECT * FROM visits WHERE run = ? AND number = ?", (job.run, number)).fetchone()
            outcome.reads += 1
            if found is None or tuple(found) != visit:
                outcome.misses.append(f"visit {number} was acknowledged, the read after it gave {found}")
    return outcome


def read(job: Job, seed: int) -> Outcome:
    """Query until told to stop. Every round also checks that nothing acknowledged is missing and time never runs
    backwards."""
    outcome = Outcome()
    pick = random.Random(seed)
    seen = 0
    with job.connect() as connection:
        for _ in job.begin():
            connection.execute(NEAREST, (pick.uniform(-60, 70), pick.uniform(-180, 180))).fetchall()
            connection.execute(OF_COUNTRY, (pick.choice(("US", "DE", "BR", "JP", "ZA", "IS")),)).fetchall()
            connection.execute(BUSIEST, (job.run,)).fetchall()
            floor = max(seen, job.acknowledged.value)
            count, highest = connection.execute(PROGRESS, (job.run,)).fetchone()
            outcome.reads += 4
            if count != highest:
                outcome.misses.append(f"{count} visits are there, the last is number {highest}: one is missing")
            if count < floor:
                outcome.misses.append(f"{count} visits are there, after {floor} had been seen or acknowledged")
            seen = count
    return outcome


def _process(results: Any, work: Any, job: Job, argument: Any) -> None:
    """The main of every child: its outcome, or its error in words, goes into the queue."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which tells us to stop
    try:
        results.put(work(job, argument))
    except Exception as error:  # noqa: BLE001 - a child has nobody else to tell
        job.ready.abort()
        results.put(Outcome(misses=[f"{work.__name__} failed: {type(error).__name__}: {error}"]))


class Cluster:
    """What the application can see of its cluster: the proxy's /status and each node's own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(timeout=5)

    def nodes(self) -> list[dict[str, Any]]:
        return list(self._http.get(f"{self.url}/status").raise_for_status().json()["nodes"])

    def wait_equal(self, timeout_seconds: float = 30) -> list[dict[str, Any]]:
        """Each node's own /status, once all stand at one position. Raises TimeoutError."""
        until = time.monotonic() + timeout_seconds
        while time.monotonic() < until:
            statuses = [self._http.get(f"{node['url']}/status").raise_for_status().json() for node in self.nodes()]
            if len({(status["txid"], status["log"]["tip"]) for status in statuses}) == 1:
                return statuses
            time.sleep(0.05)
        raise TimeoutError(f"the nodes are not at one position after {timeout_seconds:.0f} s")


@contextlib.contextmanager
def own_cluster(directory: Path) -> Iterator[str]:
    """`walship up` on a free port; stopped cleanly at the end."""
    command = [sys.executable, "-m", "walship", "up", "--listen", "127.0.0.1:0", "--data", str(directory), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"walship up ended with code {process.wait()}; its words are above")
            yield json.loads(line)["proxy"]["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def file_digest(database: Path, scratch: Path) -> str:
    """SHA-256 of the database file after a checkpoint, which is done on a copy: nobody's data is touched."""
    scratch.mkdir()
    copy = Path(shutil.copy(database, scratch))
    log = database.with_name(database.name + "-wal")
    if log.exists():
        shutil.copy(log, scratch)
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        return f"damaged: {verdict}"
    return hashlib.sha256(copy.read_bytes()).hexdigest()


def exercise(url: str, options: argparse.Namespace, console: Console) -> tuple[Outcome, dict[str, str]]:
    """Load, write and read, print the table; returns what happened and database file by node."""
    cluster = Cluster(url)
    rows = list(airportsdata.load("ICAO").values())[: options.rows or None]
    started = time.perf_counter()
    with contextlib.closing(connect(options.client, url)) as connection:
        load(connection, rows)
    console.print(f"{len(rows):,} airports loaded through {url} in {time.perf_counter() - started:.1f} s")

    runs = [secrets.token_hex(4) for _ in range(options.writers)]
    # Processes: the libsql client keeps the GIL while it waits. From a server that has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["airportsdata", "httpx", "rich.console", "rich.table", *modules(options.client)])
    stop, results = context.Event(), context.Queue()
    ready = context.Barrier(options.writers + options.readers + 1)
    jobs = [Job(options.client, url, run, context.Value("q", 0), ready, stop) for run in runs]
    codes = [row["icao"] for row in rows]
    works: list[tuple[Any, ...]] = [(write, job, codes) for job in jobs]
    works += [(read, jobs[seed % len(jobs)], seed) for seed in range(options.readers)]  # each follows one writer
    children = [context.Process(target=_process, args=(results, *work)) for work in works]
    before = {node["name"]: node["reads"] for node in cluster.nodes()}
    worst: Counter[str] = Counter()
    for child in children:
        child.start()
    with contextlib.suppress(BrokenBarrierError):  # a child that could not begin says why in its outcome
        ready.wait(START_SECONDS)
    started = time.perf_counter()
    try:
        while time.perf_counter() - started < options.seconds and not ready.broken:
            for node in cluster.nodes():
                worst[node["name"]] = max(worst[node["name"]], node["lag_txids"] or 0)
            time.sleep(0.1)
    finally:
        elapsed = time.perf_counter() - started
        stop.set()
    outcome = sum((results.get(timeout=60) for _ in children), Outcome())
    for child in children:
        child.join()

    statuses = cluster.wait_equal()
    _print_nodes(console, cluster.nodes(), before, worst)
    console.print(
        f"{outcome.writes:,} visits written one by one and {outcome.reads:,} reads by {len(works)} processes "
        f"in {elapsed:.1f} s; {len(outcome.misses)} misses"
    )
    with contextlib.closing(connect(options.client, url)) as connection:
        total = sum(connection.execute(PROGRESS, (run,)).fetchone()[0] for run in runs)
    if total != outcome.writes:
        outcome.misses.append(f"{outcome.writes} visits were acknowledged, {total} are there")
    checksums = {status["name"]: f"{status['log']['tip']} {status['log']['checksum']}" for status in statuses}
    if len(set(checksums.values())) != 1:
        outcome.misses.append(f"rolling checksums differ: {checksums}")
    else:
        console.print(f"all {len(checksums)} nodes at position and rolling checksum {next(iter(checksums.values()))}")
    return outcome, {status["name"]: status["database"] for status in statuses}


def _print_nodes(console: Console, nodes: list[dict[str, Any]], before: dict[str, int], worst: Counter[str]) -> None:
    table = Table(title="after the run, as the proxy sees it")
    for heading in ("node", "role", "reads served", "worst lag (txids)", "lag (txids)", "lag (s)", "position"):
        table.add_column(heading, justify="left" if heading in ("node", "role") else "right")
    for node in nodes:
        name = node["name"]
        table.add_row(
            name,
            node["role"],
            f"{node['reads'] - before.get(name, 0):,}",
            str(worst[name]),
            str(node["lag_txids"]),
            str(node["lag_seconds"]),
            f"{node['term']}.{node['txid']}",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="a proxy (default %(default)s)")
    parser.add_argument("--up", action="store_true", help="start an own cluster in a temporary directory")
    parser.add_argument("--client", choices=CLIENTS, default="libsql", help="client library (default %(default)s)")
    parser.add_argument("--rows", type=int, default=0, help="airports to load (default all)")
    parser.add_argument("--writers", type=int, default=1, help="writer processes (default %(default)s)")
    parser.add_argument("--readers", type=int, default=3, help="reader processes (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to write and read (default %(default)s)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=not sys.stdout.isatty())
    if not options.up:
        outcome, _ = exercise(options.url, options, console)
    else:
        with tempfile.TemporaryDirectory(prefix="walship-airports-") as directory:
            root = Path(directory)
            with own_cluster(root / "data") as url:
                outcome, databases = exercise(url, options, console)
            digests = {name: file_digest(Path(path), root / f"copy-{name}") for name, path in databases.items()}
        for name, digest in digests.items():
            console.print(f"  {name}  sha256 {digest}")
        equal = len(set(digests.values())) == 1 and not next(iter(digests.values())).startswith("damaged")
        console.print(f"the {len(digests)} database files are {'byte-identical' if equal else 'DIFFERENT'}")
        if not equal:
            outcome.misses.append("the database files differ")
    for miss in outcome.misses[:20]:
        console.print(f"MISS: {miss}", style="red")
    return 1 if outcome.misses else 0


if __name__ == "__main__":
    sys.exit(main())
