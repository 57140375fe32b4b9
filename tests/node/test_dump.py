"""GET /dump at a node (hrana.md 1.1): one snapshot, streamed, and cut when it cannot go on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.node.real_host import RealHost
from tests.waiting import eventually
from walship.front.dump import wants_row_ids
from walship.front.listen import listen
from walship.hrana.types import ExecuteRequest, Stmt
from walship.node.app import NodeApp
from walship.node.http_server import serving
from walship.service.request import Call

ROWS = (
    "INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
    "SELECT i, hex(zeroblob(300)) FROM n"
)


@pytest.fixture
async def client(leader: RealHost) -> AsyncIterator[httpx.AsyncClient]:
    statements = [ExecuteRequest(Stmt(sql)) for sql in ("CREATE TABLE t(a, b)", ROWS)]
    await leader.service.pipeline(Call(list(statements)))
    app = NodeApp(leader.service, leader, name=leader.name)
    async with (
        serving(app, listen("127.0.0.1", 0), drain_seconds=1) as address,
        httpx.AsyncClient(base_url=address.url, timeout=20) as http,
    ):
        yield http


async def test_it_is_whole_and_says_what_it_shows(leader: RealHost, client: httpx.AsyncClient) -> None:
    answer = await client.get("/dump?preserve_row_ids=true")
    assert answer.status_code == 200
    assert answer.headers["walship-position"] == str(leader.watermarks.captured)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.text.count('INSERT INTO "t"("rowid","a","b") VALUES(') == 20_000
    assert answer.text.endswith("\nCOMMIT;\n")


async def test_writes_go_on_and_are_not_in_it(leader: RealHost, client: httpx.AsyncClient) -> None:
    async with client.stream("GET", "/dump") as answer:
        texts = answer.aiter_text()
        text = await anext(texts)
        await leader.service.pipeline(Call([ExecuteRequest(Stmt("INSERT INTO t VALUES ('late', 1)"))]))
        text += "".join([part async for part in texts])
    assert text.endswith("\nCOMMIT;\n")
    assert "late" not in text


async def test_a_client_that_goes_away_ends_its_snapshot(leader: RealHost, client: httpx.AsyncClient) -> None:
    async with client.stream("GET", "/dump") as answer:
        await anext(answer.aiter_raw())
        assert leader.service.status().cursors == 1
    await eventually(lambda: leader.service.status().cursors == 0)


async def test_what_cannot_go_on_is_cut(leader: RealHost, client: httpx.AsyncClient) -> None:
    """A shell that reads it rolls back; whoever downloads it is told."""
    text = b""
    cut = False
    async with client.stream("GET", "/dump") as answer:
        try:
            async for part in answer.aiter_raw():
                text += part
                for cursor in list(leader.service._cursors):
                    cursor.close()
        except httpx.RemoteProtocolError:
            cut = True
    assert cut
    assert text.endswith(b"ROLLBACK; -- due to errors\n")
    assert b"COMMIT" not in text


@pytest.mark.parametrize(
    ("query", "wanted"),
    [(b"", False), (b"preserve_row_ids=true", True), (b"a=b&preserve_row_ids=1", True), (b"preserve_row_ids=0", False)],
)
def test_row_ids_are_asked_for_by_the_query(query: bytes, wanted: bool) -> None:
    assert wants_row_ids(query) is wanted
