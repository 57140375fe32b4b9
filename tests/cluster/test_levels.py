"""Consistency levels on real processes, through two proxies of one cluster (docs/consistency.md, R17, R18)."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.client import Client, Failed, Failure, NoReply
from tests.cluster.harness import Cluster, Process, eventually, say
from tests.cluster.linearizable import Operation, violation

LINEARIZABLE = "PRAGMA walship_consistency = 'linearizable'"
READS = 500


class Pair:
    """A cluster with two proxies, each with its own clients."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.cluster = Cluster(root, **settings)  # type: ignore[arg-type]
        self.second = Process("proxy2", root / "proxy2.log")

    def start(self) -> Pair:
        self.cluster.start()
        self.start_second()
        return self

    def start_second(self) -> None:
        seen = self.second.log_path.stat().st_size if self.second.log_path.exists() else 0
        store = f"file://{self.cluster.root}/store"
        self.second.start(["proxy", "--listen", "127.0.0.1:0", "--cluster", store, "--deadline-seconds", "4"])

        def listening() -> str:
            assert self.second.alive, f"the second proxy ended; its log ends:\n{self.second.log_tail()}"
            text = self.second.log_path.read_bytes()[seen:].decode("utf-8", "replace")
            return text.partition("listen url=")[2].partition(" ")[0].strip()

        self.second.url = eventually(listening, "the second proxy listens")
        with Client(self.second.url) as client:
            eventually(lambda: client.execute("SELECT 1").rows, "the second proxy serves")

    @property
    def urls(self) -> list[str]:
        return [self.cluster.url, self.second.url]

    def end(self) -> None:
        self.second.end()
        self.cluster.end()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("levels"))
    try:
        pair.start()
        with Client(pair.cluster.url) as client:
            client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
            client.execute("CREATE TABLE register (id INTEGER PRIMARY KEY, v)")
        yield pair
    finally:
        pair.end()


_numbers = itertools.count(1)


def test_a_write_through_one_proxy_is_read_through_the_other(pair: Pair) -> None:
    """R18: with several live proxies the floor comes from the leader. No miss, and followers do the reading."""
    served: Counter[str | None] = Counter()
    misses: list[int] = []

    def run(write_to: str, read_from: str, count: int) -> None:
        with Client(write_to) as writer, Client(read_from) as reader:
            for _ in range(count):
                number = next(_numbers)
                writer.execute("INSERT INTO w VALUES (?, ?)", number, number)
                seen = reader.execute("SELECT v FROM w WHERE id = ?", number)
                served[seen.served_by] += 1
                if seen.rows != [(number,)]:
                    misses.append(number)

    one, other = pair.urls
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run, *way, READS // 4) for way in ((one, other), (other, one)) for _ in range(2)]:
            future.result()
    say(served)
    assert misses == []
    assert sum(served[name] for name in pair.cluster.followers) >= 0.8 * READS


def test_a_register_is_linearizable_through_both_proxies(pair: Pair) -> None:
    """R18: every history of concurrent reads and writes has an order that keeps what ended before what."""
    operations: list[Operation] = []
    served: Counter[str | None] = Counter()
    start = threading.Barrier(6)
    with Client(pair.cluster.url) as client:
        client.execute("INSERT INTO register VALUES (1, 0)")

    def run(worker: int) -> None:
        """Each writes through one proxy and reads through the other at once: what a stale answer would show in."""
        with Client(pair.urls[worker % 2]) as writer, Client(pair.urls[1 - worker % 2]) as reader:
            start.wait(10)
            for turn in range(60):
                value = worker * 1000 + turn + 1 if (turn + worker) % 3 == 0 else None
                sql = "SELECT v FROM register" if value is None else f"UPDATE register SET v = {value}"
                begin = time.monotonic()
                result = (reader if value is None else writer).sequence(LINEARIZABLE, sql)[1]
                end = time.monotonic()
                served[result.served_by] += value is None
                operations.append(Operation(value is not None, value or result.value, begin, end))

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(run, worker) for worker in range(6)]:
            future.result()
    say(served)
    assert violation(operations, 0) is None
    assert sum(served[name] for name in pair.cluster.followers) > 0


def test_linearizable_reads_share_their_questions(pair: Pair) -> None:
    """Under load many reads cost one question; alone, a read costs one."""
    before = asked(pair.cluster.url)

    def run() -> None:
        with Client(pair.cluster.url) as client:
            for _ in range(25):
                client.sequence(LINEARIZABLE, "SELECT 1")

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(run) for _ in range(16)]:
            future.result()
    questions = asked(pair.cluster.url) - before
    say(f"{questions:.0f} questions for {16 * 25} reads")
    assert 0 < questions < 16 * 25 / 2


def asked(url: str) -> float:
    text = metrics(url)
    line = 'walship_floor_requests_total{level="linearizable",outcome="answered"} '
    return float(text.partition(line)[2].partition("\n")[0] or 0)


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text: str = reply.read().decode()
    return text


def test_describe_is_as_fresh_as_a_read(pair: Pair) -> None:
    """The columns of a table that was made through the other proxy a moment ago."""
    one, other = pair.urls
    with Client(one) as maker, Client(other) as reader:
        for number in range(50):
            maker.execute(f"CREATE TABLE d{number} (c{number})")
            assert reader.describe(f"SELECT * FROM d{number}") == [f"c{number}"]


