"""The node's end of the link over real sockets: each request is answered once, with its own answer, within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.node.real_host import TERM, RealHost
from tests.waiting import eventually
from walship.engine.watermarks import Watermarks
from walship.errors import NotLeader, Unavailable
from walship.formats import link
from walship.formats.position import Position
from walship.front.listen import listen
from walship.hrana.types import Level
from walship.node.app import NodeApp
from walship.node.http_server import serving
from walship.node.link_server import LinkServer
from walship.node.outcomes import Outcomes

UPGRADE = b"GET /walship/link HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: walship-link\r\n\r\n"


@dataclass
class Proxy:
    """The other end: sends requests, sorts what comes back by id."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    grants: bool = True
    statuses: list[link.Status] = field(default_factory=list)
    received: dict[int, list[link.Message]] = field(default_factory=dict)
    chunk_bytes: int = 0
    last_id: int = 0

    async def listen(self) -> None:
        messages = link.LinkReader()
        while data := await self.reader.read(1 << 16):
            for message in messages.receive_data(data):
                if isinstance(message, link.Status):
                    self.statuses.append(message)
                    continue
                self.received.setdefault(message.id, []).append(message)
                if isinstance(message, link.Chunk):
                    self.chunk_bytes += len(message.data)
                    if self.grants:
                        self.writer.write(link.Grant(message.id, len(message.data)).to_bytes())

    def send(self, verb: link.Verb, body: object, **fields: Any) -> int:
        self.last_id += 1
        self.writer.write(link.Request(self.last_id, verb, json.dumps(body).encode(), **fields).to_bytes())
        return self.last_id

    async def ends(self, id: int) -> list[link.Message]:
        """All messages for `id`, once the last one is there."""

        def ended() -> bool:
            messages = self.received.get(id, [])
            return bool(messages) and not isinstance(messages[-1], link.CursorHead | link.Chunk)

        await eventually(ended)
        return self.received[id]

    async def ask(self, *sql: str, **fields: Any) -> link.Reply | link.Refusal:
        requests = [{"type": "execute", "stmt": {"sql": text}} for text in sql]
        (message,) = await self.ends(self.send(link.Verb.PIPELINE, {"requests": requests}, **fields))
        assert isinstance(message, link.Reply | link.Refusal)
        return message


@dataclass
class Linked:
    server: LinkServer
    proxy: Proxy


@asynccontextmanager
async def linked(host: RealHost, **options: Any) -> AsyncIterator[Linked]:
    server = LinkServer(host.service, host.link_status, host.watermarks.on_change, **options)
    app = NodeApp(host.service, host, name=host.name)
    upgrades = {"/walship/link": server.serve}
    async with serving(app, listen("127.0.0.1", 0), upgrades=upgrades, drain_seconds=2) as address:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(UPGRADE)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        proxy = Proxy(reader, writer)
        async with asyncio.TaskGroup() as group:
            group.create_task(proxy.listen())
            try:
                yield Linked(server, proxy)
            finally:
                await server.drain(1)
        writer.close()


@pytest.fixture
async def proxy(leader: RealHost) -> AsyncIterator[Proxy]:
    async with linked(leader) as both:
        yield both.proxy


def values(reply: link.Reply | link.Refusal, index: int = 0) -> list[list[Any]]:
    assert isinstance(reply, link.Reply), reply
    result = json.loads(reply.body)["results"][index]
    assert result["type"] == "ok", result
    return [[value.get("value") for value in row] for row in result["response"]["result"]["rows"]]


async def test_a_lost_link_takes_its_transactions_along(leader: RealHost) -> None:
    """A killed proxy's open transaction would keep the write turn until its timer, 5 s after others began to wait."""
    async with linked(leader) as dying, linked(leader) as living:
        await living.proxy.ask("create table t(a)")
        assert isinstance(await dying.proxy.ask("insert into t values(1)", flags=link.RequestFlags.KEEP), link.Reply)
        assert isinstance(await dying.proxy.ask("begin immediate", "insert into t values(2)"), link.Reply)
        dying.proxy.writer.transport.abort()
        async with asyncio.timeout(3):
            await living.proxy.ask("insert into t values(3)")
        assert values(await living.proxy.ask("select a from t")) == [["1"], ["3"]]
        await eventually(lambda: leader.service.status().streams == 0)


