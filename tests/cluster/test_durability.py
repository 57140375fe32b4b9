"""The order of the promise as the kernel saw it: fdatasync, then the frame, then the acknowledgment (design.md 4).

Both nodes run under strace. One client writes through the leader's own front door, one write after the other, so that
every reply of the leader and every frame it ships must find its -wal synced; and the follower's word, which carries a
txid, must never be ahead of what its log had synced.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, eventually
from walship.formats.frame import FrameHeader
from walship.formats.record import RECORD_HEADER_SIZE, Kind
from walship.replication.messages import Ack

WRITES = 20
# -D: strace is the child, so that signals reach the node and its death ends the trace.
_STRACE = ("strace", "-D", "-f", "-yy", "-s", "256", "-e", "trace=fdatasync,pwrite64,write,writev,sendto,sendmsg")
_TARGET = r"<(\w+:\[.*?\]|[^>]*)>"
_TEXT = r'(?:, "((?:[^"\\]|\\.)*)")?'
_CALL = re.compile(rf"(\d+) +(\w+)\(\d+{_TARGET}{_TEXT}.*?(\) += -?\d+.*|<unfinished \.\.\.>)$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>.*\) += (-?\d+)")


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. A call that another thread's overlapped gives two: `begun`, then `ended`."""

    name: str
    target: str
    data: bytes
    begun: bool
    ended: bool


def calls(trace: Path) -> Iterator[Call]:
    unfinished: dict[str, Call] = {}
    for line in trace.read_text("latin-1").splitlines():
        if found := _RESUMED.match(line):
            call = unfinished.pop(found[1], None)
            if call is not None:
                yield Call(call.name, call.target, call.data, begun=False, ended=True)
        elif found := _CALL.match(line):
            thread, name, target, text, end = found.groups()
            data = (text or "").encode("latin-1").decode("unicode_escape").encode("latin-1")
            call = Call(name, target, data, begun=True, ended=end.startswith(")"))
            if not call.ended:
                unfinished[thread] = call
            yield call


def usable() -> str | None:
    """Why strace cannot be used here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else f"strace cannot trace here: {done.stderr.strip()[:200]}"


@pytest.fixture
def traces(tmp_path: Path) -> dict[str, Path]:
    """Traces of the leader (n1) and the follower (n2) over `WRITES` acknowledged writes."""
    if (reason := usable()) is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path, nodes=2)
    cluster.prefix_of = lambda name: (*_STRACE, "-o", str(tmp_path / f"{name}.trace"))
    try:
        cluster.start()
        with cluster.client("n1") as client:
            client.execute("CREATE TABLE w (id INTEGER PRIMARY KEY, v)")
            for number in range(WRITES):
                client.execute("INSERT INTO w (v) VALUES (?)", number)
        cluster.stop()
    finally:
        cluster.end()
    traced = {name: tmp_path / f"{name}.trace" for name in cluster.names}
    for path in traced.values():
        eventually(lambda path=path: b"+++ exited with 0 +++" in path.read_bytes()[-500:], f"{path} is complete")
    return traced


def test_nothing_is_shipped_or_acknowledged_before_it_is_durable(traces: dict[str, Path]) -> None:
    replies, frames = leader_order(traces["n1"])
    assert replies >= WRITES
    assert frames >= WRITES
    assert follower_order(traces["n2"]) >= WRITES


def leader_order(trace: Path) -> tuple[int, int]:
    """Check the leader; how many replies and frames were sent."""
    unsynced = replies = frames = 0
    for call in calls(trace):
        if call.target.endswith("-wal"):
            if call.name == "pwrite64" and call.begun:
                unsynced += 1
            elif call.name == "fdatasync" and call.ended:
                unsynced = 0
        elif call.target.startswith("TCP") and call.begun:
            if call.data.startswith(b"HTTP/1.1 200"):
                assert unsynced == 0, "the leader answered a write before its -wal was synced"
                replies += 1
            elif frame_of(call.data) is not None:
                assert unsynced == 0, "the leader shipped a frame before its -wal was synced"
                frames += 1
    return replies, frames


def follower_order(trace: Path) -> int:
    """Check the follower; the txid it acknowledged last."""
    written = synced = acked = 0
    seeded = first_txid(trace)
    syncing: int | None = None
    for call in calls(trace):
        if call.target.endswith(".seg"):
            if call.name == "pwrite64" and call.ended and (frame := frame_of(call.data)) is not None:
                written = max(written, frame.max_txid)
            elif call.name == "fdatasync":
                if call.begun:
                    syncing = written
                if call.ended and syncing is not None:
                    synced = syncing
        elif call.target.startswith("TCP") and call.begun and (ack := ack_of(call.data)) is not None:
            assert ack.durable.txid <= max(synced, seeded), "the follower acknowledged a frame it had not synced"
            acked = ack.durable.txid
    return acked


def first_txid(trace: Path) -> int:
    """TXID before the first frame that was logged: what the snapshot brought."""
    frames = (frame_of(call.data) for call in calls(trace) if call.target.endswith(".seg"))
    return next(frame.min_txid - 1 for frame in frames if frame is not None)


def frame_of(data: bytes) -> FrameHeader | None:
    """The header of the frame that `data`, cut short by strace, begins with."""
    if len(data) < RECORD_HEADER_SIZE or data[0] != Kind.FRAME_HEADER or b"WSF1" not in data[:16]:
        return None
    size = int.from_bytes(data[4:RECORD_HEADER_SIZE], "big")
    return FrameHeader.parse(data[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + size])


def ack_of(data: bytes) -> Ack | None:
    if len(data) < RECORD_HEADER_SIZE or data[:2] != bytes((Kind.ACK, 1)):
        return None
    size = int.from_bytes(data[4:RECORD_HEADER_SIZE], "big")
    return Ack.parse(data[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + size])
