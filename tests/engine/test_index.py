"""Publishing in the wal-index: block borders, hot pages, what a dead writer left, headers caught half-written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest

from tests.engine.nodes import ask, make_database, outside, read, rows
from walship.engine.apply import Applier, Batch
from walship.engine.database import Database
from walship.errors import CorruptDatabase, CorruptWalIndex, StorageFailed
from walship.formats.wal_index import HASH_OFFSET, INDEX_HEADER_SIZE, first_frame, pgno_offset

PAGE = 512
BORDERS = [4062 + 4096 * block for block in range(3)]  # the last frame of each block


def nothing() -> None:
    return


class Pages:
    """A database whose user pages are written by us: page images of a real one, with a counter in a known row."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "data.db"
        make_database(self.path, page_size=PAGE, setup=("CREATE TABLE t(id INTEGER PRIMARY KEY, body)",))
        connection = apsw.Connection(str(self.path))
        for number in range(300):
            connection.execute("INSERT INTO t VALUES(?, ?)", (number, b"0" * 400))
        connection.close()
        self.database = Database.open(self.path)
        self.applier = Applier(self.database)
        self.images = self._images()

    def _images(self) -> list[bytes]:
        with apsw.Connection(":memory:") as copy:
            with copy.backup("main", self.database.holder, "main") as backup:
                backup.step()
            data = copy.serialize("main")
        # bytes 18-19 of page 1 say WAL in the file; the copy in memory says rollback
        data = data[:18] + b"\x02\x02" + data[20:]
        return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]

    @property
    def commit(self) -> int:
        return len(self.images)

    def marked(self, mark: int) -> dict[int, bytes]:
        """Every page that holds rows of `t` as overflow or leaf bytes, its run of digits replaced by `mark`."""
        return {
            number: image.replace(b"0" * 100, b"%04d" % (mark % 10_000) * 25)
            for number, image in enumerate(self.images, start=1)
            if b"0" * 100 in image
        }

    def apply(self, pages: dict[int, bytes]) -> None:
        pgnos = sorted(pages)
        self.applier.apply(
            Batch(pgnos, lambda: (pages[pgno] for pgno in pgnos), self.commit), sync=False, publishing=nothing
        )

    def fill_to(self, frame: int) -> None:
        """Apply whole batches, then a smaller one, until mxFrame is `frame`."""
        everything = self.marked(1)
        while (missing := frame - self.applier.mx_frame()) > 0:
            self.apply(dict(list(everything.items())[:missing]))
        assert self.database.index.header().mx_frame == frame

    def distinct(self, connection: apsw.Connection) -> set[str]:
        return {row[0] for row in rows(connection, "SELECT DISTINCT substr(CAST(body AS TEXT), 21, 4) FROM t")}


@contextmanager
def pages(directory: Path) -> Iterator[Pages]:
    made = Pages(directory)
    try:
        yield made
    finally:
        made.database.close()


@pytest.mark.parametrize("before", [border + step for border in BORDERS[:2] for step in (-1, 0, 1)])
def test_frames_around_a_block_border_are_found_by_every_reader(tmp_path: Path, before: int) -> None:
    """engine.md 11.5: the index is a chain of blocks; this process, SQLite in another, and recovery must agree."""
    with pages(tmp_path) as made:
        made.fill_to(before)
        old = made.database.connect_reader()
        old.execute("BEGIN")
        seen = made.distinct(old)
        assert "0001" in seen
        made.apply(made.marked(7))
        assert made.distinct(old) == seen
        fresh = made.database.connect_reader()
        assert made.distinct(fresh) == {"0007"}
        assert rows(fresh, "PRAGMA integrity_check") == [("ok",)]
        with outside() as other:
            ask(other, "open", str(made.path))
            assert ask(other, "run", "SELECT DISTINCT substr(CAST(body AS TEXT), 21, 4) FROM t") == "[('0007',)]"
            assert ask(other, "run", "PRAGMA integrity_check") == "[('ok',)]"
            ask(other, "close")
        one = dict([next(iter(made.marked(8).items()))])
        made.apply(one)
        assert made.distinct(fresh) == {"0007", "0008"}
        assert made.database.index.newest_frames(made.applier.mx_frame())[next(iter(one))] == made.applier.mx_frame()


def test_one_batch_may_span_three_blocks(tmp_path: Path) -> None:
    make_database(tmp_path / "data.db", page_size=PAGE, setup=("CREATE TABLE t(body)",))
    database = Database.open(tmp_path / "data.db")
    with outside() as other:
        ask(other, "open", str(tmp_path / "data.db"))  # has mapped block 0 alone
        applier = Applier(database)
        made = apsw.Connection(":memory:")
        made.execute(f"PRAGMA page_size={PAGE}")
        made.execute("CREATE TABLE t(body)")
        made.execute("INSERT INTO t VALUES(zeroblob(?))", (9000 * PAGE,))
        data = made.serialize("main")
        made.close()
        data = data[:18] + b"\x02\x02" + data[20:]
        commit = len(data) // PAGE
        assert commit > 4062 + 4096
        applier.apply(
            Batch(range(1, commit + 1), lambda: (data[at : at + PAGE] for at in range(0, len(data), PAGE)), commit),
            sync=False,
            publishing=nothing,
        )
        assert ask(other, "run", "SELECT length(body) FROM t") == f"[({9000 * PAGE},)]"
        assert ask(other, "run", "PRAGMA integrity_check") == "[('ok',)]"
        ask(other, "close")
    database.close()


