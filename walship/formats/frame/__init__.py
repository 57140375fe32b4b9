"""Frames and snapshots: what is shipped, logged and installed.

A frame says "from exactly that state, these commits lead to exactly this one": its header names the predecessor's
position and rolling checksum and the checksum after, its payload is one LTX file. On disk and on the wire it is a
header record, part records of exactly PART_BYTES (the last may be shorter) and an end record, and it exists once its
end is there (R6). A snapshot has the same shape with one position instead of a range. Layouts in docs/format.md
section 6.

Everything here is strict: a header that contradicts itself cannot be built, neither from values nor from bytes.
"""

from walship.formats.frame.header import DATABASE, MAX_FRAME_TOKENS, FrameFlags, FrameHeader
from walship.formats.frame.parts import PART_BYTES
from walship.formats.frame.snapshot import MAX_SNAPSHOT_TOKENS, SnapshotHeader
from walship.formats.frame.stream import (
    FrameAssembler,
    FrameComplete,
    FrameEncoder,
    FrameEnd,
    FramePart,
    FrameStarted,
    SnapshotAssembler,
    SnapshotComplete,
    SnapshotEncoder,
    SnapshotEnd,
    SnapshotPart,
    SnapshotStarted,
    encode_frame,
)
from walship.formats.frame.token import CommitToken

__all__ = [
    "DATABASE",
    "MAX_FRAME_TOKENS",
    "MAX_SNAPSHOT_TOKENS",
    "PART_BYTES",
    "CommitToken",
    "FrameAssembler",
    "FrameComplete",
    "FrameEncoder",
    "FrameEnd",
    "FrameFlags",
    "FrameHeader",
    "FramePart",
    "FrameStarted",
    "SnapshotAssembler",
    "SnapshotComplete",
    "SnapshotEncoder",
    "SnapshotEnd",
    "SnapshotHeader",
    "SnapshotPart",
    "SnapshotStarted",
    "encode_frame",
]
