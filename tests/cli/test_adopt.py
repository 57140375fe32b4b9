"""The pre-flight: every file that cannot be adopted is refused in words and keeps every byte (issue 3, item 7)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from walship.cli import adopt
from walship.cli.adopt import Journal
from walship.errors import DatabaseRefused

HOLDER = """
import sys, apsw
db = apsw.Connection(sys.argv[1])
for sql in sys.argv[2:]:
    db.execute(sql).fetchall()
print("ready", flush=True)
sys.stdin.read()
"""

CRASHER = """
import os, sys, apsw
db = apsw.Connection(sys.argv[1])
for sql in sys.argv[2:]:
    db.execute(sql).fetchall()
os.kill(os.getpid(), 9)
"""

AS_NOBODY = """
import os, sys
from pathlib import Path
from walship.cli import adopt
from walship.errors import DatabaseRefused
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    adopt.inspect(Path(sys.argv[1]))
except DatabaseRefused as error:
    print(error.reason)
"""


def make(path: Path, *statements: str, rows: int = 200) -> Path:
    """A SQLite file with a table, in rollback-journal mode unless the statements say otherwise."""
    with contextlib.closing(apsw.Connection(str(path))) as db:
        for sql in statements:
            db.execute(sql).fetchall()
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text)")
        db.executemany("INSERT INTO t (text) VALUES (?)", (("x" * 100,) for _ in range(rows)))
    return path


def crash(path: Path, *statements: str) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHER, str(path), *statements], check=False)
    assert done.returncode == -9


@contextlib.contextmanager
def held(path: Path, *statements: str) -> Iterator[int]:
    """Another process that ran `statements` and stays; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *statements], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


def fingerprint(path: Path) -> dict[str, tuple[str, int]]:
    """Content and modification time of the file and of everything beside it but the -shm, which is only memory."""
    return {
        entry.name: (hashlib.sha256(entry.read_bytes()).hexdigest(), entry.stat().st_mtime_ns)
        for entry in path.parent.iterdir()
        if entry.is_file() and not entry.name.endswith("-shm")
    }


def refusal(path: Path, words: str, *, copies: int = 0) -> DatabaseRefused:
    """Adopting `path` is refused with `words`, as a usage error, and nothing beside it changes."""
    before = fingerprint(path)
    with pytest.raises(DatabaseRefused, match=words) as caught:
        asyncio.run(adopt.check_and_switch(path, data_dir=path.parent / "data", copies=copies))
    assert fingerprint(path) == before
    assert caught.value.exit_code == 2
    return caught.value


def adopted(path: Path) -> adopt.Verdict:
    return asyncio.run(adopt.check_and_switch(path, data_dir=path.parent / "data", copies=2))


def test_a_rollback_database_is_switched_to_wal_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "app.db", "PRAGMA page_size = 8192")
    verdict = adopted(path)
    assert (verdict.journal, verdict.page_size) == (Journal.ROLLBACK, 8192)
    assert "is now in WAL mode" in capsys.readouterr().err
    assert path.read_bytes()[18:20] == b"\2\2"
    with contextlib.closing(apsw.Connection(str(path))) as db:
        assert db.execute("SELECT count(*) FROM t").get == 200


