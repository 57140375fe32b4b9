"""What kind of statement a text is, by its words alone: enough to route it, never enough to trust it.

SQLite decides what is a read, on the node that runs it (R22); the guard decides what is allowed. This module
answers what must be known before: verb, transaction words, one statement or several, use of connection state.
A mistake here may only cost a detour, so whatever is not understood counts as a write.

Tokens are SQLite's (tokenize.c): blanks, both kinds of comments, strings, names quoted in four ways, variables,
and the body of a trigger, whose inner semicolons end nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

from walship.sql.pragmas import Action, PragmaCall, Ruling, rule

__all__ = ["EMPTY_VERDICT", "Kind", "Verdict", "classify", "counts_changes", "is_insert", "split"]


class Kind(StrEnum):
    """What a statement asks of the one who runs it."""

    READ_CANDIDATE = "read candidate"
    """Probably a read; a follower may try it."""
    WRITE = "write"
    BEGIN_DEFERRED = "begin deferred"
    BEGIN_IMMEDIATE = "begin immediate"
    """Also BEGIN EXCLUSIVE: in WAL mode they differ in nothing."""
    BEGIN_READONLY = "begin readonly"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    SAVEPOINT = "savepoint"
    RELEASE = "release"
    ROLLBACK_TO = "rollback to"
    PRAGMA = "pragma"
    """A PRAGMA that is neither a plain read nor a write: see `Verdict.ruling`."""
    CONNECTION_STATE = "connection state"
    """Means something only on the stream's own connection: TEMP objects, changes(), last_insert_rowid()."""
    REFUSED = "refused"
    EMPTY = "empty"
    MANY = "many"
    """More than one statement: see `split`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of `classify`.

    Attributes:
        verb: first word in upper case; for WITH the verb after it; for EXPLAIN that word.
        is_insert: last_insert_rowid is reported (hrana.md 1.3).
        counts_changes: affected_row_count is `changes()`; otherwise it is 0.
        session_functions: uses changes(), total_changes() or last_insert_rowid().
        pragma, ruling: for any PRAGMA statement, its parts and the policy's answer.
        reason: why it is refused, for Kind.REFUSED.
    """

    kind: Kind
    verb: str = ""
    is_insert: bool = False
    counts_changes: bool = False
    session_functions: bool = False
    pragma: PragmaCall | None = None
    ruling: Ruling | None = None
    reason: str = ""


EMPTY_VERDICT: Final = Verdict(Kind.EMPTY)

_ID = r"A-Za-z0-9_$\x80-\U0010ffff"
_WORD = rf"[A-Za-z_\x80-\U0010ffff] [{_ID}]*+"
_BLANK = r"[ \t\n\f\r] [ \t\n\v\f\r]*+ | \ufeff | --[^\n]*+ | /\*(?: .*?\*/ | .+ )"
_STRING = r"'[^']*+(?: ''[^']*+ )*+ (?:'|\Z)"
_NAME = r'"[^"]*+(?: ""[^"]*+ )*+ (?:"|\Z) | `[^`]*+(?: ``[^`]*+ )*+ (?:`|\Z) | \[[^\]]*+ (?:\]|\Z)'
# Malformed ones are taken whole, as SQLite does: every part of the pattern is linear in the text.
_VARIABLE = rf"[$@:\#] (?: [{_ID}]++ | :: )*+ (?: \( [^ \t\n\v\f\r)]*+ \)?+ )?+ | \?[0-9]*+"
_NUMBER = rf"[0-9] [{_ID}.]*+"

