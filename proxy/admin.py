"""Admin verbs through the proxy: it checks who asks, and passes the order on under the cluster's own credential.

An order goes to the leader, or to `?node=NAME`. Nothing is tried twice: an order may have been carried out though its
answer was lost, and then the answer says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.backends import Backend, Backends
from walship.errors import AuthFailed, OutcomeUnknown, Unavailable, UsageError, WalshipError
from walship.formats.link import Role
from walship.front.admin import BODY_MAX_BYTES, AdminRoute, admin_failure
from walship.hrana.admin import ADMIN, AdminGate

__all__ = ["AdminProxy"]

log = logging.getLogger("walship.proxy.admin")

_TIMEOUT: Final = httpx.Timeout(60.0, connect=2.0)  # a switchover waits for running transactions
_PASSED: Final = ("content-type", "cache-control", "content-disposition")


class AdminProxy:
    """Forwards. `aclose` ends its connections to the nodes.

    credential: the cluster's for `admin`; empty while it is not known.
    """

    def __init__(self, backends: Backends, gate: AdminGate, credential: Callable[[], str]) -> None:
        self._backends, self._gate, self._credential = backends, gate, credential
        self._client = httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False)

    def routes(self) -> list[Route]:
        return [AdminRoute(ADMIN + "{verb:path}", self._forward, methods=["GET", "POST"])]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _forward(self, request: Request) -> Response:
        host = request.client.host if request.client is not None else None
        try:
            self._gate.check(host, request.scope["headers"])
            answer = await self._ask(request, self._target(request.query_params.get("node")))
        except WalshipError as error:
            if not isinstance(error, AuthFailed):
                log.info("%s %s from=%s failed: %s", request.method, request.url.path, host, error)
            return admin_failure(error)
        if request.method != "GET":
            log.warning("%s %s from=%s: %d", request.method, request.url.path, host, answer.status_code)
        headers = {name: answer.headers[name] for name in _PASSED if name in answer.headers}
        return Response(answer.content, answer.status_code, headers)

    def _target(self, name: str | None) -> Backend:
        if name is not None:
            for each in self._backends:
                if each.name == name:
                    return each
            known = ", ".join(sorted(each.name for each in self._backends))
            raise UsageError(f"no node is named {name[:63]!r}; there are {known or 'none'}. Nothing was changed")
        leaders = [each for each in self._backends if each.usable and each.role is Role.LEADER]
        if not leaders:
            raise Unavailable("no leader is known now. Nothing was changed; ask again, or name a node with ?node=NAME")
        return leaders[0]

    async def _ask(self, request: Request, backend: Backend) -> httpx.Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_MAX_BYTES:
                raise UsageError(f"the body of an admin request exceeds {BODY_MAX_BYTES} bytes. Nothing was changed")
        credential = self._credential()
        # The path as it was sent: decoded, a name with a slash in it would become another verb.
        path = request.scope.get("raw_path") or request.url.path.encode()
        url = backend.record.url.rstrip("/") + path.decode("latin-1").partition("?")[0]
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {credential}"} if credential else {}
        )
        try:
            return await self._client.request(request.method, url, content=body, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(f"{backend.name} cannot be reached. Nothing was changed; ask again") from error
        except httpx.HTTPError as error:
            raise OutcomeUnknown(
                f"{backend.name} did not answer ({type(error).__name__}): the order may have been carried out. Look at "
                "`walship status` and `walship voters`"
            ) from error
