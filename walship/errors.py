"""Every error walship raises on purpose, in one tree.

Branches follow what the caller may do, not where the error was found::

    WalshipError
    ├── UsageError                 the command or configuration is wrong; fix it and run again
    │   └── DatabaseRefused        the file given cannot become (or stay) a walship database; it was not touched
    ├── CorruptData                bytes fail their own checks; the source must be read again or replaced
    │   ├── CorruptWal             a -wal file
    │   ├── CorruptWalIndex        a -shm file
    │   ├── CorruptLtx             an LTX file or payload
    │   ├── CorruptRecord          a shipped or logged record
    │   ├── CorruptLog             a log segment; says which frames are affected
    │   ├── CorruptState           the durable state record
    │   └── CorruptDatabase        database pages differ from the rolling checksum
    ├── HistoryMismatch            two histories disagree at a position; the follower must re-seed
    │   └── LogTruncated           the log no longer reaches back that far
    ├── NotDone                    nothing was changed by this request; it may be sent again
    │   ├── NotLeader              a write reached a node that does not lead
    │   ├── NotReadOnly            a statement routed as a read would write
    │   ├── Behind                 the node has not applied the position asked for yet
    │   ├── Overloaded             a bounded queue is full, or the disk or the followers cannot keep up
    │   ├── Draining               the process is shutting down
    │   └── TransactionTimeout     an interactive transaction held the write turn too long; it was rolled back
    ├── OutcomeUnknown             the write may or may not be durable; look before sending it again
    ├── CommittedResultLost        the write is committed and acknowledged, and its rows were lost with the answer
    ├── WriteLost                  a position the client saw is in no surviving history
    ├── Unavailable                a peer, the store or the leader cannot be reached; data is not affected
    │   └── StoreUnavailable       the coordination store did not answer
    ├── AuthFailed                 the client's token is missing, wrong, out of its time, or does not allow this
    ├── StatementFailed            SQLite (or our guard) refused a statement; carries SQLite's own code and message
    ├── ProtocolViolation          a peer or client broke a protocol; the connection or request ends
    ├── Refused                    a peer refused us, with its reason
    ├── Fenced                     a newer term exists; this node must not act for its own
    ├── CompareFailed              a compare-and-swap lost; read again and decide
    └── StorageFailed              the disk failed or is full; nothing that was acknowledged is lost

Each message says what happened, what is still true, and what to do.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AuthFailed",
    "Behind",
    "CommittedResultLost",
    "CompareFailed",
    "CorruptData",
    "CorruptDatabase",
    "CorruptLog",
    "CorruptLtx",
    "CorruptRecord",
    "CorruptState",
    "CorruptWal",
    "CorruptWalIndex",
    "DatabaseRefused",
    "Draining",
    "Fenced",
    "HistoryMismatch",
    "LogTruncated",
    "NotDone",
    "NotLeader",
    "NotReadOnly",
    "OutcomeUnknown",
    "Overloaded",
    "ProtocolViolation",
    "Refused",
    "StatementFailed",
    "StorageFailed",
    "StoreUnavailable",
    "TransactionTimeout",
    "Unavailable",
    "UsageError",
    "WalshipError",
    "WriteLost",
]


class WalshipError(Exception):
    """Root of the tree. `code` is what a client sees in a Hrana error; `exit_code` what the shell sees."""

    code: ClassVar[str] = "WALSHIP_ERROR"
    exit_code: ClassVar[int] = 1


class UsageError(WalshipError):
    """Raised when a flag, a configuration key or an argument cannot be used as given."""

    code = "WALSHIP_USAGE"
    exit_code = 2


class DatabaseRefused(UsageError):
    """Raised when a file cannot be adopted or opened as a walship database. The file was not changed."""

    code = "WALSHIP_DATABASE_REFUSED"

    def __init__(self, path: object, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}. The file was not changed. {self.remedy}"


class CorruptData(WalshipError):
    """Raised when bytes fail their own checks (magic, length, checksum, order)."""

    code = "WALSHIP_CORRUPT"


class CorruptWal(CorruptData):
    """Raised when a -wal header or frame is malformed."""


class CorruptWalIndex(CorruptData):
    """Raised when a wal-index header stays torn or contradicts itself."""


class CorruptLtx(CorruptData):
    """Raised when an LTX header, page, index or trailer is malformed."""


class CorruptRecord(CorruptData):
    """Raised when a record of the log or the wire is malformed."""


class CorruptLog(CorruptData):
    """Raised when a log segment is damaged before its end, where a torn write cannot explain it."""


class CorruptState(CorruptData):
    """Raised when the durable state record cannot be read back."""


class CorruptDatabase(CorruptData):
    """Raised when pages of the database differ from what the rolling checksum says they were."""


class HistoryMismatch(WalshipError):
    """Raised when a peer's position or checksum is not in our history."""

    code = "WALSHIP_HISTORY_MISMATCH"