_TOKEN: Final = re.compile(
    rf"""
      (?P<blank> (?: {_BLANK} )++ )
    | (?P<word> {_WORD} )
    | (?P<string> {_STRING} )
    | (?P<name> {_NAME} )
    | (?P<end> ; )
    | (?P<variable> {_VARIABLE} )
    | (?P<number> {_NUMBER} )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)

_BETWEEN: Final = re.compile(r"[ \t\n\f\r;]*+")  # nothing, as often as somebody likes to say it

# More tokens than any transaction statement or PRAGMA needs to be recognized by; the rest is not kept, so that a
# megabyte of INSERT costs no more memory than its text.
_HEAD: Final = 16
_SESSION_FUNCTIONS: Final = frozenset({"changes", "total_changes", "last_insert_rowid"})
_TEMP_TABLES: Final = frozenset({"sqlite_temp_master", "sqlite_temp_schema"})
_TELLING: Final = _SESSION_FUNCTIONS | _TEMP_TABLES | {"temp"}

# Behind its head a statement is interesting only for its end and for the telling names: all else is passed over in
# one match, ten times as fast as token by token, since this runs on event loops.
_TELLING_WORDS = "|".join(sorted(_TELLING))
_BORING: Final = re.compile(
    rf"""
    (?: [^;'"`\[\-/A-Za-z_$@:\#?0-9\x80-\U0010ffff]++
      | {_BLANK}
      | (?! (?:{_TELLING_WORDS}) (?![{_ID}]) ) {_WORD}
      | (?! ['"`\[] (?:{_TELLING_WORDS}) ['"`\]] ) (?: {_STRING} | {_NAME} )
      | {_VARIABLE}
      | {_NUMBER}
      | [-/]
    )*+
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int

    @property
    def plain(self) -> str:
        """The token as a name: without quotes, lower case."""
        text = self.text
        return (text[1:-1] if self.kind in ("name", "string") else text).lower()


class _Statement:
    """One statement while its tokens pass by: its first tokens, and what the others gave away.

    Attributes:
        head: the first tokens, `length` how many there were in all.
        start, end: where it lies in the text.
        main_verb: for WITH, the verb after the table expressions.
        session_functions, temp: it calls changes() and the like; it names something TEMP.
    """

    __slots__ = (
        "_after_cte",
        "_closed",
        "_depth",
        "_previous",
        "_telling",
        "_trigger",
        "end",
        "head",
        "length",
        "main_verb",
        "session_functions",
        "start",
        "temp",
    )

    def __init__(self, first: _Token) -> None:
        self.head: list[_Token] = []
        self.length = 0
        self.start = first.start
        self.end = first.end
        self.main_verb = ""
        self.session_functions = False
        self.temp = False
        self._depth = 0
        self._after_cte = first.plain == "with"
        self._telling = ""
        self._trigger = False
        self._closed = False
        self._previous = ""
        self.add(first)

    def add(self, token: _Token) -> None:
        kind, text, _, self.end = token
        self.length += 1
        if self.length <= _HEAD:
            self.head.append(token)
        name = token.plain if kind in ("word", "name", "string") else ""
        if self._telling:
            self.session_functions |= text == "(" and self._telling in _SESSION_FUNCTIONS
            self.temp |= text == "." and self._telling == "temp"
        self._telling = name if name in _TELLING else ""
        self.temp |= name in _TEMP_TABLES
        if self._after_cte:
            self._follow_with(kind, text)
        if self._trigger:
            # Only an END right after a semicolon closes the body: any other belongs to a CASE.
            self._closed = kind == "word" and name == "end" and self._previous == ";"
        elif kind == "word" and name == "trigger" and self.length <= _TRIGGER_WITHIN:
            self._trigger = _is_create_trigger(self.head)
        self._previous = text

    def pass_over(self, sql: str, at: int) -> int:
        """Skip what is boring from `at` on; returns where something interesting may be."""
        match = _BORING.match(sql, at)
        end = at if match is None else match.end()
        if end > at:
            self.end = max(self.end, at + len(sql[at:end].rstrip(" \t\n\v\f\r")))
        return end

    @property
    def bored(self) -> bool:
        """Is nothing left to learn but where it ends, and whether a telling name comes?"""
        return self.length >= _HEAD and not (self._after_cte or self._trigger or self._telling)

    def ends_here(self) -> bool:
        """Does a semicolon at this place end the statement?"""
        return not self._trigger or self._closed

    def _follow_with(self, kind: str, text: str) -> None:
        """Find the verb of `WITH ... verb`: the word that follows the body of the last table expression.

        A table expression may be called anything, REPLACE included, so the verb is known by its place: after a
        closing parenthesis at depth 0, and not the AS that follows a list of columns.
        """
        if text == "(":
            self._depth += 1
        elif text == ")":
            self._depth -= 1
        elif kind == "word" and self._depth == 0 and self._previous == ")" and text.upper() != "AS":
            self.main_verb, self._after_cte = text.upper(), False


_TRIGGER_WITHIN: Final = 6  # EXPLAIN QUERY PLAN CREATE TEMP TRIGGER


def _is_create_trigger(head: list[_Token]) -> bool:
    words = [token.plain for token in head]
    if words[:1] == ["explain"]:
        words = words[3:] if words[1:3] == ["query", "plan"] else words[1:]
    return words in (["create", "trigger"], ["create", "temp", "trigger"], ["create", "temporary", "trigger"])


def _statements(sql: str) -> Iterator[_Statement]:
    """The statements of a text; empty ones are left out."""
    statement: _Statement | None = None
    at, size = 0, len(sql)
    while at < size:
        if statement is not None and statement.bored:
            at = statement.pass_over(sql, at)
        match = _TOKEN.match(sql, at)
        if match is None:
            break
        at = match.end()
        kind = match.lastgroup or "other"
        if kind == "blank":
            continue
        token = _Token(kind, match[0], match.start(), at)
        if kind == "end" and (statement is None or statement.ends_here()):
            if statement is not None:
                yield statement
            statement = None
            at = _BETWEEN.match(sql, at).end()  # type: ignore[union-attr]  # it matches everywhere
        elif statement is None:
            statement = _Statement(token)
        else:
            statement.add(token)
    if statement is not None:
        yield statement


def split(sql: str) -> list[str]:
    """The statements of a text, each without its semicolon and surrounding blanks; empty ones are left out.

    A long one may keep a comment at its end.
    """
    return [sql[statement.start : statement.end] for statement in _statements(sql)]


# A verdict is small but its key is the text: long texts, which seldom repeat, are not kept.
_MAX_CACHED_CHARS: Final = 8192
_MAX_CACHED: Final = 4096


def classify(sql: str) -> Verdict:
    """The verdict on a text. Pure and total: any text has one. Cached for texts up to 8192 characters."""
    return _cached(sql) if len(sql) <= _MAX_CACHED_CHARS else _judge(sql)


def is_insert(sql: str) -> bool:
    """Does this statement set last_insert_rowid for its client?"""
    return classify(sql).is_insert


def counts_changes(sql: str) -> bool:
    """Does this statement report `changes()` as its affected_row_count?"""
    return classify(sql).counts_changes


def _judge(sql: str) -> Verdict:
    statements = _statements(sql)
    first = next(statements, None)
    if first is None:
        return EMPTY_VERDICT
    return _verdict(first) if next(statements, None) is None else Verdict(Kind.MANY)


_cached = lru_cache(_MAX_CACHED)(_judge)

_CHANGING = frozenset({"INSERT", "REPLACE", "UPDATE", "DELETE"})
_INSERTING = frozenset({"INSERT", "REPLACE"})
_READING = frozenset({"SELECT", "VALUES"})
_TRANSACTION_KINDS: Final[dict[str, Kind]] = {
    "DEFERRED": Kind.BEGIN_DEFERRED,
    "IMMEDIATE": Kind.BEGIN_IMMEDIATE,
    "EXCLUSIVE": Kind.BEGIN_IMMEDIATE,
    "READONLY": Kind.BEGIN_READONLY,
}


def _verdict(statement: _Statement) -> Verdict:
    first = statement.head[0]
    verb = first.text.upper() if first.kind == "word" else ""
    special = _SPECIAL.get(verb)
    if special is not None:
        return special(statement)
    if verb == "WITH":
        verb = statement.main_verb or verb
    if statement.session_functions or statement.temp or _creates_temp(statement.head):
        kind = Kind.CONNECTION_STATE
    else:
        kind = Kind.READ_CANDIDATE if verb in _READING else Kind.WRITE
    return Verdict(kind, verb, verb in _INSERTING, verb in _CHANGING, statement.session_functions)


def _creates_temp(head: list[_Token]) -> bool:
    return len(head) > 1 and head[0].plain == "create" and head[1].plain in ("temp", "temporary")


def _begin(statement: _Statement) -> Verdict:
    """BEGIN [DEFERRED|IMMEDIATE|EXCLUSIVE|READONLY] [TRANSACTION [name]]; READONLY also in the name's place.

    Anything else is a syntax error, for SQLite to report.
    """
    tokens = statement.head
    words = [token.plain.upper() for token in tokens[1:]]
    kind = Kind.BEGIN_DEFERRED
    if words and words[0] in _TRANSACTION_KINDS:
        kind = _TRANSACTION_KINDS[words.pop(0)]
    if words and words[0] == "TRANSACTION":
        words.pop(0)
        if words and tokens[-1].kind in ("word", "name", "string") and words.pop(0) == "READONLY":
            kind = Kind.BEGIN_READONLY
    return Verdict(Kind.WRITE if words else kind, "BEGIN")


def _commit(statement: _Statement) -> Verdict:
    return Verdict(Kind.COMMIT, statement.head[0].text.upper())


def _rollback(statement: _Statement) -> Verdict:
    """ROLLBACK [TRANSACTION [name]] [TO [SAVEPOINT] name]; the transaction's name may itself be TO, quoted."""
    to = any(token.kind == "word" and token.plain == "to" for token in statement.head[1:4])
    return Verdict(Kind.ROLLBACK_TO if to else Kind.ROLLBACK, "ROLLBACK")


def _savepoint(_: _Statement) -> Verdict:
    return Verdict(Kind.SAVEPOINT, "SAVEPOINT")


def _release(_: _Statement) -> Verdict:
    return Verdict(Kind.RELEASE, "RELEASE")


def _explain(_: _Statement) -> Verdict:
    return Verdict(Kind.READ_CANDIDATE, "EXPLAIN")


def _attach(statement: _Statement) -> Verdict:
    verb = statement.head[0].text.upper()
    reason = f"{verb}: a walship database is one file; what is attached would not be replicated"
    return Verdict(Kind.REFUSED, verb, reason=reason)


def _vacuum(statement: _Statement) -> Verdict:
    if any(token.kind == "word" and token.plain == "into" for token in statement.head[1:3]):
        reason = "VACUUM INTO: it would write a file on the server; use `walship snapshot`"
        return Verdict(Kind.REFUSED, "VACUUM", reason=reason)
    return Verdict(Kind.WRITE, "VACUUM")


_PRAGMA_KINDS: Final[dict[Action, Kind]] = {
    Action.READ: Kind.READ_CANDIDATE,
    Action.WRITE: Kind.WRITE,
    Action.STREAM: Kind.CONNECTION_STATE,
    Action.ANSWER: Kind.PRAGMA,
    Action.WALSHIP: Kind.PRAGMA,
    Action.REFUSED: Kind.REFUSED,
}


def _pragma(statement: _Statement) -> Verdict:
    call = _parse_pragma(statement.head[1:]) if statement.length <= _HEAD else None
    if call is None:
        return Verdict(Kind.WRITE, "PRAGMA")
    ruling = rule(call)
    kind = _PRAGMA_KINDS[ruling.action]
    if kind is Kind.READ_CANDIDATE and call.schema == "temp":
        kind = Kind.CONNECTION_STATE
    return Verdict(kind, "PRAGMA", pragma=call, ruling=ruling, reason=ruling.reason)


def _parse_pragma(tokens: list[_Token]) -> PragmaCall | None:
    """`[schema .] name [= value | ( value )]`; None when it is not that, which SQLite will say better."""
    schema: str | None = None
    if len(tokens) >= 3 and tokens[1].text == ".":
        schema, tokens = tokens[0].plain, tokens[2:]
    if not tokens or tokens[0].kind not in ("word", "name", "string"):
        return None
    name, rest = tokens[0].plain, tokens[1:]
    if not rest:
        return PragmaCall(name, None, schema)
    if rest[0].text == "=":
        rest = rest[1:]
    elif rest[0].text == "(" and rest[-1].text == ")":
        rest = rest[1:-1]
    else:
        return None
    if not rest:
        return None
    return PragmaCall(name, "".join([token.plain for token in rest]), schema)


_SPECIAL: Final = {
    "BEGIN": _begin,
    "COMMIT": _commit,
    "END": _commit,
    "ROLLBACK": _rollback,
    "SAVEPOINT": _savepoint,
    "RELEASE": _release,
    "EXPLAIN": _explain,
    "ATTACH": _attach,
    "DETACH": _attach,
    "VACUUM": _vacuum,
    "PRAGMA": _pragma,
}
