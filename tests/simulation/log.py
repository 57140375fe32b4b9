"""What a simulated node has on disk: a log of entries, its synced part, the durable promise, and orphans."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from walship.formats.position import Position, TermHistory, Tip

MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A commit (`write` > 0) or a term start (0). Two entries are the same iff they are one object."""

    index: int
    position: Position
    checksum: int
    write: int
    token: int = 0  # of the attempt (R19)

    @property
    def tip(self) -> Tip:
        return Tip(self.position, self.checksum, 1)


FIRST = Entry(0, Position(0, 1), 1, 0)


def commit_after(last: Entry, term: int, write: int, token: int) -> Entry:
    checksum = (last.checksum * 6364136223846793005 + write * 1442695040888963407 + term) & MASK
    return Entry(last.index + 1, Position(term, last.position.txid + 1), checksum, write, token)


def start_after(last: Entry, term: int) -> Entry:
    """A term-start frame: no TXID, same checksum (R11)."""
    return Entry(last.index + 1, Position(term, last.position.txid), last.checksum, 0)


@dataclass(slots=True)
class Disk:
    """Survives the process; what lies beyond `synced` does not surely survive the machine."""

    name: str
    node_id: str
    log: list[Entry] = field(default_factory=lambda: [FIRST])
    synced: int = 1
    promised: int = 0
    orphans: list[Entry] = field(default_factory=list)
    starts: int = 0  # of processes

    @property
    def last(self) -> Entry:
        return self.log[-1]

    def holds(self, entry: Entry) -> bool:
        return entry.index < len(self.log) and self.log[entry.index] is entry

    def cut(self, index: int) -> None:
        """Rewind (R12): what goes is kept as orphans first."""
        self.orphans += [each for each in self.log[index:] if each.write]
        del self.log[index:]
        self.synced = min(self.synced, index)

    def lose_unsynced(self, keep: int) -> None:
        """The machine crashed; `keep` more than the synced part survived by chance."""
        del self.log[self.synced + keep :]

    def history(self) -> TermHistory:
        """From the term-start frames of the log."""
        history = TermHistory()
        for before, each in itertools.pairwise(self.log):
            if not each.write:
                history.add(each.position.term, each.position.txid, before.position.term)
        return history


def common(ours: list[Entry], theirs: list[Entry]) -> int:
    """How many entries two logs share from their beginning."""
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[middle - 1] is theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
