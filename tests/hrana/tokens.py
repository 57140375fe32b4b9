"""Keys and tokens for tests, signed as an issuer would."""

from __future__ import annotations

import base64
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

__all__ = ["Issuer"]


class Issuer:
    """Somebody with a private key."""

    def __init__(self) -> None:
        self.private = Ed25519PrivateKey.generate()

    @property
    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def raw(self) -> bytes:
        """base64url without padding, as sqld takes it."""
        key = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return base64.urlsafe_b64encode(key).rstrip(b"=")

    def token(self, **claims: Any) -> str:
        return jwt.encode(claims, self.private, algorithm="EdDSA")
