"""The newest frames in memory: bounded, and found by what they follow."""

from __future__ import annotations

from tests.replication.talk import TIP, frames_after
from walship.engine.log import FrameRef
from walship.replication.tail import Tail

FRAMES = [(FrameRef(header, 1, 0, len(data), 50, 100), data) for header, data in frames_after(TIP, 10)]
ONE = len(FRAMES[0][1])


def test_a_frame_is_found_by_the_position_it_follows() -> None:
    tail = Tail(ONE * 20)
    for ref, data in FRAMES:
        tail.offer(ref, data)
    for ref, data in FRAMES:
        assert tail.after(ref.header.previous) == (ref, data)
    assert tail.after(FRAMES[-1][0].header.position) is None


def test_above_the_bound_the_oldest_go() -> None:
    tail = Tail(ONE * 3)
    for ref, data in FRAMES:
        tail.offer(ref, data)
        assert tail.size_bytes <= ONE * 3
    assert [tail.after(ref.header.previous) is not None for ref, _ in FRAMES] == [False] * 7 + [True] * 3


def test_a_frame_offered_twice_is_counted_once_and_one_too_large_not_kept() -> None:
    tail = Tail(ONE * 3)
    tail.offer(*FRAMES[0])
    tail.offer(*FRAMES[0])
    tail.offer(FRAMES[1][0], bytes(ONE * 4))
    assert tail.size_bytes == ONE
    assert tail.after(FRAMES[1][0].header.previous) is None
    tail.clear()
    assert (tail.size_bytes, tail.after(TIP.position)) == (0, None)
