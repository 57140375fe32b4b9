"""How the proxy judges a node's speed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.backends import PeakEwma


def test_a_peak_counts_at_once_and_fades_slowly() -> None:
    latency = PeakEwma(decay_seconds=2.0)
    latency.observe(0.001, 0.0)
    latency.observe(0.5, 0.1)
    assert latency.at(0.1) == 0.5
    latency.observe(0.001, 0.2)
    assert 0.4 < latency.at(0.2) < 0.5


def test_a_node_left_alone_is_tried_again() -> None:
    """Without measurements the estimate decays, so that the other nodes lose a draw some day."""
    latency = PeakEwma(decay_seconds=2.0)
    latency.observe(0.5, 0.0)
    assert latency.at(20.0) < 0.001


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), min_size=1))
def test_the_estimate_stays_within_what_was_seen(samples: list[tuple[float, float]]) -> None:
    latency, now = PeakEwma(), 0.0
    for seconds, pause in samples:
        now += pause
        latency.observe(seconds, now)
        assert 0.0 <= latency.at(now) <= max(sample for sample, _ in samples) + 1e-9
