"""etcd cluster URLs: `etcd://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME`, or `etcds://` for TLS.

NAME keeps clusters apart that share one etcd: all records of a cluster lie under the keys `walship/NAME/`.

| option of etcds://   | for                                                            |
|----------------------|----------------------------------------------------------------|
| `?ca=/FILE`          | PEM of the authority that signed etcd's certificate; else the system's |
| `?cert=/FILE&key=/FILE` | a client certificate, for an etcd that asks for one          |

Only words are judged here; no file and no network is touched.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from walship.errors import UsageError

__all__ = ["EtcdAddress", "hide_password", "parse_etcd_url"]

DEFAULT_PORT = 2379
_EXAMPLE = "write etcd://HOST:2379[,HOST:2379]/NAME, or etcds:// for TLS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OPTIONS = ("ca", "cert", "key")


@dataclasses.dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Where an etcd is, how to get in, and which part of its keys is ours. `endpoints` are base URLs, in order."""

    endpoints: tuple[str, ...]
    name: str
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def tls(self) -> bool:
        return self.endpoints[0].startswith("https:")

    @property
    def prefix(self) -> str:
        """What the keys of this cluster begin with."""
        return f"walship/{self.name}/"

    def __str__(self) -> str:
        return f"etcd {', '.join(self.endpoints)}"


def hide_password(url: str) -> str:
    """A cluster URL as it may be shown."""
    return re.sub(r"(?<=://)([^/@:]*):.*@", r"\1:***@", url, count=1)  # to the last @: a password may be badly escaped


def parse_etcd_url(url: str) -> EtcdAddress:
    """Raises UsageError, naming what is allowed; the password is in no message."""
    shown = f"cluster = {hide_password(url)!r}"
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    if login and not (user and colon and password):
        raise UsageError(f"{shown}: before the @ stands USER:PASSWORD, with % escapes; {_EXAMPLE}")
    name = unquote(parts.path).strip("/")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{shown}: after the hosts stands the cluster's name, 1 to 63 letters, digits, dots, dashes or "
            f"underscores, first a letter or digit; {_EXAMPLE}"
        )
    web = "https" if parts.scheme == "etcds" else "http"
    endpoints = tuple(f"{web}://{_host(host, shown)}" for host in hosts.split(","))
    if len(set(endpoints)) != len(endpoints):
        raise UsageError(f"{shown}: a host stands there twice; {_EXAMPLE}")
    files = _files(parts.query, shown, tls=web == "https")
    if parts.fragment:
        raise UsageError(f"{shown}: a cluster URL takes no # part; {_EXAMPLE}")
    return EtcdAddress(endpoints, name, unquote(user), unquote(password), **files)


def _host(text: str, shown: str) -> str:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port if parts.port is not None else DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or not 0 < port < 65536 or re.search(r"[^\w.:%-]", host):
        raise UsageError(f"{shown}: {text!r} is no HOST:PORT; {_EXAMPLE}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _files(query: str, shown: str, *, tls: bool) -> dict[str, Path]:
    options = parse_qsl(query, keep_blank_values=True)
    if options and not tls:
        raise UsageError(f"{shown}: certificates are for etcds://; etcd:// is not encrypted")
    files = {}
    for option, value in options:
        if option not in _OPTIONS or option in files or not value.startswith("/"):
            raise UsageError(f"{shown}: after the ? may stand ca=, cert= and key=, once each, with absolute paths")
        files[option] = Path(value)
    if ("cert" in files) != ("key" in files):
        raise UsageError(f"{shown}: a client certificate needs both cert= and key=")
    return files
