"""The list-append checker, after Elle (Kingsbury and Alvaro, 2020): transactions append unique values to lists by key
and read whole lists. A list tells the order of its appends, so dependencies are seen, not guessed:

    ww  one appended right after the other        wr  one read what the other appended last
    rw  one read the list before the other appended to it
    session  one client did it before             real time  one had ended before the other began

No order of transactions explains a cycle. Its name says what is broken: G0 (ww only), G1c (ww, wr), G-single (one
rw: a stale or skewed read), G2 (more: write skew, long fork); "-session" or "-realtime" when it needs those edges.
Besides: G1a (a refused append was read), G1b (a part of a transaction was read), duplicates, orders that contradict.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tests.chaos.checkers.cycles import components, path
from tests.chaos.checkers.sets import Outcome

__all__ = ["Append", "Read", "Transaction", "judge_append"]


@dataclass(frozen=True, slots=True)
class Append:
    key: int
    value: int


@dataclass(frozen=True, slots=True)
class Read:
    key: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction of a client. Times in seconds of one clock; `end` is infinite while no answer came."""

    session: int
    begin: float
    end: float
    outcome: Outcome
    steps: tuple[Append | Read, ...]

    def appends(self, key: int) -> list[int]:
        return [step.value for step in self.steps if isinstance(step, Append) and step.key == key]


class _Edge(IntEnum):
    WW = 1
    WR = 2
    RW = 4
    SESSION = 8
    REAL_TIME = 16


_DATA = _Edge.WW | _Edge.WR
Graph = dict[int, dict[int, int]]  # from -> to -> the kinds of edge between them, as bits


def judge_append(transactions: Sequence[Transaction], *, real_time: bool = True) -> list[str]:
    """Complaints about a history. `real_time=False`: for levels that do not promise it across clients."""
    history = _History(transactions)
    complaints = history.complaints
    if not complaints:  # a cycle in an order that contradicts itself would say nothing more
        _session_edges(transactions, history.graph)
        if real_time:
            _real_time_edges(transactions, history.graph)
        complaints = _cycles(transactions, history.graph)
    return complaints


class _History:
    """Who wrote what, in which order each list grew, and the edges that follow."""

    def __init__(self, transactions: Sequence[Transaction]) -> None:
        self.complaints: list[str] = []
        self.graph: Graph = defaultdict(lambda: defaultdict(int))
        self._transactions = transactions
        self._writer: dict[tuple[int, int], int] = {}
        self._reads: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for number, each in enumerate(transactions):
            for step in each.steps:
                if isinstance(step, Append):
                    assert (step.key, step.value) not in self._writer, "the test itself appended a value twice"
                    self._writer[step.key, step.value] = number
            if each.outcome is Outcome.OK:
                self._own_view(number, each)
        keys = {key for key, _ in self._writer} | set(self._reads)
        for key in sorted(keys):
            self._judge_key(key)

    def _own_view(self, number: int, transaction: Transaction) -> None:
        """Gather what it read of others, and complain when it did not see its own appends right at the end."""
        mine: dict[int, tuple[int, ...]] = defaultdict(tuple)
        first: dict[int, tuple[int, ...]] = {}
        for step in transaction.steps:
            if isinstance(step, Append):
                mine[step.key] += (step.value,)
                continue
            own = mine[step.key]
            others = step.values[: len(step.values) - len(own)]
            if step.values != others + own:
                self.complaints.append(f"internal: {number} read {step.values} of key {step.key} after appending {own}")
            elif first.setdefault(step.key, others) != others:
                self.complaints.append(f"internal: {number} read {first[step.key]} and {others} of key {step.key}")
            else:
                self._reads[step.key].append((number, others))

    def _judge_key(self, key: int) -> None:
        reads = self._reads[key]
        order = max((values for _, values in reads), key=len, default=())
        before = len(self.complaints)
        for number, values in reads:
            if values != order[: len(values)]:
                self.complaints.append(f"incompatible order: key {key} is {values} for {number}, elsewhere {order}")
            if len(set(values)) != len(values):
                self.complaints.append(f"duplicate: {number} read {values} of key {key}")
            self._judge_sources(key, number, values)
        if len(self.complaints) == before:
            self._edges(key, order)

    def _judge_sources(self, key: int, number: int, values: tuple[int, ...]) -> None:
        for value in values:
            writer = self._writer.get((key, value))
            if writer is None:
                self.complaints.append(f"from nowhere: {number} read {value} of key {key}")
            elif self._transactions[writer].outcome is Outcome.NOT_DONE:
                self.complaints.append(f"G1a: {number} read {value} of key {key}, whose transaction was refused")
            elif writer == number:
                self.complaints.append(f"internal: {number} read {value} of key {key} before appending it")
        last = self._writer.get((key, values[-1])) if values else None
        if last is not None and last != number and self._transactions[last].appends(key)[-1] != values[-1]:
            self.complaints.append(f"G1b: {number} read key {key} up to {values[-1]}, a part of transaction {last}")

    def _edges(self, key: int, order: tuple[int, ...]) -> None:
        writers = [self._writer[key, value] for value in order]
        for one, other in itertools.pairwise(writers):
            self._edge(one, other, _Edge.WW)
        seen = set(order)
        unseen = [  # lists only grow: an acknowledged append that no read shows comes after all of them, or is lost
            writer
            for (of, value), writer in self._writer.items()
            if of == key and value not in seen and self._transactions[writer].outcome is Outcome.OK
        ]
        for number, values in self._reads[key]:
            if values:
                self._edge(writers[len(values) - 1], number, _Edge.WR)
            following = writers[len(values) : len(values) + 1] or unseen
            for writer in following:
                self._edge(number, writer, _Edge.RW)

    def _edge(self, one: int, other: int, kind: _Edge) -> None:
        if one != other:
            self.graph[one][other] |= kind


