"""What the log lets go, what it keeps for whom, and how it begins again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.log_frames import BASE, SMALL, append, fill, open_log, positions, segment_files, start_term
from walship.engine.log import Log, LogLimits
from walship.engine.retention import PIN_SILENCE_SECONDS, SegmentFacts, plan_prune
from walship.engine.segment import Segment, SegmentFlags, SegmentHead
from walship.errors import HistoryMismatch, LogTruncated, StorageFailed, UsageError
from walship.formats.checksum import FLAG
from walship.formats.position import Position, TermHistory, Tip

ELSEWHERE = Tip(Position(7, 5000), FLAG | 99, 12)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def facts(*last: int, size_bytes: int = 100, time_ms: int = 0) -> list[SegmentFacts]:
    return [SegmentFacts(size_bytes, Position(1, txid), time_ms) for txid in last]


def plan(segments: list[SegmentFacts], *, pinned: list[int] | None = None, **more: object) -> tuple[int, int]:
    options: dict[str, object] = {"keep_from": None, "now_ms": 1_000_000, "max_bytes": 10_000, "keep_seconds": 0.0}
    options.update(more)
    limits = LogLimits(max_bytes=options.pop("max_bytes"), keep_seconds=options.pop("keep_seconds"))  # type: ignore[arg-type]
    pins = [Position(1, txid) for txid in pinned or []]
    result = plan_prune(segments, pins, limits, **options)  # type: ignore[arg-type]
    return result.segments, result.past_keep_from


# --- the decision (R9) -----------------------------------------------------------------------------------------------


def test_the_last_segment_always_stays() -> None:
    assert plan(facts(10), max_bytes=1) == (0, 0)
    assert plan(facts(10, 20), max_bytes=1) == (1, 0)


def test_what_a_follower_still_needs_stays_within_the_bound() -> None:
    assert plan(facts(10, 20, 30, 40), keep_from=20) == (2, 0)
    assert plan(facts(10, 20, 30, 40), keep_from=19) == (1, 0)


def test_the_bound_is_stronger_than_a_laggard_and_the_loss_is_counted() -> None:
    assert plan(facts(10, 20, 30, 40), keep_from=10, max_bytes=150) == (3, 2)


def test_a_pin_is_stronger_than_the_bound() -> None:
    assert plan(facts(10, 20, 30, 40), pinned=[25, 20], max_bytes=1) == (2, 0)


def test_segments_nobody_needs_stay_until_they_are_old_enough() -> None:
    assert plan(facts(10, 20, time_ms=995_000), keep_seconds=5.1) == (0, 0)
    assert plan(facts(10, 20, time_ms=995_000), keep_seconds=5.0) == (1, 0)


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    pinned=st.lists(st.integers(0, 130), max_size=3),
    keep_from=st.none() | st.integers(0, 130),
    max_bytes=st.integers(1, 3000),
)
def test_no_plan_breaks_a_rule(sizes: list[int], pinned: list[int], keep_from: int | None, max_bytes: int) -> None:
    segments = [SegmentFacts(size, Position(1, 10 * number), 0) for number, size in enumerate(sizes, 1)]
    gone, past = plan(segments, pinned=pinned, keep_from=keep_from, max_bytes=max_bytes)
    assert gone < len(segments)
    assert all(segments[number].last.txid <= pin for number in range(gone) for pin in pinned)
    if keep_from is not None:
        assert past == sum(each.last.txid > keep_from for each in segments[:gone])
        if past:
            assert sum(sizes[gone - 1 :]) > max_bytes
    if sum(sizes[gone:]) > max_bytes:
        assert gone == len(segments) - 1 or any(segments[gone].last.txid > pin for pin in pinned)


def test_limits_that_keep_nothing_are_refused() -> None:
    with pytest.raises(UsageError):
        LogLimits(max_bytes=0)


# --- on files --------------------------------------------------------------------------------------------------------


def filled(tmp_path: Path, limits: LogLimits = SMALL, **more: object) -> Log:
    log = open_log(tmp_path, limits, **more)
    fill(log, 20, size_bytes=700)
    return log


def test_pruned_segments_are_gone_from_disk_and_the_rest_opens(tmp_path: Path) -> None:
    log = filled(tmp_path)
    before = log.statistics()
    freed = log.prune(keep_from=20, now_ms=10_000)
    after = log.statistics()
    assert freed == before.size_bytes - after.size_bytes > 0
    assert after.segments == len(segment_files(tmp_path)) < before.segments
    assert log.base.position.txid <= 20
    assert log.next_after(Position(1, 20)) is not None
    with pytest.raises(LogTruncated):
        log.next_after(BASE.position)
    again = open_log(tmp_path, SMALL)
    assert (again.base, again.tip) == (log.base, log.tip)


def test_a_laggard_beyond_the_bound_is_counted(tmp_path: Path) -> None:
    log = filled(tmp_path, LogLimits(max_bytes=5000, segment_bytes=2000))
    log.prune(keep_from=BASE.position.txid, now_ms=10_000)
    statistics = log.statistics()
    assert statistics.size_bytes <= 5000
    assert statistics.pruned_past_keep_from == statistics.pruned_segments > 0


def test_a_pinned_position_can_be_read_after_any_prune(tmp_path: Path) -> None:
    log = filled(tmp_path, LogLimits(max_bytes=1, segment_bytes=2000))
    with log.pin(Position(1, 15)) as pin:
        log.prune(keep_from=None, now_ms=10_000)
        assert [position.txid for position in positions(log, Position(1, 15))] == list(range(16, 31))
        pin.move(Position(1, 25))
        log.prune(keep_from=None, now_ms=10_000)
        assert log.base.position.txid > 15
        assert log.next_after(Position(1, 25)) is not None
    log.prune(keep_from=None, now_ms=10_000)
    assert log.statistics().segments == 1


def test_a_silent_pin_is_dropped_and_says_so(tmp_path: Path) -> None:
    """R9: 60 s."""
    clock = Clock()
    log = filled(tmp_path, LogLimits(max_bytes=1, segment_bytes=2000), clock=clock)
    silent, alive = log.pin(BASE.position), log.pin(Position(1, 20))
    clock.now += PIN_SILENCE_SECONDS / 2
    alive.touch()
    clock.now += PIN_SILENCE_SECONDS / 2
    log.prune(keep_from=None, now_ms=10_000)
    assert (silent.dropped, alive.dropped) == (True, False)
    assert BASE.position.txid < log.base.position.txid <= 20
    with pytest.raises(LogTruncated):
        silent.move(Position(1, 12))
    silent.move(Position(1, 20))
    assert not silent.dropped
    assert log.statistics().pins == 2
    assert log.statistics().pins_dropped == 1


def test_a_pin_on_what_is_not_there_is_refused(tmp_path: Path) -> None:
    log = filled(tmp_path)
    with pytest.raises(HistoryMismatch):
        log.pin(Position(1, 999))
    with pytest.raises(LogTruncated):
        log.pin(Position(1, 9))
    assert log.statistics().pins == 0


def test_a_payload_stays_readable_after_its_segment_was_pruned(tmp_path: Path) -> None:
    log = filled(tmp_path)
    ref = next(log.frames_after(BASE.position))
    payload = log.payload(ref)
    log.prune(keep_from=None, now_ms=10_000)
    with pytest.raises(LogTruncated):
        log.read(ref)
    assert len(payload.read_at(0, 1000)) == 700


def test_closing_lets_go_of_every_file(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(str(link.resolve()).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir())

    log = filled(tmp_path)
    assert open_files() == log.statistics().segments
    log.prune(keep_from=20, now_ms=10_000)
    assert open_files() == log.statistics().segments
    log.close()
    assert open_files() == 0


def test_a_reset_log_begins_at_its_new_base(tmp_path: Path) -> None:
    """R9: after a snapshot install."""
    log = filled(tmp_path)
    pin = log.pin(BASE.position)
    log.reset(ELSEWHERE, TermHistory([(7, 4000)]))
    assert pin.dropped
    assert log.tip == log.base == log.durable_tip == ELSEWHERE
    assert len(segment_files(tmp_path)) == 1
    append(log)
    again = open_log(tmp_path, SMALL)
    assert (again.base, again.tip) == (ELSEWHERE, log.tip)
    assert again.terms().starts() == ((7, 4000),)


def test_a_reset_that_died_before_it_deleted_anything_is_finished_at_open(tmp_path: Path) -> None:
    log = filled(tmp_path)
    sequence = log.statistics().segments + 1
    Segment.create(tmp_path / "log", SegmentHead(SegmentFlags.RESET, log.cluster, sequence, ELSEWHERE, 0))
    segment_files(tmp_path)[0].write_bytes(b"what came before the reset is not even looked at")
    assert open_log(tmp_path, SMALL).tip == ELSEWHERE
    assert len(segment_files(tmp_path)) == 1


def test_a_reset_that_fails_is_final(tmp_path: Path) -> None:
    """Its segment may be durable although the call failed: what would be appended to the old log could vanish."""
    log = filled(tmp_path)
    (tmp_path / "log" / f"{log.statistics().segments + 1:016x}.seg").mkdir()  # a file cannot be renamed over that
    with pytest.raises(StorageFailed, match="process must end"):
        log.reset(ELSEWHERE)
    with pytest.raises(StorageFailed, match="process must end"):
        append(log)


@pytest.mark.parametrize("txid", [10, 11, 12, 13, 20, 29, 30])
def test_truncating_removes_everything_after_a_position(tmp_path: Path, txid: int) -> None:
    """R12: the log is cut at the divergence."""
    log = filled(tmp_path)
    whole = positions(log)
    log.truncate_to(Position(1, txid))
    kept = whole[: txid - 10]
    assert log.durable_tip == log.tip
    assert positions(log) == kept
    assert positions(open_log(tmp_path, SMALL)) == kept
    start_term(log, 4)
    append(log)
    added = [Position(4, txid), Position(4, txid + 1)]
    again = open_log(tmp_path, SMALL)
    assert positions(log) == positions(again) == kept + added
    assert again.terms().starts() == log.terms().starts() == ((4, txid),)


def test_truncating_forgets_the_terms_that_began_later(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    append(log)
    start_term(log, 2)
    append(log)
    start_term(log, 3)
    log.truncate_to(Position(2, 12))
    assert log.terms().starts() == ((2, 11),)


def test_what_a_reader_holds_of_a_removed_frame_never_turns_into_other_bytes(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    refs = fill(log, 5)
    log.truncate_to(refs[2].header.position)
    append(log)
    with pytest.raises(HistoryMismatch, match="was removed"):
        log.read(refs[3])


def test_truncating_to_an_unknown_position_changes_nothing(tmp_path: Path) -> None:
    log = filled(tmp_path)
    with pytest.raises(HistoryMismatch):
        log.truncate_to(Position(2, 20))
    assert log.tip.position == Position(1, 30)


def test_a_closed_log_says_that_it_is_closed(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.frames_after(BASE.position)
