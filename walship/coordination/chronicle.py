"""The last candidacy of a node, phase by phase, for `/status`, metrics and `walship failover explain`. Pure.

It watches the election core from outside, event by event, so that the core needs no clock and no memory for it.

    detect   from the proof of the holder's death, else from the last change of its record, to the claim
    claim    the compare-and-swap to the next term
    seal     the own promise, and those of a quorum
    open     the term-start frame, or the claim's way to a voter that holds more
    publish  the compare-and-swap to `serving`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from walship.coordination.ballot import (
    Event,
    HolderDied,
    Promised,
    RecordSeen,
    SealAnswer,
    SealAnswered,
    SealRefused,
)
from walship.coordination.election import Election, State

__all__ = ["PHASES", "Chronicle"]

PHASES: Final = ("detect", "claim", "seal", "open", "publish")
_PHASE_OF: Final = {
    State.CLAIMING: "claim",
    State.SEALING: "seal",
    State.PROMOTING: "open",
    State.HANDING: "open",
    State.ANNOUNCING: "publish",
}


@dataclass(slots=True)
class _Candidacy:
    term: int
    cause: str
    phases: dict[str, float]  # seconds
    entered: float
    answers: dict[str, str] = field(default_factory=dict)  # voter -> what it said
    outcome: str = ""
    ended: float | None = None


class Chronicle:
    """Call `observe` after each event that the core has handled.

    on_phase: told the name and the seconds of each phase as it ends. on_end: told `serving`, `handed over` or
    `given up` as a candidacy ends.
    """

    def __init__(
        self,
        on_phase: Callable[[str, float], None] = lambda _phase, _seconds: None,
        on_end: Callable[[str], None] = lambda _outcome: None,
    ) -> None:
        self._on_phase, self._on_end = on_phase, on_end
        self._state = State.FOLLOWING
        self._version: int | None = None
        self._sign: float | None = None  # last sign of the holder's life, or the proof of its death
        self._last: _Candidacy | None = None

    def observe(self, event: Event, core: Election) -> None:
        """`event` has just been handled by `core`."""
        now = event.now
        if isinstance(event, RecordSeen) and event.seen is not None and event.seen.version != self._version:
            self._version, self._sign = event.seen.version, now
        elif isinstance(event, HolderDied) and core.seen is not None and event.nonce == core.seen.record.nonce:
            self._sign = now
        elif isinstance(event, SealAnswered) and self._last is not None and event.term == self._last.term:
            self._last.answers[event.answer.name] = _said(event.answer)
        elif isinstance(event, Promised) and self._last is not None and event.term == self._last.term:
            self._last.answers[core.me.name] = f"holds {event.tip.position}" if event.tip else "has no whole copy"
        if core.state is not self._state:
            self._step(now, core)
            self._state = core.state

    def last(self, now: float) -> dict[str, Any] | None:
        """The last candidacy as JSON: term, cause, seconds of its phases, what the voters said, outcome, age."""
        last = self._last
        if last is None:
            return None
        return {
            "term": last.term,
            "cause": last.cause,
            "phases": {phase: round(last.phases[phase], 6) for phase in PHASES if phase in last.phases},
            "answers": [{"name": name, "said": said} for name, said in sorted(last.answers.items())],
            "outcome": last.outcome or "under way",
            "ended_seconds_ago": None if last.ended is None else round(now - last.ended, 3),
        }

    def _step(self, now: float, core: Election) -> None:
        last = self._last
        if self._state in _PHASE_OF and last is not None:
            self._took(last, _PHASE_OF[self._state], now - last.entered)
            last.entered = now
        if core.state in (State.CLAIMING, State.SEALING) and self._state not in _PHASE_OF:
            last = self._last = _Candidacy(core.term, core.why.partition(": ")[2], {}, now)
            if core.state is State.CLAIMING and self._sign is not None:
                self._took(last, "detect", now - self._sign)
        if last is None or last.ended is not None:
            return
        if core.state is State.SERVING:
            self._end(last, now, f"serving: {core.why}", "serving")
        elif core.state is State.FOLLOWING:
            word = "handed over" if self._state is State.HANDING else "given up"
            self._end(last, now, f"{word}: {core.last}", word)  # its `why` is on the next claim already

    def _took(self, last: _Candidacy, phase: str, seconds: float) -> None:
        last.phases[phase] = last.phases.get(phase, 0.0) + seconds
        self._on_phase(phase, seconds)

    def _end(self, last: _Candidacy, now: float, outcome: str, word: str) -> None:
        last.outcome, last.ended = outcome, now
        self._on_end(word)


def _said(answer: object) -> str:
    if isinstance(answer, SealAnswer):
        return f"holds {answer.tip.position}"
    return f"has promised term {answer.promised}" if isinstance(answer, SealRefused) else "did not answer"
