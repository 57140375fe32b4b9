"""Everything that a front door answers besides Hrana: probes, health, version, status, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from walship import __version__
from walship.front.admin import AdminRoute
from walship.front.answer import CORS
from walship.hrana.admin import ADMIN
from walship.hrana.http import JSON_TYPE, PROBES
from walship.metrics import CONTENT_TYPE

__all__ = ["Pages", "plain_pages"]


class Pages(Protocol):
    """What a process tells about itself."""

    def status(self) -> Mapping[str, object]:
        """The body of /status, ready for JSON."""
        ...

    def unhealthy(self) -> str | None:
        """None when it can serve, else why not."""
        ...

    def metrics(self) -> bytes:
        """The Prometheus text."""
        ...


def plain_pages(pages: Pages, further: Sequence[Route]) -> Starlette:
    """The application that serves them and the `further` routes; an empty 404 for everything else."""
    for route in further:  # the front door asks for no client's token there, so nothing else may do without a check
        assert isinstance(route, AdminRoute) or not route.path.startswith(ADMIN), f"{route.path} lets everybody in"
    cors = {name.decode(): value.decode() for name, value in CORS}

    def probe(request: Request) -> Response:
        return PlainTextResponse(PROBES[request.url.path], headers=cors)

    def health(_: Request) -> Response:
        reason = pages.unhealthy()
        return Response(headers=cors) if reason is None else PlainTextResponse(reason, 503, cors)

    def version(_: Request) -> Response:
        return PlainTextResponse(f"walship {__version__}", headers=cors)

    def status(_: Request) -> Response:
        return Response(msgspec.json.encode(pages.status()), media_type=JSON_TYPE, headers=cors)

    def metrics(_: Request) -> Response:
        return Response(pages.metrics(), media_type=CONTENT_TYPE)

    def nothing(_: Request, __: Exception) -> Response:
        return Response(status_code=404, headers=cors)

    pages_by_path: dict[str, Callable[[Request], Response]] = {
        **dict.fromkeys(PROBES, probe),
        "/health": health,
        "/version": version,
        "/status": status,
        "/metrics": metrics,
    }
    routes = [Route(path, _in_loop(page), methods=["GET"]) for path, page in pages_by_path.items()]
    return Starlette(routes=[*routes, *further], exception_handlers={404: nothing})


def _in_loop(page: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Starlette runs plain functions in threads; these are quick and look at state of the loop."""

    async def answer(request: Request) -> Response:
        return page(request)

    return answer
