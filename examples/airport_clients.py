"""The Python clients that airports.py can use, each as it is: what differs is how a connection is made and asked.

`connect` gives an object with `execute(sql, parameters)`, whose result has `fetchone()` and `fetchall()`, and with
`commit()` and `close()`. The DB-API clients have those themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CLIENTS", "connect", "modules"]


def _libsql(url: str) -> Any:
    import libsql

    return libsql.connect(url)


def _turso(url: str) -> Any:
    import turso_serverless

    return turso_serverless.connect(url)


def _sqlalchemy(url: str) -> Any:
    import sqlalchemy

    return sqlalchemy.create_engine(url.replace("http:", "sqlite+libsql:") + "/?secure=false").raw_connection()


class _Rows:
    """A result that is here already."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = iter(rows)

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


class _OldClient:
    """PyPI `libsql-client`, the former official one, without its event loop. Each statement is committed by itself."""

    def __init__(self, url: str) -> None:
        import libsql_client

        self._client = libsql_client.create_client_sync(url)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> _Rows:
        return _Rows([tuple(row) for row in self._client.execute(sql, list(parameters)).rows])

    def commit(self) -> None:
        pass

    def close(self) -> None:
        self._client.close()  # its thread would keep the process


class _Django:
    """Django by `django-libsql-backend`, whose connection commits each statement outside of an atomic block."""

    def __init__(self, url: str) -> None:
        from django.conf import settings
        from django.db import ConnectionHandler

        if not settings.configured:
            settings.configure()
        database = {"ENGINE": "django_libsql", "NAME": url, "AUTH_TOKEN": ""}
        self._connection = ConnectionHandler({"default": database})["default"]

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> _Rows:
        with self._connection.cursor() as cursor:
            cursor.execute(sql.replace("%", "%%"), parameters)
            return _Rows(cursor.fetchall())

    def commit(self) -> None:
        pass

    def close(self) -> None:
        self._connection.close()


_CLIENTS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "libsql": (_libsql, ("libsql",)),
    "turso": (_turso, ("turso_serverless",)),
    "sqlalchemy": (_sqlalchemy, ("sqlalchemy", "libsql_experimental")),
    "libsql-client": (_OldClient, ("libsql_client",)),
    "libsql-client-ws": (lambda url: _OldClient(url.replace("http:", "ws:")), ("libsql_client",)),
    "django": (_Django, ("django.db",)),
}
CLIENTS = tuple(_CLIENTS)


def modules(client: str) -> tuple[str, ...]:
    """What the client is imported by."""
    return _CLIENTS[client][1]


def connect(client: str, url: str) -> Any:
    """A connection by the client library of that name."""
    return _CLIENTS[client][0](url)
