"""A plain Hrana client over WebSocket, for tests: says what it is told, and hands out answers by request id."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

__all__ = ["Socket", "connected", "value_rows"]


class Socket:
    """One connection. Requests get their ids here; answers are kept until they are asked for."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._next_id = 0
        self._answers: dict[int, dict[str, Any]] = {}

    async def say(self, **message: Any) -> None:
        await self.connection.send(json.dumps(message))

    async def hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.connection.recv())
        return message

    async def hello(self, jwt: str | None = None) -> dict[str, Any]:
        await self.say(type="hello", jwt=jwt)
        return await self.hear()

    async def send(self, type: str, **request: Any) -> int:
        """Send a request without waiting; its id."""
        self._next_id += 1
        await self.say(type="request", request_id=self._next_id, request={"type": type, **request})
        return self._next_id

    async def answer(self, request_id: int) -> dict[str, Any]:
        """The whole answer to a request."""
        while request_id not in self._answers:
            message = await self.hear()
            self._answers[message["request_id"]] = message
        return self._answers.pop(request_id)

    async def ask(self, type: str, **request: Any) -> dict[str, Any]:
        """Send a request and return its `response`; an error is a failure of the test."""
        answer = await self.answer(await self.send(type, **request))
        assert answer["type"] == "response_ok", answer
        response: dict[str, Any] = answer["response"]
        return response

    async def fails(self, type: str, **request: Any) -> dict[str, Any]:
        """Send a request and return its `error`."""
        answer = await self.answer(await self.send(type, **request))
        assert answer["type"] == "response_error", answer
        error: dict[str, Any] = answer["error"]
        return error

    async def run(self, sql: str, stream: int = 1, *args: int | str) -> list[list[Any]]:
        """The rows of one statement."""
        stmt = {"sql": sql, "args": [_value(arg) for arg in args]}
        return value_rows((await self.ask("execute", stream_id=stream, stmt=stmt))["result"])

    async def closed(self) -> tuple[int | None, str]:
        """Wait until the other side has closed: code and reason."""
        try:
            while True:
                await self.connection.recv()
        except websockets.ConnectionClosed as end:
            return (None, "") if end.rcvd is None else (end.rcvd.code, end.rcvd.reason)


@asynccontextmanager
async def connected(
    url: str, *offered: str, hello: bool = True, headers: dict[str, str] | None = None
) -> AsyncIterator[Socket]:
    """A connection to the server at the http URL; by default it has said hello and opened stream 1."""
    names = [Subprotocol(name) for name in offered or ("hrana3",)]
    async with websockets.connect(
        url.replace("http", "ws", 1), subprotocols=names, max_size=None, additional_headers=headers
    ) as connection:
        socket = Socket(connection)
        if hello:
            assert await socket.hello() == {"type": "hello_ok"}
            await socket.ask("open_stream", stream_id=1)
        yield socket


def value_rows(result: dict[str, Any]) -> list[list[Any]]:
    return [
        [int(cell["value"]) if cell["type"] == "integer" else cell.get("value") for cell in row]
        for row in result["rows"]
    ]


def _value(value: int | str) -> dict[str, str]:
    return {"type": "integer", "value": str(value)} if isinstance(value, int) else {"type": "text", "value": value}
