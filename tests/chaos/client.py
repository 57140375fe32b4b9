"""A pool of clients on one event loop: Hrana over HTTP, as many requests under way as are asked for.

tests/cluster/client.py is one client of one thread; an open-loop load has hundreds waiting during a failover, and a
thread for each would measure the threads. Nothing is retried or hidden: each request gives one `Reply`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.chaos.checkers.sets import Outcome

__all__ = ["Pool", "Reply", "batch", "execute", "rows"]

LIMIT_BYTES = 8 << 20
DONE = "WALSHIP_COMMITTED_RESULT_LOST"  # what the statement gave is lost, the write is not
PERHAPS_DONE = frozenset({"WALSHIP_OUTCOME_UNKNOWN", "WALSHIP_STORAGE"})  # docs/errors.md; all other codes promise "no"


@dataclass(slots=True)
class Reply:
    """What a client was told. `code` is empty iff all went well. `results` are the decoded Hrana results."""

    outcome: Outcome
    code: str = ""
    message: str = ""
    position: tuple[int, int] | None = None
    served_by: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Rows of the last result that has any."""
        return next((rows(each) for each in reversed(self.results) if each.get("rows")), [])


def rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(_decode(value) for value in row) for row in result["rows"]]


def execute(sql: str, *args: int) -> dict[str, object]:
    return {"type": "execute", "stmt": {"sql": sql, "args": [_integer(each) for each in args]}}


def batch(*statements: tuple[str, tuple[int, ...]]) -> dict[str, object]:
    """One transaction: BEGIN IMMEDIATE, each statement if the one before it went well, COMMIT, else ROLLBACK."""
    steps: list[dict[str, object]] = [{"stmt": {"sql": "BEGIN IMMEDIATE", "args": []}}]
    for sql, args in [*statements, ("COMMIT", ())]:
        before = {"type": "ok", "step": len(steps) - 1}
        steps.append({"stmt": {"sql": sql, "args": [_integer(each) for each in args]}, "condition": before})
    done = {"type": "ok", "step": len(steps) - 1}
    steps.append({"stmt": {"sql": "ROLLBACK", "args": []}, "condition": {"type": "not", "cond": done}})
    return {"type": "batch", "batch": {"steps": steps}}


class Pool:
    """Connections to one server, opened as they are needed and kept. Use it on one event loop."""

    def __init__(self, url: str, *, timeout_seconds: float = 30.0) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._timeout_seconds = timeout_seconds
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, *requests: dict[str, object], level: str = "") -> Reply:
        """Requests on a stream of their own. Never raises for what a server or a network does."""
        body = json.dumps({"baton": None, "requests": [*requests, {"type": "close"}]}).encode()
        head = f"POST /v3/pipeline HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n"
        if level:
            head += f"walship-consistency: {level}\r\n"
        sent = False
        writer = None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                reader, writer = await self._connection()
                sent = True
                writer.write(head.encode() + b"\r\n" + body)
                status, headers, data = await _response(reader)
                self._idle.append((reader, writer))
                writer = None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
            outcome = Outcome.UNKNOWN if sent else Outcome.NOT_DONE
            return Reply(outcome, "no reply" if sent else "no connection", repr(error))
        finally:
            if writer is not None:
                writer.transport.abort()
        return _reply(status, headers, data)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        for _, writer in self._idle:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.transport.abort()
        return await asyncio.open_connection(self._host, self._port, limit=LIMIT_BYTES)


async def _response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split(" ")[1]), headers, await reader.readexactly(int(headers.get("content-length", "0")))


def _reply(status: int, headers: dict[str, str], data: bytes) -> Reply:
    position = None
    if text := headers.get("walship-position"):
        term, _, txid = text.partition(".")
        position = (int(term), int(txid))
    reply = Reply(Outcome.OK, position=position, served_by=headers.get("walship-served-by", ""))
    if status >= 400:
        _refuse(reply, _error_of(status, data))
        return reply
    for each in json.loads(data)["results"]:
        if each["type"] != "ok":
            _refuse(reply, each["error"])
            return reply
        if each["response"]["type"] == "execute":
            reply.results.append(each["response"]["result"])
        elif each["response"]["type"] == "batch":
            _take_batch(reply, each["response"]["result"])
    return reply


def _take_batch(reply: Reply, result: dict[str, Any]) -> None:
    """A batch of `batch` above: it is done iff its COMMIT went well, and not done if that was not run."""
    reply.results.extend(each for each in result["step_results"] if each is not None)
    commit = len(result["step_results"]) - 2
    errors = [error for error in result["step_errors"] if error is not None]
    if result["step_results"][commit] is None:
        _refuse(reply, errors[0])


def _refuse(reply: Reply, error: dict[str, Any]) -> None:
    reply.code, reply.message = error.get("code") or "?", error.get("message") or ""
    if reply.code == DONE:
        reply.outcome = Outcome.OK
    else:
        reply.outcome = Outcome.UNKNOWN if reply.code in PERHAPS_DONE else Outcome.NOT_DONE


def _error_of(status: int, data: bytes) -> dict[str, Any]:
    try:
        error: dict[str, Any] = json.loads(data)
        return {"code": error["code"], "message": error["message"]}
    except (ValueError, KeyError, TypeError):
        return {"code": f"HTTP {status}", "message": data.decode("utf-8", "replace")}


def _integer(value: int) -> dict[str, str]:
    return {"type": "integer", "value": str(value)}


def _decode(value: dict[str, Any]) -> Any:
    return int(value["value"]) if value["type"] == "integer" else value.get("value", value.get("base64"))
