"""Opening the log's files at start: finish what was interrupted, check everything, cut a torn end.

In order: files that never got their final name are deleted; after a failed fsync the last segment is written anew;
what an interrupted reset left is deleted; every frame is read and must follow the one before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from walship.engine.files import sync_directory
from walship.engine.segment import Segment, SegmentFlags
from walship.engine.segment_check import Damage, verify
from walship.engine.segment_list import SegmentList
from walship.errors import CorruptLog, HistoryMismatch, StorageFailed
from walship.formats.frame import FrameHeader
from walship.formats.position import Tip

__all__ = ["FAILED_FSYNC", "describe_damage", "open_segments"]

FAILED_FSYNC = "failed-fsync"  # a file of this name says that an fsync failed in an earlier life
_COPY_BYTES = 1 << 20


def open_segments(directory: Path, cluster: bytes, on_frame: Callable[[FrameHeader], None]) -> tuple[SegmentList, int]:
    """Open, check and index all segments, oldest first; returns them and how many bytes of a torn end were cut.
    Each frame's header is given to `on_frame`, in order.

    Makes the directory if needed. Raises CorruptLog for damage, HistoryMismatch for another cluster's log,
    StorageFailed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.new"):
            leftover.unlink()  # never had its final name, so it never counted
        _rewrite_last_segment(directory)
        segments = _open_all(directory, cluster)
        _delete_before(directory, segments)
    except OSError as error:
        raise StorageFailed(f"{directory} cannot be prepared: {error.strerror}") from error
    return segments, _verify_all(segments, on_frame)


def _rewrite_last_segment(directory: Path) -> None:
    """After a failed fsync in an earlier life, write the last segment anew (R5). Raises OSError.

    The kernel may hold pages of it that it believes to be clean though they never reached the disk; only bytes that
    are written again can be made durable.
    """
    marker = directory / FAILED_FSYNC
    if not marker.exists():
        return
    names = sorted(directory.glob("*.seg"))
    if names:
        temporary = names[-1].with_suffix(".new")
        with names[-1].open("rb") as source, temporary.open("wb") as target:
            while piece := source.read(_COPY_BYTES):
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(names[-1])
        sync_directory(directory)
    marker.unlink()
    sync_directory(directory)


def _open_all(directory: Path, cluster: bytes) -> SegmentList:
    """Open all segments since the last reset, oldest first. Those before it are not even looked at."""
    segments: list[Segment] = []
    for path in sorted(directory.glob("*.seg"), reverse=True):
        segment = Segment.open(path)
        if segment.head.cluster != cluster:
            raise HistoryMismatch(
                f"{path} belongs to cluster {segment.head.cluster.hex()}, not {cluster.hex()}. Nothing was changed"
            )
        segments.insert(0, segment)
        if segment.head.flags & SegmentFlags.RESET:
            break
    return SegmentList(segments)


def _delete_before(directory: Path, segments: SegmentList) -> None:
    """Delete the segments that an interrupted reset left. Raises OSError."""
    if segments and segments[0].head.flags & SegmentFlags.RESET:
        for path in sorted(directory.glob("*.seg")):
            if path.name < segments[0].path.name:
                path.unlink()
                sync_directory(directory)


def _verify_all(segments: SegmentList, on_frame: Callable[[FrameHeader], None]) -> int:
    """Read and index every frame; cut a torn end. Returns the bytes cut. Raises CorruptLog."""
    cut_bytes = 0
    for number, segment in enumerate(segments):
        damage = verify(segment, on_frame)
        following = segments[number + 1].base if number + 1 < len(segments) else None
        if following is not None and segment.tip != following:
            damage = damage or Damage(segment.end, f"the next segment begins at {following}", torn=False)
            raise CorruptLog(describe_damage(segment, damage, following))
        if damage is None:
            continue
        if following is None and not damage.torn:
            raise CorruptLog(describe_damage(segment, damage, None))
        # Either a write that was cut short, or remains of a failed append that the next segment took the place of:
        # its base is this segment's tip, so nothing that ever counted lies in them.
        cut_bytes += segment.size_bytes() - segment.end
        try:
            os.ftruncate(segment.descriptor, segment.end)
            os.fsync(segment.descriptor)
        except OSError as error:
            raise StorageFailed(f"{segment.path}: its torn end cannot be cut: {error.strerror}") from error
    return cut_bytes


def describe_damage(segment: Segment, damage: Damage, until: Tip | None) -> str:
    affected = f"{segment.tip.position} and up to {until.position}" if until else f"{segment.tip.position}"
    return (
        f"{segment.path.name} at byte {damage.offset}: {damage.reason}. Affected are the frames after {affected}; "
        "nothing was changed. This node must stay out of acknowledgments until it has a new copy: "
        "move its directory away and let it join again"
    )
