"""What a node has on disk for one database: the file, the log, the page checksums and the mark, opened together."""

from __future__ import annotations

from dataclasses import dataclass, field

from walship.engine.database import Database
from walship.engine.log import Log
from walship.engine.marks import Marks
from walship.formats.checksum import PageChecksums

__all__ = ["Replica"]


@dataclass(slots=True)
class Replica:
    """An open database whose content is at the log's tip, with `checksums` of exactly that content.

    differing: pages whose content is in doubt and differs from the log's history; empty unless a leader's -wal could
    not be counted (R7). They become the first, `rebuilt` frame of the next term.
    """

    database: Database
    log: Log
    checksums: PageChecksums
    marks: Marks
    differing: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the database (which empties its -wal) and the log."""
        self.database.close()
        self.log.close()
