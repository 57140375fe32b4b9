"""Clients whose histories are judged: registers, lists, and a bank, each in a closed loop on one event loop.

Registers and lists are read at `linearizable`, which promises real time through any proxy; the bank at `any`, where
only whole transactions are promised. Writes of the bank and the lists are transactions of several statements.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

from tests.chaos.checkers.append import Append, Read, Transaction, judge_append
from tests.chaos.checkers.bank import judge_bank
from tests.chaos.checkers.register import RegisterOperation, judge_by_search, judge_positions
from tests.chaos.checkers.sets import Outcome
from tests.chaos.client import Pool, Reply, batch, execute, rows
from tests.cluster.linearizable import Operation, violation

__all__ = ["Histories", "tables"]

ACCOUNTS, EACH = 5, 100
KEYS = 3
APPENDS_OF_A_LIST = 60  # then the next list: reads stay short, and every list is judged whole
PAUSE_SECONDS = 0.02  # of a client between its operations
SEARCHED = 1500  # operations of one register that the search judges too
JOIN_SECONDS = 60.0

_READ_LISTS = "SELECT k, v FROM l WHERE k IN (?, ?) ORDER BY rowid"
_READ_LIST = "SELECT v FROM l WHERE k = ? ORDER BY rowid"


def tables() -> list[str]:
    """What must be there before the clients begin."""
    return [
        "CREATE TABLE l (k INTEGER, v INTEGER)",
        "CREATE INDEX l_k ON l (k)",
        "CREATE TABLE r (k INTEGER PRIMARY KEY, v INTEGER)",
        "INSERT INTO r VALUES " + ", ".join(f"({key}, 0)" for key in range(KEYS)),
        "CREATE TABLE b (id INTEGER PRIMARY KEY, balance INTEGER)",
        "INSERT INTO b VALUES " + ", ".join(f"({account}, {EACH})" for account in range(ACCOUNTS)),
    ]


class Histories:
    """`clients` of each kind, spread over the proxies. Use as a context; then `judge`."""

    def __init__(self, urls: Sequence[str], *, clients: int = 3, seed: int = 0) -> None:
        self.registers: dict[int, list[RegisterOperation]] = {key: [] for key in range(KEYS)}
        self.transactions: list[Transaction] = []
        self.bank: list[dict[int, int]] = []
        self.errors: Counter[str] = Counter()
        self._urls, self._clients, self._seed = urls, clients, seed
        self._value = 0
        self._problem: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="histories")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "the clients did not end"
        if self._problem is not None:
            raise self._problem

    def judge(self) -> list[str]:
        """What all checkers complain about. After the context ended."""
        complaints = judge_append(self.transactions)
        complaints += judge_bank(self.bank, frozenset(range(ACCOUNTS)), ACCOUNTS * EACH)
        complaints += judge_positions([each for operations in self.registers.values() for each in operations])
        for key, operations in self.registers.items():
            plain = [Operation(each.writes, each.value, each.begin, each.end) for each in operations]
            if why := violation(plain, 0):
                complaints.append(f"register {key}: {why}")
            first = sorted(operations, key=lambda each: each.begin)[:SEARCHED]
            if not judge_by_search(first, 0):
                complaints.append(f"register {key}: no order explains its first {len(first)} operations")
        return complaints

    def counts(self) -> dict[str, int]:
        registers = sum(map(len, self.registers.values()))
        return {"lists": len(self.transactions), "registers": registers, "bank reads": len(self.bank)}

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._problem = error
            raise

    async def _run(self) -> None:
        pools = [Pool(url) for url in self._urls]
        kinds: list[Callable[[Pool, random.Random, int], Coroutine[Any, Any, Reply]]]
        kinds = [self._register, self._list, self._transfer]
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(kinds) * self._clients):
                    kind, pool = kinds[number % len(kinds)], pools[number % len(pools)]
                    group.create_task(self._loop(kind, pool, random.Random(self._seed * 100 + number), number))
        finally:
            for pool in pools:
                await pool.close()

    async def _loop(
        self, kind: Callable[[Pool, random.Random, int], Coroutine[Any, Any, Reply]],
        pool: Pool, chance: random.Random, session: int,
    ) -> None:  # fmt: skip
        while not self._stopping.is_set():
            reply = await kind(pool, chance, session)
            if reply.code:
                self.errors[reply.code] += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def _register(self, pool: Pool, chance: random.Random, session: int) -> Reply:
        del session
        key, begin = chance.randrange(KEYS), time.monotonic()
        if chance.random() < 0.5:
            value = self._next_value()
            reply = await pool.ask(execute("UPDATE r SET v = ? WHERE k = ?", value, key))
            end = time.monotonic() if reply.outcome is Outcome.OK else math.inf
            if reply.outcome is not Outcome.NOT_DONE:
                position = reply.position if reply.outcome is Outcome.OK else None
                self.registers[key].append(RegisterOperation(True, value, begin, end, position))
        else:
            reply = await pool.ask(execute("SELECT v FROM r WHERE k = ?", key), level="linearizable")
            if reply.outcome is Outcome.OK:
                found = RegisterOperation(False, reply.rows[0][0], begin, time.monotonic(), reply.position)
                self.registers[key].append(found)
        return reply

    async def _list(self, pool: Pool, chance: random.Random, session: int) -> Reply:
        round_of_keys = 2 * (len(self.transactions) // (2 * APPENDS_OF_A_LIST))
        keys = [round_of_keys, round_of_keys + 1]
        begin = time.monotonic()
        if chance.random() < 0.5:
            reply = await pool.ask(execute(_READ_LISTS, *keys), level="linearizable")
            if reply.outcome is Outcome.OK:
                seen = [Read(key, tuple(value for at, value in reply.rows if at == key)) for key in keys]
                self._ended(session, begin, reply, seen)
            return reply
        wanted = [
            Append(chance.choice(keys), self._next_value()) if chance.random() < 0.6 else Read(chance.choice(keys), ())
            for _ in range(chance.randrange(1, 4))
        ]
        statements = [
            ("INSERT INTO l (k, v) VALUES (?, ?)", (each.key, each.value)) if isinstance(each, Append)
            else (_READ_LIST, (each.key,)) for each in wanted
        ]  # fmt: skip
        reply = await pool.ask(batch(*statements))
        if reply.outcome is Outcome.OK and not reply.code:
            got = reply.results[1 : 1 + len(wanted)]  # after BEGIN
            done: list[Append | Read] = [
                Read(step.key, tuple(value for (value,) in rows(result))) if isinstance(step, Read) else step
                for step, result in zip(wanted, got, strict=True)
            ]
        else:
            done = [step for step in wanted if isinstance(step, Append)]
        self._ended(session, begin, reply, done)
        return reply

    def _ended(self, session: int, begin: float, reply: Reply, steps: Sequence[Append | Read]) -> None:
        end = math.inf if reply.outcome is Outcome.UNKNOWN else time.monotonic()
        self.transactions.append(Transaction(session, begin, end, reply.outcome, tuple(steps)))

    async def _transfer(self, pool: Pool, chance: random.Random, session: int) -> Reply:
        del session
        if chance.random() < 0.5:
            reply = await pool.ask(execute("SELECT id, balance FROM b"), level="any")
            if reply.outcome is Outcome.OK:
                self.bank.append(dict(reply.rows))
            return reply
        one, other = chance.sample(range(ACCOUNTS), 2)
        amount = chance.randrange(1, EACH)
        take = ("UPDATE b SET balance = balance - ? WHERE id = ? AND balance >= ?", (amount, one, amount))
        give = ("UPDATE b SET balance = balance + ? WHERE id = ? AND changes() = 1", (amount, other))
        return await pool.ask(batch(take, give))

    def _next_value(self) -> int:
        self._value += 1
        return self._value
