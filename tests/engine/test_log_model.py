"""Random lives of a log against a list of frames: after every step, and after every reopening, they agree."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.engine.log_frames import BASE, SMALL, header_after, open_log, payload_of, term_start_after
from walship.engine.log import Log, LogLimits, Pin
from walship.errors import HistoryMismatch
from walship.formats.checksum import FLAG
from walship.formats.frame import FrameEncoder, FrameHeader, encode_frame
from walship.formats.position import Position, TermHistory, Tip

TIGHT = LogLimits(max_bytes=4000, segment_bytes=SMALL.segment_bytes)


class LogLife(RuleBasedStateMachine):
    """`frames` is what the log must hold after `base`; pruning may only move `base` along it, and never past a pin."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="walship-log-"))
        self.log: Log = open_log(self.directory, TIGHT)
        self.base = BASE
        self.frames: list[tuple[FrameHeader, bytes]] = []
        self.terms: dict[int, int] = {}
        self.pin: Pin | None = None

    def teardown(self) -> None:
        self.log.close()
        shutil.rmtree(self.directory)

    def tip(self) -> Tip:
        return self.frames[-1][0].tip if self.frames else self.base

    def pick(self, chance: random.Random) -> Tip:
        return chance.choice([self.base, *(header.tip for header, _ in self.frames)])

    @rule(size_bytes=st.integers(1, 1500), commits=st.integers(1, 3))
    def append(self, size_bytes: int, commits: int) -> None:
        header = header_after(self.log.tip, commits=commits)
        data = encode_frame(header, payload_of(header, size_bytes))
        self.log.append(header, data)
        self.frames.append((header, data))

    @rule(skipped=st.integers(1, 3))
    def start_term(self, skipped: int) -> None:
        tip = self.log.tip
        header = term_start_after(tip, tip.position.term + skipped)
        data = encode_frame(header)
        self.log.append(header, data)
        self.frames.append((header, data))
        self.terms[header.term] = tip.position.txid

    @rule(size_bytes=st.integers(1, 5000), commit=st.booleans())
    def append_in_pieces(self, size_bytes: int, *, commit: bool) -> None:
        header = header_after(self.log.tip)
        encoder = FrameEncoder(header)
        payload = payload_of(header, size_bytes)
        pieces = [encoder.header_record(), encoder.part(payload), encoder.end()]
        with self.log.begin(header) as frame:
            for piece in pieces if commit else pieces[:2]:
                frame.write(piece)
            if commit:
                frame.commit()
                self.frames.append((header, b"".join(pieces)))

    @rule()
    def sync(self) -> None:
        assert self.log.sync() == self.log.durable_tip == self.tip()

    @rule(chance=st.randoms())
    def move_the_pin(self, chance: random.Random) -> None:
        if self.pin is not None:
            self.pin.release()
        self.pin = self.log.pin(self.pick(chance).position)

    @rule()
    def release_the_pin(self) -> None:
        if self.pin is not None:
            self.pin.release()
            self.pin = None

    @rule(back=st.none() | st.integers(0, 10))
    def prune(self, back: int | None) -> None:
        self.log.prune(keep_from=None if back is None else self.tip().position.txid - back, now_ms=10_000)
        known = [self.base, *(header.tip for header, _ in self.frames)]
        gone = known.index(self.log.base)
        self.base = self.log.base
        del self.frames[:gone]
        if self.pin is not None:
            assert self.pin.position in [tip.position for tip in known[gone:]]
        elif self.log.statistics().segments > 1:
            assert self.log.statistics().size_bytes <= TIGHT.max_bytes

    @rule(chance=st.randoms())
    def truncate(self, chance: random.Random) -> None:
        tip = self.pick(chance)
        whole = tip == self.tip()
        self.log.truncate_to(tip.position)
        while self.tip() != tip:
            self.frames.pop()
        self.terms = {term: start for term, start in self.terms.items() if term <= tip.position.term}
        assert self.log.durable_tip == tip
        if not whole:
            self.pin = None

    @rule(ahead=st.integers(1, 50))
    def reset(self, ahead: int) -> None:
        position = self.tip().position
        self.base = Tip(Position(position.term, position.txid + ahead), FLAG | 5, 9)
        self.log.reset(self.base, TermHistory(self.terms.items()))
        self.frames, self.pin = [], None

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = open_log(self.directory, TIGHT)
        self.pin = None
        assert self.log.durable_tip == self.tip()
        assert self.log.statistics().cut_bytes == 0

    @invariant()
    def it_holds_exactly_the_frames(self) -> None:
        log = self.log
        assert (log.base, log.tip) == (self.base, self.tip())
        assert [log.read(ref) for ref in log.frames_after(self.base.position)] == [data for _, data in self.frames]
        assert dict(log.terms().starts()) == self.terms
        for header, _ in self.frames:
            assert log.locate(header.position, header.checksum) == header.position

    @invariant()
    def it_knows_nothing_else(self) -> None:
        for beyond in (Position(self.tip().position.term, self.tip().position.txid + 1), Position(99, 1)):
            try:
                self.log.next_after(beyond)
            except HistoryMismatch:
                continue
            raise AssertionError(f"{beyond} was found")


LogLife.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLogLife = LogLife.TestCase
