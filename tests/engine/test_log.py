"""The log on real files: what it keeps, what it refuses, and what is left of it after a crash."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.log_frames import (
    BASE,
    LIMITS,
    SMALL,
    append,
    fill,
    flip,
    header_after,
    open_log,
    payload_of,
    positions,
    segment_files,
    start_term,
)
from walship.engine.log import Log
from walship.errors import CorruptLog, CorruptRecord, HistoryMismatch, LogTruncated
from walship.formats.checksum import FLAG
from walship.formats.frame import PART_BYTES, FrameEncoder, encode_frame
from walship.formats.position import Position, Tip

# --- appending and reading -------------------------------------------------------------------------------------------


def test_a_new_log_is_empty_at_its_base(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.tip == log.base == log.durable_tip == BASE
    assert log.next_after(BASE.position) is None
    assert log.page_size == 0


def test_frames_come_back_byte_for_byte_and_in_order(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    written = []
    for size in (1, 100, 5000):
        header = header_after(log.tip, commits=3)
        written.append(encode_frame(header, payload_of(header, size)))
        log.append(header, written[-1])
    assert [log.read(ref) for ref in log.frames_after(BASE.position)] == written
    assert [b"".join(log.chunks(ref, 64)) for ref in log.frames_after(BASE.position)] == written


def test_a_frame_that_does_not_extend_the_tip_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log)
    before = log.statistics()
    for tip in (BASE, Tip(log.tip.position, FLAG | 77, 3)):
        header = header_after(tip)
        with pytest.raises(HistoryMismatch, match="does not follow"):
            log.append(header, encode_frame(header, b"x"))
    assert log.statistics() == before


def test_bytes_that_are_not_one_whole_frame_are_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    header = header_after(log.tip)
    data = encode_frame(header, b"x" * 100)
    for wrong in (b"", data[:-1], data[1:], data + data, data[:60]):
        with pytest.raises(CorruptRecord):
            log.append(header, wrong)
    assert log.tip == BASE


def test_a_large_frame_comes_in_pieces_and_is_seen_only_when_committed(tmp_path: Path) -> None:
    """R6: a frame exists once its end is there."""
    log = open_log(tmp_path)
    header = header_after(log.tip)
    payload = payload_of(header, 2 * PART_BYTES + 12345)
    encoder = FrameEncoder(header)
    with log.begin(header) as frame:
        frame.write(encoder.header_record()[:5])
        frame.write(encoder.header_record()[5:])
        for start in range(0, len(payload), 700_000):
            frame.write(encoder.part(payload[start : start + 700_000]))
        assert log.tip == BASE
        with pytest.raises(ValueError, match="another frame"):
            append(log)
        with pytest.raises(CorruptRecord):
            frame.commit()
    assert log.tip == BASE

    encoder = FrameEncoder(header)
    with log.begin(header) as frame:
        frame.write(encoder.header_record())
        frame.write(encoder.part(payload))
        frame.write(encoder.end())
        ref = frame.commit()
    assert log.tip == header.tip
    stored = log.payload(ref)
    assert stored.size_bytes == len(payload)
    for offset, size in ((0, 10), (PART_BYTES - 3, 6), (5, 2 * PART_BYTES), (len(payload) - 4, 100)):
        assert stored.read_at(offset, size) == payload[offset : offset + size]
    assert stored.read_at(len(payload), 10) == b""
    append(log)
    assert open_log(tmp_path).tip == log.tip


def test_an_aborted_frame_leaves_no_trace(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log)
    size = segment_files(tmp_path)[0].stat().st_size
    with log.begin(header_after(log.tip)) as frame:
        frame.write(b"z" * 1000)
    assert segment_files(tmp_path)[0].stat().st_size == size
    append(log)
    assert open_log(tmp_path).tip == log.tip


def test_segments_rotate_and_the_log_reads_across_them(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    refs = fill(log, 30, size_bytes=500)
    assert len(segment_files(tmp_path)) > 5
    assert [(ref.segment, ref.offset) for ref in log.frames_after(BASE.position)] == [
        (ref.segment, ref.offset) for ref in refs
    ]
    again = open_log(tmp_path, SMALL)
    assert list(again.frames_after(BASE.position)) == refs
    assert list(again.frames_after(refs[11].header.position)) == refs[12:]
    assert again.page_size == 4096


def test_a_frame_larger_than_a_segment_gets_a_segment_of_its_own(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    fill(log, 2)
    ref = append(log, size_bytes=10_000)
    assert ref.size_bytes > SMALL.segment_bytes
    assert len(segment_files(tmp_path)) == 2
    assert append(log).segment == ref.segment + 1


def test_the_durable_tip_is_what_the_tip_was_before_the_sync(tmp_path: Path) -> None:
    """R5."""
    log = open_log(tmp_path)
    append(log)
    assert log.durable_tip == BASE
    assert log.sync() == log.tip == log.durable_tip
    append(log)
    assert log.durable_tip != log.tip


def test_a_sync_never_claims_what_was_appended_while_it_ran(tmp_path: Path) -> None:
    """R5: what becomes durable is the position sampled before the call."""
    log = open_log(tmp_path)
    claims: list[bool] = []
    stop = threading.Event()

    def keep_syncing() -> None:
        while not stop.is_set():
            claims.append(log.sync() == log.durable_tip)

    thread = threading.Thread(target=keep_syncing)
    thread.start()
    fill(log, 1000)
    stop.set()
    thread.join()
    assert all(claims)


def test_a_rotation_makes_the_full_segment_durable_first(tmp_path: Path) -> None:
    """R5: only the last segment may be torn."""
    log = open_log(tmp_path, SMALL)
    before = log.tip
    while len(segment_files(tmp_path)) == 1:
        before = log.tip
        append(log, size_bytes=500)
    assert log.durable_tip == before


def test_a_reader_in_another_thread_follows_appends_rotations_and_pruning(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    total = 400
    seen: list[int] = []
    errors: list[Exception] = []
    appended = threading.Condition()

    def more() -> bool:
        return len(seen) == total or log.tip.position.txid > BASE.position.txid + len(seen)

    def follow() -> None:
        try:
            with log.pin(BASE.position) as pin:
                while len(seen) < total:
                    for ref in log.frames_after(pin.position):
                        assert log.payload(ref).read_at(0, 1000) == payload_of(ref.header)
                        seen.append(ref.header.max_txid)
                        pin.move(ref.header.position)
                    with appended:
                        if not appended.wait_for(more, 10):
                            raise TimeoutError
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    for number in range(total):
        append(log)
        if number % 20 == 0:
            log.sync()
            log.prune(keep_from=None, now_ms=10_000)
        with appended:
            appended.notify_all()
    thread.join(20)
    assert errors == []
    assert seen == list(range(11, 11 + total))
    assert log.base != BASE


# --- looking up --------------------------------------------------------------------------------------------------


def test_a_position_is_found_only_at_a_frame_end_with_its_checksum(tmp_path: Path) -> None:
    """R11."""
    log = open_log(tmp_path, SMALL)
    fill(log, 20, size_bytes=500, commits=2)
    for ref in log.frames_after(BASE.position):
        assert log.locate(ref.header.position, ref.header.checksum) == ref.header.position
    assert log.locate(BASE.position, BASE.checksum) == BASE.position
    with pytest.raises(HistoryMismatch, match="two different databases"):
        log.locate(log.tip.position, FLAG | 5)
    inside, beyond = Position(1, 13), Position(1, 1000)
    for position in (inside, beyond, Position(2, log.tip.position.txid)):
        with pytest.raises(HistoryMismatch, match="not the end of a frame"):
            log.locate(position, log.tip.checksum)


def test_a_position_before_the_base_is_truncated_history_not_another_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log)
    for call in (lambda: log.locate(Position(1, 9), FLAG), lambda: log.frames_after(Position(0, 0))):
        with pytest.raises(LogTruncated):
            call()


def test_a_diverged_position_of_an_older_term_is_a_mismatch(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    start_term(log, 3)
    append(log)
    with pytest.raises(HistoryMismatch) as caught:
        log.locate(Position(1, 11), FLAG)
    assert not isinstance(caught.value, LogTruncated)


def test_term_starts_are_known_even_after_their_frames_are_pruned(tmp_path: Path) -> None:
    """R11, and the segment head's list of terms."""
    log = open_log(tmp_path, SMALL)
    append(log, size_bytes=900)
    start_term(log, 2)
    fill(log, 5, size_bytes=900)
    start_term(log, 5)
    expected = ((2, 11), (5, 16))
    assert log.terms().starts() == expected
    assert log.locate(Position(2, 11), log.frames_after(BASE.position).__next__().header.checksum)
    log.prune(keep_from=None, now_ms=10_000)
    with pytest.raises(LogTruncated):
        log.next_after(Position(2, 11))
    assert log.terms().starts() == open_log(tmp_path, SMALL).terms().starts() == expected


