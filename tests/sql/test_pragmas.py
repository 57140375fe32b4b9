"""The PRAGMA policy is complete for the SQLite we are pinned to."""

from __future__ import annotations

import apsw
import apsw.ext
import pytest

from walship.sql.pragmas import POLICIES, Action, PragmaCall, rule


def test_every_pragma_of_this_sqlite_has_a_policy() -> None:
    known = {name for (name,) in apsw.Connection(":memory:").execute("pragma pragma_list")}
    assert known - POLICIES.keys() == set()


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