def test_a_wal_database_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = WAL")
    before = fingerprint(path)
    assert adopted(path).journal is Journal.WAL
    assert fingerprint(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["app.db"]


def test_the_wal_of_a_crashed_process_is_left_for_the_node(tmp_path: Path) -> None:
    """The check reads through the -wal but neither recovers, checkpoints nor removes it."""
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = WAL")
    crash(path, "INSERT INTO t (text) VALUES ('late')")
    before = fingerprint(path)
    assert set(before) == {"app.db", "app.db-wal"}
    assert adopted(path).journal is Journal.WAL
    assert fingerprint(path) == before


@pytest.mark.parametrize("size", [0, None])
def test_an_empty_or_absent_file_is_a_new_database(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "app.db"
    if size is not None:
        path.touch()
    assert adopted(path).journal is Journal.NEW
    assert path.exists() == (size is not None)


def test_a_symbolic_link_is_followed_to_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = make(tmp_path / "real" / "app.db")
    (tmp_path / "link.db").symlink_to(path)
    assert adopted(tmp_path / "link.db").path == path


def test_a_persistent_journal_that_is_over_is_no_obstacle(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = PERSIST")
    assert (tmp_path / "app.db-journal").stat().st_size > 0
    assert adopted(path).journal is Journal.ROLLBACK


@pytest.mark.parametrize("content", [b"hello\n", b"x" * 5000, os.urandom(4096)])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "app.db"
    path.write_bytes(content)
    refusal(path, "not a SQLite database")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path, "not a regular file")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseRefused, match="does not exist"):
        adopted(tmp_path / "absent" / "app.db")


def test_a_second_hard_link_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db")
    os.link(path, tmp_path / "other.db")
    refusal(path, "2 names")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_corrupt_database_is_refused(tmp_path: Path, mode: str) -> None:
    """A b-tree page of noise: quick_check finds it."""
    path = make(tmp_path / "app.db", f"PRAGMA journal_mode = {mode}")
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xa5" * 2048)
    refusal(path, "corrupt")


def test_a_truncated_database_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db")
    os.truncate(path, path.stat().st_size - 3 * 4096)
    refusal(path, "corrupt")


def test_an_impossible_page_size_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db")
    with path.open("r+b") as file:
        file.seek(16)
        file.write(b"\x03\xe8")
    refusal(path, "header is corrupt")


def test_a_hot_journal_is_refused(tmp_path: Path) -> None:
    """A crash in a transaction: rolling it back is the owner's decision, not ours."""
    path = make(tmp_path / "app.db", "PRAGMA synchronous = OFF", rows=500)
    crash(path, "PRAGMA cache_size = 5", "BEGIN", "UPDATE t SET text = 'y'")
    assert (tmp_path / "app.db-journal").stat().st_size > 0
    refusal(path, "unfinished transaction")


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(("BEGIN IMMEDIATE", "INSERT INTO t (text) VALUES ('z')"), id="writing"),
        pytest.param(("BEGIN", "SELECT * FROM t"), id="reading"),
        pytest.param(("PRAGMA locking_mode = EXCLUSIVE", "INSERT INTO t (text) VALUES ('z')"), id="exclusive"),
    ],
)
def test_a_rollback_database_in_use_is_refused_and_its_user_named(tmp_path: Path, statements: tuple[str, ...]) -> None:
    path = make(tmp_path / "app.db")
    with held(path, *statements) as pid:
        refusal(path, f"process {pid} is using it")


def test_a_wal_database_held_in_exclusive_mode_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = WAL")
    with held(path, "PRAGMA locking_mode = EXCLUSIVE", "INSERT INTO t (text) VALUES ('z')") as pid:
        refusal(path, f"process {pid} holds it in exclusive mode")


def test_a_wal_database_somebody_reads_is_adopted_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = WAL")
    with held(path, "BEGIN", "SELECT * FROM t") as pid:
        assert adopted(path).journal is Journal.WAL
    assert f"process {pid} has" in capsys.readouterr().err


def test_a_wal_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db", "PRAGMA journal_mode = WAL")
    crash(path, "INSERT INTO t (text) VALUES ('late')")
    with (tmp_path / "app.db-wal").open("r+b") as wal:
        wal.write(bytes.fromhex("377f0683"))
    refusal(path, "big-endian")


def test_a_wal_beside_a_rollback_database_is_refused(tmp_path: Path) -> None:
    """SQLite would play a stranger's frames into it."""
    path = make(tmp_path / "app.db")
    (tmp_path / "app.db-wal").write_bytes(b"\0" * 4096)
    refusal(path, "belongs to another database")


def test_walships_own_store_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "store.db", f"PRAGMA application_id = {adopt.STORE_APPLICATION_ID}")
    refusal(path, "own coordination store")


def test_followers_that_would_fill_the_disk_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "app.db")
    refusal(path, "MiB free", copies=1 << 40)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(
    ("directory_mode", "file_mode", "words"),
    [(0o755, 0o666, "is read-only"), (0o777, 0o444, "may not read and write"), (0o777, 0o200, "may not read")],
)
def test_rights_that_are_missing_are_named(open_tmp: Path, directory_mode: int, file_mode: int, words: str) -> None:
    """As another user, since root may do everything."""
    path = make(open_tmp / "app.db")
    path.chmod(file_mode)
    open_tmp.chmod(directory_mode)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    assert words in done.stdout
    assert path.read_bytes() == before


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that other users can reach, which tmp_path is not."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="walship-test-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A tmpfs of so many MiB, where the machine lets us mount one."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(place)], check=False, capture_output=True
        )
        if done.returncode != 0:
            pytest.skip("this machine does not let us mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_refused(small_disk: Callable[[int], Path]) -> None:
    path = make(small_disk(2) / "app.db")
    refusal(path, "disk is full")


def test_a_disk_that_fills_up_during_the_switch_leaves_the_file_alone(small_disk: Callable[[int], Path]) -> None:
    """SQLite cannot write its journal, so nothing of the switch happens."""
    path = make(small_disk(1) / "app.db")
    with (path.parent / "ballast").open("wb") as ballast, contextlib.suppress(OSError):
        while True:
            os.write(ballast.fileno(), b"\0" * 4096)
    before = path.read_bytes()
    with pytest.raises(DatabaseRefused, match=r"full|cannot read"):
        adopt.switch_to_wal(path)
    assert path.read_bytes() == before
