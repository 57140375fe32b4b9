"""The PRAGMA policy is complete for the SQLite we are pinned to."""

from __future__ import annotations

from pathlib import Path

import apsw
import apsw.ext
import pytest

from tests.sql.pragma_table import GROUPS, page_tables
from walship.sql.pragmas import POLICIES, Action, PragmaCall, rule


def test_every_pragma_of_this_sqlite_has_a_policy() -> None:
    known = {name for (name,) in apsw.Connection(":memory:").execute("pragma pragma_list")}
    assert known - POLICIES.keys() == set()


@pytest.mark.parametrize("heading", sorted(GROUPS))
def test_the_page_says_what_the_policy_does(heading: str) -> None:
    """docs/pragmas.md; `python -m tests.sql.pragma_table` prints the tables anew."""
    page = (Path(__file__).parents[2] / "docs" / "pragmas.md").read_text()
    assert page_tables()[heading] in page


def test_the_page_has_every_pragma() -> None:
    assert {policy.set for policy in POLICIES.values()} == set(GROUPS.values())


def test_an_unknown_pragma_is_refused_by_name() -> None:
    ruling = rule(PragmaCall("frobnicate"))
    assert ruling.action is Action.REFUSED
    assert "frobnicate" in ruling.reason


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_plain_read_is_a_read_for_sqlite_too(name: str) -> None:
    """R22: a query form called READ must not be refused by a read-only connection."""
    if POLICIES[name].query is not Action.READ or name in ("writable_schema", "schema_version"):
        return
    connection = apsw.Connection(":memory:")
    connection.execute("create table x(a)")
    assert apsw.ext.query_info(connection, f"pragma {name}").is_readonly
    if POLICIES[name].set is Action.READ:
        assert apsw.ext.query_info(connection, f"pragma {name}('x')").is_readonly


@pytest.mark.parametrize("name", sorted(name for name, policy in POLICIES.items() if policy.set is Action.STREAM))
def test_a_stream_setting_really_is_state_of_the_connection(name: str) -> None:
    if name == "data_version":
        return
    connection = apsw.Connection(":memory:")
    connection.execute(f"pragma {name} = 1")
