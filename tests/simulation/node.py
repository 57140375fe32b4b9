"""A simulated node: a thin shell around the real Election, Lease, AckTracker, records. Its faults are the world's.

`Machine` survives a crash of its `Process`. The replication is not the product's: a leader sends what follows an entry,
a follower takes it if it has that entry, cuts what contradicts, and says how far its disk is. Messages may come late,
twice or never, which is more than TCP does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.log import Disk, Entry, commit_after, common, start_after
from tests.simulation.world import STORE, SimStore, finish
from walship.coordination import ballot as b
from walship.coordination.election import Election, State
from walship.coordination.lease import Lease
from walship.coordination.record import (
    Phase,
    Seen,
    TermStart,
    announce_leader,
    claim_next_term,
    hand_over,
    read_leader,
    release,
    renew,
)
from walship.engine.acks import AckTracker
from walship.errors import CompareFailed, Fenced, StoreUnavailable
from walship.formats.position import Position

if TYPE_CHECKING:
    from .cluster import Cluster

HEARTBEAT_SECONDS = 0.1
ZERO = Position(0, 0)
Reply = Callable[[str, Any], None]


class Machine:
    """Name, clock and disk. `process` is None while it is down."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.name = name
        self.disk = Disk(name, f"id-{name}")
        draw = self.world.random
        self.rate = 10 ** draw.uniform(-1, 1) if cluster.wild_clocks else draw.uniform(0.975, 1.025)
        self.fsync = draw.choice((0.0005, 0.0005, 0.005, 0.05))
        self.offset = self.world.random.uniform(0, 1e6)
        self.process: Process | None = None

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    def set_rate(self, rate: float) -> None:
        """From now on the clock runs so."""
        self.offset, self.rate = self.clock() - self.world.now * rate, rate
        if self.process is not None:
            self.process.wake = None
            self.process.guarded(lambda process=self.process: process.feed(b.Tick(self.clock())))

    def start(self) -> None:
        if self.process is None:
            self.disk.starts += 1
            self.process = self.cluster.rules.process(self)

    def crash(self, *, machine: bool) -> None:
        if self.process is None:
            return
        self.world.say(f"{self.name} {'machine' if machine else 'process'} crashes")
        nonce, self.process = self.process.nonce, None
        self.cluster.dead.add(nonce)
        if machine:
            beyond = len(self.disk.log) - self.disk.synced
            self.disk.lose_unsynced(self.world.random.randint(0, beyond))
        if self.cluster.one_host:
            for other in self.cluster.machines:
                self.world.at(self.world.random.uniform(0.003, 0.008), self.cluster.tell_death, other, nonce)

    def receive(self, method: str, *args: Any) -> None:
        """A message from the network."""
        if self.process is not None:
            self.process.guarded(getattr(self.process, method), *args)


class Leading:
    """What a leader of one term knows."""

    def __init__(self, term: int, acks: int, seconds: float) -> None:
        self.term = term
        self.acks = AckTracker(term, acks, ZERO)
        self.lease = Lease(seconds)
        self.serving = False
        self.quiet = False  # a switchover is under way
        self.waiting: list[tuple[Entry, Reply]] = []
        self.burned: set[int] = set()
        self.next: dict[str, int] = {}
        self.acked: dict[str, int] = {}
        self.began = float("-inf")  # of the last compare-and-swap that succeeded: what the judge goes by
        self.swapping = False  # a compare-and-swap of ours on the record is under way