class LogTruncated(HistoryMismatch):
    """Raised when the position asked for lies before the oldest frame the log keeps."""

    code = "WALSHIP_LOG_TRUNCATED"


class NotDone(WalshipError):
    """Raised when a request was refused before it changed anything; it is safe to send it again."""

    code = "WALSHIP_NOT_DONE"


class NotLeader(NotDone):
    """Raised by a node that does not lead when it is asked to write."""

    code = "WALSHIP_NOT_LEADER"

    def __init__(self, leader: str | None, url: str | None, term: int) -> None:
        super().__init__(leader, url, term)
        self.leader, self.url, self.term = leader, url, term

    def __str__(self) -> str:
        where = f"the leader is {self.leader} at {self.url}" if self.leader else "no leader is known"
        return (
            f"this node is a follower and runs no writes; {where} (term {self.term}). "
            "Nothing was changed. Send the write there, or connect to the proxy."
        )


class NotReadOnly(NotDone):
    """Raised on a follower when SQLite says that a statement would write (R22)."""

    code = "WALSHIP_NOT_READ_ONLY"


class Behind(NotDone):
    """Raised when a node did not reach the position asked for within the time allowed."""

    code = "WALSHIP_BEHIND"


class Overloaded(NotDone):
    """Raised before BEGIN when a bound would be passed: queue, unacknowledged commits, disk reserve (R5, R14)."""

    code = "WALSHIP_OVERLOADED"


class Draining(NotDone):
    """Raised for new work while the process stops."""

    code = "WALSHIP_DRAINING"


class TransactionTimeout(NotDone):
    """Raised when an interactive transaction lost the write turn (R21) and was rolled back."""

    code = "TRANSACTION_TIMEOUT"


class OutcomeUnknown(WalshipError):
    """Raised when a write may have become durable but nobody can say yet."""

    code = "WALSHIP_OUTCOME_UNKNOWN"


class CommittedResultLost(WalshipError):
    """Raised when a write is known to be committed and acknowledged, but its result went with its first answer (R19).

    The words name the position that covers it.
    """

    code = "WALSHIP_COMMITTED_RESULT_LOST"


class WriteLost(WalshipError):
    """Raised when a token names a position that no surviving history contains."""

    code = "WALSHIP_WRITE_LOST"


class Unavailable(WalshipError):
    """Raised when somebody needed for the request cannot be reached."""

    code = "WALSHIP_UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """Raised when the coordination store does not answer within its deadline."""

    code = "WALSHIP_STORE_UNAVAILABLE"


class AuthFailed(WalshipError):
    """Raised when a token does not let its client in (status 401), or not do this (403). Nothing was run.

    `auth_code` is the Hrana code (hrana.md 1.5). No message ever holds any part of a token.
    """

    code = "AUTH_FAILED"

    def __init__(self, status: int, auth_code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.auth_code = status, auth_code


class StatementFailed(WalshipError):
    """Raised when a statement of a client fails; `code` is the Hrana code (hrana.md 1.5), the text is SQLite's."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.statement_code = code


class ProtocolViolation(WalshipError):
    """Raised when a peer sends what the protocol does not allow at that moment."""

    code = "WALSHIP_PROTOCOL"


class Refused(WalshipError):
    """Raised when a peer answers a hello with a refusal. `reason` is its machine-readable word."""

    code = "WALSHIP_REFUSED"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return f"refused by the peer ({self.reason}): {self.message}"


class Fenced(WalshipError):
    """Raised when a term below the promised one tries to act (R1, invariant I3)."""

    code = "WALSHIP_FENCED"


class CompareFailed(WalshipError):
    """Raised when a compare-and-swap found another version than expected."""

    code = "WALSHIP_COMPARE_FAILED"


class StorageFailed(WalshipError):
    """Raised when a write, fsync or allocation on disk fails; the process must not go on as if it had worked."""

    code = "WALSHIP_STORAGE"
