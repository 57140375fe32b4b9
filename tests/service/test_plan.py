"""Where a list of requests may run, by its words alone (R21, R22)."""

from __future__ import annotations

import pytest

from tests.service.bench import CLOSE, batch, execute
from walship.errors import ProtocolViolation
from walship.hrana.types import And, BatchRequest, Cond, IsAutocommit, IsOk, Not, Or, SequenceRequest
from walship.service.limits import Limits
from walship.service.plan import look, resolve


def settled(last: Cond | None, *, commit: str = "COMMIT") -> bool:
    request = batch("BEGIN", ("INSERT INTO t VALUES (1)", IsOk(0)), (commit, IsOk(1)), ("ROLLBACK", last))
    return look([request], closing=False).certain


@pytest.mark.parametrize("last", [Not(IsOk(2)), And([IsOk(0), Not(IsOk(2))]), And([Not(IsOk(2))]), None])
def test_rollback_that_runs_unless_the_commit_went_well_settles_a_batch(last: Cond | None) -> None:
    """hrana.md 2.4: the shapes of @libsql/client and of the serverless clients."""
    assert settled(last)


@pytest.mark.parametrize(
    "last", [IsOk(2), Not(IsOk(1)), And([IsOk(1), Not(IsOk(2))]), Or([Not(IsOk(2))]), Not(IsAutocommit())]
)
def test_any_other_condition_leaves_it_open_to_doubt(last: Cond) -> None:
    """A batch that might leave its transaction open gets a connection on which that can go on."""
    assert not settled(last)


def test_a_rollback_before_the_end_is_not_a_commit() -> None:
    assert not settled(Not(IsOk(2)), commit="ROLLBACK")


def test_closing_settles_everything() -> None:
    items, closing = resolve([execute("BEGIN"), execute("INSERT INTO t VALUES (1)"), CLOSE], {}, Limits())
    assert look(items, closing=closing).certain
    assert not look(items, closing=False).certain


@pytest.mark.parametrize(
    ("sql", "writes", "own"),
    [
        ("SELECT 1", False, False),
        ("WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x", True, False),
        ("EXPLAIN DELETE FROM t", False, False),
        ("PRAGMA table_info(t)", False, False),
        ("PRAGMA journal_mode = WAL", False, False),
        ("PRAGMA user_version = 3", True, False),
        ("PRAGMA foreign_keys = ON", False, True),
        ("CREATE TEMP TABLE x (a)", False, True),
        ("CREATE TEMP TABLE x AS SELECT changes()", False, True),
        ("SELECT changes()", False, False),
        ("INSERT INTO t VALUES (last_insert_rowid())", True, False),
        ("BEGIN IMMEDIATE", True, False),
        ("ATTACH 'x' AS y", False, False),
    ],
)
def test_statements_are_told_apart(sql: str, writes: bool, own: bool) -> None:
    needs = look([execute(sql)], closing=True)
    assert (needs.writes, needs.own_connection) == (writes, own)


def test_each_statement_of_a_sequence_counts() -> None:
    needs = look([SequenceRequest(sql="SELECT 1; PRAGMA foreign_keys = ON; DELETE FROM t")], closing=False)
    assert (needs.writes, needs.own_connection, needs.certain) == (True, True, True)


def test_readonly_is_told_only_when_every_begin_says_so() -> None:
    readonly, deferred = execute("BEGIN TRANSACTION READONLY"), execute("BEGIN")
    assert look([readonly], closing=False).read_only
    assert not look([readonly, execute("COMMIT"), deferred], closing=False).read_only


def test_requests_and_steps_are_bounded() -> None:
    limits = Limits(requests=3)
    with pytest.raises(ProtocolViolation, match="too many requests"):
        resolve([execute("SELECT 1")] * 4, {}, limits)
    steps: BatchRequest = batch(*["SELECT 1"] * 4)
    with pytest.raises(ProtocolViolation, match="too many steps"):
        resolve([steps], {}, limits)