async def test_requests_are_answered_with_results_and_position(proxy: Proxy) -> None:
    written = await proxy.ask("create table t(a)", "insert into t values (5)")
    assert isinstance(written, link.Reply)
    assert written.body.startswith(link.NO_BATON)
    assert (written.stream, written.flags) == (0, link.ReplyFlags.AUTOCOMMIT)
    assert written.position.term == TERM
    assert values(await proxy.ask("select a from t", floor=written.position)) == [["5"]]


async def test_the_first_message_is_a_status_and_they_keep_coming(proxy: Proxy) -> None:
    await eventually(lambda: len(proxy.statuses) >= 3)
    status = proxy.statuses[0]
    assert (status.name, status.role, status.term, status.history) == ("n1", link.Role.LEADER, TERM, ((TERM, 0),))
    assert not status.flags & link.StatusFlags.DRAINING


async def test_a_write_changes_the_status_without_waiting_for_the_beat(proxy: Proxy) -> None:
    await eventually(lambda: len(proxy.statuses) >= 1)
    reply = await proxy.ask("create table t(a)")
    assert isinstance(reply, link.Reply)
    await eventually(lambda: proxy.statuses[-1].applied == reply.position)


async def test_a_transaction_stays_on_its_stream_until_it_ends(proxy: Proxy) -> None:
    begun = await proxy.ask("create table t(a)", "begin immediate", "insert into t values (1)")
    assert isinstance(begun, link.Reply)
    assert begun.stream != 0
    assert not begun.flags & link.ReplyFlags.AUTOCOMMIT
    assert values(await proxy.ask("select count(*) from t")) == [["0"]]
    ended = await proxy.ask("commit", stream=begun.stream)
    assert isinstance(ended, link.Reply)
    assert (ended.stream, ended.flags) == (0, link.ReplyFlags.AUTOCOMMIT)
    assert values(await proxy.ask("select count(*) from t")) == [["1"]]


async def test_a_closed_stream_is_rolled_back(proxy: Proxy) -> None:
    await proxy.ask("create table t(a)")
    begun = await proxy.ask("begin immediate", "insert into t values (1)")
    assert isinstance(begun, link.Reply)
    (closed,) = await proxy.ends(proxy.send(link.Verb.CLOSE_STREAM, None, stream=begun.stream))
    assert isinstance(closed, link.Reply)
    assert closed.stream == 0
    assert values(await proxy.ask("select count(*) from t")) == [["0"]]


@pytest.mark.parametrize(
    ("sql", "fields", "reason"),
    [
        ("create table x(a)", {"flags": link.RequestFlags.READ_ONLY}, link.Reason.NOT_READ_ONLY),
        ("select 1", {"floor": Position(TERM, 10**9), "wait_ms": 1}, link.Reason.BEHIND),
        ("select 1", {"min_term": TERM + 1}, link.Reason.FENCED),
        ("select 1", {"stream": 12345}, link.Reason.PROTOCOL),
    ],
)
async def test_a_refusal_says_why(proxy: Proxy, sql: str, fields: dict[str, Any], reason: link.Reason) -> None:
    refused = await proxy.ask(sql, **fields)
    assert isinstance(refused, link.Refusal)
    assert refused.reason is reason


async def test_a_follower_refuses_a_write_by_naming_the_leader(follower: RealHost) -> None:
    async with linked(follower) as both:
        refused = await both.proxy.ask("create table t(a)")
    assert isinstance(refused, link.Refusal)
    assert refused.reason is link.Reason.NOT_LEADER
    assert refused.leader == link.Leader("n1", "http://n1:1", TERM)


async def test_a_malformed_body_refuses_the_request_and_not_the_link(proxy: Proxy) -> None:
    (refused,) = await proxy.ends(proxy.send(link.Verb.PIPELINE, {"requests": [{"type": "walk"}]}))
    assert isinstance(refused, link.Refusal)
    assert refused.reason is link.Reason.PROTOCOL
    assert values(await proxy.ask("select 1")) == [["1"]]