def _session_edges(transactions: Sequence[Transaction], graph: Graph) -> None:
    last: dict[int, int] = {}
    for number in sorted(range(len(transactions)), key=lambda each: transactions[each].begin):
        each = transactions[number]
        if each.outcome is Outcome.OK:
            if each.session in last:
                graph[last[each.session]][number] |= _Edge.SESSION
            last[each.session] = number


def _real_time_edges(transactions: Sequence[Transaction], graph: Graph) -> None:
    """Edges enough that all others follow: each begin comes after the ends that nothing later has come after yet."""
    events = []
    for number, each in enumerate(transactions):
        if each.outcome is not Outcome.NOT_DONE:
            events.append((each.begin, 0, number))  # at one instant begins come first: only "ended before" binds
            if each.outcome is Outcome.OK:
                events.append((each.end, 1, number))
    front: set[int] = set()
    before: dict[int, frozenset[int]] = {}
    for _, ends, number in sorted(events):
        if ends:
            front -= before[number]
            front.add(number)
        else:
            before[number] = frozenset(front)
            for earlier in front:
                graph[earlier][number] |= _Edge.REAL_TIME


def _cycles(transactions: Sequence[Transaction], graph: Graph) -> list[str]:
    """The plainest name for each cycle, with the fewest kinds of edges that make it one."""
    for suffix, extra in (("", 0), ("-session", _Edge.SESSION), ("-realtime", _Edge.SESSION | _Edge.REAL_TIME)):
        for name, kinds in (("G0", _Edge.WW | extra), ("G1c", _DATA | extra)):
            if found := _name_cycles(name + suffix, transactions, graph, kinds):
                return found
        if found := _with_rw(suffix, transactions, graph, _DATA | extra):
            return found
    return []


def _name_cycles(name: str, transactions: Sequence[Transaction], graph: Graph, kinds: int) -> list[str]:
    after = _along(graph, kinds)
    said = []
    for part in components(list(graph), after):
        start = min(part)
        ways = [way for each in after(start) if (way := path(each, start, after)) is not None]
        said.append(f"{name}: {_told(transactions, graph, [start, *min(ways, key=len)])}")
    return said


def _with_rw(suffix: str, transactions: Sequence[Transaction], graph: Graph, kinds: int) -> list[str]:
    """Cycles that need anti-dependencies: one of them (G-single), or more (G2)."""
    along_all, along_data = _along(graph, kinds | _Edge.RW), _along(graph, kinds)
    said = []
    for part in components(list(graph), along_all):
        jumps = [
            (one, other) for one in sorted(part) for other in sorted(graph[one])
            if other in part and graph[one][other] & _Edge.RW
        ]  # fmt: skip
        single = next(((one, way) for one, other in jumps if (way := path(other, one, along_data)) is not None), None)
        if single is not None:
            said.append(f"G-single{suffix}: {_told(transactions, graph, [single[0], *single[1]])}")
            continue
        one, other = jumps[0]
        way = path(other, one, along_all)
        assert way is not None
        said.append(f"G2{suffix}: {_told(transactions, graph, [one, *way])}")
    return said


def _along(graph: Graph, kinds: int) -> Callable[[int], Iterable[int]]:
    return lambda node: [to for to, edge in graph[node].items() if edge & kinds] if node in graph else []


def _told(transactions: Sequence[Transaction], graph: Graph, cycle: Sequence[int]) -> str:
    words = [
        "+".join(kind.name.lower() for kind in _Edge if graph[one][other] & kind) + f"-> {other}"
        for one, other in itertools.pairwise(cycle)
    ]
    return f"{cycle[0]} " + " ".join(words) + "; " + "; ".join(f"{each}={transactions[each]}" for each in cycle[:-1])
