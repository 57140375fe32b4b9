"""Admin verbs of a process: routes under /admin/ that check who asks, and say what went wrong in JSON.

A handler gets the request and returns what goes out as JSON (anything msgspec encodes), or a whole `Response` of its
own. It raises errors of the tree; those become `{"error": {"code", "message"}}` with the status of
`walship.hrana.http.STATUSES`. A verb that only the leader knows raises NotLeader: the answer then names the leader and
its URL, and the command line goes there by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from walship.errors import AuthFailed, NotLeader, UsageError, WalshipError
from walship.hrana.admin import ADMIN, AdminGate
from walship.hrana.http import JSON_TYPE, STATUSES
from walship.hrana.types import ErrorBody

__all__ = ["AdminRoute", "AdminVerb", "admin_failure", "admin_routes", "body_of", "failed"]

log = logging.getLogger("walship.admin")

BODY_MAX_BYTES: Final = 64 << 10  # an order is a few words
_Body = TypeVar("_Body")
_NO_STORE: Final = {"cache-control": "no-store"}

Handler = Callable[[Request], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class AdminVerb:
    """One verb: `path` below /admin/, such as `voters` or `orphans/{name}`. What changes anything is a POST."""

    method: str
    path: str
    handle: Handler


class AdminRoute(Route):
    """A route that was made by `admin_routes`, and so checks who asks. No other may lie under /admin/."""


def admin_routes(gate: AdminGate, verbs: Iterable[AdminVerb]) -> list[Route]:
    """The routes of `verbs`, each behind `gate`."""
    return [AdminRoute(ADMIN + verb.path, _guarded(gate, verb), methods=[verb.method]) for verb in verbs]


def _guarded(gate: AdminGate, verb: AdminVerb) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        host = request.client.host if request.client is not None else None
        try:
            gate.check(host, request.scope["headers"])
            found = await verb.handle(request)
        except WalshipError as error:
            log.info("refuse %s %s from=%s: %s", verb.method, request.url.path, host, error)
            return admin_failure(error)
        if verb.method != "GET":
            log.warning("done %s %s from=%s", verb.method, request.url.path, host)
        if isinstance(found, Response):
            return found
        return Response(msgspec.json.encode(found), media_type=JSON_TYPE, headers=_NO_STORE)

    return answer


def admin_failure(error: WalshipError) -> Response:
    """How an error looks to whoever gave the order."""
    if isinstance(error, AuthFailed):
        status = error.status
    else:
        status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    where: dict[str, Any] = {}
    if isinstance(error, NotLeader):
        status = HTTPStatus.MISDIRECTED_REQUEST.value
        where = {"leader": error.leader, "url": error.url, "term": error.term}
    return failed(status, ErrorBody.of(error).code, str(error), **where)


def failed(status: int, code: str, message: str, **further: object) -> Response:
    """An answer in the words of `admin_failure`, for what is no error of the tree."""
    headers = _NO_STORE | ({"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {})
    body = {"error": {"code": code, "message": message, **further}}
    return Response(msgspec.json.encode(body), status, headers, JSON_TYPE)


async def body_of(request: Request, kind: type[_Body]) -> _Body:
    """The JSON body of an order as `kind`, a msgspec Struct. Raises UsageError for what is none."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY_MAX_BYTES:
            raise UsageError(f"the body of an admin request exceeds {BODY_MAX_BYTES} bytes. Nothing was changed")
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the body of this admin request cannot be read: {error}. Nothing was changed") from error
