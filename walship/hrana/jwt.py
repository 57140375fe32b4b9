"""JSON Web Tokens as sqld takes them: EdDSA only, claims `exp`, `nbf`, `id`, `a`, `p` (hrana.md 1.8). Pure.

A signature is checked once per token (`Keys.verify`), its times at each request (`Claims.grant`), so that a token ends
when it says and not when somebody forgets it. One database is served here; sqld's name for it is `default`.
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from walship.errors import AuthFailed, UsageError
from walship.hrana.auth import FULL, READ_ONLY, Grant

__all__ = ["NAMESPACE", "Claims", "Keys"]

NAMESPACE: Final = "default"
IMMATURE_LEEWAY_SECONDS: Final = 5.0  # an issuer's clock may be ahead of ours; one that is behind costs nobody a start
_PEM: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_RAW_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token with a good signature says. Times are seconds since 1970; None: no bound."""

    expires: float | None
    begins: float | None
    may_read: bool
    may_write: bool

    def grant(self, now: float) -> Grant:
        """What it allows at `now`. Raises AuthFailed: 401 out of its time, 403 when it is for another database."""
        if self.expires is not None and now >= self.expires:
            raise AuthFailed(401, "AUTH_JWT_EXPIRED", "the token has expired. Nothing was run; get a new one")
        if self.begins is not None and now < self.begins - IMMATURE_LEEWAY_SECONDS:
            raise AuthFailed(401, "AUTH_JWT_IMMATURE", "the token is not valid yet. Nothing was run")
        if self.may_write:
            return FULL
        if self.may_read:
            return READ_ONLY
        raise AuthFailed(403, "AUTH_NAMESPACE", f"the token grants nothing on {NAMESPACE!r}. Nothing was run")


@dataclass(frozen=True, slots=True)
class Keys:
    """Ed25519 public keys; each is tried."""

    keys: tuple[Ed25519PublicKey, ...]

    @classmethod
    def parse(cls, data: bytes) -> Keys:
        """PEM blocks `PUBLIC KEY`, or one raw key in base64url. Raises UsageError when there is no usable key."""
        try:
            blocks = _PEM.findall(data)
            keys = [load_pem_public_key(block) for block in blocks] if blocks else [_raw_key(data)]
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(
                "the file of --auth-jwt-key holds no readable key. It takes PEM blocks `PUBLIC KEY` of Ed25519 keys, "
                "or one raw key in base64url (32 bytes)"
            ) from error
        good = tuple(key for key in keys if isinstance(key, Ed25519PublicKey))
        if len(good) != len(keys):
            raise UsageError("the file of --auth-jwt-key holds a key that is not Ed25519; only EdDSA tokens are taken")
        return cls(good)

    def verify(self, token: str) -> Claims:
        """The claims of a token signed by one of the keys; times are not looked at. Raises AuthFailed."""
        for key in self.keys:
            try:
                payload = jwt.decode(token, key, algorithms=["EdDSA"], options=_SIGNATURE_ONLY)
            except (jwt.PyJWTError, ValueError, RecursionError):
                continue
            return _claims(payload)
        raise _invalid()


_SIGNATURE_ONLY: Final[Any] = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


def _invalid() -> AuthFailed:
    return AuthFailed(401, "AUTH_JWT_INVALID", "the token is not valid. Nothing was run")


def _raw_key(data: bytes) -> Ed25519PublicKey:
    text = data.strip().rstrip(b"=")
    key = binascii.a2b_base64(text.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(text) % 4), strict_mode=True)
    if len(key) != _RAW_KEY_BYTES:
        raise ValueError(len(key))
    return Ed25519PublicKey.from_public_bytes(key)


def _claims(payload: Mapping[str, Any]) -> Claims:
    may_read, may_write = _rights(payload)
    return Claims(_time(payload, "exp"), _time(payload, "nbf"), may_read, may_write)


def _time(payload: Mapping[str, Any], name: str) -> float | None:
    value = payload.get(name)
    if value is None:
        return None
    # A bound that cannot be read is not the absence of a bound.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid()
    return float(value)


def _rights(payload: Mapping[str, Any]) -> tuple[bool, bool]:
    """May the token read, and may it write? `p` wins over `id` and `a`; without any of them it may do everything."""
    permissions = payload.get("p")
    if permissions is not None:
        if not isinstance(permissions, Mapping):
            raise _invalid()
        writes = _in_scope(permissions, "rw") or _in_scope(permissions, "rwa")
        return writes or _in_scope(permissions, "ro") or _in_scope(permissions, "roa"), writes
    namespace, access = payload.get("id"), payload.get("a")
    if access not in (None, "ro", "rw", "roa") or not isinstance(namespace, str | None):
        raise _invalid()
    here = namespace in (None, NAMESPACE)
    return here, here and access in (None, "rw")


def _in_scope(permissions: Mapping[str, Any], right: str) -> bool:
    scope = permissions.get(right)
    if scope is None:
        return False
    names = scope.get("ns") if isinstance(scope, Mapping) else scope
    if names is None:
        return False
    if not isinstance(names, list):
        raise _invalid()
    return NAMESPACE in names
