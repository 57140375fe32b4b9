"""A leader and a follower in one process, on real files: the engine as `walship.node` composes it, without a network.

`LeaderNode` is driven from the test's thread (`write`, then `commit`), or by a real `Writer`. `FollowerNode` is a real
`Follower`; `ship` hands it the frames of the leader's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apsw

from walship.engine import marks as marks_module
from walship.engine.acks import AckTracker
from walship.engine.database import Database
from walship.engine.durable_state import DurableState, StateFile
from walship.engine.follower import Follower
from walship.engine.log import FrameRef, LogLimits
from walship.engine.marks import Marks
from walship.engine.replica import Replica
from walship.engine.snapshot import Snapshot, ltx_chunks, scan
from walship.engine.watermarks import Watermarks
from walship.engine.writer import Writer, WriterLimits
from walship.formats.frame import SnapshotHeader
from walship.formats.position import Position, Tip
from walship.node.promote import promote
from walship.node.recover import found_database, recover

CLUSTER = b"c" * 16
LIMITS = LogLimits(max_bytes=8 << 30)
HERE = Path(__file__).parent


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def make_database(path: Path, *, page_size: int = 4096, setup: Iterable[str] = ()) -> None:
    """A database in WAL mode, closed."""
    connection = apsw.Connection(str(path))
    for statement in (f"PRAGMA page_size={page_size}", *setup, "PRAGMA journal_mode=WAL"):
        connection.execute(statement).fetchall()
    connection.execute("CREATE TABLE IF NOT EXISTS walship_test(x)")
    connection.close()


def open_state(directory: Path, name: str) -> StateFile:
    directory.mkdir(exist_ok=True)
    if StateFile.exists(directory):
        return StateFile.open(directory)
    return StateFile.create(
        directory, DurableState((name * 32).encode().hex()[:32], name, "c" * 32, str(directory / "data.db"))
    )


def open_replica(directory: Path, name: str, *, limits: LogLimits = LIMITS) -> tuple[StateFile, Marks, Replica | None]:
    state = open_state(directory, name)
    marks = Marks(directory, state, every_bytes=marks_module.EVERY_BYTES)
    return state, marks, recover(directory, state, marks, cluster=CLUSTER, limits=limits)


class LeaderNode:
    """The leader of a fresh or recovered directory, in the next term."""

    def __init__(
        self,
        directory: Path,
        *,
        page_size: int = 4096,
        setup: Iterable[str] = (),
        limits: LogLimits = LIMITS,
    ) -> None:
        self.directory = directory
        state = open_state(directory, "a")
        if state.state.mark is None and state.state.installing is None:
            if not (directory / "data.db").exists():
                make_database(directory / "data.db", page_size=page_size, setup=setup)
            found_database(state, Marks(directory, state))
        self.state, self.marks, replica = open_replica(directory, "a", limits=limits)
        assert replica is not None
        self.replica = replica
        self.recovered_tip = replica.log.tip
        self.watermarks = Watermarks(replica.log.tip.position)
        self.frames: list[FrameRef] = []
        self.on_frame: Callable[[FrameRef, bytes | None], None] = lambda ref, data: None
        self.leader = promote(
            replica,
            self.state,
            self.watermarks,
            cluster=CLUSTER,
            term=max(self.state.state.promised, replica.log.tip.position.term) + 1,
            now_ms=now_ms,
            on_frame=lambda ref, data: self.on_frame(ref, data),
        )
        self.leader.unfence()  # a writer does that, and not every test has one
        self._connection: apsw.Connection | None = None
        self.acks: AckTracker
        self.writer: Writer | None = None
        self.failures: list[BaseException] = []

    @property
    def database(self) -> Database:
        return self.replica.database

    @property
    def connection(self) -> apsw.Connection:
        if self._connection is None:
            self._connection = self.database.connect_writer()
        return self._connection

    @property
    def tip(self) -> Tip:
        return self.leader.tip

    def write(self, *statements: str | tuple[str, tuple[Any, ...]]) -> None:
        """Run statements in autocommit; not captured yet."""
        for statement in statements:
            sql, bindings = (statement, ()) if isinstance(statement, str) else statement
            self.connection.execute(sql, bindings).fetchall()

    def commit(self, *statements: str | tuple[str, tuple[Any, ...]]) -> Tip:
        """`write`, then one group commit."""
        self.write(*statements)
        return self.leader.commit_group()

    def start_writer(self, *, required: int = 0, limits: WriterLimits = WriterLimits()) -> Writer:
        """A real writer thread; acknowledgments come from `acks.record` and `move_acked`."""
        self.acks = AckTracker(self.leader.term, required, self.watermarks.captured)
        self.writer = Writer(self.leader, self.acks, limits=limits, on_failure=self.failures.append)
        self.writer.start()
        self.watermarks.on_change(self.move_acked)
        self.move_acked()
        return self.writer

    def move_acked(self) -> None:
        acked, known = self.acks.covered(self.watermarks.durable), self.watermarks.acked
        if (acked.term, acked.txid) > (known.term, known.txid):
            self.watermarks.acked = acked

    async def stop(self) -> None:
        """Stop the writer, then close."""
        if self.writer is not None:
            await self.writer.stop()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self.leader.close()
        self.replica.close()

    def abandon(self) -> None:
        """Close without any promise, as after a failure (not a crash: SQLite still empties its -wal)."""
        if self._connection is not None:
            self._connection.close()
        self.leader.abandon()
        self.replica.close()


class FollowerNode:
    """A follower of a `LeaderNode`. Create it on the event loop."""

    def __init__(
        self,
        directory: Path,
        *,
        voter: bool = True,
        acks: int = 1,
        name: str = "b",
        clock: Callable[[], float] = time.monotonic,
        limits: LogLimits = LIMITS,
    ) -> None:
        self.directory = directory
        self.state, self.marks, replica = open_replica(directory, name, limits=limits)
        self.watermarks = Watermarks()
        self.failures: list[BaseException] = []
        self.installed: list[Replica] = []
        self.follower = Follower(
            directory=directory,
            state=self.state,
            cluster=CLUSTER,
            voter=voter,
            acks=acks,
            limits=limits,
            replica=replica,
            marks=self.marks,
            watermarks=self.watermarks,
            on_replica=self.installed.append,
            on_failure=self.failures.append,
            clock=clock,
        )

    @property
    def replica(self) -> Replica:
        assert self.follower.replica is not None
        return self.follower.replica

    @property
    def database(self) -> Database:
        return self.replica.database

    async def seed(self, pin: Callable[[], tuple[SnapshotHeader, Snapshot]]) -> None:
        """Receive and install the snapshot that `pin` pins."""
        header, snapshot = pin()
        try:
            seed = await self.follower.seed(header)
            for chunk in ltx_chunks(snapshot, header):
                await seed.write(chunk)
        finally:
            snapshot.close()
        await seed.install()

    async def ship(self, leader: LeaderNode, *, until: Position | None = None) -> None:
        """Hand over every frame of the leader's log that is not here yet; small ones whole, large ones in parts."""
        tip = self.follower.tip
        assert tip is not None
        log = leader.replica.log
        for ref in log.frames_after(log.locate(tip.position, tip.checksum)):
            if ref.size_bytes <= 1 << 20:
                await self.follower.receive(ref.header, log.read(ref))
            else:
                await self._ship_in_parts(leader, ref)
            if ref.header.position == until:
                break

    async def _ship_in_parts(self, leader: LeaderNode, ref: FrameRef) -> None:
        from walship.formats.record import Kind, RecordReader, encode_record

        reader = RecordReader()
        await self.follower.begin(ref.header)
        for chunk in leader.replica.log.chunks(ref):
            reader.receive_data(chunk)
            while (record := reader.next_record()) is not None:
                if record.kind is Kind.FRAME_PART:
                    await self.follower.part(encode_record(record.kind, record.body))
                elif record.kind is Kind.FRAME_END:
                    await self.follower.end(encode_record(record.kind, record.body))

    async def applied(self, position: Position, timeout_seconds: float = 20.0) -> None:
        assert await self.watermarks.wait_applied(position, timeout_seconds), (
            f"applied {self.watermarks.applied}, wanted {position}; {self.failures} {self.follower.mismatches}"
        )

    async def catch_up(self, leader: LeaderNode) -> None:
        await self.ship(leader)
        await self.applied(leader.tip.position)

    async def stop(self) -> None:
        await self.follower.stop()
        if self.follower.replica is not None:
            await asyncio.to_thread(self.follower.replica.close)


