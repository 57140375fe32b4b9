"""One simulated cluster: machines, proxies, a store, and the faults that a seed chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.judge import Judge
from tests.simulation.node import Machine, Process
from tests.simulation.proxy import Proxy
from tests.simulation.world import STORE, SimStore, World, finish
from walship.coordination.ballot import HolderDied
from walship.coordination.election import Election
from walship.coordination.lease import Lease
from walship.coordination.record import LEADER, LeaderRecord, Phase, Seen, claim_next_term, decode, release
from walship.coordination.store import Versioned

__all__ = ["FOCUS", "Cluster", "Rules", "simulate"]

SHAPES = ((3, 1), (3, 1), (3, 1), (3, 1), (3, 1), (3, 2), (5, 2), (5, 1), (4, 2), (3, 0), (2, 1))
# Which faults a seed draws, by weight. A focus makes one kind of trouble frequent that is rare in the mix.
FOCUS: dict[str, dict[str, int]] = {
    "mix": {
        "crash_one": 5,
        "pause_one": 4,
        "isolate": 4,
        "halves": 2,
        "cut_store": 2,
        "store_outage": 1,
        "slow_links": 4,
        "crash_all": 1,
        "crash_two": 3,
        "switch": 3,
        "resign": 1,
        "lossy": 1,
        "bad_clock": 3,
    },
    "deposed": {"bad_clock": 10, "crash_one": 1},  # leaders that do not know it, and are sure of their lease
    "machines": {"crash_two": 6, "crash_all": 2, "crash_one": 1},
    "handoff": {"switch": 10, "slow_links": 2, "crash_one": 1},
    "store": {"slow_links": 5, "cut_store": 4, "store_outage": 3, "isolate": 2},
}
HEAL_SECONDS = 10.0  # I20


class Rules:
    """The rules that a mutant breaks. All on."""

    name = "none"
    seals = True  # a voter promises before it answers a seal
    steps_down = True  # and steps down before
    acks_before_fsync = False
    election: Callable[..., Election] = Election
    process: Callable[[Machine], Process] = Process

    def extend(self, process: Process, lease: Lease, began: float) -> None:
        lease.extend(began)


class Cluster:
    def __init__(
        self,
        seed: int,
        rules: Rules | None = None,
        *,
        shape: tuple[int, int] | None = None,
        one_host: bool | None = None,
        focus: str | None = None,
        lease_seconds: float = 1.0,
        verbose: bool = False,
    ) -> None:
        self.world = World(seed, verbose=verbose)
        draw = self.world.random
        self.rules = rules or Rules()
        self.focus = focus or draw.choice(("mix", "mix", "mix", *FOCUS))
        size, self.acks = shape or draw.choice(SHAPES if self.focus == "mix" else ((3, 1), (3, 1), (5, 2), (5, 1)))
        self.one_host = draw.random() < 0.5 if one_host is None else one_host
        self.lease_seconds = lease_seconds
        self.calm = draw.choice((0.5, 1.2, 2.5))  # mean seconds between faults, three times over
        # Rates that no lease allows for: it may be overrun, and everything else must hold all the same.
        self.wild_clocks = self.focus == "deposed" or (self.focus == "mix" and draw.random() < 0.3)
        self.store_deadline = draw.choice((0.25, 0.5, 2.0))
        self.store = SimStore(self.world)
        self.judge = Judge(self.world, self.acks, wild_clocks=self.wild_clocks)
        self.dead: set[str] = set()
        self.voters = tuple(f"n{number}" for number in range(1, size + 1))
        self.machines = [Machine(self, name) for name in self.voters]
        self.by_name = {machine.name: machine for machine in self.machines}
        self.store.on_change.append(self.changed)
        found = finish(claim_next_term(self.store, None, holder="founder", name="founder", url="", promised=0))
        finish(release(self.store, found))
        self.proxies = [Proxy(self, f"p{n}", 3, n * 1_000_000, draw.choice((0.003, 0.02, 0.05))) for n in (1, 2)]
        for machine in self.machines:
            self.world.at(draw.random() * 0.02, machine.start)
        self.world.at(0.05, self.poll)

    # --- the store's news -----------------------------------------------------------------------------------------

    def changed(self, key: str, state: Versioned) -> None:
        if key != LEADER:
            return
        record = decode(LeaderRecord, key, state.value)
        self.world.say(f"record: term {record.term} {record.name} {record.phase} beat {record.beat}")
        self.judge.record(record)
        if not hasattr(self, "proxies"):
            return
        for machine in self.machines:
            self.world.send(STORE, machine.name, self.tell, machine, record, state.version)
        for proxy in self.proxies:
            self.world.send(STORE, proxy.name, proxy.on_record, key, state.value)

    def tell(self, machine: Machine, record: LeaderRecord, version: int) -> None:
        if machine.process is not None:
            machine.process.guarded(machine.process.see, Seen(record, version))

    def poll(self) -> None:
        """Proxies read the record now and then."""
        there = self.store.records[LEADER]
        if self.world.now >= self.store.down_until:
            for proxy in self.proxies:
                if self.world.cut.get((proxy.name, STORE), 0.0) <= self.world.now:
                    self.world.send(STORE, proxy.name, proxy.on_record, LEADER, there.value)
        self.world.at(0.2, self.poll)

    def tell_death(self, machine: Machine, nonce: str) -> None:
        process = machine.process
        if process is not None:
            process.guarded(lambda: process.feed(HolderDied(process.clock(), nonce)))

    def ready(self, but: Process) -> list[str]:
        """Other nodes that would say ok to a write at this instant."""
        others = [each.process for each in self.machines if each.process not in (None, but)]
        return [each.name for each in others if each is not None and each.ready()]

    @property
    def leader(self) -> Machine | None:
        """The newest that serves."""
        serving = [m for m in self.machines if m.process and m.process.leading and m.process.leading.serving]
        return max(serving, key=lambda m: m.process.leading.term, default=None)  # type: ignore[union-attr]

    # --- faults ---------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        draw = self.world.random
        weights = FOCUS[self.focus]
        getattr(self, draw.choices(list(weights), list(weights.values()))[0])()

    def victim(self) -> Machine:
        """More often the leader than chance would have it."""
        leader = self.leader
        return (
            leader
            if leader is not None and self.world.random.random() < 0.6
            else self.world.random.choice(self.machines)
        )

    def crash_one(self) -> None:
        machine = self.victim()
        machine.crash(machine=self.world.random.random() < 0.5)
        self.world.at(self.world.random.random() ** 2 * 2.5 + 0.02, machine.start)

    def crash_all(self) -> None:
        hard = self.world.random.random() < 0.5
        for machine in self.machines:
            delay = self.world.random.random() * 0.1
            self.world.at(delay, lambda machine=machine: machine.crash(machine=hard))
            self.world.at(delay + 0.02 + self.world.random.random() ** 2, machine.start)

    def crash_two(self) -> None:
        """The leader, and at almost the same moment a follower's machine, which is back first."""
        leader = self.leader
        if leader is not None:
            draw = self.world.random
            other = draw.choice([each for each in self.machines if each is not leader])
            rest = [each.name for each in self.machines if each not in (other, leader)]
            self.apart([leader.name], rest, 0.5)  # what only these two hold
            self.world.at(0.2, lambda: leader.crash(machine=True))
            self.world.at(0.2 + draw.random() * 0.005, lambda: other.crash(machine=True))
            self.world.at(0.25, other.start)
            self.world.at(draw.uniform(0.5, 2.5), leader.start)
            self.world.run(self.world.now + 0.3)

    def pause_one(self) -> None:
        process = self.victim().process
        if process is not None:
            process.paused_until = self.world.now + self.world.random.uniform(0.1, 2.5)
            self.world.say(f"{process.name} stops until {process.paused_until:.3f}")

    def isolate(self) -> None:
        """One node from the nodes, from the store, from the proxies: any of these, one way or both."""
        draw, name = self.world.random, self.victim().name
        for group in (list(self.voters), [STORE], [proxy.name for proxy in self.proxies]):
            if draw.random() < 0.6:
                self.cut([name], [each for each in group if each != name])

    def halves(self) -> None:
        draw = self.world.random
        names = [*self.voters, *(proxy.name for proxy in self.proxies), STORE]
        here = [name for name in names if draw.random() < 0.5]
        self.cut(here, [name for name in names if name not in here])

    def cut(self, here: list[str], there: list[str]) -> None:
        draw = self.world.random
        seconds, way = draw.uniform(0.1, 2.5), draw.choice(("both", "both", "to", "from"))
        self.world.say(f"cut {here} {way} {there} for {seconds:.2f} s")
        for a in here:
            for b in there:
                if way != "from":
                    self.world.partition(a, b, seconds)
                if way != "to":
                    self.world.partition(b, a, seconds)

    def apart(self, here: list[str], there: list[str], seconds: float) -> None:
        for a in here:
            for b in there:
                self.world.partition(a, b, seconds)
                self.world.partition(b, a, seconds)

    def cut_store(self) -> None:
        self.cut([self.victim().name], [STORE])

    def store_outage(self) -> None:
        self.store.down_until = self.world.now + self.world.random.uniform(0.2, 3.0)
        self.world.say(f"store away until {self.store.down_until:.2f}")

    def slow_links(self) -> None:
        name = self.world.random.choice([self.victim().name, self.victim().name, STORE, "p1"])
        self.world.slow[name] = self.world.now + self.world.random.uniform(0.3, 2.0)
        self.world.say(f"slow: {name}")

    def lossy(self) -> None:
        self.world.loss = self.world.random.choice((0.0, 0.02, 0.2))
        self.store.flaky = self.world.random.choice((0.0, 0.1))

    def bad_clock(self) -> None:
        """The leader's clock crawls while the others' race: every lease is overrun, and only the seal is left."""
        if not self.wild_clocks:
            return
        leader, draw = self.leader, self.world.random
        for machine in self.machines:
            machine.set_rate(draw.uniform(0.03, 0.3) if machine is leader else draw.uniform(2, 10))
        if leader is not None and draw.random() < 0.7:  # and it is the last to learn
            self.world.partition(STORE, leader.name, draw.uniform(0.5, 3.0))
        if leader is not None and draw.random() < 0.5:  # and one follower hears it alone
            other = draw.choice([each for each in self.machines if each is not leader])
            self.apart([other.name], [each.name for each in self.machines if each not in (other, leader)], 1.5)
        self.world.at(draw.uniform(0.5, 1.5), self.mend_clocks)
        self.world.say(f"clocks: {[round(machine.rate, 2) for machine in self.machines]}")
        self.world.run(self.world.now + draw.uniform(0.1, 1.0))

    def mend_clocks(self) -> None:
        for machine in self.machines:
            machine.set_rate(self.world.random.uniform(0.95, 1.05))

    def switch(self) -> None:
        leader = self.leader
        if leader is not None and leader.process is not None:
            target = self.world.random.choice([name for name in self.voters if name != leader.name])
            leader.process.guarded(leader.process.switchover, target)
            if self.world.random.random() < 0.5:
                self.world.slow[leader.name] = self.world.now + 1.0

    def resign(self) -> None:
        leader = self.leader
        if leader is not None and leader.process is not None:
            leader.process.guarded(leader.process.resign)
            self.world.at(0.5, leader.start)

    # --- the course of a run --------------------------------------------------------------------------------------

    def run(self, fault_seconds: float) -> None:
        """Faults, then healing, then I20. Raises Violation."""
        until, draw = self.world.now + fault_seconds, self.world.random
        self.world.run(0.3)
        while self.world.now < until:
            self.fault()
            self.world.run(self.world.now + draw.random() ** 2 * self.calm)
        self.heal()

    def heal(self) -> None:
        self.world.say("heal")
        self.world.heal()
        self.store.down_until = self.store.flaky = 0.0
        for machine in self.machines:
            machine.start()
            if machine.process is not None:
                machine.process.paused_until = min(machine.process.paused_until, self.world.now)
            if self.wild_clocks:
                machine.set_rate(1.0)
        for proxy in self.proxies:
            proxy.writing = False
        end = self.world.now + HEAL_SECONDS
        while not self.settled():
            if self.world.now >= end:
                state = [
                    (m.name, str(m.disk.last.position), m.process and m.process.election.why) for m in self.machines
                ]
                self.judge.fail(f"I20: not whole {HEAL_SECONDS} s after healing: {state}, open {self.opened()}")
            self.world.run(self.world.now + 0.1)
            for machine in self.machines:
                machine.start()  # what ended by itself, as a supervisor does
        leader = self.leader
        assert leader is not None
        self.judge.healed([machine.disk for machine in self.machines], leader.disk)

    def opened(self) -> int:
        return sum(proxy.open for proxy in self.proxies)

    def settled(self) -> bool:
        leader = self.leader
        if leader is None or leader.process is None or not leader.process.ready() or self.opened():
            return False
        record = decode(LeaderRecord, LEADER, self.store.records[LEADER].value)
        return (
            record.phase is Phase.SERVING
            and record.nonce == leader.process.nonce
            and all(machine.disk.log == leader.disk.log for machine in self.machines)
            and leader.disk.synced == len(leader.disk.log)
        )


def simulate(seed: int, rules: Rules | None = None, *, fault_seconds: float = 5.0, **options: Any) -> Cluster:
    """One run. Raises `Violation`; the same seed raises the same one."""
    cluster = Cluster(seed, rules, **options)
    cluster.run(fault_seconds)
    return cluster