async def test_sixty_four_clients_on_one_link_get_their_own_rows(proxy: Proxy) -> None:
    async def ask(number: int) -> None:
        assert values(await proxy.ask(f"select {number}, 'mine'")) == [[str(number), "mine"]]

    async with asyncio.TaskGroup() as group:
        for number in range(64):
            group.create_task(ask(number))


def series(length: int) -> str:
    return f"with recursive s(value) as (select 1 union all select value + 1 from s limit {length}) "


async def test_a_cursor_comes_in_chunks_and_ends(proxy: Proxy) -> None:
    batch = {"batch": {"steps": [{"stmt": {"sql": series(30_000) + "select value from s"}}]}}
    messages = await proxy.ends(proxy.send(link.Verb.CURSOR, batch))
    end = messages.pop()
    assert isinstance(end, link.CursorEnd)
    assert (end.stream, end.flags, end.status) == (0, link.ReplyFlags.AUTOCOMMIT, 200)
    data = b"".join(message.data for message in messages if isinstance(message, link.Chunk))
    assert data.startswith(link.NO_BATON)
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["row"][0]["value"] for line in lines if line.get("type") == "row"] == [*map(str, range(1, 30_001))]
    assert all(message.data.endswith(b"\n") for message in messages if isinstance(message, link.Chunk))


async def test_a_slow_cursor_waits_for_its_window_and_holds_up_nobody(leader: RealHost, proxy: Proxy) -> None:
    """A cursor may be CURSOR_WINDOW and one chunk ahead of its grants; the link goes on with others."""
    proxy.grants = False
    batch = {"batch": {"steps": [{"stmt": {"sql": series(200_000) + "select value, hex(zeroblob(50)) from s"}}]}}
    id = proxy.send(link.Verb.CURSOR, batch)
    await eventually(lambda: proxy.chunk_bytes >= link.CURSOR_WINDOW)
    assert values(await proxy.ask("select 1")) == [["1"]]
    stopped_at = proxy.chunk_bytes
    assert stopped_at < 2 * link.CURSOR_WINDOW
    assert values(await proxy.ask("select 2")) == [["2"]]
    assert proxy.chunk_bytes == stopped_at
    proxy.grants = True
    proxy.writer.write(link.Grant(id, stopped_at).to_bytes())
    assert isinstance((await proxy.ends(id))[-1], link.CursorEnd)


async def test_a_cursor_of_a_vanished_proxy_lets_its_snapshot_go(leader: RealHost) -> None:
    async with linked(leader) as both:
        both.proxy.grants = False
        batch = {"batch": {"steps": [{"stmt": {"sql": series(200_000) + "select value, hex(zeroblob(50)) from s"}}]}}
        both.proxy.send(link.Verb.CURSOR, batch)
        await eventually(lambda: both.proxy.chunk_bytes >= link.CURSOR_WINDOW)
        both.proxy.writer.transport.abort()
        await eventually(lambda: leader.service.status().cursors == 0 and both.server.links == 0)


async def test_requests_beyond_the_bound_are_refused_as_overloaded(leader: RealHost) -> None:
    async with linked(leader, max_in_flight=4) as both:
        proxy = both.proxy
        slow = series(300_000) + "select max(value) from s"
        body = {"requests": [{"type": "execute", "stmt": {"sql": slow}}]}
        ids = [proxy.send(link.Verb.PIPELINE, body) for _ in range(12)]
        ended = [(await proxy.ends(id))[-1] for id in ids]
    refused = [message for message in ended if isinstance(message, link.Refusal)]
    assert refused
    assert {message.reason for message in refused} == {link.Reason.OVERLOADED}
    assert sum(isinstance(message, link.Reply) for message in ended) >= 4


async def test_draining_finishes_what_runs_refuses_the_rest_and_ends_the_link(leader: RealHost) -> None:
    async with linked(leader) as both:
        proxy, server = both.proxy, both.server
        slow = series(300_000) + "select max(value) from s"
        running = proxy.send(link.Verb.PIPELINE, {"requests": [{"type": "execute", "stmt": {"sql": slow}}]})
        await eventually(lambda: server.in_flight == 1 or running in proxy.received)
        await server.drain(10)
        (answer,) = await proxy.ends(running)
        assert isinstance(answer, link.Reply)
        await eventually(lambda: server.links == 0)
        assert any(status.flags & link.StatusFlags.DRAINING for status in proxy.statuses)


