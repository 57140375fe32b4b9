"""Parameter names and numbers agree with SQLite's own (hrana.md 1.3, the prefix trap)."""

from __future__ import annotations

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.service.parameters import MAX_PARAMETER, parameters

PIECES = st.sampled_from(
    [
        "?", "?2", "?7", ":a", ":a1", "@a", "$a", "$a::b", "$a(x)", ":\u00e9", "'?'", "'it''s :no'", '"?"', "`:x`",
        "[@y]", "/* ? */ 1", "-- :z\n 2", "a$b", "x'3f'", "1e5", "json('{}') ->> '?'", "(?)", "- ?", "count(:a)",
    ]
)  # fmt: skip


def sqlite_names(sql: str, count: int) -> tuple[str | None, ...] | None:
    """SQLite's names without prefix; None when it refuses the text."""
    cursor = apsw.Connection(":memory:").cursor()
    cursor.exec_trace = lambda *_: False
    try:
        cursor.execute(sql, (None,) * count)
    except apsw.ExecTraceAbort:
        return cursor.bindings_names
    except apsw.SQLError:
        return None
    raise AssertionError("the statement ran")


@given(st.lists(PIECES, min_size=1, max_size=8))
def test_names_and_numbers_are_sqlites(pieces: list[str]) -> None:
    columns = '"?" TEXT, "`:x`", [@y], a$b'
    sql = f"WITH s({columns.replace(' TEXT', '')}) AS (SELECT 1, 2, 3, 4) SELECT {', '.join(pieces)} FROM s"
    found = parameters(sql)
    names = sqlite_names(sql, len(found))
    if names is not None:
        assert tuple(name and name[1:] for name in found) == names


@given(st.text())
def test_any_text_has_an_answer(sql: str) -> None:
    assert len(parameters(sql)) <= MAX_PARAMETER


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT ?, :a, ?, @b, $c, :a", (None, ":a", None, "@b", "$c")),
        ("SELECT ?3, ?", (None, None, "?3", None)),
        ("SELECT '?' -- ?", ()),
        ("SELECT ?99999999999", ()),
    ],
)
def test_prefixes_are_kept(sql: str, names: tuple[str | None, ...]) -> None:
    assert parameters(sql) == names
