"""A stream with a connection of its own: interactive transactions, PRAGMA settings, TEMP objects (R21).

The connection runs the client's own BEGIN: SQLite's deferred BEGIN takes nothing, the first read takes a snapshot,
and before the first statement that writes (SQLite says which) the stream waits its turn at the writer. So a state is
not stored but read off, from SQLite and from the turn held; the table says what may follow what:

    AUTOCOMMIT  no transaction
    DEFERRED    BEGIN was said; nothing is held
    READING     a snapshot is held; at the first write the turn is taken, and SQLite answers SQLITE_BUSY
                (BUSY_SNAPSHOT) if somebody wrote meanwhile
    WRITING     the turn and SQLite's WRITE lock are held
    READONLY    BEGIN READONLY: on any node; never takes a turn

At the end of each request a turn is kept only by a transaction that holds SQLite's WRITE lock. Giving it back
(`Turn.release`) makes what was committed durable and waits for its acknowledgment, and the reply waits for that.

A turn that expires rolls the transaction back; the next call learns it as TransactionTimeout. Nothing else ends a
statement that writes: a client that goes away is noticed between two statements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import apsw

from walship.errors import NotLeader, NotReadOnly, OutcomeUnknown, TransactionTimeout, WalshipError
from walship.formats.position import Position
from walship.hrana.types import Batch, StreamRequest
from walship.service.bound import attempt_of, fill, writer_of
from walship.service.connections import Connections, Lane
from walship.service.executor import Counters, Lines, Need, Program
from walship.service.request import Call, Host

if TYPE_CHECKING:
    from walship.engine.attempts import Attempt, Attempts
    from walship.engine.turn import Turn

__all__ = ["FOLLOWS", "Session", "State", "named"]

T = TypeVar("T")


class State(StrEnum):
    """Where a stream stands between two requests."""

    AUTOCOMMIT = "autocommit"
    DEFERRED = "deferred"
    READING = "reading"
    WRITING = "writing"
    READONLY = "readonly"


FOLLOWS: Final[dict[State, frozenset[State]]] = {
    # A request may be a whole batch, so any state can be reached from autocommit, and autocommit from any.
    State.AUTOCOMMIT: frozenset(State),
    State.DEFERRED: frozenset(State) - {State.READONLY},
    State.READING: frozenset(State) - {State.READONLY},
    State.WRITING: frozenset(State) - {State.READONLY},
    State.READONLY: frozenset((State.READONLY, State.AUTOCOMMIT)),
}
"""`FOLLOWS[state]`: the states that one request can lead to. Anything else is a fault of ours."""


@dataclass(eq=False, slots=True)
class Session:
    """One stream. Without a lane it is only a record: stored texts and counters.

    Not safe for two calls at once: the service holds `lock` around each.
    """

    id: int
    host: Host
    connections: Connections
    used_at: float
    spawn: Callable[[Coroutine[None, None, None]], None]
    texts: dict[int, str] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    settings: dict[str, str] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lane: Lane | None = None
    turn: Turn | None = None
    state: State = State.AUTOCOMMIT
    dirty: bool = False
    closed: bool = False
    expired: bool = False
    calls: int = 0
    ack: int | None = None  # acknowledgments the present call asks for; None: the cluster's rule
    term: int = 0  # that the present call is bound to
    attempt: Attempt | None = None  # of the present call
    final: bool = False  # nothing of the present call can commit after the request that runs now
    _lines: Lines | None = None
    _running: bool = False
    _commits: int = 0  # of the lane, when the turn was taken
    _read_only: bool = False

    @property
    def pinned(self) -> bool:
        """Does the stream own anything that must be on this node?"""
        return self.lane is not None

    @property
    def has_state(self) -> bool:
        """Would its client lose something with it, or has it, and must be told?"""
        return self.pinned or self.expired or bool(self.settings)

    @property
    def needs_snapshot(self) -> bool:
        """Will the next read take a new snapshot? Then the call's floor can be asked for."""
        return self.state in (State.AUTOCOMMIT, State.DEFERRED)

    async def own(self, *, writer: bool) -> None:
        """Give the stream a connection, unless it has one. Raises Overloaded."""
        if self.lane is None:
            lane = await self.connections.take(writer=writer)
            try:
                if self.settings:
                    await self.connections.run(lane, lambda: _repeat(lane, tuple(self.settings.values())))
            except BaseException:
                self.connections.give_back(lane, clean=False)
                raise
            lane.executor.start(self.counters)
            lane.executor.settings = self.settings
            self.lane = lane

    def begin_call(self, *, read_only: bool) -> None:
        """A call starts: a fresh response budget. Raises TransactionTimeout when the turn was lost since the last."""
        if self.expired:
            raise TransactionTimeout(
                "this transaction held the write turn too long while others waited, and was rolled back. "
                "Nothing of it was kept. Begin again on a new stream."
            )
        if read_only and self.state is State.WRITING:
            raise NotReadOnly("this transaction writes, and the call allows only reads. Nothing was done with it.")
        self._read_only = read_only
        self._name_turn()
        if self.lane is not None:
            self.lane.executor.start(self.counters)

    async def perform(self, request: StreamRequest) -> bytes:
        """Run one request and return its StreamResult. Afterwards the turn is given back unless it must be kept."""
        program = self._lane.executor.perform(request)
        answer = await self._drive(lambda: _advance(program))
        assert answer is not None
        return answer

    def lines(self, batch: Batch) -> Lines:
        """The cursor entries of a batch, to be pulled with `chunk`."""
        self._lines = self._lane.executor.lines(batch)
        return self._lines

    async def chunk(self, lines: Lines) -> bytes | None:
        """The next chunk of a cursor on this stream, or None at its end."""
        return await self._drive(lambda: next(lines, None))

    async def stop_lines(self) -> None:
        """Give up a cursor between two rows; the stream and its transaction go on."""
        lines, self._lines = self._lines, None
        if lines is not None:
            await self.connections.run(self._lane, lines.close)

    async def settle(self) -> Position | None:
        """After a request: read off the state; give the turn back unless a transaction needs it.

        Returns the position of what was committed, once acknowledged; None when no turn ended.
        """
        lane = self._lane
        state = _observe(lane, holds_turn=self.turn is not None)
        if state not in FOLLOWS[self.state]:
            raise AssertionError(f"stream {self.id} went from {self.state} to {state}")
        self.state = state
        if self.turn is None or (state is State.WRITING and lane.commits == self._commits):
            return None
        if state is State.WRITING:  # COMMIT, and the next transaction in the same request
            self._commits = lane.commits
            self._note_commit(lane)
            return await self.turn.acknowledge(ack=self.ack)
        return await self._release()

    def check_open(self) -> None:
        """Before the answer to a call, which may have waited. Raises TransactionTimeout when the transaction that it
        leaves open was lost meanwhile: as an answer it would seem to be in autocommit."""
        if self.expired:
            raise TransactionTimeout(
                "this transaction lost the write turn while its answer waited, and was rolled back. "
                "Nothing of it was kept. Begin again on a new stream."
            )

    async def close(self) -> None:
        """Roll back what is open and let everything go. Idempotent."""
        self.closed = True
        await self.abandon()

    async def abandon(self) -> None:
        """Roll back, give back the turn and the connection; the record stays. The turn is given back in any case."""
        lane, self.lane = self.lane, None
        lines, self._lines = self._lines, None
        stop = None if lines is None else lines.close
        try:
            if lane is not None and self.turn is not None:
                try:
                    await self.connections.run(lane, lambda: _roll_back(lane, stop))
                finally:
                    await self._release()
        finally:
            self.state = State.AUTOCOMMIT
            if lane is not None:
                lane.executor.may_write = False
                self.connections.give_back(lane, clean=not (self.dirty or self.settings), first=stop)
            self.dirty = False

    # --- running ------------------------------------------------------------------------------------------------

    @property
    def _lane(self) -> Lane:
        assert self.lane is not None
        return self.lane

    async def _drive(self, advance: Callable[[], Need | bytes | None]) -> bytes | None:
        """Advance a program in the pool until it gives something else than a need; meet its needs in between."""
        lane = self._lane
        while True:
            self._running = True
            if self.turn is not None:
                self.turn.begin_statement()
            try:
                outcome = await self.connections.run(lane, advance)
            finally:
                self._running = False
                if self.turn is not None:
                    self.turn.end_statement()
            self._raise_if_expired(lane)
            if not isinstance(outcome, Need):
                return outcome
            await self._take_turn(lane)

    def _raise_if_expired(self, lane: Lane) -> None:
        if not self.expired:
            return
        if lane.commits == self._commits:
            raise TransactionTimeout(
                "this transaction held the write turn longer than allowed and was rolled back. "
                "Nothing of it was kept. Begin again on a new stream, with smaller transactions."
            )
        # Its COMMIT came first, in the same request as what took so long.
        if not lane.connection.get_autocommit():
            raise OutcomeUnknown(
                "this request committed a transaction, and began another that held the write turn longer than allowed "
                "and was rolled back. Look at what was kept before sending it again."
            )
        self.expired = False

    async def _take_turn(self, lane: Lane) -> None:
        if self._read_only:
            raise NotReadOnly("a statement writes, and the call allows only reads. Nothing was changed by it.")
        writer = writer_of(self.host, self.term)
        if not lane.writer:
            raise NotLeader(*self.host.leader)
        turn = await writer.turn()
        if turn.expired:  # this node stopped leading before the turn could be used
            turn.withdraw()
            raise TransactionTimeout(
                "the write turn was called in before it was used. Nothing was changed; begin again."
            )

        def on_expire() -> None:
            if self.turn is turn:
                self._on_expire()

        turn.on_expire = on_expire
        self.turn = turn
        self._name_turn()
        lane.revoked, self._commits = False, lane.commits
        lane.executor.may_write = True

    def end_call(self) -> None:
        """The call is over; what is still open, another may commit."""
        self.attempt, self.term = None, 0
        self._name_turn()

    def _name_turn(self) -> None:
        if self.turn is not None:
            self.turn.attempt = self.attempt
        if self.lane is not None:
            self.lane.frame = 0

    async def _release(self) -> Position | None:
        turn, self.turn = self.turn, None
        if self.lane is not None:
            self.lane.executor.may_write = False
            self._note_commit(self.lane)
        return None if turn is None else await turn.release(ack=self.ack)

    def _note_commit(self, lane: Lane) -> None:
        """What the present attempt has committed, before it is logged."""
        if self.attempt is not None and lane.frame:
            fill(self.attempt, lane.executor)
            self.attempt.frame, self.attempt.ended = lane.frame, self.final

    def _on_expire(self) -> None:
        """The writer takes the turn back (on the loop). A statement that runs is stopped, and its call ends the rest;
        an idle transaction is rolled back at once, since others wait."""
        self.expired = True
        if self._running and self.lane is not None:
            self.lane.revoked = True
            self.lane.connection.interrupt()
        elif not self._running:
            self.spawn(self.abandon())


