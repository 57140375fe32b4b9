"""The baton at the head of a cursor, as clients use it that do not wait for the end of an answer (hrana.md 2.1)."""

from __future__ import annotations

import asyncio
import json

from tests.proxy.conftest import CLOSE, Cluster, Start, execute

ROWS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 20) SELECT n FROM c"


async def next_request_after_the_last_row(cluster: Cluster) -> int:
    """PyPI libsql reads up to the line that ends its step, and sends its next request with the baton of the head."""
    batch = {"steps": [{"stmt": {"sql": ROWS}}]}
    async with cluster.client.http.stream("POST", "/v3/cursor", json={"batch": batch}) as response:
        baton = None
        async for line in response.aiter_lines():
            entry = json.loads(line)
            baton = entry.get("baton", baton)
            if entry.get("type") == "step_end":
                break
        answer = await cluster.client.post([execute("SELECT 1"), CLOSE], baton=baton)
        return answer.status_code


async def test_the_baton_of_a_cursor_is_good_once_its_last_row_was_read(start: Start) -> None:
    """It was refused as "already been used" while the node's word that the cursor ended was still on its way."""
    cluster = await start(followers=0)
    cluster.leader.may_end_cursors.clear()
    async with asyncio.TaskGroup() as tasks:
        client = tasks.create_task(next_request_after_the_last_row(cluster))
        await asyncio.wait({client}, timeout=0.3)
        cluster.leader.may_end_cursors.set()
    assert client.result() == 200
