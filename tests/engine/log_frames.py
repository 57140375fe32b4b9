"""Frames for the tests of the log, and what looks at and damages its files."""

from __future__ import annotations

import random
from pathlib import Path

from walship.engine.log import FrameRef, Log, LogLimits
from walship.formats.checksum import FLAG
from walship.formats.frame import FrameFlags, FrameHeader, encode_frame
from walship.formats.position import Position, Tip

CLUSTER = bytes(range(16))
BASE = Tip(Position(1, 10), FLAG | 10, 2)
LIMITS = LogLimits(max_bytes=1 << 30)
SMALL = LogLimits(max_bytes=1 << 30, segment_bytes=2000)


def open_log(directory: Path, limits: LogLimits = LIMITS, **more: object) -> Log:
    return Log.open(directory / "log", cluster=CLUSTER, base=BASE, limits=limits, **more)  # type: ignore[arg-type]


def header_after(tip: Tip, *, commits: int = 1, term: int | None = None, time_ms: int = 1000) -> FrameHeader:
    previous = tip.position
    term = previous.term if term is None else term
    txid = previous.txid + commits
    return FrameHeader(
        flags=FrameFlags(0),
        cluster=CLUSTER,
        database=1,
        term=term,
        min_txid=previous.txid + 1,
        max_txid=txid,
        previous=previous,
        previous_checksum=tip.checksum,
        checksum=FLAG | (txid * 1000 + term),
        commit=3,
        page_size=4096,
        time_ms=time_ms,
        acked=Position(0, 0),
    )


def term_start_after(tip: Tip, term: int) -> FrameHeader:
    return FrameHeader.start_of_term(tip, term, cluster=CLUSTER, page_size=4096, time_ms=1000)


def payload_of(header: FrameHeader, size_bytes: int = 100) -> bytes:
    return random.Random(header.max_txid).randbytes(size_bytes)


def append(log: Log, *, size_bytes: int = 100, **more: int) -> FrameRef:
    header = header_after(log.tip, **more)
    return log.append(header, encode_frame(header, payload_of(header, size_bytes)))


def start_term(log: Log, term: int) -> FrameRef:
    header = term_start_after(log.tip, term)
    return log.append(header, encode_frame(header))


def fill(log: Log, frames: int, **more: int) -> list[FrameRef]:
    return [append(log, **more) for _ in range(frames)]


def segment_files(directory: Path) -> list[Path]:
    return sorted((directory / "log").glob("*.seg"))


def positions(log: Log, after: Position = BASE.position) -> list[Position]:
    return [ref.header.position for ref in log.frames_after(after)]


def flip(path: Path, at: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))
