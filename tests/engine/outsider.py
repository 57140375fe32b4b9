"""A foreign process on a database: the standard library's sqlite3, commanded by lines on standard input.

    open PATH           attach (autocommit, busy timeout 0)       -> ok
    run SQL             execute, fetch                            -> repr of the rows, or the error's text
    close               detach                                    -> ok
    watch PATH          read with invariants in threads until `report`  -> ok
    report              stop watching                             -> JSON {"reads": n, "violations": [...]}
    hammer PATH KIND    write in a way of its own until `enough`   -> ok
    enough              stop writing       -> JSON {"commits": n, "errors": {text: n}, "marks": [...]}

The invariants (tests/engine/test_apply.py writes so that each commit keeps them): the sum over `account` is constant,
`counter` never falls, two reads inside one transaction agree, rows of `pair` come in twos.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
import uuid

CHECKS = (
    "SELECT sum(balance) FROM account",
    "SELECT n FROM counter",
    "SELECT count(*), coalesce(max(n), 0), coalesce(min(n), 2) FROM (SELECT count(*) AS n FROM pair GROUP BY k)",
)


class Watch:
    def __init__(self, path: str) -> None:
        self.path = path
        self.stop = threading.Event()
        self.reads = 0
        self.violations: list[str] = []
        self.threads = [
            threading.Thread(target=self.loop, args=(pause, mmap), daemon=True)
            for pause, mmap in ((0.0, 0), (0.02, 1 << 28))
        ]
        for thread in self.threads:
            thread.start()

    def loop(self, pause: float, mmap: int) -> None:
        connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, isolation_level=None, timeout=0)
        connection.execute(f"PRAGMA mmap_size={mmap}").fetchall()
        last = -1
        try:
            while not self.stop.is_set():
                connection.execute("BEGIN")
                first = [connection.execute(sql).fetchone() for sql in CHECKS]
                if pause:
                    time.sleep(pause)
                second = [connection.execute(sql).fetchone() for sql in CHECKS]
                connection.execute("COMMIT")
                self.reads += 1
                total, counter = first[0][0], first[1][0]
                if first != second:
                    self.violations.append(f"not repeatable: {first} then {second}")
                if total != 1000:
                    self.violations.append(f"torn: sum {total}")
                if counter < last:
                    self.violations.append(f"went back: {last} then {counter}")
                if first[2][1] not in (0, 2) or first[2][2] != 2:
                    self.violations.append(f"torn: pairs {first[2]}")
                last = counter
        except sqlite3.Error as error:
            self.violations.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def report(self) -> str:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        return json.dumps({"reads": self.reads, "violations": self.violations[:10]})


class Hammer:
    """A foreign program that writes the way KIND says, with SQLite's defaults: autocheckpoint 1000, close deletes."""

    def __init__(self, path: str, kind: str) -> None:
        self.path = path
        self.stop = threading.Event()
        self.commits = 0
        self.errors: dict[str, int] = {}
        self.marks: list[str] = []
        self.step = getattr(self, kind)
        self.connection = self.connect()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, timeout=1, check_same_thread=False)

    def loop(self) -> None:
        while not self.stop.is_set():
            try:
                self.step()
            except sqlite3.Error as error:
                self.errors[str(error)] = self.errors.get(str(error), 0) + 1
            time.sleep(0.002)  # SQLite's lock is not fair: without a pause nobody else would ever get it
        self.connection.close()

    def insert(self, size: int = 600) -> None:
        self.connection.execute("INSERT INTO hammer(body) VALUES(randomblob(?))", (size,))
        self.commits += 1

    def plain(self) -> None:
        self.insert()

    def marked(self) -> None:
        """Each row is unmistakable, and each commit a connection of its own; what was committed is reported."""
        self.connection.close()
        self.connection = self.connect()
        self.connection.execute("PRAGMA busy_timeout=0").fetchall()
        mark = f"foreign-{uuid.uuid4().hex}"
        self.connection.execute("INSERT INTO hammer(body) VALUES(?)", (mark,))
        self.marks.append(mark)
        self.commits += 1

    def attempts(self) -> None:
        """Everything that would change a file in which it must not write."""
        for sql in (
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "VACUUM",
            "PRAGMA journal_mode=delete",
            "CREATE TABLE theirs(x)",
            "PRAGMA user_version=7",
        ):
            try:
                self.connection.execute(sql).fetchall()
                self.commits += "checkpoint" not in sql
            except sqlite3.OperationalError as error:
                self.errors[str(error)] = self.errors.get(str(error), 0) + 1

    def eager(self) -> None:
        """Tries again at once for 2 ms, then pauses: any moment in which WRITE is free is its own."""
        self.connection.execute("PRAGMA busy_timeout=0").fetchall()
        until = time.monotonic() + 0.002
        while True:
            try:
                return self.insert()
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise

    def opening(self) -> None:
        """Opens and closes for each commit; its close would checkpoint and delete the -wal if it were the last."""
        self.connection.close()
        self.connection = self.connect()
        self.insert()

    def spilling(self) -> None:
        self.connection.execute("PRAGMA cache_size=5").fetchall()
        self.connection.execute("BEGIN IMMEDIATE")
        for _ in range(60):
            self.connection.execute("INSERT INTO hammer(body) VALUES(randomblob(3000))")
        if self.commits % 2:
            self.connection.execute("ROLLBACK")
            self.commits -= 1
        else:
            self.connection.execute("COMMIT")
        self.commits += 2

    def vacuum(self) -> None:
        self.insert()
        self.connection.execute("DELETE FROM hammer WHERE id % 3 = 0")
        self.connection.execute("VACUUM")

    def checkpoints(self) -> None:
        for mode in ("TRUNCATE", "RESTART", "FULL", "PASSIVE"):
            self.insert()
            self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()

    def journal(self) -> None:
        self.insert()
        for mode in ("delete", "truncate", "persist"):
            try:
                self.connection.execute(f"PRAGMA journal_mode={mode}").fetchall()
            except sqlite3.OperationalError as error:
                self.errors[str(error)] = self.errors.get(str(error), 0) + 1

    def report(self) -> str:
        self.stop.set()
        self.thread.join()
        return json.dumps({"commits": self.commits, "errors": self.errors, "marks": self.marks})


def main() -> None:
    hammer: Hammer | None = None
    connection: sqlite3.Connection | None = None
    watch: Watch | None = None
    for line in sys.stdin:
        command, *words = line.rstrip("\n").split("\t")
        answer = "ok"
        try:
            if command == "open":
                connection = sqlite3.connect(words[0], isolation_level=None, timeout=0)
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            elif command == "run":
                assert connection is not None
                answer = repr(connection.execute(words[0]).fetchall())
            elif command == "close":
                assert connection is not None
                connection.close()
            elif command == "watch":
                watch = Watch(words[0])
            elif command == "hammer":
                hammer = Hammer(*words)
            elif command == "enough":
                assert hammer is not None
                answer = hammer.report()
            elif command == "report":
                assert watch is not None
                answer = watch.report()
        except sqlite3.Error as error:
            answer = f"{type(error).__name__}: {error}"
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
