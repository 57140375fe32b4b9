"""What a node has on disk for one database: the file, the log, the page checksums and the mark, opened together."""

from __future__ import annotations

from dataclasses import dataclass, field

from walship.engine.database import Database
from walship.engine.log import Log
from walship.engine.marks import Marks
from walship.engine.snapshot import Snapshot
from walship.formats.checksum import PageChecksums

__all__ = ["Replica"]


@dataclass(slots=True)
class Replica:
    """An open database whose content is at the log's tip, with `checksums` of exactly that content.

    differing: pages whose content is in doubt and differs from the log's history; empty unless a leader's -wal could
    not be counted (R7). They become the first, `rebuilt` frame of the next term.
    foreign: why nothing of the file may be shown or built upon: other programs wrote to it (R10). It holds what
    `checksums` say, which is no state of history; a seed makes an end of that. None as long as all is well.
    pinned: the state all this was read at, when the -wal was the truth. Other programs may have committed since; while
    it lives their frames stay in the -wal, so whoever leads goes on from there. Let go of it with `unpin`.
    """

    database: Database
    log: Log
    checksums: PageChecksums
    marks: Marks
    differing: list[int] = field(default_factory=list)
    pinned: Snapshot | None = None
    foreign: str | None = None

    def unpin(self) -> None:
        """Let go of `pinned`. Idempotent."""
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            pinned.close()

    def close(self) -> None:
        """Close the database and the log."""
        self.database.close()
        self.log.close()
