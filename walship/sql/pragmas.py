"""What a PRAGMA may do here: a policy table by name, for the query form and for the form with an argument.

Programs set PRAGMAs at start that make no sense, or would do harm, in a replicated database (hrana.md 3.2). A
refusal breaks them, silence misleads them; so a setting that walship decides itself (journal_mode, synchronous,
busy_timeout...) is accepted, changes nothing, and answers with the value in force. Settings of a connection become
state of the stream; settings of the database are writes; what would break capture or the file is refused, and so is
another journal mode or page size than there is: whoever asks for one of those relies on getting it.

Every PRAGMA of the SQLite we are pinned to is listed; an unlisted one is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["Action", "Policy", "PragmaCall", "Ruling", "repeatable", "rule"]


class Action(StrEnum):
    """How a PRAGMA statement is to be treated."""

    READ = "read"
    """Runs as a read, on any node."""
    WRITE = "write"
    """Changes the database: runs as a write on the leader."""
    STREAM = "stream"
    """Changes or depends on one connection: the stream's statements run on the leader from then on, on a connection
    that has its settings."""
    ANSWER = "answer"
    """Changes nothing; the answer is the value in force, fixed or read by `Ruling.query`."""
    WALSHIP = "walship"
    """One of walship's own settings, answered by the proxy (or a node as front door)."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class PragmaCall:
    """A PRAGMA statement taken apart: lower-case name, schema and argument without quotes, None when absent."""

    name: str
    argument: str | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy of one PRAGMA. `value`: the one value in force everywhere, for Action.ANSWER; with a `reason` there,
    setting another one is refused."""

    query: Action
    set: Action
    value: int | str | None = None
    column: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What to do with one statement.

    For Action.ANSWER: reply with one row (`column`: `value`), or, when `value` is None, with what `query` reads. With a
    `reason`, an argument that differs from what `query` reads is refused for it.
    """

    action: Action
    column: str = ""
    value: int | str | None = None
    query: str | None = None
    reason: str = ""


_READ = Policy(Action.READ, Action.READ)
_STREAM = Policy(Action.READ, Action.STREAM)
_WRITE = Policy(Action.READ, Action.WRITE)
_KEPT = Policy(Action.READ, Action.ANSWER)


def _fixed(value: int | str, column: str | None = None, *, reason: str = "") -> Policy:
    return Policy(Action.ANSWER, Action.ANSWER, value, column, reason)


def _refused(reason: str, query: Action = Action.REFUSED) -> Policy:
    return Policy(query, Action.REFUSED, reason=reason)


_DEBUG_ONLY = _refused("it is a debugging aid of SQLite")
_DANGEROUS = _refused("it can damage the database", query=Action.READ)

