"""The log when the process is killed, the disk is full, or an fsync fails. Everything here fails for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.engine.log_frames import BASE, SMALL, append, fill, open_log, payload_of, positions, segment_files
from walship.engine.log import Log
from walship.errors import StorageFailed

ROOT = Path(__file__).parents[2]


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "engine")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_everything_acknowledged_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    """R5: what a sync returned is there again, and what is there is a prefix of what was written."""
    script = """
        import sys
        from pathlib import Path
        from log_frames import SMALL, append, open_log
        log = open_log(Path(sys.argv[1]), SMALL)
        while True:
            for _ in range(3):
                append(log, size_bytes=log.tip.position.txid * 37 % 900 + 1)
            print(log.sync().position.txid, flush=True)
    """
    chance = random.Random(5)
    acknowledged = BASE.position.txid
    for _ in range(20):
        with start(script, tmp_path) as process:
            assert process.stdout is not None
            for _ in range(chance.randrange(1, 20)):
                acknowledged = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split("\n")
            acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
        log = open_log(tmp_path, SMALL)
        assert log.durable_tip == log.tip
        assert log.tip.position.txid >= acknowledged
        found = 0
        for found, ref in enumerate(log.frames_after(BASE.position), 1):  # noqa: B007
            size = (ref.header.max_txid - 1) * 37 % 900 + 1
            assert log.payload(ref).read_at(0, size) == payload_of(ref.header, size)
        assert found == log.tip.position.txid - BASE.position.txid
        log.close()
    assert len(segment_files(tmp_path)) > 20


def test_a_death_right_after_a_new_segment_leaves_a_log_that_opens(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from log_frames import SMALL, append, open_log
        log = open_log(Path(sys.argv[1]), SMALL)
        while True:
            append(log, size_bytes=700)
    """
    with start(script, tmp_path, WALSHIP_FAILPOINT="log.segment_created:3") as process:
        assert process.wait(20) == -signal.SIGKILL
    log = open_log(tmp_path, SMALL)
    assert len(segment_files(tmp_path)) == 3
    assert log.next_after(log.tip.position) is None
    append(log)
    assert open_log(tmp_path, SMALL).tip == log.tip


def test_a_full_disk_fails_the_append_and_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    """R5: after a failed append, truncate to the last good end."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        from log_frames import append, open_log
        from walship.errors import StorageFailed
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = open_log(Path(sys.argv[1]))
        append(log)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        tip = log.tip
        for _ in range(2):
            try:
                append(log, size_bytes=300_000)
            except StorageFailed as error:
                print("failed:", error)
            assert log.tip == tip
        header = append(log, size_bytes=50_000).header
        print(log.sync().position)
        print("size", log.statistics().size_bytes)
    """
    with start(script, tmp_path) as process:
        output, _ = process.communicate(timeout=20)
    lines = output.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["failed", "failed"]
    assert "nothing before it is affected" in lines[0]
    assert lines[2] == "1.12"
    log = open_log(tmp_path)
    assert str(log.tip.position) == "1.12"
    assert lines[3] == f"size {segment_files(tmp_path)[0].stat().st_size}"
    assert log.statistics().cut_bytes == 0


def test_a_segment_that_cannot_be_cut_back_is_left_for_a_new_one(tmp_path: Path) -> None:
    """R5: or close the segment and begin another; its remains are never read as history."""
    log = open_log(tmp_path)
    refs = fill(log, 3)
    path = segment_files(tmp_path)[0]
    with replaced(log, os.open(path, os.O_RDONLY)), pytest.raises(StorageFailed):
        append(log)
    with path.open("ab") as file:
        file.write(b"remains of the failed append")
    refs.append(append(log))
    assert len(segment_files(tmp_path)) == 2
    again = open_log(tmp_path)
    assert positions(again) == [ref.header.position for ref in refs]
    assert again.statistics().cut_bytes == 28


def test_no_new_segment_on_a_full_disk_is_an_error_that_passes(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    append(log, size_bytes=1900)
    directory = tmp_path / "log"
    blocked = directory / "0000000000000002.new"
    blocked.mkdir()  # nothing can be written under that name
    with pytest.raises(StorageFailed, match="no new segment"):
        append(log, size_bytes=1900)
    blocked.rmdir()
    append(log, size_bytes=10)
    assert len(segment_files(tmp_path)) == 2
    assert open_log(tmp_path, SMALL).tip == log.tip


def test_a_failed_fsync_is_final(tmp_path: Path) -> None:
    """R5: the kernel may have dropped the data, a second fsync would lie."""
    log = open_log(tmp_path)
    append(log)
    log.sync()
    durable = log.durable_tip
    append(log)
    with unsyncable(log), pytest.raises(StorageFailed, match="process must end"):
        log.sync()
    assert log.durable_tip == durable
    with pytest.raises(StorageFailed, match="process must end"):
        log.sync()
    with pytest.raises(StorageFailed, match="process must end"):
        append(log)


def test_after_a_failed_fsync_the_next_start_writes_the_last_segment_anew(tmp_path: Path) -> None:
    """R5."""
    log = open_log(tmp_path, SMALL)
    fill(log, 8, size_bytes=500)
    with unsyncable(log), pytest.raises(StorageFailed):
        log.sync()
    before = [(path.name, path.stat().st_ino, path.read_bytes()) for path in segment_files(tmp_path)]
    again = open_log(tmp_path, SMALL)
    after = [(path.name, path.stat().st_ino, path.read_bytes()) for path in segment_files(tmp_path)]
    assert again.tip == again.durable_tip == log.tip
    assert after[:-1] == before[:-1]
    assert after[-1][1] != before[-1][1]
    assert after[-1][2] == before[-1][2]
    assert not (tmp_path / "log" / "failed-fsync").exists()


class replaced:
    """Put another open file in the place of the log's own for a while: system calls on it then really fail."""

    def __init__(self, log: Log, other: int) -> None:
        self._number = log._growing().descriptor
        self._other = other

    def __enter__(self) -> None:
        self._saved = os.dup(self._number)
        os.dup2(self._other, self._number)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, self._number)
        os.close(self._saved)
        os.close(self._other)


def unsyncable(log: Log) -> replaced:
    """A pipe cannot be fsynced: EINVAL."""
    reader, writer = os.pipe()
    os.close(reader)
    return replaced(log, writer)
