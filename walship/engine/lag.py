"""How far applying lags behind, in seconds."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from walship.formats.position import Position

__all__ = ["LagMeter"]


@dataclass(slots=True)
class LagMeter:
    """Lag in seconds on this node's own monotonic clock: how long ago the oldest position not yet applied was heard."""

    _heard: deque[tuple[Position, float]]

    @classmethod
    def new(cls) -> LagMeter:
        return cls(deque(maxlen=4096))

    def heard(self, tip: Position, now: float) -> None:
        if not self._heard or tip.order() > self._heard[-1][0].order():
            if len(self._heard) == self._heard.maxlen:
                # Every second one goes, never the oldest: the answer stays about right however long it takes.
                self._heard = deque(itertools.islice(self._heard, 0, None, 2), maxlen=self._heard.maxlen)
            self._heard.append((tip, now))

    def seconds(self, applied: Position, now: float) -> float:
        while self._heard and applied.order() >= self._heard[0][0].order():
            self._heard.popleft()
        return now - self._heard[0][1] if self._heard else 0.0
