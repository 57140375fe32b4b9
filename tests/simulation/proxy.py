"""A simulated proxy: sends writes to the newest leader it knows, and asks what became of those in doubt (R19)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from walship.coordination.record import LeaderRecord, Phase, Seen, decode

if TYPE_CHECKING:
    from .cluster import Cluster

REPLY_SECONDS = 0.4
AGAIN_SECONDS = 0.03


class Proxy:
    def __init__(self, cluster: Cluster, name: str, slots: int, first_write: int, pause_seconds: float) -> None:
        self.cluster, self.world, self.name = cluster, cluster.world, name
        self.pause_seconds = pause_seconds
        self.term, self.leader = 0, ""
        self.sent_term = 0
        self.writing = True
        self.token = first_write * 1000
        self.open = 0
        self.done = 0
        self.longest_seconds = 0.0
        for slot in range(slots):
            self.world.at(0.01, self.write, first_write + slot * 100_000)

    def learn(self, record: LeaderRecord) -> None:
        """The highest term wins, never a lower one (3.9)."""
        if record.phase is Phase.SERVING and record.term > self.term:
            self.term, self.leader = record.term, record.name

    def on_record(self, key: str, value: bytes) -> None:
        self.learn(decode(LeaderRecord, key, value))

    def write(self, number: int) -> None:
        if self.writing:
            self.open += 1
            self.attempt(number, self.world.now)

    def end(self, number: int, began: float) -> None:
        self.open -= 1
        self.done += 1
        self.longest_seconds = max(self.longest_seconds, self.world.now - began)
        self.world.at(self.world.random.uniform(0.5, 1.5) * self.pause_seconds, self.write, number + 1)

    def attempt(self, number: int, began: float) -> None:
        """Bound to the term that it is sent in (docs/model.md, TERMBIND)."""
        term = self.term
        if not term:
            self.world.at(AGAIN_SECONDS, self.attempt, number, began)
            return
        self.token += 1
        self.talk("on_write", term, number, self.token, began)

    def ask(self, number: int, token: int, began: float) -> None:
        self.talk("on_ask", self.term, number, token, began)

    def talk(self, method: str, term: int, number: int, token: int, began: float) -> None:
        if term < self.sent_term:
            self.cluster.judge.fail(f"I18: {self.name} sends to a leader of term {term} after {self.sent_term}")
        self.sent_term = term
        target, ended = self.leader, False

        def end(outcome: str, value: Any) -> None:
            nonlocal ended
            if outcome == "moved" and isinstance(value, LeaderRecord):
                self.learn(value)
            if ended:
                return
            ended = True
            if outcome == "ok":
                self.end(number, began)
            elif outcome == "silence":
                self.ask(number, token, began)
            else:  # surely not done: never admitted, or the token is burned
                self.world.at(AGAIN_SECONDS, self.attempt, number, began)

        def reply(outcome: str, value: Any) -> None:
            self.world.send(target, self.name, end, outcome, value)

        machine = self.cluster.by_name[target]
        # What an attempt was refused is no answer to a question: an earlier attempt may still be under way.
        answer = reply if method == "on_write" else (lambda o, v: reply(o, v) if o in ("ok", "not done") else None)
        self.world.send(self.name, target, machine.receive, method, self.name, term, number, token, answer)
        self.world.at(REPLY_SECONDS, end, "silence", None)

    def was_read(self, result: Any) -> None:
        if isinstance(result, Seen):
            self.learn(result.record)