class Process:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.cluster, self.world = machine, machine.cluster, machine.world
        self.name, self.disk, self.clock = machine.name, machine.disk, machine.clock
        self.nonce = f"{machine.name}.{machine.disk.starts}"
        self.paused_until = 0.0
        self.disk.synced = len(self.disk.log)  # R2: before any position is reported
        self.fence = self.disk.promised
        self.leading: Leading | None = None
        self.answers: dict[str, Position] = {}
        self.syncing = False
        self.acked_seen = ZERO
        self.last_read = float("-inf")
        self.wake: float | None = None
        cluster = self.cluster
        me = b.Candidate(self.disk.node_id, self.name, f"http://{self.name}", self.nonce)
        self.election: Election = cluster.rules.election(
            me, cluster.voters, cluster.acks, cluster.lease_seconds, self.world.random.uniform, promised=self.fence
        )
        self.world.say(f"{self.name} starts as {self.nonce} at {self.disk.last.position}, promised {self.fence}")
        self.eligible()
        self.belt()

    # --- time and the outer world ---------------------------------------------------------------------------------

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Nothing happens in a dead process; in a stopped one it happens when it goes on."""
        if self.machine.process is not self:
            return
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until - self.world.now, self.guarded, function, *args)
        else:
            function(*args)

    def later(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        self.world.at(delay, self.guarded, function, *args)

    def send(self, target: str, method: str, *args: Any) -> None:
        self.world.send(self.name, target, self.cluster.by_name[target].receive, method, *args)

    def fsync_seconds(self) -> float:
        chance = self.world.random.random()
        return self.machine.fsync * (0.5 + chance) if chance < 0.97 else self.world.random.uniform(0.01, 0.15)

    def call(self, change: Callable[[SimStore], Any], done: Callable[[Any], None]) -> None:
        """A store call: carried out when it arrives; `done` gets the result, or the error as a value."""
        ended = False

        def end(result: Any) -> None:
            nonlocal ended
            if not ended:
                ended = True
                done(result)

        def arrive() -> None:
            if self.world.now < self.cluster.store.down_until:
                return
            self.world.send(STORE, self.name, self.guarded, end, finish(change(self.cluster.store)))

        self.world.send(self.name, STORE, arrive)
        self.later(self.cluster.store_deadline, end, StoreUnavailable("no answer"))

    def feed(self, event: b.Event) -> None:
        for action in self.election.handle(event):
            self.do(action)
        wake = self.election.wake_at
        if wake is not None and (self.wake is None or wake < self.wake or self.wake <= event.now):
            self.wake = wake
            self.later(max(0.0, (wake - self.clock()) / self.machine.rate) + 1e-6, self.tick, wake)

    def tick(self, wake: float) -> None:
        if self.wake == wake:
            self.wake = None
        self.feed(b.Tick(self.clock()))

    def belt(self) -> None:
        """The watch's belt: read the record when nothing was heard of it for a while. And the heartbeats."""
        if self.world.now - self.last_read > self.cluster.lease_seconds / 3:
            self.read()
        leading = self.leading
        if leading is not None and leading.serving:
            for name in self.cluster.voters:
                if name != self.name:
                    leading.next[name] = leading.acked.get(name, leading.next.get(name, len(self.disk.log) - 1))
                    self.ship(leading, name)
        self.later(HEARTBEAT_SECONDS * self.world.random.uniform(0.8, 1.2), self.belt)

    def read(self) -> None:
        self.last_read = self.world.now
        self.call(read_leader, self.was_read)

    def was_read(self, result: Any) -> None:
        if result is None or isinstance(result, Seen):
            self.see(result)

    def see(self, seen: Seen[Any] | None) -> None:
        self.last_read = self.world.now
        if seen is not None and self.cluster.one_host and seen.record.nonce in self.cluster.dead:
            self.feed(b.HolderDied(self.clock(), seen.record.nonce))
        self.feed(b.RecordSeen(self.clock(), seen))

    def eligible(self) -> None:
        tip = self.disk.last.tip
        self.feed(b.Eligible(self.clock(), tip, self.acked_seen.order() > tip.position.order()))

    # --- what the election asks for -------------------------------------------------------------------------------

    def do(self, action: b.Action) -> None:
        if not isinstance(action, b.Read):
            self.world.say(f"{self.name} {type(action).__name__} [{self.election.why}]")
        match action:
            case b.Read():
                self.read()
            case b.Check(term, voters):
                for name in voters:
                    self.send(name, "on_check", self.name, term)
            case b.Claim(seen):
                record = self.election.me
                self.swap(
                    b.Swap.CLAIM,
                    lambda store: claim_next_term(
                        store,
                        seen,
                        holder=record.node_id,
                        name=record.name,
                        url=record.url,
                        nonce=record.nonce,
                        promised=self.disk.promised,
                        lease_ms=round(self.cluster.lease_seconds * 1000),
                    ),
                )
            case b.Promise(term):
                self.fence = max(self.fence, term)
                self.later(self.fsync_seconds(), self.promise, term)
            case b.Seal(term, voters):
                for name in voters:
                    self.send(name, "on_seal", self.name, term)
            case b.HandOver(claim, to):
                self.swap(b.Swap.HAND, lambda store: hand_over(store, claim, to=to, phase=Phase.CLAIMING))
            case b.Promote(term):
                self.later(self.fsync_seconds() + self.world.random.choice((0.005, 0.05, 0.3)), self.promote, term)
            case b.Announce(claim, start):
                self.swap(b.Swap.ANNOUNCE, lambda store: announce_leader(store, claim, start=start))
            case b.Serve(term):
                self.serve(term)
            case b.StepDown(term, _):
                self.step_down(term)
            case b.Release(claim):
                self.call(lambda store: release(store, claim), lambda _: None)

    def swap(self, kind: b.Swap, change: Callable[[SimStore], Any]) -> None:
        began = self.clock()

        def done(result: Any) -> None:
            if isinstance(result, Seen):
                if kind is b.Swap.ANNOUNCE and self.leading is not None and self.leading.term == result.record.term:
                    self.extend(self.leading, began)
                self.feed(b.SwapDone(self.clock(), kind, b.Won(result)))
            else:
                lost = isinstance(result, CompareFailed | Fenced)
                self.feed(b.SwapDone(self.clock(), kind, b.LOST if lost else b.UNKNOWN))

        self.call(change, done)

    def promise(self, term: int) -> None:
        if self.fence > term:
            self.feed(b.Sealed(self.clock(), self.fence))
            return
        self.make_promise(term)
        self.answers = {}
        self.feed(b.Promised(self.clock(), term, self.disk.last.tip))

    def make_promise(self, term: int) -> None:
        self.disk.promised = max(self.disk.promised, term)
        self.disk.synced = len(self.disk.log)
        self.cluster.judge.promise(self.disk)

    def promote(self, term: int) -> None:
        if self.election.state is not State.PROMOTING or self.election.term != term:
            return
        disk = self.disk
        self.cluster.judge.promoted(disk, term, self.answers)
        before = disk.last
        entry = start_after(before, term)
        disk.log.append(entry)
        disk.synced = len(disk.log)
        self.cluster.judge.wrote(self.name, entry)
        self.leading = Leading(term, self.cluster.acks, self.cluster.lease_seconds)
        start = TermStart(before.position.term, before.position.txid, before.checksum)
        self.feed(b.Promoted(self.clock(), term, start))

    def serve(self, term: int) -> None:
        leading = self.leading
        assert leading is not None
        assert leading.term == term
        leading.serving = True
        self.cluster.judge.alone(self.name, self.cluster.ready(self))
        for name in self.cluster.voters:
            if name != self.name:
                leading.next[name] = len(self.disk.log) - 1
                self.ship(leading, name)
        self.renew(leading)

    def step_down(self, term: int) -> None:
        if self.leading is not None and self.leading.term == term:
            self.leading.lease.end()
            self.leading = None  # clients whose writes waited learn nothing: outcome unknown
            self.disk.synced = len(self.disk.log)  # R2, demote

    # --- leading --------------------------------------------------------------------------------------------------

    def renew(self, leading: Leading) -> None:
        if self.leading is not leading or not leading.serving:
            return
        at = leading.lease.renew_at
        if leading.swapping or (at is not None and at > self.clock() + 1e-6):
            ahead = 0.02 if at is None or leading.swapping else (at - self.clock()) / self.machine.rate
            self.later(max(ahead, 0.005), self.renew, leading)
            return
        self.renew_now(leading)
        self.later(0.02, self.renew, leading)

    def extend(self, leading: Leading, began: float) -> None:
        leading.began = max(leading.began, began)
        self.cluster.rules.extend(self, leading.lease, began)

    def renew_now(self, leading: Leading) -> None:
        seen, began = self.election.seen, self.clock()
        if seen is None or seen.record.nonce != self.nonce or seen.record.phase is not Phase.SERVING:
            self.read()
            return
        leading.swapping = True

        def done(result: Any) -> None:
            leading.swapping = False
            if isinstance(result, Seen):
                self.extend(leading, began)
                self.see(result)
                self.answer(leading)
            else:
                self.read()

        self.call(lambda store: renew(store, seen), done)

    def on_write(self, proxy: str, term: int, write: int, token: int, reply: Reply) -> None:
        leading = self.leading
        if leading is None or leading.term != term or not leading.serving or token in leading.burned:
            seen = self.election.seen
            reply("moved", seen.record if seen else None)
            return
        if leading.quiet or not leading.lease.valid(self.clock()):
            reply("refused", None)
            return
        entry = commit_after(self.disk.last, term, write, token)
        self.disk.log.append(entry)
        self.cluster.judge.wrote(self.name, entry)
        leading.waiting.append((entry, reply))
        self.sync()

    def on_ask(self, proxy: str, term: int, write: int, token: int, reply: Reply) -> None:
        """R19: what became of it? Only a leader whose term-start is acked may say `not done`, and it burns it."""
        leading = self.leading
        if leading is None or leading.term != term or not leading.serving or not leading.lease.valid(self.clock()):
            return
        covered = self.covered(leading)
        if covered == ZERO:
            return
        for entry in reversed(self.disk.log):
            if entry.token == token:
                if entry.position.term < term or entry.position.txid <= covered.txid:
                    self.say_ok(leading, entry, reply, fresh=False)
                return
        leading.burned.add(token)
        reply("not done", None)

    def sync(self) -> None:
        if not self.syncing:
            self.syncing = True
            self.later(self.fsync_seconds(), self.synced, len(self.disk.log), self.disk.last)

    def synced(self, length: int, last: Entry) -> None:
        """What is durable is the position sampled before the fdatasync (R5)."""
        self.syncing = False
        disk = self.disk
        if disk.holds(last):
            disk.synced = max(disk.synced, length)
        leading = self.leading
        if leading is not None and leading.serving:
            for name in self.cluster.voters:
                if name != self.name:
                    self.ship(leading, name)
            self.answer(leading)
        elif leading is None and disk.holds(last):
            self.acknowledge(last)
        if disk.synced < len(disk.log):
            self.sync()

    def ship(self, leading: Leading, name: str) -> None:
        disk = self.disk
        first = leading.next.get(name, len(disk.log) - 1)
        entries = disk.log[first : disk.synced]
        leading.next[name] = max(first, disk.synced)
        live = leading.lease.valid(self.clock())
        self.send(name, "on_frames", self.name, leading.term, disk.log[first - 1], entries, self.covered(leading), live)

    def on_ack(self, follower: str, node_id: str, term: int, last: Entry) -> None:
        leading = self.leading
        if leading is None or leading.term != term or not self.disk.holds(last):
            return
        leading.acks.record(node_id, last.position)
        leading.acked[follower] = max(leading.acked.get(follower, 1), last.index + 1)
        self.answer(leading)

    def on_nack(self, follower: str, term: int, promised: int, theirs: list[Entry]) -> None:
        leading = self.leading
        if promised > self.fence:
            self.read()
        elif leading is not None and leading.term == term:
            leading.next[follower] = max(1, common(self.disk.log, theirs))
            self.ship(leading, follower)

    def covered(self, leading: Leading) -> Position:
        durable = self.disk.log[self.disk.synced - 1].position
        return leading.acks.covered(durable) if durable.term == leading.term else ZERO

    def answer(self, leading: Leading) -> None:
        """Tell clients what the rule covers by now, if the lease still holds: check (c) of failover.md 3.2."""
        if self.leading is not leading or not leading.waiting:
            return
        covered = self.covered(leading)
        if covered.term != leading.term:
            return
        left = []
        for entry, reply in leading.waiting:
            if entry.position.txid > covered.txid:
                left.append((entry, reply))
            elif leading.lease.valid(self.clock()):
                self.say_ok(leading, entry, reply, fresh=True)
        leading.waiting = left

    def say_ok(self, leading: Leading, entry: Entry, reply: Reply, *, fresh: bool) -> None:
        until = leading.began + leading.lease.seconds - leading.lease.margin_seconds
        valid, others = self.clock() < until, self.cluster.ready(self)
        self.cluster.judge.ok(self.name, leading.term, entry, valid, others, fresh=fresh)
        reply("ok", entry)

    def ready(self) -> bool:
        """Would this process say ok to a write now?"""
        leading = self.leading
        return (
            leading is not None
            and leading.serving
            and not leading.quiet
            and self.paused_until <= self.world.now
            and leading.lease.valid(self.clock())
        )

    # --- planned changes ------------------------------------------------------------------------------------------

    def switchover(self, target: str) -> None:
        """S3 to S7 of failover.md 3.7, with the target's nonce from wherever it is known."""
        leading = self.leading
        other = self.cluster.by_name[target].process
        if leading is None or not leading.serving or leading.quiet or other is None:
            return
        self.world.say(f"{self.name} switches over to {target}")
        leading.quiet = True
        self.later(0.001, self.hand_off, leading, other.election.me, self.clock() + 0.5)

    def hand_off(self, leading: Leading, to: b.Candidate, deadline: float) -> None:
        if self.leading is not leading or not leading.quiet:
            return
        disk = self.disk
        caught_up = leading.acked.get(to.name, 0) == len(disk.log) == disk.synced and not leading.waiting
        seen = self.election.seen
        if self.clock() > deadline or not leading.lease.valid(self.clock()):
            leading.quiet = False
        elif not caught_up or leading.swapping or seen is None or seen.record.nonce != self.nonce:
            self.later(0.003, self.hand_off, leading, to, deadline)
        else:
            last = disk.last
            start = TermStart(last.position.term, last.position.txid, last.checksum)
            leading.swapping = True

            def done(result: Any) -> None:
                leading.swapping = False
                leading.quiet = False
                if isinstance(result, Seen):
                    leading.lease.end()
                    self.see(result)
                    return
                if isinstance(result, StoreUnavailable):
                    leading.lease.demand_renewal(self.clock())
                self.read()

            self.call(lambda store: hand_over(store, seen, to=to, phase=Phase.HANDOFF, start=start), done)

    def resign(self) -> None:
        """A graceful stop without a target: step down, then give the term up, then end."""
        leading, seen = self.leading, self.election.seen
        if leading is not None and leading.serving and seen is not None and seen.record.nonce == self.nonce:
            self.step_down(leading.term)
            self.call(lambda store: release(store, seen), lambda _: self.machine.crash(machine=False))

    # --- following ------------------------------------------------------------------------------------------------

    def on_frames(
        self, leader: str, term: int, before: Entry, entries: list[Entry], acked: Position, live: bool
    ) -> None:
        disk = self.disk
        if term < self.fence:
            self.send(leader, "on_nack", self.name, term, self.fence, [])
            return
        if term > self.fence:
            self.feed(b.Sealed(self.clock(), term))
            self.fence = term
            self.make_promise(term)
        if live:
            self.feed(b.Heard(self.clock(), term))
        if self.leading is not None or self.election.term == term:
            return
        self.acked_seen = max(self.acked_seen, acked, key=Position.order)
        if not disk.holds(before):
            self.send(leader, "on_nack", self.name, term, self.fence, disk.log[:])
            return
        for entry in entries:
            if disk.holds(entry):
                continue
            if entry.index < len(disk.log):
                self.world.say(f"{self.name} rewinds from {disk.last.position} to {disk.log[entry.index - 1].position}")
                disk.cut(entry.index)
            self.cluster.judge.appended(disk, term)
            disk.log.append(entry)
        self.eligible()
        if self.cluster.rules.acks_before_fsync and disk.last.position.term == term:
            self.acknowledge(disk.last)
        self.sync()

    def acknowledge(self, last: Entry) -> None:
        """Tell the leader of the term that the log ends in (R12a: acked as (term, txid))."""
        term, seen = last.position.term, self.election.seen
        leader = self.cluster.judge.leaders_at.get(term)
        if term != self.fence or leader is None or leader == self.name or seen is None:
            return
        self.cluster.judge.acknowledges(self.disk, term)
        self.send(leader, "on_ack", self.name, self.disk.node_id, term, last)

    def on_check(self, asker: str, term: int) -> None:
        heard = self.election.heard(self.clock(), term) or (self.ready() and self.election.leads >= term)
        self.send(asker, "on_checked", self.name, heard)

    def on_checked(self, name: str, heard: bool) -> None:
        self.feed(b.Checked(self.clock(), name, heard))

    def on_seal(self, candidate: str, term: int) -> None:
        if not self.cluster.rules.seals:
            self.send(candidate, "on_answer", term, self.seal_answer())
            return
        if term < self.fence:
            self.send(candidate, "on_answer", term, b.SealRefused(self.name, self.fence))
            return
        if self.cluster.rules.steps_down:
            self.feed(b.Sealed(self.clock(), term))
        self.fence = term
        self.later(self.fsync_seconds(), self.sealed, candidate, term)

    def sealed(self, candidate: str, term: int) -> None:
        if self.fence > term:
            self.send(candidate, "on_answer", term, b.SealRefused(self.name, self.fence))
            return
        self.make_promise(term)
        self.send(candidate, "on_answer", term, self.seal_answer())

    def seal_answer(self) -> b.SealAnswer:
        me = self.election.me
        return b.SealAnswer(me.name, me.node_id, me.url, me.nonce, self.disk.last.tip)

    def on_answer(self, term: int, answer: b.SealAnswer | b.SealRefused) -> None:
        if isinstance(answer, b.SealAnswer) and self.election.state is State.SEALING and self.election.term == term:
            self.answers[answer.name] = answer.tip.position
        self.feed(b.SealAnswered(self.clock(), term, answer))
