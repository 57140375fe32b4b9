"""The invariants of failover.md 3.13, asserted as things happen. It sees all, and no node sees it."""

from __future__ import annotations

from tests.simulation.log import Disk, Entry
from tests.simulation.world import Violation, World
from walship.coordination.record import LeaderRecord
from walship.formats.position import Position


class Judge:
    def __init__(self, world: World, acks: int, *, wild_clocks: bool) -> None:
        self.world = world
        self.acks = acks
        self.wild_clocks = wild_clocks  # leases may overlap; nothing else may break
        self.acked: dict[int, Entry] = {}  # write -> its entry
        self.refused: set[int] = set()  # writes whose client was told "surely not done" for good
        self.leaders_at: dict[int, str] = {}  # term -> who wrote frames of it
        self.openings: list[tuple[int, tuple[Entry, ...]]] = []  # term, the log it began on
        self.record_term = 0
        self.promised: dict[str, int] = {}
        self.elections = 0

    def fail(self, text: str) -> None:
        raise Violation(f"{self.world.now:.4f} s: {text}")

    def record(self, record: LeaderRecord) -> None:
        if record.term < self.record_term:
            self.fail(f"I2: the record went from term {self.record_term} back to {record.term}")
        self.record_term = record.term

    def promise(self, disk: Disk) -> None:
        if disk.promised < self.promised.get(disk.name, 0):
            self.fail(f"I2: {disk.name} promised {self.promised[disk.name]}, now {disk.promised}")
        self.promised[disk.name] = disk.promised

    def wrote(self, name: str, entry: Entry) -> None:
        if self.leaders_at.setdefault(entry.position.term, name) != name:
            self.fail(f"I1: {name} wrote {entry.position}, which is {self.leaders_at[entry.position.term]}'s term")

    def appended(self, disk: Disk, term: int) -> None:
        if term < disk.promised:
            self.fail(f"I3: {disk.name} took a frame of term {term}, it promised {disk.promised}")

    def acknowledges(self, disk: Disk, term: int) -> None:
        if disk.promised > term:
            self.fail(f"I4: {disk.name} acknowledges in term {term}, it promised {disk.promised}")

    def promoted(self, disk: Disk, term: int, answers: dict[str, Position]) -> None:
        """Before the term-start is written."""
        self.elections += 1
        for name, position in answers.items():
            if position.order() > disk.last.position.order():
                self.fail(f"I7: {disk.name} opens term {term} at {disk.last.position}, {name} answered {position}")
        self.openings.append((term, tuple(disk.log)))
        if self.acks:
            for entry in self.acked.values():
                if entry.position.term < term and not disk.holds(entry):
                    self.fail(
                        f"I5: term {term} of {disk.name} begins without write {entry.write}, acked {entry.position}"
                    )

    def ok(self, name: str, own_term: int, entry: Entry, lease_valid: bool, others: list[str], *, fresh: bool) -> None:
        """The leader of `own_term` tells a client that `entry` is committed.

        others: nodes that would now admit a write and say so too. fresh: the write was just made, not asked about.
        """
        if not lease_valid:
            self.fail(f"I9: {name} says ok to {entry.position} after its lease")
        if fresh:
            self.alone(name, others)
        known = self.acked.setdefault(entry.write, entry)
        if known is not entry and self.acks:
            self.fail(f"I15: write {entry.write} is acked as {known.position} and as {entry.position}")
        if self.acks:
            for term, log in self.openings:
                if term > own_term and not (entry.index < len(log) and log[entry.index] is entry):
                    self.fail(f"I5: {name} acks {entry.position}, but term {term} began without it")

    def alone(self, name: str, others: list[str]) -> None:
        if others and not self.wild_clocks:
            self.fail(f"I8: {name} and {', '.join(others)} would both say ok to a write")

    def healed(self, disks: list[Disk], leader: Disk) -> None:
        """All is well again and quiet: one history, nothing lost, nothing twice, nothing unaccounted for."""
        log = leader.log
        for disk in disks:
            if disk.log != log:
                self.fail(f"I10/I20: {disk.name} ends at {disk.last.position}, {leader.name} at {leader.last.position}")
        writes = [each.write for each in log if each.write]
        if self.acks and len(writes) != len(set(writes)):
            self.fail(f"I15: a write is in history twice: {sorted(x for x in set(writes) if writes.count(x) > 1)}")
        orphans = [each for disk in disks for each in disk.orphans]
        history = leader.history()
        for entry in self.acked.values():
            if leader.holds(entry):
                if not history.covers(leader.last.position, entry.position):
                    self.fail(f"I12: {leader.last.position} does not cover {entry.position}, which is in its log")
            elif self.acks:
                self.fail(f"I5: write {entry.write}, acked at {entry.position}, is lost")
            elif entry not in orphans:
                self.fail(f"I6: write {entry.write}, acked at {entry.position}, is nowhere")
        present = set(log)
        for entry in orphans:
            if entry not in present and not history.lost(entry.position):
                self.fail(f"I12: orphan {entry.position} counts as covered by {leader.last.position}")
        if lost := self.refused & set(writes):
            self.fail(f"I15: refused for good, yet in history: {lost}")
