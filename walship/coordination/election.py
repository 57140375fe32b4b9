"""One node's part in elections, pure: events in, actions out (failover.md 3.3, 3.4; design.md R2, R12a).

    FOLLOWING   watches the record; says in `why` why it does not claim
    CHECKING    the lease ran out: did another voter hear the leader? does the store still say the same?
    CLAIMING    the compare-and-swap to the next term is under way
    SEALING     the term is ours by the record: promise it, have voters promise it, and learn what they hold
    HANDING     a voter holds more: the claim goes to it; no candidate any more, whatever comes of that
    PROMOTING   our tip is the best of a quorum: the term-start frame is being written
    ANNOUNCING  the compare-and-swap to `serving` is under way
    SERVING     leads by the record; whether it may say "ok" is the lease's question

What makes it safe: a term is won by compare-and-swap, once. Every acknowledged commit is on a leader and n voters, and
|V| - n voters promise the new term before we promote, so one of them holds it and nobody acknowledges more; we promote
only if nobody in that quorum holds more than we. No step trusts a clock: a claim that comes too early costs a failover.

A record that names this process in a term it has not been candidate in is taken up, however that came about: another
handed its claim over, a leader handed over to us, or a claim of ours landed after its outcome was unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from walship.coordination.ballot import (
    LOST,
    Action,
    Announce,
    Candidate,
    Check,
    Checked,
    Claim,
    Eligible,
    Event,
    HandOver,
    Heard,
    HolderDied,
    Promise,
    Promised,
    Promote,
    Promoted,
    PromotionFailed,
    Read,
    RecordSeen,
    Release,
    Seal,
    SealAnswer,
    SealAnswered,
    Sealed,
    SealRefused,
    Serve,
    Stand,
    StepDown,
    Swap,
    SwapDone,
    Tick,
    Won,
)
from walship.coordination.grounds import Grounds, Urge, who
from walship.coordination.record import LeaderRecord, Phase, Seen, TermStart
from walship.formats.position import Position, Tip

__all__ = ["TRANSITIONS", "Election", "State"]

SEAL_AGAIN_SECONDS: Final = 0.1
ALL_ANSWERS_SECONDS: Final = 0.2  # n = 0: how long to wait for every voter
CHECK_SECONDS: Final = 0.2


class State(StrEnum):
    FOLLOWING = "following"
    CHECKING = "checking"
    CLAIMING = "claiming"
    SEALING = "sealing"
    HANDING = "handing over"
    PROMOTING = "promoting"
    ANNOUNCING = "announcing"
    SERVING = "serving"


_F = State.FOLLOWING
TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.FOLLOWING: frozenset({State.CHECKING, State.CLAIMING, State.SEALING}),
    State.CHECKING: frozenset({_F, State.CLAIMING}),
    State.CLAIMING: frozenset({_F, State.SEALING}),
    State.SEALING: frozenset({_F, State.HANDING, State.PROMOTING}),
    State.HANDING: frozenset({_F}),
    State.PROMOTING: frozenset({_F, State.ANNOUNCING}),
    State.ANNOUNCING: frozenset({_F, State.SERVING}),
    State.SERVING: frozenset({_F}),
}
_OPENED: Final = frozenset({State.PROMOTING, State.ANNOUNCING, State.SERVING})  # leaving them is a StepDown


class Election:
    """Hand in every event, carry out the actions in order, send `Tick` at `wake_at`.

    voters: their names; acks: the cluster's n. Both may be set at any time (membership changes, failover.md 3.5).
    lease_seconds: T of this node's own claims. uniform: a source of random numbers between two bounds.
    promised: the highest term that this node has durably promised. Founding (no record at all) is not its business.
    """

    def __init__(
        self,
        me: Candidate,
        voters: tuple[str, ...],
        acks: int,
        lease_seconds: float,
        uniform: Callable[[float, float], float],
        *,
        promised: int = 0,
    ) -> None:
        self.me = me
        self.voters = voters
        self.acks = acks
        self.lease_seconds = lease_seconds
        self.state = State.FOLLOWING
        self.term = 0  # of the candidacy or leadership; 0 while following or checking
        self.seen: Seen[LeaderRecord] | None = None
        self.wake_at: float | None = None
        self.why = "no leader record was seen yet"  # one sentence on now: why there is no election, or how it stands
        self.last = ""  # how the last candidacy or leadership of this process ended; empty before the first
        self._promised = promised
        self._spent = 0  # highest term this process has been candidate in; never again in one up to it
        self._tip: Tip | None = None
        self._grounds = Grounds(me, uniform)
        self._heard = (0, float("-inf"))  # term, when
        self._blind_version: int | None = None  # no claim before the store showed a later version
        self._blind = False  # no claim before the store answered
        self._read_at: float | None = None  # the store is to be read again then
        self._began = 0.0  # of the check, or of the candidacy
        self._cause = ""
        self._unchecked: set[str] = set()
        self._fresh = False
        self._claimed_from: Seen[LeaderRecord] | None = None
        self._claim: Seen[LeaderRecord] | None = None
        self._own: SealAnswer | None = None
        self._answers: dict[str, SealAnswer] = {}
        self._seal_at = 0.0
        self._start: TermStart | None = None
        self._doubt: bool = False  # the announcement has ended without success
        self._announce_lost = False

    # --- what the node asks -----------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Action]:
        """What to do now, in order."""
        actions = _HANDLERS[type(event)](self, event)
        actions += self._advance(event.now)
        self.wake_at = self._next_wake(event.now)
        return actions

    def began_alone(self, seen: Seen[LeaderRecord]) -> None:
        """This process serves by a claim that needed no election: the first term of a cluster, or the term after one
        that this node led when its former process ended, so that nobody else can hold anything it lacks."""
        self.state, self.seen, self._claim = State.SERVING, seen, seen
        self.term = self._spent = self._promised = seen.record.term
        self.why = f"{self.me.name} serves term {self.term}: it founded the cluster, or led it before it started"

    def heard(self, now: float, term: int) -> bool:
        """The answer to another's `Check`: did this node hear a leader of `term` or later within half a lease?"""
        heard_term, at = self._heard
        return heard_term >= term and now - at <= self.lease_seconds / 2

    @property
    def leads(self) -> int:
        """The term that this node serves by the record; 0 for none. The lease has the last word."""
        return self.term if self.state is State.SERVING else 0

    # --- events -----------------------------------------------------------------------------------------------

    def _on_tick(self, event: Tick) -> list[Action]:
        return []

    def _on_record(self, event: RecordSeen) -> list[Action]:
        return self._see(event.now, event.seen)

    def _on_died(self, event: HolderDied) -> list[Action]:
        self._grounds.died(event.nonce)
        return []

    def _on_heard(self, event: Heard) -> list[Action]:
        if event.term >= self._heard[0]:
            self._heard = (event.term, event.now)
        return []

    def _on_stand(self, event: Stand) -> list[Action]:
        self._grounds.asked(event.now, self.lease_seconds)
        return []

    def _on_eligible(self, event: Eligible) -> list[Action]:
        self._tip = event.tip
        self._grounds.behind = event.behind
        return []

    def _on_sealed(self, event: Sealed) -> list[Action]:
        self._promised = max(self._promised, event.term)
        if self.seen is not None and self.seen.record.term < event.term:
            self._read_at = event.now  # it must be in the store already
        handed = self.state is State.HANDING and event.term == self.term  # by whom we handed it to
        if self.term == 0 or event.term < self.term or handed:
            return []
        return self._leave(event.now, f"this node promised term {event.term} to another candidate")

    def _on_checked(self, event: Checked) -> list[Action]:
        if self.state is not State.CHECKING or event.name not in self._unchecked:
            return []
        self._unchecked.discard(event.name)
        if event.heard:
            self._postpone(event.now, f"{event.name} still hears the leader")
        return []

    def _on_swap(self, event: SwapDone) -> list[Action]:
        expected = {Swap.CLAIM: State.CLAIMING, Swap.HAND: State.HANDING, Swap.ANNOUNCE: State.ANNOUNCING}[event.kind]
        won = event.outcome if isinstance(event.outcome, Won) else None
        if self.state is not expected:
            return self._see(event.now, won.seen) if won else []
        if won is None:
            return self._swap_failed(event.now, lost=event.outcome is LOST)
        if event.kind is not Swap.CLAIM:
            return self._see(event.now, won.seen)
        if not self._note(event.now, won.seen) or self.term < self._promised:
            return self._leave(event.now, "it was overtaken before this node knew that it had it")
        return self._take_up(event.now, won.seen)

    def _on_promised(self, event: Promised) -> list[Action]:
        self._promised = max(self._promised, event.term)
        if self.state is not State.SEALING or event.term != self.term or self._claim is None:
            return []
        if event.tip is None:
            return self._give_up(event.now, "this node has no whole database to lead with")
        me, record = self.me, self._claim.record
        if record.phase is Phase.HANDOFF and _at_start(event.tip, record.start):
            return self._promote(f"{self._cause}; the leader before ended at {event.tip.position}, as this node does")
        self._own = SealAnswer(me.name, me.node_id, me.url, me.nonce, event.tip, event.lag_txids)
        return []

    def _on_answer(self, event: SealAnswered) -> list[Action]:
        if self.state is not State.SEALING or event.term != self.term:
            return []
        answer = event.answer
        if isinstance(answer, SealRefused) and answer.promised > self.term:
            self._read_at = event.now
            return self._leave(event.now, f"{answer.name} has promised term {answer.promised}")
        if isinstance(answer, SealAnswer):
            self._answers[answer.name] = answer
        return []

    def _on_promoted(self, event: Promoted) -> list[Action]:
        if self.state is not State.PROMOTING or event.term != self.term or self._claim is None:
            return []
        self._go(State.ANNOUNCING)
        self._start, self._doubt, self._announce_lost = event.start, False, False
        return [Announce(self._claim, event.start)]

    def _on_failed(self, event: PromotionFailed) -> list[Action]:
        if self.state not in (State.SEALING, State.PROMOTING) or event.term != self.term:
            return []
        return self._give_up(event.now, f"opening the term failed: {event.reason}")

    # --- the record -------------------------------------------------------------------------------------------

    def _note(self, now: float, seen: Seen[LeaderRecord]) -> bool:
        """Keep what was seen unless it is old; True if so."""
        if self.seen is not None and seen.version < self.seen.version:
            return False
        self.seen = seen
        self._grounds.seen(now, seen)
        self._blind = False
        if seen.version != self._blind_version:
            self._blind_version = None
        if self._blind_version is None and seen.record.term >= self._promised:
            self._read_at = None
        return True

    def _see(self, now: float, seen: Seen[LeaderRecord] | None) -> list[Action]:
        if seen is None:
            self.seen = None
            if self.state is State.CHECKING:
                self._go(State.FOLLOWING)
            return self._leave(now, "the leader record is gone from the store") if self.term else []
        known = self.seen
        if not self._note(now, seen):
            return []
        if self.state is State.CHECKING:
            if known is None or seen.version != known.version:
                self._go(State.FOLLOWING)
            self._fresh = True
            return []
        if self._claim is None or self.state is State.CLAIMING:  # the outcome of a claim comes by itself
            return []
        if seen.version == self._claim.version:
            return self._announce_again(now, seen)
        record = seen.record
        mine = self._grounds.names_me(record) and record.term == self.term
        if mine and record.phase is Phase.SERVING and self.state in (State.ANNOUNCING, State.SERVING):
            return self._serve(seen)
        if mine and record.phase is Phase.VACANT:
            self._grounds.not_before = now + self.lease_seconds
        return self._leave(now, f"the record says that {who(record)}")

    def _announce_again(self, now: float, seen: Seen[LeaderRecord]) -> list[Action]:
        """The record is still our claim, after an announcement that failed."""
        if self.state is not State.ANNOUNCING or not self._doubt or self._start is None:
            return []
        if self._announce_lost:  # not by the record, so by the history: the term's line there is another's
            return self._give_up(now, f"term {self.term} has another line in the history of terms")
        self._doubt, self._read_at = False, None
        return [Announce(seen, self._start)]

    def _serve(self, seen: Seen[LeaderRecord]) -> list[Action]:
        self._claim = seen
        if self.state is State.SERVING:
            return []
        self._go(State.SERVING)
        self._read_at = None
        self.why = f"{self.me.name} serves term {self.term}: {self._cause}"
        return [Serve(self.term)]

    def _swap_failed(self, now: float, *, lost: bool) -> list[Action]:
        """Whatever failed, the record decides. Only what is lost for sure has changed it for sure."""
        state = self.state
        self._read_at = now  # read at once, and again until the store answers
        if state is State.ANNOUNCING:
            self._doubt, self._announce_lost = True, lost
            return []
        if lost:
            named = self._claim or self._claimed_from
            self._blind_version = named.version if named and named == self.seen else None
        self._blind = True
        doing = "claiming" if state is State.CLAIMING else "handing over"
        outcome = "somebody else changed the record first" if lost else "the store did not say what came of it"
        return self._leave(now, f"{doing} term {self.term} failed: {outcome}")

    # --- following and checking -------------------------------------------------------------------------------

    def _urge(self, now: float) -> Urge | str:
        """When this node may claim, or why not."""
        if self.seen is None:
            return "there is no leader record in the store"
        if self.me.name not in self.voters:
            return f"{self.me.name} is not a voter"
        if self._tip is None:
            return f"{self.me.name} has no whole database to lead with"
        term = self.seen.record.term
        if term < self._promised:
            return f"the record is at term {term}, this node promised {self._promised}: a newer record must come"
        if self._blind or self._blind_version is not None:
            return "the store has not shown yet what came of the last attempt"
        return self._grounds.urge(now, self.seen, self.lease_seconds)

    def _follow(self, now: float) -> list[Action]:
        seen = self.seen
        if seen is not None and self._to_take_up(seen.record):
            self._cause = f"the record gives term {seen.record.term} to this node"
            if self._tip is not None:
                return self._take_up(now, seen)
            self._spent = seen.record.term
            return [Release(seen)]
        urge = self._urge(now)
        if isinstance(urge, str) or seen is None:
            self.why = f"no election: {urge}"
            return []
        if now >= urge.at:
            self._cause = urge.why
            return self._begin_check(now, seen) if urge.check else self._begin_claim(seen)
        if not self._grounds.postponed:
            self.why = f"no election: {who(seen.record)}, and may live" if urge.check else f"waiting: {urge.why}"
        return []

    def _begin_check(self, now: float, seen: Seen[LeaderRecord]) -> list[Action]:
        self._go(State.CHECKING)
        self._began, self._fresh = now, False
        self._unchecked = {name for name in self.voters if name != self.me.name}
        self.why = f"{self._cause}: asking the voters whether they hear the leader"
        term = seen.record.term
        if self.heard(now, term):
            self._postpone(now, f"{self.me.name} still hears the leader")
        if self.state is not State.CHECKING:
            return [Read()]
        return [Read(), Check(term, tuple(sorted(self._unchecked)))]

    def _postpone(self, now: float, why: str) -> None:
        """Somebody hears the leader: leave it time to renew, but not for ever; its lease is over."""
        if self._grounds.postpone(now, self.lease_seconds):
            self._look_again(now, f"no election: {self._cause}, but {why}")

    def _look_again(self, now: float, why: str) -> None:
        self._go(State.FOLLOWING)
        self._grounds.look_at = now + self.lease_seconds / 4
        self.why = why

    def _check(self, now: float) -> list[Action]:
        waited = now - self._began
        if self._unchecked and waited < self._check_seconds:
            return []
        if self._fresh:
            if self.seen is not None and isinstance(self._urge(now), Urge):
                return self._begin_claim(self.seen)
            self._go(State.FOLLOWING)
            return []
        if waited >= self.lease_seconds / 2:
            self._look_again(now, "no election: the coordination store does not answer")
        return []

    @property
    def _check_seconds(self) -> float:
        return min(CHECK_SECONDS, self.lease_seconds / 8)

    def _begin_claim(self, seen: Seen[LeaderRecord]) -> list[Action]:
        self._go(State.CLAIMING)
        self._claimed_from = seen
        self.term = seen.record.term + 1
        self.why = f"claiming term {self.term}: {self._cause}"
        return [Claim(seen)]

    # --- candidacy --------------------------------------------------------------------------------------------

    def _to_take_up(self, record: LeaderRecord) -> bool:
        """Does the record give this process a term that it has not been candidate in?"""
        return (
            self._grounds.names_me(record)
            and record.phase in (Phase.CLAIMING, Phase.HANDOFF)
            and record.term > self._spent
            and record.term >= self._promised
        )

    def _take_up(self, now: float, seen: Seen[LeaderRecord]) -> list[Action]:
        self._go(State.SEALING)
        self.term = self._spent = seen.record.term
        self._claim, self._began, self._seal_at = seen, now, now
        self._own, self._answers = None, {}
        self.why = f"sealing term {self.term}: {self._cause}"
        return [Promise(self.term)]

    def _seal(self, now: float) -> list[Action]:
        """Promise first, then ask; decide as soon as a quorum has answered."""
        if self._own is None or self._claim is None:
            return [] if now < self._deadline else self._give_up(now, "the own promise did not become durable in time")
        voters = set(self.voters)
        if self.me.name not in voters:
            return self._give_up(now, f"{self.me.name} is not a voter")
        answers = {name: answer for name, answer in self._answers.items() if name in voters and name != self.me.name}
        missing = tuple(sorted(voters - answers.keys() - {self.me.name}))
        if len(answers) + 1 >= self._needed(now):
            return self._decide(self._own, list(answers.values()))
        if now >= self._deadline:
            needed = len(voters) - self.acks
            return self._give_up(now, f"of {needed} voters needed {len(answers) + 1} answered; not {_names(missing)}")
        if now < self._seal_at:
            return []
        self._seal_at = now + SEAL_AGAIN_SECONDS
        return [Seal(self.term, missing)]

    def _needed(self, now: float) -> int:
        """Answers, own included. Every acknowledged commit is on the leader and n voters (3.4 E4)."""
        if self.acks == 0 and now >= self._began + ALL_ANSWERS_SECONDS:
            return 1  # nothing was promised to survive; more would not make it sure
        return max(1, len(self.voters) - self.acks)

    @property
    def _deadline(self) -> float:
        return self._began + self.lease_seconds

    def _decide(self, own: SealAnswer, answers: list[SealAnswer]) -> list[Action]:
        """Never below the best answer (E5). Who holds more gets the claim: the two logs are never merged (R12a)."""
        assert self._claim is not None
        best = max([own, *answers], key=_merit)
        of = f"{len(answers) + 1} of {len(self.voters)} voters answered"
        if best.tip.position.order() <= own.tip.position.order():
            return self._promote(f"{self._cause}; {of}, none beyond {own.tip.position}")
        self._go(State.HANDING)  # before the compare-and-swap is sent: it may land whenever it likes
        self.why = f"handing term {self.term} to {best.name}: {of}, it is at {best.tip.position}"
        self.why += f", this node at {own.tip.position}"
        return [HandOver(self._claim, best)]

    def _promote(self, cause: str) -> list[Action]:
        self._go(State.PROMOTING)
        self._cause = cause
        self.why = f"opening term {self.term}: {cause}"
        return [Promote(self.term)]

    def _give_up(self, now: float, why: str) -> list[Action]:
        """Nobody was told of this term: let others claim at once, and before us."""
        claim = self._claim
        self._grounds.not_before = now + self.lease_seconds
        actions = self._leave(now, why)
        return [*actions, Release(claim)] if claim is not None else actions

    def _leave(self, now: float, why: str) -> list[Action]:
        """Back to following. Whatever was opened in the term is ended."""
        term, opened = self.term, self.state in _OPENED
        self.last = self.why if self.state is State.HANDING else f"{self.why}. It ended: {why}"
        if self.state is not State.FOLLOWING:
            self._go(State.FOLLOWING)
        self.term, self._claim, self._own, self._start = 0, None, None, None
        self._answers = {}
        self.why = f"term {term} ended here: {why}"
        return [StepDown(term, why)] if opened else []

    # --- time -------------------------------------------------------------------------------------------------

    def _go(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.state} -> {state} is not in the table")
        self.state = state

    def _advance(self, now: float) -> list[Action]:
        """What is due. One step may make the next one due at once."""
        actions: list[Action] = []
        if self._read_at is not None and now >= self._read_at:
            self._read_at = now + min(SEAL_AGAIN_SECONDS, self.lease_seconds / 8)
            actions.append(Read())
        step = {State.FOLLOWING: self._follow, State.CHECKING: self._check, State.SEALING: self._seal}
        while True:
            before = self.state
            if before in step:
                actions += step[before](now)
            if self.state is before:
                return actions

    def _next_wake(self, now: float) -> float | None:
        times: list[float] = [] if self._read_at is None else [self._read_at]
        if self.state is State.FOLLOWING:
            urge = self._urge(now)
            if isinstance(urge, Urge):
                times.append(urge.at)
        elif self.state is State.CHECKING:
            end = self._began + self._check_seconds
            times.append(end if now < end else self._began + self.lease_seconds / 2)
        elif self.state is State.SEALING:
            times += [self._deadline, self._seal_at]
            if self.acks == 0:
                times.append(self._began + ALL_ANSWERS_SECONDS)
        ahead = [each for each in times if each > now]
        return min(ahead, default=None)


def _merit(answer: SealAnswer) -> tuple[tuple[int, int], int]:
    return answer.tip.position.order(), -answer.lag_txids


def _at_start(tip: Tip, start: TermStart | None) -> bool:
    return start is not None and (tip.position, tip.checksum) == (
        Position(start.prev_term, start.prev_txid),
        start.checksum,
    )


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "nobody"


_HANDLERS: Final[dict[type[Event], Callable[..., list[Action]]]] = {
    Tick: Election._on_tick,
    RecordSeen: Election._on_record,
    HolderDied: Election._on_died,
    Heard: Election._on_heard,
    Stand: Election._on_stand,
    Eligible: Election._on_eligible,
    Sealed: Election._on_sealed,
    Checked: Election._on_checked,
    SwapDone: Election._on_swap,
    Promised: Election._on_promised,
    SealAnswered: Election._on_answer,
    Promoted: Election._on_promoted,
    PromotionFailed: Election._on_failed,
}
