"""What becomes of the attempts that carry a commit token, on the leader that runs them (R19, tests/model/m5.pml).

An attempt is bound to the term it was sent in, and this object lives for one term; so a token that is burned here need
be known nowhere else. On the event loop an attempt is *running* from before it can commit until after its frame is in
the log, and with it its token: so `outcome`, which is asked on the loop too, finds no moment in between.

In the writer thread `Pending` collects the tokens for the next frame. A frame that must be logged while an attempt is
still running carries its token as a *part*: if nothing ever follows, nobody says `not done`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from walship.engine.tokens import Found, Name, Tokens
from walship.errors import NotDone, OutcomeUnknown
from walship.formats.frame import MAX_FRAME_TOKENS, CommitToken
from walship.formats.link_words import Outcome
from walship.formats.position import Position

__all__ = ["Attempt", "Attempts", "Pending"]


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt: filled in by whoever runs it, in the thread that does.

    frame: where in the -wal its last commit ends; 0 while it has committed nothing.
    ended: nothing more of it will be committed.
    `changes`, `last_insert_rowid` (None: no INSERT) and `had_rows` are of its last statement.
    """

    name: Name
    frame: int = 0
    ended: bool = False
    changes: int = 0
    last_insert_rowid: int | None = None
    had_rows: bool = False

    def token(self, txid: int) -> CommitToken:
        return CommitToken(*self.name, txid, self.changes, self.last_insert_rowid, self.had_rows, part=not self.ended)


class Pending:
    """Attempts that have committed and whose tokens are not in the log as they are now. Writer thread.

    present: the attempt of another thread that may be committing now, if there is one.
    """

    def __init__(self) -> None:
        self.present: Callable[[], Attempt | None] = lambda: None
        self._attempts: list[Attempt] = []

    def add(self, attempt: Attempt) -> None:
        """It has committed. Idempotent until the next frame."""
        if not self._attempts or self._attempts[-1] is not attempt:
            self._attempts.append(attempt)

    def take(self, txid_at: Callable[[int], int], last_txid: int) -> tuple[CommitToken, ...]:
        """The tokens for the frame that holds everything captured just now.

        txid_at: the TXID of the commit that ends at a frame of the -wal. Ask after capturing: whoever commits has made
        itself `present` before, so a commit that was captured is never without a token.
        """
        taken, self._attempts = self._attempts[:MAX_FRAME_TOKENS], self._attempts[MAX_FRAME_TOKENS:]
        tokens = [attempt.token(txid_at(attempt.frame)) for attempt in taken]
        present = self.present()
        # It may have ended this moment, after its commit was captured and before it came to `add`.
        if present is not None and present not in taken and (present.frame or not present.ended):
            tokens.append(present.token(last_txid))
        return tuple(tokens)


class Attempts:
    """The attempts of one term. Event loop.

    acked: the position acknowledged by the cluster's rule and by so many, None: by the rule alone.
    running: those that may still commit, or whose token is not in the log yet.
    """

    def __init__(self, term: int, tokens: Tokens, acked: Callable[[int | None], Position]) -> None:
        self.term = term
        self.running: set[Name] = set()
        self.changed = asyncio.Event()
        self._tokens = tokens
        self._acked = acked
        self._burned: set[Name] = set()

    def begin(self, attempt: Attempt) -> None:
        """It may run. Raises NotDone when it was answered `not done`, OutcomeUnknown when it ran already."""
        name = attempt.name
        if name in self._burned:
            raise NotDone("this attempt was answered `not done` before it arrived. It was not run and changed nothing.")
        if name in self.running or self._tokens.lookup(name) is not None:
            raise OutcomeUnknown("this very attempt was run already, and not again. Ask for its outcome.")
        self.running.add(name)

    def end(self, attempt: Attempt | None) -> None:
        """It will commit nothing more, and what it committed is in the log."""
        if attempt is None:
            return
        self.running.discard(attempt.name)
        if attempt.ended and attempt.frame:
            self._tokens.complete(attempt.token(0))
        self.changed.set()

    def outcome(self, name: Name, sent_after: Position, ack: int | None = None) -> tuple[Outcome, Found | None]:
        """What became of an attempt. `sent_after`: its term, and a txid of that term's leader known when it was sent.
        `ack`: how many acknowledgments it asked for; before them it is not done (None: the cluster's rule).

        Only while this term serves: its start is acknowledged. NOT_DONE is for ever.
        """
        if name in self.running:
            return Outcome.RUNNING, None
        found = self._tokens.lookup(name)
        if found is not None:
            if found.token.part:
                return Outcome.UNKNOWN, None
            acked = self._acked(ack).order() >= found.position.order()
            return (Outcome.DONE, found) if acked else (Outcome.RUNNING, None)
        if not self._tokens.covers(sent_after):
            return Outcome.UNKNOWN, None
        if sent_after.term == self.term:  # nobody of another term would run it
            self._burned.add(name)
        return Outcome.NOT_DONE, None
