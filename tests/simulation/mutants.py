"""Each mutant breaks one rule, and the simulation has to notice."""

from __future__ import annotations

from tests.simulation.cluster import Rules
from tests.simulation.node import Process
from walship.coordination.ballot import Action, SealAnswer
from walship.coordination.election import Election
from walship.coordination.lease import Lease

__all__ = ["MUTANTS"]


class NoSeal(Rules):
    """A voter answers a seal without promising the term: it goes on taking frames of older ones."""

    seals = False


class NoPositionCheck(Rules):
    """The candidate promotes itself whatever the quorum holds (E5)."""

    class election(Election):
        def _decide(self, own: SealAnswer, answers: list[SealAnswer]) -> list[Action]:
            return self._promote("mutant")


class NoStepDown(Rules):
    """A leader that is sealed answers, and goes on acknowledging."""

    steps_down = False


class AckBeforeFsync(Rules):
    """A follower acknowledges what it has not made durable."""

    acks_before_fsync = True


class LeaseFromReply(Rules):
    """The lease is counted from the reply to the renewal."""

    def extend(self, process: Process, lease: Lease, began: float) -> None:
        lease.extend(process.clock())


class NoQuorum(Rules):
    """The candidate promotes itself on its own answer."""

    class election(Election):
        def _needed(self, now: float) -> int:
            return 1


class NoRenewalAfterDoubt(Rules):
    """After a handoff of unknown outcome the old leader goes on without a renewal (R12a)."""

    class process(Process):
        def hand_off(self, leading, to, deadline):  # type: ignore[no-untyped-def]
            leading.lease.demand_renewal = lambda _now: None
            super().hand_off(leading, to, deadline)


# name -> (the rules, the focus that brings it to light)
MUTANTS: dict[str, tuple[type[Rules], str]] = {
    "no-seal": (NoSeal, "deposed"),
    "no-position-check": (NoPositionCheck, "mix"),
    "no-step-down": (NoStepDown, "deposed"),
    "ack-before-fsync": (AckBeforeFsync, "machines"),
    "lease-from-reply": (LeaseFromReply, "store"),
    "no-quorum": (NoQuorum, "mix"),
    "no-renewal-after-doubt": (NoRenewalAfterDoubt, "handoff"),
}