def test_a_hot_page_is_found_after_ten_thousand_versions(tmp_path: Path) -> None:
    """engine.md T4: every version has the same hash key; remembering the last slot keeps publishing linear."""
    with pages(tmp_path) as made:
        pgno, _ = next(iter(made.marked(1).items()))
        reader = made.database.connect_reader()
        for version in range(1, 10_001):
            image = made.images[pgno - 1].replace(b"0" * 100, b"%04d" % (version % 10_000) * 25)
            made.apply({pgno: image})
            if version % 811 == 0 or version in (4061, 4062, 4063, 8157, 8158, 8159):
                assert made.distinct(reader) == {"0000", f"{version:04d}"}
        assert made.applier.mx_frame() == 10_000
        with outside() as other:
            ask(other, "open", str(made.path))
            assert ask(other, "run", "PRAGMA integrity_check") == "[('ok',)]"
            ask(other, "close")


def test_what_a_dead_writer_left_in_the_index_is_cleared(tmp_path: Path) -> None:
    """Entries above mxFrame, in page numbers and hash slots, of frames that were never published."""
    with pages(tmp_path) as made:
        made.fill_to(1000)
        with made.database.holding_write():
            made.database.index.insert(1001, [2, 3, 2, 3, 5] * 20)
        made.database.index.forget_slots()
        made.apply(made.marked(9))
        assert made.distinct(made.database.connect_reader()) == {"0009"}
        block = bytes(made.database.index._blocks[0])
        count = made.applier.mx_frame()
        numbers = memoryview(block)[pgno_offset(first_frame(0)) : HASH_OFFSET].cast("I")
        slots = memoryview(block)[HASH_OFFSET:].cast("H")
        assert not any(numbers[count:])
        assert max(slots) == count
        assert sorted(slot for slot in slots if slot) == list(range(1, count + 1))


def test_a_batch_that_failed_before_publishing_leaves_no_trace(tmp_path: Path) -> None:
    """Any error before step 7 leaves the old state standing, and the next batch goes over its remains."""
    with pages(tmp_path) as made:
        made.fill_to(500)
        before = made.database.index.header()

        def fail() -> None:
            raise StorageFailed("for the test")

        new = made.marked(5)
        pgnos = sorted(new)
        with pytest.raises(StorageFailed):
            made.applier.apply(Batch(pgnos, lambda: (new[p] for p in pgnos), made.commit), sync=False, publishing=fail)
        assert made.database.index.header() == before
        assert "0005" not in made.distinct(made.database.connect_reader())
        made.apply(made.marked(6))
        assert made.distinct(made.database.connect_reader()) == {"0006"}


def test_a_header_caught_between_its_copies_is_waited_for(tmp_path: Path) -> None:
    """engine.md T3 and 11.17: a writer may lose the CPU between the copies; nobody repairs it, nobody fails."""
    with pages(tmp_path) as made:
        head = made.database.index._head
        whole = bytes(head[:INDEX_HEADER_SIZE])
        head[:INDEX_HEADER_SIZE] = bytes([whole[0], whole[1], *whole[2:8], whole[8] ^ 1, *whole[9:]])
        healed = threading.Event()

        def heal() -> None:
            healed.wait(0.05)
            head[:INDEX_HEADER_SIZE] = whole

        thread = threading.Thread(target=heal)
        thread.start()
        header = made.database.index.header()
        thread.join()
        assert header.to_bytes() == whole


def test_a_header_that_stays_torn_is_an_error_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walship.engine.shm._HEADER_DEADLINE_SECONDS", 0.05)
    with pages(tmp_path) as made:
        head = made.database.index._head
        head[8] ^= 1
        with pytest.raises(CorruptWalIndex, match="repairs"):
            made.database.index.header()
        assert read(made.database, "SELECT count(*) FROM t") == [(300,)]  # SQLite's own recovery
        assert made.database.index.header().mx_frame == 0


def test_recovery_by_another_process_is_no_foreign_write(tmp_path: Path) -> None:
    """engine.md T8: recovery sets the change counter to 0 and keeps the frames."""
    with pages(tmp_path) as made:
        made.fill_to(700)
        made.database.fence.release()
        made.database.index._head[8] ^= 1  # torn, as a writer killed between the copies leaves it
        with outside() as other:
            ask(other, "open", str(made.path))
            assert ask(other, "run", "SELECT count(*) FROM t") == "[(300,)]"
            ask(other, "close")
        assert made.database.index.header().change == 0
        made.apply(made.marked(4))
        assert made.distinct(made.database.connect_reader()) == {"0004"}


def test_a_hole_in_a_growing_batch_is_refused(tmp_path: Path) -> None:
    """engine.md T10: it would make every later checkpoint fail for good."""
    with pages(tmp_path) as made:
        first = made.images[0]
        with pytest.raises(CorruptDatabase, match="grows"):
            made.applier.apply(
                Batch([1, made.commit + 2], lambda: iter([first, bytes(PAGE)]), made.commit + 2),
                sync=False,
                publishing=nothing,
            )
        assert made.database.index.header().mx_frame == 0


def test_a_full_disk_while_growing_the_index_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """engine.md T17."""
    with pages(tmp_path) as made:
        made.fill_to(4000)
        real = os.pwrite

        def full(fd: int, data: bytes, offset: int) -> int:
            if fd == made.database.index.fd:
                raise OSError(28, "No space left on device")
            return real(fd, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr("walship.engine.shm.os.pwrite", full)
            with pytest.raises(StorageFailed, match="Nothing was published"):
                made.apply(made.marked(3))
        assert made.database.index.header().mx_frame == 4000
        made.apply(made.marked(2))
        assert made.distinct(made.database.connect_reader()) == {"0002"}