async def test_a_link_that_speaks_nonsense_is_closed(leader: RealHost) -> None:
    async with linked(leader) as both:
        both.proxy.writer.write(b"\xff" * 64)
        await eventually(lambda: both.server.links == 0)


async def test_a_write_of_a_vanished_proxy_is_still_done(leader: RealHost) -> None:
    """Nothing that writes is cancelled."""
    async with linked(leader) as both:
        await both.proxy.ask("create table t(a)")
        body = {"requests": [{"type": "execute", "stmt": {"sql": "insert into t values (1)"}}]}
        both.proxy.send(link.Verb.PIPELINE, body)
        await both.proxy.writer.drain()
        both.proxy.writer.close()
        await eventually(lambda: both.server.links == 0)
    reader = leader.database.connect_reader()
    assert reader.execute("select count(*) from t").fetchall() == [(1,)]
    reader.close()


async def test_a_read_index_is_a_position_and_nothing_else(leader: RealHost) -> None:
    """R18: LINEARIZABLE, SESSION and ANY are three different questions; the node's own rules answer them."""
    asked: list[tuple[Level, float]] = []

    async def position_for(level: Level, wait_seconds: float) -> Position:
        asked.append((level, wait_seconds))
        if level is Level.SESSION:
            raise NotLeader("n9", None, TERM)
        return Position(TERM, 7)

    async with linked(leader, position_for=position_for) as both:
        proxy = both.proxy
        for level in link.ReadLevel:
            await proxy.ends(proxy.send(link.Verb.READ_INDEX, {}, level=level, wait_ms=250))
        answers = [messages[-1] for messages in proxy.received.values()]
        fenced = await proxy.ends(proxy.send(link.Verb.READ_INDEX, {}, min_term=TERM + 1))
    assert asked == [(Level.ANY, 0.25), (Level.SESSION, 0.25), (Level.LINEARIZABLE, 0.25)]
    assert [type(answer) for answer in answers] == [link.Reply, link.Refusal, link.Reply]
    assert isinstance(answers[0], link.Reply)
    assert (answers[0].position, answers[0].body) == (Position(TERM, 7), b"")
    assert isinstance(fenced[0], link.Refusal)
    assert fenced[0].reason is link.Reason.FENCED


async def test_a_cursor_names_its_position_before_its_rows(proxy: Proxy) -> None:
    body = {"batch": {"steps": [{"stmt": {"sql": "select 1"}}]}}
    head, *_, end = await proxy.ends(proxy.send(link.Verb.CURSOR, body))
    assert isinstance(head, link.CursorHead)
    assert isinstance(end, link.CursorEnd)
    assert head.position == end.position


@asynccontextmanager
async def tokened(host: RealHost) -> AsyncIterator[Linked]:
    async with linked(host, outcome_of=Outcomes(host).of) as served:
        yield served


async def outcome(
    proxy: Proxy, seq: int, *, term: int = TERM, txid: int = 0, **fields: Any
) -> tuple[link.OutcomeBody, Position] | link.Refusal:
    asked = proxy.send(link.Verb.OUTCOME, None, incarnation=5, seq=seq, floor=Position(term, txid), **fields)
    (message,) = await proxy.ends(asked)
    if isinstance(message, link.Refusal):
        return message
    assert isinstance(message, link.Reply)
    return link.OutcomeBody.parse(message.body), message.position


NAMED: dict[str, Any] = {"term": TERM, "incarnation": 5}


