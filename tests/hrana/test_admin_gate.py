"""The admin verbs: three keys open them, and nothing else does."""

from __future__ import annotations

import pytest

from walship.errors import AuthFailed
from walship.hrana.admin import AdminGate
from walship.hrana.auth import READ_ONLY, Authenticator, Gate

TOKEN = "adm1n"
CREDENTIAL = "ab" * 32
HOST = (b"host", b"127.0.0.1:8080")


def bearer(token: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {token}".encode()


@pytest.mark.parametrize("token", [TOKEN, CREDENTIAL])
@pytest.mark.parametrize("client", ["127.0.0.1", "203.0.113.9", None])
def test_the_token_and_the_clusters_credential_open_from_anywhere(token: str, client: str | None) -> None:
    gate = AdminGate(token=TOKEN, credential=lambda: CREDENTIAL)
    gate.check(client, [HOST, bearer(token)])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [bearer("wrong")],
        [bearer("")],
        [(b"authorization", b"Basic YWRtMW46")],
        [(b"authorization", TOKEN.encode())],
        [bearer(TOKEN), bearer(TOKEN)],
        [(b"authorization", b"Bearer \xff")],
        [bearer("x" * 9000)],
    ],
)
def test_nothing_else_opens_where_a_token_is_set(headers: list[tuple[bytes, bytes]]) -> None:
    """Also not from this machine."""
    gate = AdminGate(token=TOKEN, credential=lambda: CREDENTIAL, from_this_machine=True)
    with pytest.raises(AuthFailed) as caught:
        gate.check("127.0.0.1", [HOST, *headers])
    assert caught.value.status == 401
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_needs_no_token_where_nobody_is_asked_for_one(client: str) -> None:
    AdminGate(from_this_machine=True).check(client, [HOST])
    AdminGate(from_this_machine=True).check(client, [(b"host", b"[::1]:8080"), bearer("whatever a client sends")])
    AdminGate(from_this_machine=True).check(client, [(b"host", b"localhost:8080")])


@pytest.mark.parametrize(
    ("client", "header"),
    [
        ("203.0.113.9", HOST),
        ("unix", HOST),
        ("127.0.0.1.evil.example", HOST),
        (None, HOST),
        ("127.0.0.1", (b"origin", b"http://evil.example")),
        ("127.0.0.1", (b"sec-fetch-site", b"cross-site")),
        ("127.0.0.1", (b"x-forwarded-for", b"203.0.113.9")),
        ("127.0.0.1", (b"forwarded", b"for=203.0.113.9")),
        ("127.0.0.1", (b"host", b"evil.example:8080")),  # DNS rebinding
        ("127.0.0.1", (b"host", b"127.0.0.1.evil.example")),
    ],
)
def test_web_pages_and_reverse_proxies_are_not_this_machine(client: str | None, header: tuple[bytes, bytes]) -> None:
    with pytest.raises(AuthFailed, match="this machine only"):
        AdminGate(from_this_machine=True).check(client, [header])


def test_a_credential_that_is_not_known_yet_opens_nothing() -> None:
    with pytest.raises(AuthFailed):
        AdminGate(credential=lambda: "").check("127.0.0.1", [bearer("")])


def test_an_open_front_door_lets_nobody_in_by_itself() -> None:
    with pytest.raises(AuthFailed):
        Gate(Authenticator()).admin.check("127.0.0.1", [HOST])


def test_the_front_door_leaves_the_admin_verbs_to_their_own_gate() -> None:
    """A client's token is no admin's, and an admin's is no client's."""
    gate = Gate(Authenticator(token="client"), admin=AdminGate(token=TOKEN))
    assert gate.admit("POST", "/admin/voters", [bearer(TOKEN)]) is READ_ONLY
    with pytest.raises(AuthFailed):
        gate.admin.check("127.0.0.1", [bearer("client")])
    with pytest.raises(AuthFailed):
        gate.admit("POST", "/v2/pipeline", [bearer(TOKEN)])
