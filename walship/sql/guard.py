"""The guard: what SQLite's authorizer lets a client's statements do on a connection.

Installed on every connection that runs clients' SQL. The authorizer is asked while a statement is prepared, so a
refused one never takes a step. It refuses what would break capture (journal mode, checkpoints), leave the one file
(ATTACH, and with it VACUUM INTO), run foreign code (load_extension, fts3_tokenizer) or damage the database
(writable_schema, sqlite_dbpage); SQLite's defensive mode closes the same doors a second time.

The guard does not ask whether a statement writes: SQLite says that better, after preparing (R22).
"""

from __future__ import annotations

from typing import Final

import apsw

from walship.errors import NotReadOnly, StatementFailed
from walship.sql.pragmas import Action, PragmaCall, rule

__all__ = ["Guard", "blocked", "install"]

BLOCKED: Final = "BLOCKED"

# Functions that run code or reach outside the database.
_REFUSED_FUNCTIONS: Final = frozenset(
    {"load_extension", "fts3_tokenizer", "sqlite_attach", "sqlite_detach", "readfile", "writefile", "edit"}
)
# Eponymous tables that are the file itself, below SQL.
_RAW_TABLES: Final = frozenset({"sqlite_dbpage"})
_CHANGING_ACTIONS: Final = frozenset({apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE})


def blocked(reason: str) -> StatementFailed:
    """The error for something the guard (or the classifier) refuses."""
    return StatementFailed(f"Operation was blocked: {reason}", BLOCKED)


class Guard:
    """The authorizer of one connection.

    An exception raised here comes out of `execute` or `prepare` as it is: StatementFailed BLOCKED, or NotReadOnly
    for a PRAGMA that would change a connection which several clients share (it belongs to the leader, R22).
    """

    __slots__ = ("_shared",)

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared

    def __call__(self, action: int, first: str | None, second: str | None, schema: str | None, _: str | None) -> int:
        if action == apsw.SQLITE_PRAGMA:
            self._check_pragma(first or "", second)
        elif action == apsw.SQLITE_FUNCTION:
            if (second or "").lower() in _REFUSED_FUNCTIONS:
                raise blocked(f"the function {second} is not available on the server")
        elif action == apsw.SQLITE_ATTACH:
            # VACUUM attaches a nameless temporary database through here; `ATTACH ''` itself the classifier refuses.
            if first != "":
                raise blocked("a walship database is one file; ATTACH and VACUUM INTO are not available")
        elif action == apsw.SQLITE_DETACH:
            raise blocked("a walship database is one file; DETACH is not available")
        elif action in _CHANGING_ACTIONS and (first or "").lower() in _RAW_TABLES:
            raise blocked(f"{first} cannot be written through SQL")
        return apsw.SQLITE_OK

    def _check_pragma(self, name: str, argument: str | None) -> None:
        ruling = rule(PragmaCall(name.lower(), argument))
        if ruling.action is Action.REFUSED:
            raise blocked(ruling.reason)
        if argument is None:
            return
        if ruling.action in (Action.ANSWER, Action.WALSHIP):
            raise blocked(f"PRAGMA {name} is set by walship itself")
        if ruling.action is Action.STREAM and self._shared:
            raise NotReadOnly(f"PRAGMA {name} = {argument} changes the connection; only a stream's own can take it")


def install(connection: apsw.Connection, *, follower: bool, shared: bool | None = None) -> Guard:
    """Guard `connection` from now on, and put it into SQLite's defensive mode.

    Args:
        follower: the connection belongs to a node that runs no writes.
        shared: statements of several clients run on it (a follower's readers, the leader's writer connection), so
            none may change its settings. By default what `follower` says.

    Call it before the first statement of a client: what was prepared earlier is not looked at again.
    """
    guard = Guard(shared=follower if shared is None else shared)
    connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    connection.enable_load_extension(False)
    connection.authorizer = guard
    return guard