def test_every_reply_names_a_position_that_makes_another_proxy_as_fresh(pair: Pair) -> None:
    one, other = pair.urls
    with Client(one) as writer, Client(other) as reader:
        for _ in range(50):
            number = next(_numbers)
            token = writer.execute("INSERT INTO w VALUES (?, ?)", number, number).position
            results = reader.sequence(
                "PRAGMA walship_consistency = 'any'", f"PRAGMA walship_wait_for = '{token}'", "SELECT max(id) FROM w"
            )
            assert results[2].value == number


def test_a_second_proxy_gets_a_name_of_its_own(pair: Pair) -> None:
    with Client(pair.cluster.url) as first, Client(pair.second.url) as second:
        assert [client.get("/status")["proxy"]["name"] for client in (first, second)] == ["proxy", "proxy-2"]


def test_what_one_reader_sees_never_goes_back_while_the_leader_is_killed_and_comes_back(pair: Pair) -> None:
    """R18 across terms and followers: a counter that only grows, read at `session` through one proxy."""
    cluster = pair.cluster
    with Client(cluster.url) as client:
        client.execute("CREATE TABLE counter (n)")
        client.execute("INSERT INTO counter VALUES (0)")
    done = threading.Event()
    acknowledged = [0]
    back: list[tuple[int, int]] = []
    missed: list[tuple[int, int]] = []
    reads = Counter[str | None]()

    def write() -> None:
        with Client(cluster.url, 20) as client:
            for number in itertools.count(1):
                if done.is_set():
                    return
                try:
                    client.execute("UPDATE counter SET n = ?", number)
                    acknowledged[0] = number
                except Failure:
                    continue

    def read(url: str) -> None:
        last = 0
        with Client(url, 20) as client:
            while not done.is_set():
                known = acknowledged[0]
                try:
                    seen = client.execute("SELECT n FROM counter")
                except Failure:
                    continue
                reads[seen.served_by] += 1
                if seen.value < last:
                    back.append((last, seen.value))
                if seen.value < known:
                    missed.append((known, seen.value))
                last = seen.value

    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(write), *[pool.submit(read, url) for url in pair.urls for _ in range(2)]]
        try:
            for _ in range(3):
                before = acknowledged[0]
                eventually(lambda before=before: acknowledged[0] > before + 20, "writes go on")  # type: ignore[misc]
                name = cluster.kill_leader()
                time.sleep(0.3)
                cluster.start_node(name)
        finally:
            done.set()
        for future in futures:
            future.result()
    say(f"{acknowledged[0]} writes, reads by node: {dict(reads)}")
    assert back == []
    assert missed == []
    cluster.wait_healthy()


def test_session_reads_go_on_without_a_leader_and_see_what_the_other_proxy_acknowledged(pair: Pair) -> None:
    """R18: the newest position among |V| - n voters stands in for the leader's word. Proof needs a leader."""
    cluster = pair.cluster
    one, other = pair.urls
    number = next(_numbers)
    with Client(one) as writer, Client(other) as reader:
        writer.execute("INSERT INTO w VALUES (?, ?)", number, number)
        stopped = cluster.processes[cluster.leader]
        os.kill(stopped.pid, signal.SIGSTOP)  # until its lease ends nobody leads
        try:
            for _ in range(20):
                assert reader.execute("SELECT v FROM w WHERE id = ?", number).rows == [(number,)]
            # Proof is for the next leader to give.
            assert reader.sequence(LINEARIZABLE, "SELECT 1")
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
    cluster.wait_healthy()


def test_a_stopped_leader_proves_nothing(pair: Pair) -> None:
    """Its process lives and its connections stand: a lease on a clock would say yes."""
    cluster = pair.cluster
    leader = cluster.processes[cluster.leader]
    with Client(pair.cluster.url) as client:
        os.kill(leader.pid, signal.SIGSTOP)
        resume = threading.Timer(1.0, os.kill, (leader.pid, signal.SIGCONT))
        resume.start()
        begin = time.monotonic()
        client.sequence(LINEARIZABLE, "SELECT v FROM register")
        seconds = time.monotonic() - begin
        resume.join()
    assert seconds > 0.9


def test_a_token_of_the_future_is_waited_for_and_then_refused(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(nodes=2, ack=0, proxy_words=("--deadline-seconds", "1"))
    with cluster.client() as client:
        for token in ("1.999999", "77.1"):
            started = time.monotonic()
            with pytest.raises(Failed) as refused:
                client.sequence(f"PRAGMA walship_wait_for = '{token}'", "SELECT 1")
            assert refused.value.code == "WALSHIP_BEHIND"
            assert 0.9 < time.monotonic() - started < 5
        # --ack 0: what a linearizable read shows could be lost, so there are none, and nobody is told otherwise.
        with pytest.raises(Failed) as refused:
            client.sequence(LINEARIZABLE, "SELECT 1")
        assert refused.value.code == "LINEARIZABLE_NEEDS_ACK"
        assert client.execute("SELECT 1").value == 1
    with cluster.client(cluster.followers[0]) as client, pytest.raises((Failed, NoReply)):
        client.sequence(LINEARIZABLE, "SELECT 1")
