"""Tokens: who is let in, who may write, and what a refusal says (hrana.md 1.8)."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from tests.hrana.tokens import Issuer
from walship.errors import AuthFailed, UsageError
from walship.hrana.auth import FULL, READ_ONLY, Authenticator, Gate
from walship.hrana.http import failure
from walship.hrana.jwt import Keys

NOW = 1_800_000_000.0
ISSUER = Issuer()
OTHER = Issuer()


def by_jwt(*issuers: Issuer, now: float = NOW, token: str | None = None) -> Authenticator:
    keys = Keys.parse(b"\n".join(issuer.pem for issuer in issuers or (ISSUER,)))
    return Authenticator(token=token, keys=keys, clock=lambda: now)


def refusal(check: Authenticator, header: bytes | str | None) -> tuple[int, str]:
    with pytest.raises(AuthFailed) as caught:
        check.check(header)
    return caught.value.status, caught.value.auth_code


@pytest.mark.parametrize("header", [None, b"", b"Bearer ", b"Bearer x", b"Basic YTpi", b"\xff\xff"])
def test_nobody_is_asked_when_auth_is_off(header: bytes | None) -> None:
    """1.8: Python clients send an empty bearer; with auth off it is never looked at."""
    assert Authenticator().check(header) is FULL
    assert not Authenticator().enabled


def test_the_static_token_grants_everything_whatever_the_case_of_the_scheme() -> None:
    check = Authenticator(token="s3cret")
    assert {check.check(header) for header in (b"Bearer s3cret", "bearer s3cret", b"BEARER  s3cret ")} == {FULL}
    assert check.check_token("s3cret") is FULL


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "AUTH_HTTP_HEADER_MISSING"),
        (b"", "AUTH_HTTP_HEADER_INVALID"),
        (b"Bearer", "AUTH_JWT_MISSING"),
        (b"Bearer ", "AUTH_JWT_MISSING"),
        (b"Bearer wrong", "AUTH_FAILED"),
        (b"Bearer s3cre", "AUTH_FAILED"),
        (b"Basic czNjcmV0", "AUTH_BASIC_NOT_ALLOWED"),
        (b"Digest s3cret", "AUTH_HTTP_HEADER_UNSUPPORTED_SCHEME"),
        (b"s3cret", "AUTH_HTTP_HEADER_UNSUPPORTED_SCHEME"),
        (b"Bearer s3cret\xff", "AUTH_HTTP_HEADER_INVALID"),
        (b"Bearer " + b"x" * 10_000, "AUTH_JWT_INVALID"),
    ],
)
def test_anything_else_is_401_with_its_code(header: bytes | None, code: str) -> None:
    assert refusal(Authenticator(token="s3cret"), header) == (401, code)


@pytest.mark.parametrize(
    ("claims", "grant"),
    [
        ({}, FULL),
        ({"a": "rw"}, FULL),
        ({"a": "ro"}, READ_ONLY),
        ({"a": "roa"}, READ_ONLY),
        ({"id": "default"}, FULL),
        ({"id": "default", "a": "ro"}, READ_ONLY),
        ({"exp": NOW + 1}, FULL),
        ({"nbf": NOW - 1, "iat": NOW + 1000, "aud": "x", "iss": "y"}, FULL),
        ({"nbf": NOW + 4}, FULL),
        ({"p": {"rw": {"ns": ["default"]}}}, FULL),
        ({"p": {"rwa": {"ns": ["a", "default"]}}}, FULL),
        ({"p": {"ro": {"ns": ["default"]}}}, READ_ONLY),
        ({"p": {"roa": {"ns": ["default"]}, "rw": {"ns": ["other"]}}}, READ_ONLY),
        ({"p": {"ro": {"ns": ["default"]}}, "a": "rw", "id": "default"}, READ_ONLY),
    ],
)
def test_claims_say_what_a_token_may_do(claims: dict[str, Any], grant: object) -> None:
    """1.8: `p` wins over `id` and `a`; without any of them a token may do everything."""
    assert by_jwt().check_token(ISSUER.token(**claims)) == grant


@pytest.mark.parametrize(
    ("claims", "refused"),
    [
        ({"exp": NOW}, (401, "AUTH_JWT_EXPIRED")),
        ({"exp": NOW - 1, "a": "ro"}, (401, "AUTH_JWT_EXPIRED")),
        ({"nbf": NOW + 60}, (401, "AUTH_JWT_IMMATURE")),
        ({"exp": "tomorrow"}, (401, "AUTH_JWT_INVALID")),
        ({"exp": True}, (401, "AUTH_JWT_INVALID")),
        ({"nbf": [1]}, (401, "AUTH_JWT_INVALID")),
        ({"a": "root"}, (401, "AUTH_JWT_INVALID")),
        ({"a": ["rw"]}, (401, "AUTH_JWT_INVALID")),
        ({"id": 7}, (401, "AUTH_JWT_INVALID")),
        ({"p": "rw"}, (401, "AUTH_JWT_INVALID")),
        ({"p": {"rw": {"ns": "default"}}}, (401, "AUTH_JWT_INVALID")),
        ({"id": "other"}, (403, "AUTH_NAMESPACE")),
        ({"p": {}}, (403, "AUTH_NAMESPACE")),
        ({"p": {"rw": {}}}, (403, "AUTH_NAMESPACE")),
        ({"p": {"ddl": {"ns": ["default"]}}}, (403, "AUTH_NAMESPACE")),
    ],
)
def test_a_token_that_does_not_hold_is_refused(claims: dict[str, Any], refused: tuple[int, str]) -> None:
    assert refusal(by_jwt(), "Bearer " + ISSUER.token(**claims)) == refused


def test_a_token_ends_when_it_says_though_it_was_good_before() -> None:
    """A signature is remembered, its times are not."""
    now = [NOW]
    check = Authenticator(keys=Keys.parse(ISSUER.pem), clock=lambda: now[0])
    token = ISSUER.token(exp=NOW + 10)
    assert check.check_token(token) is FULL
    now[0] += 10
    assert refusal(check, f"Bearer {token}") == (401, "AUTH_JWT_EXPIRED")


def test_each_key_of_the_file_is_tried() -> None:
    check = by_jwt(OTHER, ISSUER)
    assert check.check_token(ISSUER.token()) == check.check_token(OTHER.token()) == FULL


def test_a_raw_base64url_key_is_taken() -> None:
    check = Authenticator(keys=Keys.parse(ISSUER.raw + b"\n"), clock=lambda: NOW)
    assert check.check_token(ISSUER.token()) is FULL


def test_the_static_token_and_a_jwt_are_good_side_by_side() -> None:
    check = by_jwt(token="s3cret")
    assert check.check_token("s3cret") == check.check_token(ISSUER.token()) == FULL
    assert refusal(check, b"Bearer wrong") == (401, "AUTH_JWT_INVALID")


def forged() -> list[str]:
    head, body, signature = ISSUER.token(a="ro").split(".")
    better = base64.urlsafe_b64encode(json.dumps({"a": "rw"}).encode()).decode().rstrip("=")
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    return [
        f"{head}.{better}.{signature}",
        f"{none}.{better}.",
        f"{head}.{body}.",
        f"{head}.{body}",
        OTHER.token(),
        jwt.encode({}, ISSUER.raw.decode(), algorithm="HS256"),  # the public key taken for a shared secret
        "e30.e30.e30",
        "a.b.c",
        "..",
        "[" * 4000,
    ]


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("number", range(10))
def test_a_forged_token_is_refused(number: int) -> None:
    assert refusal(by_jwt(), f"Bearer {forged()[number]}") == (401, "AUTH_JWT_INVALID")


@given(st.text(), st.binary())
def test_no_input_gets_in_or_raises_anything_else(text: str, data: bytes) -> None:
    check = by_jwt(token="s3cret")
    for header in (text, data, f"Bearer {text}", b"Bearer " + data):
        with pytest.raises(AuthFailed):
            check.check(header)


@pytest.mark.parametrize("token", ["hunter2-static", ISSUER.token(exp=1), OTHER.token(secret="x")])
def test_no_refusal_shows_the_token(token: str) -> None:
    with pytest.raises(AuthFailed) as caught:
        by_jwt().check(f"Bearer {token}")
    shown = repr(caught.value) + str(caught.value) + failure(caught.value).body.decode()
    assert not any(piece in shown for piece in (token, *token.split(".")))


@pytest.mark.parametrize("data", [b"", b"hello", b"QUJD", b"-----BEGIN PUBLIC KEY-----\nxx\n-----END PUBLIC KEY-----"])
def test_a_file_without_a_key_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(UsageError, match="auth-jwt-key"):
        Keys.parse(data)


def test_a_key_of_another_kind_is_refused_in_words() -> None:
    pem = generate_private_key(SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(UsageError, match="Ed25519"):
        Keys.parse(ISSUER.pem + pem)


# --- the gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/version", "/v2", "/v3", "/status", "/metrics"])
def test_what_tells_nothing_of_the_data_needs_no_token(path: str) -> None:
    assert Gate(Authenticator(token="s3cret")).admit("GET", path, []) is READ_ONLY


def test_a_preflight_needs_no_token() -> None:
    """A browser sends it without one."""
    assert Gate(Authenticator(token="s3cret")).admit("OPTIONS", "/v2/pipeline", []) is READ_ONLY


@pytest.mark.parametrize("path", ["/status", "/metrics"])
def test_status_can_be_closed(path: str) -> None:
    gate = Gate(Authenticator(token="s3cret"), status_needs_token=True)
    with pytest.raises(AuthFailed):
        gate.admit("GET", path, [])
    assert gate.admit("GET", path, [(b"authorization", b"Bearer s3cret")]) is FULL


@given(st.text())
def test_every_other_path_is_closed(path: str) -> None:
    """An endpoint that somebody adds is closed until it is listed."""
    open_paths = {"/health", "/version", "/v1", "/v2", "/v3", "/status", "/metrics"}
    if path not in open_paths:
        with pytest.raises(AuthFailed):
            Gate(Authenticator(token="s3cret")).admit("GET", path, [])


def test_two_authorization_headers_are_refused() -> None:
    headers = [(b"authorization", b"Bearer s3cret"), (b"authorization", b"Bearer other")]
    with pytest.raises(AuthFailed):
        Gate(Authenticator(token="s3cret")).admit("POST", "/v2/pipeline", headers)
