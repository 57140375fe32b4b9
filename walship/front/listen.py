"""The socket of a front door, bound before anything starts: a busy port is then an error of ours, and port 0 known."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, Self

from walship.errors import UsageError

__all__ = ["BACKLOG", "Address", "listen"]

BACKLOG: Final = 2048


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket really listens."""

    host: str
    port: int

    @classmethod
    def of(cls, listener: socket.socket) -> Self:
        host, port = listener.getsockname()[:2]
        return cls(host, port)

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises UsageError when the address is busy, not ours or not
    allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"{host} is not an address to listen on: {error}. Choose another by --listen") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Nothing was started; "
            "stop whoever has the port, or choose another by --listen"
        ) from error
    listener.setblocking(False)
    return listener
