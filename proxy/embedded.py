"""Embedded replicas through the proxy: three GET paths, forwarded to a node that can answer (hrana.md 4).

`/info` and `/export/G` go to the leader, which keeps the generations and their image; `/sync` goes to a follower, and
to the leader when no follower's log reaches far enough (back to the client, or up to what was acknowledged through
this proxy: a client that wrote pulls once and expects its write). Bodies are streamed; nothing is kept here. Nodes
check the client's token themselves.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from proxy.backends import Backend, Backends
from proxy.consistency import Floors
from walship.formats.link import Role

__all__ = ["EmbeddedProxy"]

log = logging.getLogger("walship.proxy.embedded")

_TIMEOUT = httpx.Timeout(30.0, connect=2.0)  # between two reads of a body; an image may take as long as it likes
_PASSED = ("content-type", "content-length", "cache-control", "access-control-allow-origin")
_ELSEWHERE = 503  # a node's word for "not me, not now"


class EmbeddedProxy:
    """Forwards. `aclose` ends its connections to the nodes."""

    def __init__(self, backends: Backends, floors: Floors, rng: random.Random) -> None:
        self._backends = backends
        self._floors = floors
        self._rng = rng
        self._client = httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False)

    def routes(self) -> list[Route]:
        return [
            Route("/info", self._to_leader, methods=["GET"]),
            Route("/export/{generation:int}", self._to_leader, methods=["GET"]),
            Route("/sync/{generation:int}/{first:int}/{end:int}", self._to_any, methods=["GET"]),
            Route("/sync/{rest:path}", self._to_leader, methods=["POST"]),
        ]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _to_leader(self, request: Request) -> Response:
        return await self._forward(request, self._leaders())

    async def _to_any(self, request: Request) -> Response:
        followers = [each for each in self._backends if each.usable and each.role is not Role.LEADER]
        self._rng.shuffle(followers)
        return await self._forward(request, followers + self._leaders())

    def _leaders(self) -> list[Backend]:
        return [each for each in self._backends if each.usable and each.role is Role.LEADER]

    async def _forward(self, request: Request, backends: list[Backend]) -> Response:
        """The first answer that is not "not me"; the last word of those asked otherwise."""
        refusal: Response = JSONResponse(
            {"error": "no node can answer this now; nothing was changed, ask again"}, 503, {"cache-control": "no-store"}
        )
        for backend in backends:
            try:
                answer = await self._ask(request, backend)
            except httpx.HTTPError as error:
                log.info("forward %s failed node=%s error=%r", request.url.path, backend.name, error)
                continue
            if answer.status_code != _ELSEWHERE:
                return _passed_on(answer)
            refusal = Response(await answer.aread(), _ELSEWHERE, _headers(answer))
            await answer.aclose()
        return refusal

    async def _ask(self, request: Request, backend: Backend) -> httpx.Response:
        # libSQL clients without a token send "Bearer " with nothing after it, which is no valid header value.
        token = request.headers.get("authorization", "").strip()
        asked = self._client.build_request(
            request.method,
            backend.record.url.rstrip("/") + request.url.path,
            headers={"walship-min-position": str(self._floors.position)} | ({"authorization": token} if token else {}),
        )
        return await self._client.send(asked, stream=True)


def _passed_on(answer: httpx.Response) -> Response:
    async def body() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw(1 << 16):
                yield chunk
        finally:
            await answer.aclose()

    return StreamingResponse(body(), answer.status_code, _headers(answer))


def _headers(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in _PASSED if name in answer.headers}