@contextlib.asynccontextmanager
async def cluster(
    directory: Path, *, page_size: int = 4096, setup: Iterable[str] = (), acks: int = 1, voter: bool = True
) -> AsyncIterator[tuple[LeaderNode, FollowerNode]]:
    """A leader and a seeded follower; both closed in order at the end."""
    leader = LeaderNode(directory / "leader", page_size=page_size, setup=setup)
    follower = FollowerNode(directory / "follower", acks=acks, voter=voter)
    await follower.seed(leader.leader.pin_snapshot)
    yield leader, follower
    await leader.stop()
    await follower.stop()


def filled(directory: Path, commits: int = 5) -> LeaderNode:
    leader = LeaderNode(directory, setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
    for number in range(commits):
        leader.commit(f"INSERT INTO t VALUES({number}, randomblob(300))")
    return leader


def rows(connection: apsw.Connection, sql: str) -> list[Any]:
    return connection.execute(sql).fetchall()


def read(database: Database, sql: str) -> list[Any]:
    connection = database.connect_reader()
    try:
        return rows(connection, sql)
    finally:
        connection.close()


def scanned(database: Database) -> int:
    """The rolling checksum of a fresh scan."""
    snapshot = Snapshot.pin(database)
    try:
        return scan(snapshot).rolling
    finally:
        snapshot.close()


def assert_same_files(first: Path, second: Path) -> None:
    """Byte equality of two closed databases, and SQLite's own verdict. Says which page differs first."""
    one, two = (path / "data.db" for path in (first, second))
    for path in (one, two):
        wal = path.with_name("data.db-wal")
        assert not wal.exists() or wal.stat().st_size == 0, f"{wal} was not emptied"
    with one.open("rb") as left, two.open("rb") as right:
        for number in itertools.count():
            a, b = left.read(1 << 16), right.read(1 << 16)
            assert a == b, f"the files differ inside bytes {number << 16}.. ({len(a)} and {len(b)} bytes read)"
            if not a:
                break
    connection = apsw.Connection(str(one), flags=apsw.SQLITE_OPEN_READONLY)
    assert rows(connection, "PRAGMA integrity_check") == [("ok",)]
    connection.close()


@contextlib.contextmanager
def outside(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own with the standard library's sqlite3, which must never share ours with a database (R25)."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "outsider.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def ask(process: subprocess.Popen[str], *words: str) -> str:
    """Send one command line to an outsider; return its one-line answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\t".join(words) + "\n")
    process.stdin.flush()
    return process.stdout.readline().rstrip("\n")


def crash_image(source: Path, target: Path) -> Path:
    """`source` as a crash right now would leave it, at another place. Copied by another process: this one must not
    open the files (R25)."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    (target / "data.db-shm").unlink(missing_ok=True)
    StateFile.open(target).update(database_path=str(target / "data.db"))
    return target


def changed_by_others(database: Path, *statements: str) -> None:
    """Statements of a foreign program on a closed database, which closes it (and so deletes the -wal)."""
    connection = apsw.Connection(str(database))
    for statement in statements:
        connection.execute(statement).fetchall()
    connection.close()