def _advance(program: Program) -> Need | bytes:
    try:
        return next(program)
    except StopIteration as end:
        answer: bytes = end.value
        return answer


def _repeat(lane: Lane, settings: tuple[str, ...]) -> None:
    for sql in settings:
        lane.connection.execute(sql)


def _observe(lane: Lane, *, holds_turn: bool) -> State:
    connection = lane.connection
    if connection.get_autocommit():
        return State.AUTOCOMMIT
    if lane.executor.readonly_transaction:
        return State.READONLY
    held = connection.txn_state()
    if held == apsw.SQLITE_TXN_WRITE:
        if not holds_turn:
            raise AssertionError("a transaction holds SQLite's write lock without the write turn")
        return State.WRITING
    return State.READING if held == apsw.SQLITE_TXN_READ else State.DEFERRED


def _roll_back(lane: Lane, stop: Callable[[], None] | None) -> None:
    """End the transaction; a connection that cannot even do that is closed, which ends it too."""
    if stop is not None:
        stop()
    try:
        if not lane.connection.get_autocommit():
            lane.connection.execute("ROLLBACK")
    except apsw.Error:
        lane.connection.close(True)


async def named(host: Host, session: Session, call: Call, work: Coroutine[None, None, T]) -> T:
    """Run `work`, a call on `session`, under the call's token and bound to its term.

    Raises what it raises, and before it runs what `writer_of` and `Attempts.begin` do.
    """
    attempt = attempt_of(call)
    attempts = None
    try:
        if call.term or attempt is not None:
            attempts = writer_of(host, call.term).attempts
        if attempts is not None and attempt is not None:
            attempts.begin(attempt)
    except BaseException:
        work.close()
        raise
    session.attempt, session.term, session.final = attempt, call.term, False
    try:
        answer = await work
    except WalshipError:
        _end_attempt(attempts, attempt)
        raise
    finally:
        session.end_call()
    # Any other error leaves it running for ever: nobody knows whether a COMMIT is still under way.
    _end_attempt(attempts, attempt)
    return answer


def _end_attempt(attempts: Attempts | None, attempt: Attempt | None) -> None:
    if attempts is not None and attempt is not None:
        attempt.ended = True
        attempts.end(attempt)
