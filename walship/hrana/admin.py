"""Who may use the admin verbs: the paths under /admin/, which change the cluster and not its data. Pure.

Three keys open them, and a client's token is none of them:

* the admin token (`--admin-token`);
* the cluster's own credential for `admin`, derived from the secret in its record: who can read the coordination store
  has it, so proxies and the command line with `--cluster` need no token of their own;
* being on this machine, while neither an admin token nor any client token is configured: then `walship up` on a laptop
  needs none, and everybody who reaches it may write everything anyhow.

A web page that a browser on this machine shows, and whatever a reverse proxy passes on, also come from this machine.
So the third key asks that nothing in the request speaks of either.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Iterable
from typing import Final

from walship.errors import AuthFailed

__all__ = ["ADMIN", "AdminGate"]

ADMIN: Final = "/admin/"
"""What every admin path begins with."""

_MAX_TOKEN_CHARS: Final = 8192
# A browser names the page that asks, a reverse proxy whom it asks for; curl, httpx and our own parts send none of them.
_ELSEWHERE: Final = frozenset(
    {
        b"origin",
        b"referer",
        b"sec-fetch-site",
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-real-ip",
        b"via",
    }
)


class AdminGate:
    """Checks who uses an admin verb.

    Args:
        token: the admin token; None when there is none.
        credential: gives the cluster's credential for `admin`; empty while it is not known, or there is none.
        from_this_machine: let in who connects from this machine without a token. For a process of which no client is
            asked for one either.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        credential: Callable[[], str] = str,
        from_this_machine: bool = False,
    ) -> None:
        self._token, self._credential = token, credential
        self._from_this_machine = from_this_machine and token is None

    def check(self, client_host: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let a request in, or raise AuthFailed, status 401. Header names in lower case.

        client_host: the address that the connection came from; None when that is not known.
        """
        all_headers = list(headers)
        shown = [value for name, value in all_headers if name == b"authorization"]
        if len(shown) == 1 and self._knows(_bearer(shown[0])):
            return
        if self._from_this_machine and _is_local(client_host, all_headers):
            return
        raise AuthFailed(401, "AUTH_ADMIN", f"{self._why(bool(shown))}. Nothing was changed")

    def _knows(self, token: str) -> bool:
        keys = (self._token or "", self._credential())
        return any(bool(key) and hmac.compare_digest(key.encode(), token.encode()) for key in keys)

    def _why(self, shown: bool) -> str:
        ask = "give --admin-token, or --cluster URL to use the cluster's own credential"
        if shown:
            return f"this token does not open the admin verbs; {ask}"
        if self._from_this_machine:
            return f"without a token the admin verbs are for this machine only, and not for web pages; {ask}"
        return f"the admin verbs ask for a token; {ask}"


def _bearer(header: bytes) -> str:
    scheme, _, token = header.decode("latin-1").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" and len(token) <= _MAX_TOKEN_CHARS else ""


def _is_local(client_host: str | None, headers: list[tuple[bytes, bytes]]) -> bool:
    if client_host is None or not _is_loopback(client_host):
        return False
    if any(name in _ELSEWHERE for name, _ in headers):
        return False
    # A web page whose name was made to mean 127.0.0.1 asks under that name (DNS rebinding).
    return all(_names_no_page(value) for name, value in headers if name == b"host")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _names_no_page(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
