"""Who may do what: tokens of clients, checked as sqld checks them (hrana.md 1.8). Pure; the clock is an argument.

A client shows a bearer token, in the Authorization header over HTTP or in `hello` over WebSocket. Two kinds are known,
and either is enough: one static token, and JSON Web Tokens signed with an Ed25519 key (`walship.hrana.jwt`). With
neither configured nobody is asked, and whatever a client sends is not looked at: Python clients send an empty token.

A token never gets into a message, a log line or a cache: what is remembered of one that was good is its SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from walship.errors import AuthFailed
from walship.hrana.admin import ADMIN, AdminGate

if TYPE_CHECKING:
    from walship.hrana.jwt import Claims, Keys

__all__ = ["FULL", "OPEN", "READ_ONLY", "Authenticator", "Gate", "Grant", "may_not_write"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a client may do. Reading is what every grant allows."""

    may_write: bool = True


FULL: Final = Grant()
READ_ONLY: Final = Grant(may_write=False)

MAX_TOKEN_CHARS: Final = 8192  # a JWT with every claim sqld knows is a few hundred; this bounds the work on a bad one
MAX_REMEMBERED: Final = 1024  # checking a signature costs about 100 us, more than a point read


def may_not_write() -> AuthFailed:
    """The refusal of a statement that writes, sent with a token that only reads."""
    return AuthFailed(403, "AUTH_READ_ONLY", "this token may only read, and the request writes. Nothing was changed")


class Authenticator:
    """Checks tokens.

    Args:
        token: the static token; None when there is none.
        keys: the Ed25519 keys of JWTs; None when there are none.
        clock: seconds since 1970, for `exp` and `nbf`.
    """

    def __init__(
        self, *, token: str | None = None, keys: Keys | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._static = None if token is None else _digest(token)
        self._keys, self._clock = keys, clock
        self._remembered: dict[bytes, Claims] = {}

    @classmethod
    def of(cls, token: str | None, key_file: bytes | None) -> Authenticator:
        """From settings. Raises UsageError when the key file holds no usable key."""
        if key_file is None:
            return cls(token=token)
        from walship.hrana.jwt import Keys  # here, since loading its library takes as long as the rest of a start

        return cls(token=token, keys=Keys.parse(key_file))

    @property
    def enabled(self) -> bool:
        """Is anybody asked at all?"""
        return self._static is not None or self._keys is not None

    def check(self, authorization: bytes | str | None) -> Grant:
        """The grant of an Authorization header (None: there was none). Raises AuthFailed, status 401 or 403."""
        if not self.enabled:
            return FULL
        if authorization is None:
            raise _unauthorized("AUTH_HTTP_HEADER_MISSING", "the Authorization header is missing")
        text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
        scheme, _, token = text.strip().partition(" ")
        if not text.isascii() or not scheme:
            raise _unauthorized("AUTH_HTTP_HEADER_INVALID", "the Authorization header cannot be read")
        if scheme.lower() == "basic":
            raise _unauthorized("AUTH_BASIC_NOT_ALLOWED", "Basic authentication is not offered; send a bearer token")
        if scheme.lower() != "bearer":
            raise _unauthorized("AUTH_HTTP_HEADER_UNSUPPORTED_SCHEME", "only `Authorization: Bearer TOKEN` is known")
        return self.check_token(token)

    def check_token(self, token: str | None) -> Grant:
        """The grant of a bare token, as `hello` carries it. Raises AuthFailed, status 401 or 403."""
        if not self.enabled:
            return FULL
        token = (token or "").strip()
        if not token:
            raise _unauthorized("AUTH_JWT_MISSING", "the token is empty, and this server asks for one")
        if len(token) > MAX_TOKEN_CHARS:
            raise _unauthorized("AUTH_JWT_INVALID", f"the token is longer than {MAX_TOKEN_CHARS} characters")
        digest = _digest(token)
        if self._static is not None and hmac.compare_digest(digest, self._static):
            return FULL
        if self._keys is None:
            raise _unauthorized("AUTH_FAILED", "the token is wrong")
        claims = self._remembered.get(digest)
        if claims is None:
            claims = self._keys.verify(token)
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[digest] = claims
        return claims.grant(self._clock())


@dataclass(frozen=True, slots=True)
class Gate:
    """Which requests a front door lets in, before anything else looks at them.

    Everything needs a token but what is listed here, so that a new endpoint is closed until somebody opens it. The
    admin verbs ask for keys of their own (`admin`), so no client's token is looked at there.
    """

    authenticator: Authenticator
    status_needs_token: bool = False
    admin: AdminGate = field(default_factory=AdminGate)

    def admit(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Grant:
        """The grant of an HTTP request; header names in lower case. Raises AuthFailed.

        A request to an open path is granted reading only; the paths that are open do nothing else.
        """
        if not self.authenticator.enabled:
            return FULL
        if (
            method == "OPTIONS"
            or path in _OPEN
            or path.startswith(ADMIN)
            or (path in _STATUS and not self.status_needs_token)
        ):
            return READ_ONLY
        return self.authenticator.check(_authorization(headers))


OPEN: Final = Gate(Authenticator())
"""Lets every client in, and nobody to the admin verbs."""

_OPEN: Final = frozenset({"/health", "/version", "/v1", "/v2", "/v3"})
_STATUS: Final = frozenset({"/status", "/metrics"})


def _authorization(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The header's value. Two of them are refused: which one counts would differ from one reader to the next."""
    found: Sequence[bytes] = [value for name, value in headers if name == b"authorization"]
    if len(found) > 1:
        raise _unauthorized("AUTH_HTTP_HEADER_INVALID", "there is more than one Authorization header")
    return found[0] if found else None


def _unauthorized(code: str, what: str) -> AuthFailed:
    return AuthFailed(401, code, f"{what}. Nothing was run")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