async def test_a_token_tells_what_became_of_a_write(leader: RealHost) -> None:
    async with tokened(leader) as served:
        proxy = served.proxy
        assert isinstance(await proxy.ask("CREATE TABLE t(id INTEGER PRIMARY KEY, b)", seq=1, **NAMED), link.Reply)
        written = await proxy.ask("INSERT INTO t VALUES(4, 'x'), (9, 'y')", seq=2, **NAMED)
        returned = await proxy.ask("INSERT INTO t VALUES(5, 'x') RETURNING id", seq=3, **NAMED)
        failed = await proxy.ask("INSERT INTO t VALUES(5, 'x')", seq=4, **NAMED)
        done = link.Outcome.DONE
        assert await outcome(proxy, 1) == (link.OutcomeBody(done, 1, 0, None), Position(TERM, 1))
        assert await outcome(proxy, 2) == (link.OutcomeBody(done, 2, 2, 9), written.position)
        assert await outcome(proxy, 3) == (link.OutcomeBody(done, 3, 1, 5, True), returned.position)
        assert isinstance(failed, link.Reply)  # it changed nothing, so it may as well be called not done
        assert await outcome(proxy, 4) == (link.OutcomeBody(link.Outcome.NOT_DONE), link.NO_POSITION)


async def test_not_done_keeps_a_late_attempt_from_running(leader: RealHost) -> None:
    async with tokened(leader) as served:
        proxy = served.proxy
        await proxy.ask("CREATE TABLE t(id INTEGER PRIMARY KEY)", seq=1, **NAMED)
        assert await outcome(proxy, 2) == (link.OutcomeBody(link.Outcome.NOT_DONE), link.NO_POSITION)
        late = await proxy.ask("INSERT INTO t VALUES(1)", seq=2, **NAMED)
        assert isinstance(late, link.Refusal)
        assert late.reason is link.Reason.NOT_DONE
        again = await proxy.ask("INSERT INTO t VALUES(1)", seq=1, **NAMED)
        assert isinstance(again, link.Refusal)
        assert again.reason is link.Reason.OUTCOME_UNKNOWN
        assert values(await proxy.ask("SELECT count(*) FROM t")) == [["0"]]


async def test_a_commit_of_an_open_transaction_carries_its_token(leader: RealHost) -> None:
    async with tokened(leader) as served:
        proxy = served.proxy
        await proxy.ask("CREATE TABLE t(id INTEGER PRIMARY KEY)")
        begun = await proxy.ask("BEGIN IMMEDIATE")
        assert isinstance(begun, link.Reply)
        await proxy.ask("INSERT INTO t VALUES(1)", stream=begun.stream)
        ended = await proxy.ask("COMMIT", stream=begun.stream, seq=7, **NAMED)
        assert await outcome(proxy, 7) == (link.OutcomeBody(link.Outcome.DONE, 2, 0, None), ended.position)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"term": TERM - 1, "incarnation": 5, "seq": 1}, link.Reason.FENCED),
        ({"term": TERM + 1}, link.Reason.FENCED),
        ({"incarnation": 5, "seq": 1}, link.Reason.PROTOCOL),
    ],
)
async def test_an_attempt_runs_in_the_very_term_it_was_sent_in(
    leader: RealHost, fields: dict[str, Any], reason: link.Reason
) -> None:
    """m5 TERMBIND."""
    async with tokened(leader) as served:
        refused = await served.proxy.ask("CREATE TABLE t(id)", **fields)
        assert isinstance(refused, link.Refusal)
        assert refused.reason is reason
        assert leader.watermarks.captured.txid == 0


async def test_who_does_not_serve_tells_no_outcome(leader: RealHost, follower: RealHost) -> None:
    """m5 SERVING, MINTERM."""
    async with tokened(leader) as served, tokened(follower) as behind:
        refused = await outcome(behind.proxy, 1)
        assert isinstance(refused, link.Refusal)
        assert refused.reason is link.Reason.NOT_LEADER
        for newer in (await outcome(served.proxy, 1, term=TERM + 1), await outcome(served.proxy, 1, min_term=TERM + 1)):
            assert isinstance(newer, link.Refusal)
            assert newer.reason is link.Reason.FENCED
        waiting = replace(leader, watermarks=Watermarks(Position(TERM - 1, 0)))
        with pytest.raises(Unavailable, match="not acknowledged yet"):
            await Outcomes(waiting).of((5, 1), Position(TERM, 0), 0.01)
        assert await outcome(served.proxy, 1) == (link.OutcomeBody(link.Outcome.NOT_DONE), link.NO_POSITION)
