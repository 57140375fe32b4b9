"""Random requests on random streams: what is said of a call agrees with what it committed (R19, R20, R21).

Each call has a token. Whatever it is made of, if the database holds more afterwards than before, nobody says `not
done`, and the log has its token; if it does not, nobody says `done`.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import apsw
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.bench import Bench, batch, execute, leading, steps_of
from walship.errors import Fenced, NotDone, Unavailable, WalshipError
from walship.formats.link_words import Outcome
from walship.hrana.types import Level, SequenceRequest, StreamRequest
from walship.service.limits import Limits
from walship.service.request import Call

WORDS = ("BEGIN", "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK", "SAVEPOINT a", "RELEASE a", "ROLLBACK TO a")
STATEMENTS = (
    "INSERT INTO t (a) VALUES (1)",
    "INSERT INTO t (a) VALUES (1) RETURNING id",
    "INSERT INTO logged VALUES (1)",
    "INSERT INTO t (id, a) VALUES (1, 1)",  # fails: it is there
    "INSERT OR ROLLBACK INTO t (id, a) VALUES (1, 1)",
    "INSERT INTO nothing VALUES (1)",
    "SELECT count(*) FROM t",
    "PRAGMA foreign_keys = ON",
    "CREATE TEMP TABLE IF NOT EXISTS mine (x)",
)
texts = st.sampled_from(WORDS + STATEMENTS)
requests = st.one_of(
    texts.map(execute),
    st.lists(texts, min_size=1, max_size=5).map(lambda steps: batch(*steps)),
    st.lists(texts, min_size=1, max_size=5).map(lambda pieces: SequenceRequest(";".join(pieces))),
)
calls = st.tuples(
    st.sampled_from(("new", "open", "cursor", "cursor on open")),
    st.lists(requests, min_size=1, max_size=3),
    st.lists(texts, min_size=1, max_size=5),
    st.sampled_from((Level.ANY, Level.SESSION)),
)


class Told:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.reader: apsw.Connection = bench.host.database.connect_reader()
        self.stream = 0
        self.seq = 0

    def rows(self) -> int:
        return int(self.reader.execute("SELECT (SELECT count(*) FROM t) + (SELECT count(*) FROM logged)").get)

    async def call(self, how: str, made_of: list[StreamRequest], steps: list[str], level: Level) -> None:
        bench, writer = self.bench, self.bench.host.writer
        assert writer is not None
        self.seq += 1
        name, known, before = (9, self.seq), bench.host.watermarks.captured, self.rows()
        stream = self.stream if how.endswith("open") else 0
        if not stream and self.stream:
            await bench.service.close_stream(self.stream)  # it may hold the turn
        self.stream = 0
        call = Call(made_of, stream=stream, keep=True, level=level, term=1, token=name)
        error: WalshipError | None = None
        try:
            if how.startswith("cursor"):
                reply = await bench.service.cursor(replace(call, requests=[]), steps_of(*steps))
                async for _ in reply.lines:
                    pass
                self.stream = reply.stream
            else:
                self.stream = (await bench.service.pipeline(call)).stream
        except WalshipError as raised:
            error = raised
        outcome, _ = writer.attempts.outcome(name, known)
        grew = self.rows() > before
        if grew:
            assert not isinstance(error, NotDone | Fenced | Unavailable), error
            assert outcome is Outcome.DONE, outcome
            assert writer._leader.log.tokens.lookup(name) is not None
        else:
            assert outcome is Outcome.NOT_DONE, outcome


@settings(max_examples=40, deadline=None)
@given(st.lists(calls, min_size=1, max_size=12))
def test_what_is_said_of_a_call_is_what_it_committed(
    made: list[tuple[str, list[StreamRequest], list[str], Level]],
) -> None:
    async def live(directory: Path) -> None:
        async with asyncio.timeout(60), leading(directory / "n", Limits()) as bench:
            await bench.run("CREATE TABLE t (id INTEGER PRIMARY KEY, a)")
            await bench.run("INSERT INTO t VALUES (1, 0)")
            await bench.run("CREATE TABLE logged (a)")
            await bench.run("CREATE TRIGGER more AFTER INSERT ON logged BEGIN INSERT INTO t (a) VALUES (2); END")
            told = Told(bench)
            for each in made:
                await told.call(*each)
            told.reader.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(live(Path(directory)))
