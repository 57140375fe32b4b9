"""Opening a connection to a node: one HTTP request that turns it into a stream of the node's own (replication, peers).

Each shares the node's HTTP port, so that a node has one address and one firewall rule.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from walship.errors import Unavailable, UsageError

__all__ = ["PATH", "PROTOCOL_NAME", "connect", "request_bytes"]

PATH = "/walship/replication"
PROTOCOL_NAME = "walship-replication/1"
_MAX_HEAD_BYTES = 16 << 10
_BUFFER_BYTES = 1 << 20  # of the reader; it pauses the socket at twice this


def request_bytes(host: str, credential: str = "", *, path: str = PATH, protocol: str = PROTOCOL_NAME) -> bytes:
    """Return the request that asks for the upgrade; `host` is the Host header, `credential` what the node asks for."""
    shown = f"Authorization: Walship {credential}\r\n" if credential else ""
    return (f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{shown}Connection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n").encode(
        "ascii"
    )


def _check_answer(head: bytes, url: str, protocol: str) -> None:
    lines = head.decode("latin-1").split("\r\n")
    status = lines[0].split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if len(status) < 2 or not status[0].startswith("HTTP/1.1"):
        raise Unavailable(f"{url} does not speak HTTP/1.1: it answered {lines[0][:80]!r}. Check the address")
    if status[1] != "101" or headers.get("upgrade", "").lower() != protocol:
        raise Unavailable(f"{url} did not open a {protocol} stream: it answered {lines[0][:80]!r}")


async def connect(
    url: str,
    *,
    timeout_seconds: float,
    credential: str = "",
    path: str = PATH,
    protocol: str = PROTOCOL_NAME,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the node at `url` (http or https) and upgrade. The caller closes the writer.

    Raises Unavailable when it cannot be reached, does not answer in time, or answers anything but 101.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is not a URL: {error}") from error
    if not url.isascii() or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not the http:// or https:// URL of a node")
    secure = parts.scheme == "https"
    port = port or (443 if secure else 80)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(
                parts.hostname, port, limit=_BUFFER_BYTES, ssl=True if secure else None
            )
            writer.write(request_bytes(parts.netloc.rpartition("@")[2], credential, path=path, protocol=protocol))
            head = await reader.readuntil(b"\r\n\r\n")
            if len(head) > _MAX_HEAD_BYTES:
                raise Unavailable(f"{url} answered with {len(head)} bytes of headers; {_MAX_HEAD_BYTES} is the bound")
            _check_answer(head, url, protocol)
    except BaseException as error:
        if writer is not None:
            writer.close()
        if isinstance(error, TimeoutError):
            raise Unavailable(f"{url} did not answer within {timeout_seconds:g} s") from error
        if isinstance(error, OSError | asyncio.IncompleteReadError | asyncio.LimitOverrunError):
            raise Unavailable(f"{url} cannot be reached: {error}") from error
        raise
    return reader, writer
