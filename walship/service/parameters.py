"""The parameters of a statement, with their prefixes, read from its text (hrana.md 1.3).

SQLite knows the prefix too, but apsw drops it, and Hrana's describe must give it. The numbering is SQLite's own
(lang_expr, section 3): `?` takes the next number after the largest so far, `?NNN` takes NNN, a name that occurred
before keeps its number, a new name takes the next.
"""

from __future__ import annotations

import re

__all__ = ["MAX_PARAMETER", "parameters"]

MAX_PARAMETER = 32766  # SQLITE_MAX_VARIABLE_NUMBER's default; SQLite refuses larger numbers itself

# Everything in which a `?`, `:`, `@` or `$` is no parameter comes first; identifiers too, since they may contain `$`.
_TOKEN = re.compile(
    r"""
      '(?:[^']|'')*'? | "(?:[^"]|"")*"? | `(?:[^`]|``)*`? | \[[^\]]*\]?
    | --[^\n]* | /\*.*?(?:\*/|\Z)
    | [A-Za-z_\x80-\U0010ffff0-9][A-Za-z0-9_$\x80-\U0010ffff]*
    | (?P<parameter> \?[0-9]* | [:@][A-Za-z0-9_$\x80-\U0010ffff]+
                   | \$(?:[A-Za-z0-9_$\x80-\U0010ffff]|::)+(?:\([^\s)]*\))? )
    """,
    re.VERBOSE | re.DOTALL,
)


# Bounded in entries and in the size of each, since clients choose both.
_cache: dict[str, tuple[str | None, ...]] = {}
_CACHED_TEXTS, _CACHED_CHARACTERS, _CACHED_NAMES = 2048, 4096, 256


def parameters(sql: str) -> tuple[str | None, ...]:
    """Names in the order of their numbers: None for `?` and for numbers never used. `sql` is one statement.

    A number above MAX_PARAMETER ends the list: SQLite will refuse the statement with its own words.
    """
    known = _cache.get(sql)
    if known is None:
        known = _scan(sql)
        if len(sql) <= _CACHED_CHARACTERS and len(known) <= _CACHED_NAMES:
            if len(_cache) >= _CACHED_TEXTS:
                _cache.clear()
            _cache[sql] = known
    return known


def _scan(sql: str) -> tuple[str | None, ...]:
    names: list[str | None] = []
    numbers: dict[str, int] = {}
    for match in _TOKEN.finditer(sql):
        text = match["parameter"]
        if text is None:
            continue
        if text == "?":
            names.append(None)
        elif text[0] == "?":
            number = int(text[1:])
            if not 0 < number <= MAX_PARAMETER:
                break
            names.extend([None] * (number - len(names)))
            names[number - 1] = names[number - 1] or text
        elif text not in numbers:
            names.append(text)
            numbers[text] = len(names)
    return tuple(names)
