"""How long a leader may acknowledge, and how long a challenger must wait: two sides of one lease, pure.

No wall clock and no agreement between clocks: each side measures on its own CLOCK_BOOTTIME (which goes on while a
machine sleeps), in seconds. The holder counts from *before* it sent the renewal, and stops MARGIN early; the challenger
counts from its own first sight of a record, and waits longer than the lease. So the two never overlap as long as no
clock runs more than about 8 % slower than another. What is acknowledged does not hang on it with acks >= 1: the
seal does that (failover.md 3.2, 3.4).
"""

from __future__ import annotations

from typing import Final

__all__ = ["EXPIRY_FACTOR", "Lease", "Observation"]

MARGIN_FRACTION: Final = 0.1
MARGIN_SECONDS: Final = 0.05
RENEW_FRACTION: Final = 0.25
EXPIRY_FACTOR: Final = 1.1


class Lease:
    """The holder's side, one object for one term.

    Ask `valid` before BEGIN, before COMMIT, and after the commit before anything is acknowledged. Other threads may
    ask while one thread extends: each value is replaced whole.
    """

    def __init__(self, seconds: float) -> None:
        """seconds: T of the record. Nothing is valid before the first `extend`."""
        self.seconds = seconds
        self.margin_seconds = seconds * MARGIN_FRACTION + MARGIN_SECONDS
        self._began: float | None = None
        self._doubted: float | None = None
        self._ended = False

    def extend(self, began: float) -> None:
        """A compare-and-swap on the leader record succeeded that was begun at `began`, read *before* it was sent.

        Never the time of the reply: a reply may lie in a queue for seconds while a challenger counts.
        """
        if self._began is None or began > self._began:
            self._began = began
        if self._doubted is not None and began >= self._doubted:
            self._doubted = None

    def valid(self, now: float) -> bool:
        """May this leader say "ok" now?"""
        return self.remaining(now) > 0.0

    def remaining(self, now: float) -> float:
        """Seconds until `valid` ends by itself; 0 when it has ended, never began, or waits for a renewal."""
        began = self._began
        if began is None or self._ended or self._doubted is not None:
            return 0.0
        return max(0.0, began + self.seconds - self.margin_seconds - now)

    @property
    def renew_at(self) -> float | None:
        """When to begin the next renewal; None before the first success and after the end."""
        return None if self._began is None or self._ended else self._began + self.seconds * RENEW_FRACTION

    @property
    def must_renew(self) -> bool:
        """Writes wait for a renewal of our own: see `demand_renewal`."""
        return self._doubted is not None

    def demand_renewal(self, now: float) -> None:
        """A handoff of ours has an unknown outcome (R12a): its compare-and-swap may still land.

        Not valid again before a renewal that begins from now on has succeeded. That renewal names the version that
        the handoff named, so the handoff can no longer land.
        """
        self._doubted = now

    def end(self) -> None:
        """This node stepped down. For ever: a renewal that was under way cannot bring the lease back."""
        self._ended = True


class Observation:
    """A challenger's side: since when, by our own clock, has the record not changed?"""

    def __init__(self) -> None:
        self._key: object = None
        self._since: float | None = None

    def seen(self, key: object, now: float) -> None:
        """The record was seen at version `key`. Only the first sight of a version starts the count."""
        if self._since is None or key != self._key:
            self._key, self._since = key, now

    @property
    def since(self) -> float:
        """When the present version was first seen. Raises ValueError before any sight of the record."""
        if self._since is None:
            raise ValueError("no record was seen yet")
        return self._since

    def unchanged_for(self, now: float) -> float:
        """Seconds since the first sight of the present version; 0 before any."""
        return 0.0 if self._since is None else now - self._since

    def expires_at(self, lease_seconds: float) -> float:
        """When a lease of that length has surely ended, on our clock. Raises ValueError before any sight."""
        return self.since + lease_seconds * EXPIRY_FACTOR

    def expired(self, now: float, lease_seconds: float) -> bool:
        return self._since is not None and now >= self.expires_at(lease_seconds)
