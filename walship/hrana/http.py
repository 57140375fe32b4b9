"""Hrana over HTTP, the parts that are tables: paths, probe texts, and how a failure of a whole request looks.

Statement errors are inside a reply with status 200 (`walship.hrana.json.failed`). What is here ends the request:
any status of 400 or more tells the client that its stream is gone (hrana.md 1.4). Protocol errors are plain text,
as sqld sends them; all others are JSON that serves every client at once: `message` and `code` for those that read
an Error structure, `error` for those that expect sqld's `{"error": ...}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Final

import msgspec

from walship.errors import (
    AuthFailed,
    Behind,
    CompareFailed,
    Draining,
    Fenced,
    NotDone,
    NotLeader,
    NotReadOnly,
    Overloaded,
    ProtocolViolation,
    StatementFailed,
    StorageFailed,
    TransactionTimeout,
    Unavailable,
    UsageError,
    WalshipError,
    WriteLost,
)
from walship.hrana.types import ErrorBody

__all__ = [
    "CURSOR_TYPE",
    "DEFAULT_MAX_BODY_BYTES",
    "ENDPOINTS",
    "JSON_TYPE",
    "PROBES",
    "TEXT_TYPE",
    "Endpoint",
    "Failure",
    "Verb",
    "body_too_large",
    "failure",
    "head_too_large",
    "request_too_slow",
]

JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain"
CURSOR_TYPE: Final = "text/plain"
DEFAULT_MAX_BODY_BYTES: Final = 16 << 20


class Verb(StrEnum):
    PIPELINE = "pipeline"
    CURSOR = "cursor"
    EXECUTE = "execute"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a POST to a path means."""

    verb: Verb
    version: int


ENDPOINTS: Final[dict[str, Endpoint]] = {
    "/v1/execute": Endpoint(Verb.EXECUTE, 1),
    "/v1/batch": Endpoint(Verb.BATCH, 1),
    "/v2/pipeline": Endpoint(Verb.PIPELINE, 2),
    "/v3/pipeline": Endpoint(Verb.PIPELINE, 3),
    "/v3/cursor": Endpoint(Verb.CURSOR, 3),
}

# GET on these answers 200 with the text: "this version is spoken here" (hrana.md 1.1).
PROBES: Final[dict[str, str]] = {
    "/v1": "Hello, this is HTTP API v1",
    "/v2": "Hello, this is HTTP API v2 (Hrana over HTTP)",
    "/v3": "Hello, this is HTTP API v3 (Hrana over HTTP)",
}

# First match along the class's ancestors. 503 is "elsewhere or later", 409 "not on these terms", 429 "slower".
STATUSES: Final[dict[type[WalshipError], int]] = {
    ProtocolViolation: 400,
    StatementFailed: 400,
    UsageError: 400,
    TransactionTimeout: 400,
    NotReadOnly: 409,
    WriteLost: 409,
    Overloaded: 429,
    NotLeader: 503,
    Behind: 503,
    Draining: 503,
    NotDone: 503,
    Unavailable: 503,
    Fenced: 503,
    CompareFailed: 503,
    StorageFailed: 500,
    WalshipError: 500,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A whole-request failure, ready to be sent."""

    status: int
    content_type: str
    body: bytes

    def to_http(self) -> bytes:
        """A whole HTTP/1.1 answer that ends its connection, for where no application can give one."""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: {self.content_type}\r\n"
            f"content-length: {len(self.body)}\r\naccess-control-allow-origin: *\r\nconnection: close\r\n\r\n"
        )
        return head.encode("ascii") + self.body


def failure(error: WalshipError) -> Failure:
    """How `error` looks to an HTTP client."""
    code = ErrorBody.of(error).code
    if isinstance(error, AuthFailed):
        return _json_failure(error.status, str(error), code)
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    if isinstance(error, ProtocolViolation):
        return Failure(status, TEXT_TYPE, str(error).encode("utf-8", "replace"))
    extra = {"leader": error.leader, "url": error.url, "term": error.term} if isinstance(error, NotLeader) else {}
    return _json_failure(status, str(error), code, extra)


def body_too_large(limit_bytes: int) -> Failure:
    """The body of a request exceeds what this server takes. Nothing was run."""
    message = f"The request body exceeds {limit_bytes} bytes; nothing was run. Send it in smaller pieces."
    return _json_failure(413, message, "REQUEST_TOO_LARGE")


def head_too_large(limit_bytes: int) -> Failure:
    """The head of a request exceeds what this server takes."""
    message = f"The head of the request exceeds {limit_bytes} bytes; nothing was run. Send fewer or shorter headers."
    return _json_failure(431, message, "REQUEST_HEAD_TOO_LARGE")


def request_too_slow() -> Failure:
    """A request did not arrive whole in the time allowed. Nothing was run."""
    return _json_failure(408, "The request did not arrive in time; nothing was run. Send it again.", "REQUEST_TIMEOUT")


def _json_failure(status: int, message: str, code: str, extra: dict[str, str | int | None] | None = None) -> Failure:
    message = message.encode("utf-8", "replace").decode("utf-8")
    body = {"message": message, "code": code, "error": message, **(extra or {})}
    return Failure(status, JSON_TYPE, msgspec.json.encode(body))