# --- opening what a crash or a bad disk left ---------------------------------------------------------------------


def test_a_torn_end_is_cut_and_the_log_goes_on(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    refs = fill(log, 3)
    path = segment_files(tmp_path)[0]
    with path.open("r+b") as file:
        file.truncate(refs[2].offset + refs[2].size_bytes - 1)
    again = open_log(tmp_path)
    assert positions(again) == [ref.header.position for ref in refs[:2]]
    assert again.statistics().cut_bytes == refs[2].size_bytes - 1
    append(again)
    assert open_log(tmp_path).tip == again.tip


def test_zeros_behind_the_last_frame_are_a_torn_end(tmp_path: Path) -> None:
    """A file system may have grown the file without its data."""
    log = open_log(tmp_path)
    fill(log, 2)
    with segment_files(tmp_path)[0].open("ab") as file:
        file.write(bytes(3 << 20))
    assert open_log(tmp_path).tip == log.tip


def test_a_bad_record_before_a_good_one_is_damage_and_nothing_is_changed(tmp_path: Path) -> None:
    """R5: never a torn tail."""
    log = open_log(tmp_path)
    refs = fill(log, 3)
    path = segment_files(tmp_path)[0]
    flip(path, refs[1].offset + refs[1].header_bytes + 20)
    before = path.read_bytes()
    with pytest.raises(CorruptLog, match=r"a good record follows.*frames after 1\.11") as caught:
        open_log(tmp_path)
    assert path.name in str(caught.value)
    assert path.read_bytes() == before


def test_a_damaged_length_does_not_hide_the_good_records_behind_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    refs = fill(log, 3)
    path = segment_files(tmp_path)[0]
    flip(path, refs[1].offset + 5, 0x0F)
    with pytest.raises(CorruptLog, match="a good record follows"):
        open_log(tmp_path)


def test_damage_in_an_earlier_segment_is_never_a_torn_end(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    refs = fill(log, 10, size_bytes=500)
    first = [ref for ref in refs if ref.segment == refs[0].segment]
    path = segment_files(tmp_path)[0]
    with path.open("r+b") as file:
        file.truncate(first[-1].offset + 10)
    with pytest.raises(CorruptLog, match="and up to"):
        open_log(tmp_path, SMALL)


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    log = open_log(tmp_path, SMALL)
    fill(log, 10, size_bytes=500)
    segment_files(tmp_path)[1].unlink()
    with pytest.raises(CorruptLog, match="the next segment begins at"):
        open_log(tmp_path, SMALL)


def test_a_good_frame_that_does_not_follow_is_damage(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 2)
    header = header_after(BASE)
    with segment_files(tmp_path)[0].open("ab") as file:
        file.write(encode_frame(header, b"x" * 100))
    with pytest.raises(CorruptLog, match="does not follow"):
        open_log(tmp_path)


def test_a_damaged_head_is_damage(tmp_path: Path) -> None:
    fill(open_log(tmp_path), 2)
    flip(segment_files(tmp_path)[0], 30)
    with pytest.raises(CorruptLog, match="at byte 0"):
        open_log(tmp_path)


def test_a_log_of_another_cluster_is_refused(tmp_path: Path) -> None:
    open_log(tmp_path)
    with pytest.raises(HistoryMismatch, match="belongs to cluster"):
        Log.open(tmp_path / "log", cluster=bytes(16), base=BASE, limits=LIMITS)


def test_a_segment_that_never_got_its_name_does_not_count(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log)
    leftover = tmp_path / "log" / "0000000000000002.new"
    leftover.write_bytes(b"half a head")
    assert open_log(tmp_path).tip == log.tip
    assert not leftover.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_a_flip_anywhere_leaves_a_prefix_or_is_reported(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """R5: whatever happens to the last segment, no wrong frame is ever served."""
    directory = tmp_path_factory.mktemp("log")
    log = open_log(directory, SMALL)
    written = []
    for size in (30, 700, 700, 40, 60, 20):
        header = header_after(log.tip)
        written.append(encode_frame(header, payload_of(header, size)))
        log.append(header, written[-1])
    path = segment_files(directory)[-1]
    at = data.draw(st.integers(0, path.stat().st_size - 1), label="byte")
    if data.draw(st.booleans(), label="cut"):
        os.truncate(path, at)
    else:
        flip(path, at, data.draw(st.integers(1, 255), label="mask"))
    try:
        again = open_log(directory, SMALL)
    except CorruptLog:
        return
    found = [again.read(ref) for ref in again.frames_after(BASE.position)]
    assert found == written[: len(found)]
    append(again)
    assert open_log(directory, SMALL).tip == again.tip
