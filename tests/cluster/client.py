"""A client of a proxy or a node: Hrana over HTTP on one kept connection, standard library only.

It does not retry and hides nothing: what a client can meet is a value here (`Failure`), because the tests count it.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Client", "Failed", "Failure", "NoReply", "Result"]

TIMEOUT_SECONDS = 30.0


class Failed(Exception):
    """The server answered, and the answer is a typed error: `code` and `message`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class NoReply(Exception):
    """The connection was refused, or ended before a reply. `sent`: the server may have read the request."""

    def __init__(self, error: OSError | http.client.HTTPException, *, sent: bool) -> None:
        super().__init__(repr(error))
        self.sent = sent


Failure = (Failed, NoReply)


@dataclass(frozen=True, slots=True)
class Result:
    """One statement's result: plain values, and the node that gave them."""

    rows: list[tuple[Any, ...]]
    changes: int
    served_by: str | None
    position: str | None

    @property
    def value(self) -> Any:
        return self.rows[0][0]


class Client:
    """One client. Not thread-safe: give each thread its own."""

    def __init__(self, url: str, timeout_seconds: float = TIMEOUT_SECONDS, *, token: str | None = None) -> None:
        parts = urlsplit(url)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_seconds)
        self.baton: str | None = None

    def execute(self, sql: str, *args: object) -> Result:
        """One statement on a stream of its own. Raises Failed or NoReply."""
        return self._results([_execute(sql, args), {"type": "close"}])[0]

    def sequence(self, *statements: str) -> list[Result]:
        """Statements one after the other on one stream, in one request; the first that fails ends it."""
        return self._results([*(_execute(sql, ()) for sql in statements), {"type": "close"}])

    def interactive(self, sql: str, *args: object) -> Result:
        """One statement on the kept stream of this client, which it opens or continues by its baton."""
        return self._results([_execute(sql, args)], stream=True)[0]

    def describe(self, sql: str) -> list[str]:
        """Names of the columns a statement would give."""
        request = {"type": "describe", "sql": sql}
        _, data = self._send("POST", "/v3/pipeline", json.dumps({"requests": [request, {"type": "close"}]}))
        [reply, _] = json.loads(data)["results"]
        if reply["type"] != "ok":
            raise Failed(reply["error"].get("code") or "", reply["error"]["message"])
        return [col["name"] for col in reply["response"]["result"]["cols"]]

    def end_stream(self) -> None:
        self._results([{"type": "close"}], stream=True)
        self.baton = None

    def get(self, path: str) -> Any:
        """A JSON document, such as /status."""
        return json.loads(self._send("GET", path, None)[1])

    def post(self, path: str, body: object) -> tuple[dict[str, str], str]:
        """Any request in the client's own words: headers and text of the reply. Raises Failed or NoReply."""
        headers, data = self._send("POST", path, json.dumps(body))
        return headers, data.decode()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _results(self, requests: list[dict[str, object]], *, stream: bool = False) -> list[Result]:
        body = json.dumps({"baton": self.baton if stream else None, "requests": requests})
        headers, data = self._send("POST", "/v3/pipeline", body)
        reply = json.loads(data)
        if stream:
            self.baton = reply["baton"]
        results = []
        for each in reply["results"]:
            if each["type"] != "ok":
                raise Failed(each["error"].get("code") or "", each["error"]["message"])
            if each["response"]["type"] == "execute":
                results.append(_result(each["response"]["result"], headers))
        return results

    def _send(self, method: str, path: str, body: str | None) -> tuple[dict[str, str], bytes]:
        connection = self._connection
        try:
            if connection.sock is None:
                connection.connect()
        except OSError as error:
            connection.close()
            raise NoReply(error, sent=False) from error
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoReply(error, sent=True) from error
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.status >= 400:
            raise _failure(response.status, data)
        return headers, data


def _failure(status: int, data: bytes) -> Failed:
    try:
        error = json.loads(data)
        return Failed(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return Failed(f"HTTP {status}", data.decode("utf-8", "replace"))


def _execute(sql: str, args: tuple[object, ...]) -> dict[str, object]:
    return {"type": "execute", "stmt": {"sql": sql, "args": [_encode(value) for value in args]}}


def _encode(value: object) -> dict[str, object]:
    if isinstance(value, int):
        return {"type": "integer", "value": str(value)}
    return {"type": "text", "value": str(value)}


def _decode(value: dict[str, Any]) -> Any:
    if value["type"] == "integer":
        return int(value["value"])
    return value.get("value", value.get("base64"))


def _result(result: dict[str, Any], headers: dict[str, str]) -> Result:
    return Result(
        rows=[tuple(map(_decode, row)) for row in result["rows"]],
        changes=result["affected_row_count"],
        served_by=headers.get("walship-served-by"),
        position=headers.get("walship-position"),
    )
