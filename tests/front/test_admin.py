"""Routes of admin verbs: checked, answered in JSON, refused in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from walship.errors import NotLeader, UsageError
from walship.front.admin import BODY_MAX_BYTES, AdminVerb, admin_routes, body_of
from walship.front.pages import plain_pages
from walship.hrana.admin import AdminGate

TOKEN = "adm1n"


class Order(msgspec.Struct, forbid_unknown_fields=True):
    add: str


class Nothing:
    """A process that tells nothing about itself."""

    def status(self) -> dict[str, object]:
        return {}

    def unhealthy(self) -> str | None:
        return None

    def metrics(self) -> bytes:
        return b""


async def echo(request: Request) -> object:
    return {"added": (await body_of(request, Order)).add}


async def elsewhere(_: Request) -> object:
    raise NotLeader("b", "http://b:1", 7)


async def own(_: Request) -> Response:
    return Response(b"bytes", 200)


async def wrong(_: Request) -> object:
    raise UsageError("no such thing")


VERBS = [
    AdminVerb("POST", "voters", echo),
    AdminVerb("POST", "switchover", elsewhere),
    AdminVerb("GET", "orphans/{name}", own),
    AdminVerb("GET", "wrong", wrong),
]


async def ask(method: str, path: str, *, token: str = TOKEN, body: bytes = b"") -> tuple[int, Any]:
    pages = plain_pages(Nothing(), admin_routes(AdminGate(token=TOKEN), VERBS))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(pages), base_url="http://node") as client:
        answer = await client.request(method, path, headers={"authorization": f"Bearer {token}"}, content=body)
    return answer.status_code, answer.json() if answer.headers.get("content-type", "").startswith(
        "application/json"
    ) else answer.content


async def test_a_verb_answers_in_json() -> None:
    assert await ask("POST", "/admin/voters", body=b'{"add":"c"}') == (200, {"added": "c"})


async def test_a_handler_may_answer_bytes() -> None:
    assert await ask("GET", "/admin/orphans/1-2-3.ltx") == (200, b"bytes")


@pytest.mark.parametrize("path", ["/admin/voters", "/admin/switchover"])
async def test_without_the_token_no_verb_is_run(path: str) -> None:
    status, answer = await ask("POST", path, token="wrong", body=b'{"add":"c"}')
    assert (status, answer["error"]["code"]) == (401, "AUTH_ADMIN")


async def test_a_refusal_names_the_leader() -> None:
    status, answer = await ask("POST", "/admin/switchover")
    assert status == 421
    assert answer["error"] | {"message": ""} == {
        "code": "WALSHIP_NOT_LEADER",
        "message": "",
        "leader": "b",
        "url": "http://b:1",
        "term": 7,
    }


async def test_an_error_of_the_tree_keeps_its_status_and_words() -> None:
    assert await ask("GET", "/admin/wrong") == (400, {"error": {"code": "WALSHIP_USAGE", "message": "no such thing"}})


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"add":1}', b'{"add":"c","drop":"d"}', b"\xff", b"x" * (BODY_MAX_BYTES + 1)]
)
async def test_a_body_that_is_no_order_is_refused(body: bytes) -> None:
    status, answer = await ask("POST", "/admin/voters", body=body)
    assert (status, answer["error"]["code"]) == (400, "WALSHIP_USAGE")
    assert "Nothing was changed" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/admin/", "/admin/nothing", "/admin", "/admin/voters/more"])
async def test_what_is_no_verb_is_nothing(path: str) -> None:
    assert (await ask("POST", path))[0] == 404


def test_no_unguarded_route_may_lie_among_the_verbs() -> None:
    async def open_door(_: Request) -> Response:
        return JSONResponse({})

    routes: Sequence[Route] = [Route("/admin/door", open_door)]
    with pytest.raises(AssertionError, match="lets everybody in"):
        plain_pages(Nothing(), routes)
