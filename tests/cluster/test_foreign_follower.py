"""R10, hostile: other programs do all they can to a follower's file. They get SQLITE_BUSY; what they commit while the
node is down is in an orphan file, row by row; reads on the follower go on; in the end all files are byte-identical.

WALSHIP_FOREIGN_SECONDS: how long they hammer (5; the soak takes 30).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.cluster.client import Failure
from tests.cluster.harness import Cluster, content_of, eventually, same_files, say
from tests.cluster.load import Load
from tests.engine.nodes import ask, outside
from walship.engine.orphans import ORPHANS, Reason, list_orphans
from walship.formats import ltx

SECONDS = float(os.environ.get("WALSHIP_FOREIGN_SECONDS", "5"))


def test_programs_that_write_to_a_followers_file(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster()
    with cluster.client() as client:
        client.execute("CREATE TABLE hammer (id INTEGER PRIMARY KEY, body)")
        client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
    cluster.wait_level()
    path = cluster.database("n2")
    with Load(cluster.url, clients=4, payload_bytes=2000) as load:
        with reading(cluster) as failures, hammers(path, "marked", "marked", "eager", "attempts") as programs:
            time.sleep(SECONDS)
            reports = [json.loads(ask(program, "enough")) for program in programs]
            assert failures == []
        say({"commits": sum(r["commits"] for r in reports), "refused": [r["errors"] for r in reports]})
        assert all(report["commits"] == 0 for report in reports), reports
        assert all(set(report["errors"]) == {"database is locked"} for report in reports), reports
        assert list_orphans(cluster.root / "n2") == []
        marks = written_while_it_is_down(cluster, path)
        load.wait_acked(50)
    kept = marks_in_orphans(cluster.root / "n2")
    say({"committed while it was down": len(marks), "in orphan files": len(marks & kept)})
    assert marks
    assert marks <= kept
    statuses = cluster.wait_level()
    assert statuses["n2"]["replication"]["seeds"] == 1
    files = cluster.stop()
    same_files(files)
    assert content_of(files[1], "SELECT count(*) FROM hammer") == [(0,)]
    assert load.acked <= {row for (row,) in content_of(files[1], "SELECT id FROM w")}


def written_while_it_is_down(cluster: Cluster, path: Path) -> set[str]:
    """Kill the follower, let others commit to its file, and start it while they go on. Returns what they committed."""
    with hammers(path, "marked", "marked") as programs:
        cluster.processes["n2"].kill()
        with outside() as looker:
            ask(looker, "open", str(path))
            count = "SELECT count(*) >= 20 FROM hammer"
            eventually(lambda: ask(looker, "run", count) == "[(1,)]", "they commit while it is down")
            ask(looker, "close")
        cluster.start_node("n2")
        eventually(lambda: cluster.status("n2")["replication"]["seeds"] == 1, "n2 is seeded")
        return {mark for program in programs for mark in json.loads(ask(program, "enough"))["marks"]}


def marks_in_orphans(directory: Path) -> set[str]:
    found: set[str] = set()
    for manifest in list_orphans(directory):
        assert manifest.reason is Reason.FOREIGN
        _, pages = ltx.decode((directory / ORPHANS / f"{manifest.name}.ltx").read_bytes())
        for _, page in pages:
            found |= {piece[:40].decode("ascii", "replace") for piece in page.split(b"foreign-") if len(piece) >= 32}
    return {"foreign-" + piece[:32] for piece in found}


@contextlib.contextmanager
def hammers(path: Path, *kinds: str) -> Iterator[list[Popen[str]]]:
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(outside()) for _ in kinds]
        for program, kind in zip(programs, kinds, strict=True):
            assert ask(program, "hammer", str(path), kind) == "ok"
        yield programs


@contextlib.contextmanager
def reading(cluster: Cluster) -> Iterator[list[Any]]:
    """A client that reads at the follower all the time; what failed is in the list."""
    failures: list[Any] = []
    stop = threading.Event()
    reads = 0

    def run() -> None:
        nonlocal reads
        with cluster.client("n2") as client:
            while not stop.wait(0.005):
                try:
                    client.execute("SELECT count(*), max(id) FROM w")
                    reads += 1
                except Failure as error:
                    failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield failures
    finally:
        stop.set()
        thread.join()
    assert reads > 20