POLICIES: Final[dict[str, Policy]] = {
    # The argument, if any, only says what to look at.
    "collation_list": _READ,
    "compile_options": _READ,
    "database_list": _READ,
    "foreign_key_check": _READ,
    "foreign_key_list": _READ,
    "freelist_count": _READ,
    "function_list": _READ,
    "index_info": _READ,
    "index_list": _READ,
    "index_xinfo": _READ,
    "integrity_check": _READ,
    "module_list": _READ,
    "page_count": _READ,
    "pragma_list": _READ,
    "quick_check": _READ,
    "stats": _READ,
    "table_info": _READ,
    "table_list": _READ,
    "table_xinfo": _READ,
    # A read, but its value means something only on the connection it was read on before.
    "data_version": Policy(Action.STREAM, Action.STREAM),
    # State of one connection.
    "analysis_limit": _STREAM,
    "automatic_index": _STREAM,
    "case_sensitive_like": _STREAM,
    "cell_size_check": _STREAM,
    "count_changes": _STREAM,
    "defer_foreign_keys": _STREAM,
    "empty_result_callbacks": _STREAM,
    "foreign_keys": _STREAM,
    "full_column_names": _STREAM,
    "ignore_check_constraints": _STREAM,
    "legacy_alter_table": _STREAM,
    "query_only": _STREAM,
    "recursive_triggers": _STREAM,
    "reverse_unordered_selects": _STREAM,
    "short_column_names": _STREAM,
    "trusted_schema": _STREAM,
    # In the database file: replicated like any write.
    "application_id": _WRITE,
    "auto_vacuum": _WRITE,
    "incremental_vacuum": Policy(Action.WRITE, Action.WRITE),
    "optimize": Policy(Action.WRITE, Action.WRITE),
    "user_version": _WRITE,
    # Decided by walship: accepted, nothing changes. The journal is what is shipped; the group commit syncs; the
    # write turn queues instead of waiting on a lock; checkpoints are walship's.
    "busy_timeout": _fixed(0, "timeout"),
    "checkpoint_fullfsync": _fixed(0),
    "fullfsync": _fixed(0),
    "journal_mode": _fixed("wal", reason="the -wal is what is shipped to the followers"),
    "locking_mode": _fixed("normal"),
    "read_uncommitted": _fixed(0),
    "synchronous": _fixed(1),
    "wal_autocheckpoint": _fixed(0),
    # Harmless tuning, or fixed once the file exists: the value in force is what SQLite says.
    "cache_size": _KEPT,
    "cache_spill": _KEPT,
    "default_cache_size": _KEPT,
    "encoding": _KEPT,
    "hard_heap_limit": _KEPT,
    "journal_size_limit": _fixed(-1),
    "legacy_file_format": _KEPT,
    "max_page_count": _KEPT,
    "mmap_size": _fixed(0),
    "page_size": Policy(Action.READ, Action.ANSWER, reason="it is fixed once the database is there"),
    "secure_delete": _KEPT,
    "shrink_memory": _KEPT,
    "soft_heap_limit": _KEPT,
    "temp_store": _KEPT,
    "threads": _KEPT,
    # Never.
    "schema_version": _DANGEROUS,
    "writable_schema": _DANGEROUS,
    "wal_checkpoint": _refused("walship checkpoints by itself, after what it would drop is in the log"),
    "temp_store_directory": _refused("it changes the whole process"),
    "data_store_directory": _refused("it changes the whole process"),
    "lock_proxy_file": _refused("it changes how the file is locked"),
    "lock_status": _DEBUG_ONLY,
    "parser_trace": _DEBUG_ONLY,
    "sql_trace": _DEBUG_ONLY,
    "vdbe_addoptrace": _DEBUG_ONLY,
    "vdbe_debug": _DEBUG_ONLY,
    "vdbe_eqp": _DEBUG_ONLY,
    "vdbe_listing": _DEBUG_ONLY,
    "vdbe_trace": _DEBUG_ONLY,
    # walship's own (design.md 6).
    "walship_ack": Policy(Action.WALSHIP, Action.WALSHIP),
    "walship_consistency": Policy(Action.WALSHIP, Action.WALSHIP),
    "walship_position": Policy(Action.WALSHIP, Action.WALSHIP),
    "walship_status": Policy(Action.WALSHIP, Action.WALSHIP),
    "walship_wait_for": Policy(Action.WALSHIP, Action.WALSHIP),
}


def repeatable(call: PragmaCall) -> bool:
    """Can this setting of a connection be said again on another one, to the same effect? Not where the value means
    something only there (data_version), nor where the next COMMIT ends it (defer_foreign_keys)."""
    policy = POLICIES.get(call.name)
    return (
        policy is not None
        and policy.set is Action.STREAM
        and call.argument is not None
        and call.name not in ("data_version", "defer_foreign_keys")
    )


def rule(call: PragmaCall) -> Ruling:
    """Decide on one PRAGMA statement."""
    policy = POLICIES.get(call.name)
    if policy is None:
        return Ruling(Action.REFUSED, reason=f"PRAGMA {call.name} is not known to walship")
    action = policy.query if call.argument is None else policy.set
    reason = f"PRAGMA {call.name}: {policy.reason}" if policy.reason else ""
    if action is Action.REFUSED:
        return Ruling(action, reason=reason)
    if action is not Action.ANSWER:
        return Ruling(action)
    if policy.value is None:
        return Ruling(action, call.name, query=f"PRAGMA {call.name}", reason=reason)
    if reason and call.argument not in (None, str(policy.value)):
        return Ruling(Action.REFUSED, reason=reason)
    return Ruling(action, policy.column or call.name, policy.value)
