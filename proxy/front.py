"""The proxy's Hrana endpoints: one request in, one reply out, and what becomes of its stream (hrana.md 1.2 to 1.4).

A plain ASGI application for POST on the Hrana paths. The node's reply bytes go to the client as they are; only the
baton at their beginning is this proxy's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from prometheus_client import Counter, Histogram
from starlette.types import Receive, Scope, Send

from proxy.consistency import Settings
from proxy.dispatch import CursorAnswer, Dispatcher
from proxy.link import LinkLost
from proxy.plan import Known, Plan, plan_cursor, plan_pipeline
from proxy.router import Need
from proxy.streams import ClientStream, Pin, Streams
from walship.errors import (
    Draining,
    OutcomeUnknown,
    Overloaded,
    ProtocolViolation,
    Unavailable,
    WalshipError,
)
from walship.formats.link import NO_BATON, CursorEnd, Refusal, ReplyFlags, error_of
from walship.formats.position import Position
from walship.front.answer import CORS, Headers, send_answer, send_failure, send_head
from walship.front.body import Bodies, BodyRefused
from walship.hrana import v1
from walship.hrana.http import CURSOR_TYPE, ENDPOINTS, JSON_TYPE, Endpoint, Failure, Verb, failure
from walship.hrana.json import cursor_error, decode_cursor, decode_pipeline
from walship.hrana.types import CursorBody, ErrorBody, PipelineBody
from walship.metrics import ProxyMetrics

__all__ = [
    "Counted",
    "CursorRefused",
    "Front",
    "cursor_failure",
    "freshness_headers",
    "reply_results",
    "served",
]

log = logging.getLogger("walship.proxy.front")

MAX_ACTIVE = 4096
"""Requests in the proxy at once, those that wait for a leader included; beyond it nothing is begun."""


class Front:
    """Answers POST on the Hrana paths. `draining` set refuses new work, except on streams that hold a transaction."""

    def __init__(
        self,
        *,
        streams: Streams,
        dispatcher: Dispatcher,
        metrics: ProxyMetrics,
        known: Callable[[], Known],
        bodies: Bodies,
    ) -> None:
        self.draining = False
        self.orphaned_pins: deque[Pin] = deque()  # node streams nobody can reach any more; the sweeper closes them
        self._streams, self._dispatcher, self._metrics, self._known = streams, dispatcher, metrics, known
        self._bodies = bodies
        self._active = 0
        self._measured: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._reads: dict[str, Counter] = {}
        self._clock = asyncio.get_running_loop().time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request whose path is in `ENDPOINTS` and whose method is POST."""
        endpoint = ENDPOINTS[scope["path"]]
        started = self._clock()
        kind = outcome = "unknown"
        body: bytes | None = None
        active = 0
        try:
            body = await self._bodies.read(scope["headers"], receive)
            if body is None:
                raise _ClientGone
            self._enter()
            active = 1  # from here on it costs more than its bytes
            request = _Request(self, endpoint, body, scope)
            kind = request.kind
            await request.serve(send)
            outcome = "ok"
        except WalshipError as error:
            outcome = error.code
            await send_failure(send, failure(error))
        except BodyRefused as refused:
            outcome = "REQUEST_TOO_LARGE"
            await refused.answer(receive, send, CORS)
        except _ClientGone:
            outcome = "client gone"
        finally:
            self._active -= active
            self._bodies.release(body)
            self._measure(kind, outcome, started)

    @contextmanager
    def counted(self) -> Iterator[Counted]:
        """Count and measure a request that came another way than by HTTP, for the time of the block.

        Raises Overloaded when too many are under way.
        """
        counted = Counted()
        started = self._clock()
        try:
            self._enter()
            try:
                yield counted
            finally:
                self._active -= 1
        except WalshipError as error:
            counted.outcome = error.code
            raise
        finally:
            self._measure(counted.kind, counted.outcome, started)

    def check_open(self) -> None:
        """Raise Draining when no new work is taken."""
        if self.draining:
            raise Draining("this proxy is shutting down; nothing was run. Connect again")

    def now(self) -> float:
        """The clock of streams, in monotonic seconds."""
        return self._clock()

    def _enter(self) -> None:
        if self._active >= MAX_ACTIVE:
            raise Overloaded(f"{MAX_ACTIVE} requests are under way in this proxy; this one was not begun. Try again")
        self._active += 1

    def _measure(self, kind: str, outcome: str, started: float) -> None:
        counter, seconds = self._measures(kind, outcome)
        counter.inc()
        seconds.observe(self._clock() - started)

    # --- streams: how they begin and end --------------------------------------------------------------------------

    def begin(self, endpoint: Endpoint, body: bytes, scope: Scope) -> tuple[ClientStream, bool, Plan]:
        """Decode, find or make the stream, plan. The stream is busy afterwards; `finish` or `fail` hands it back."""
        decoded: PipelineBody | CursorBody
        if endpoint.verb is Verb.CURSOR:
            decoded = decode_cursor(body)
        elif endpoint.verb is Verb.PIPELINE:
            decoded = decode_pipeline(body, version=endpoint.version)
        else:
            decoded = v1.decode(endpoint.verb, body)
            body = msgspec.json.encode(decoded)
        consistency, min_position = freshness_headers(scope["headers"])
        resumed = decoded.baton is not None
        stream = self._streams.open() if decoded.baton is None else self._streams.resume(decoded.baton, self._clock())
        try:
            settings = stream.settings.overridden(consistency=consistency, min_position=min_position)
            plan = self.plan(stream, decoded, body, settings, may_write=scope["walship.grant"].may_write)
        except WalshipError:
            self._hand_back(stream, resumed=resumed)
            raise
        return stream, resumed, plan

    def plan(
        self,
        stream: ClientStream,
        decoded: PipelineBody | CursorBody,
        body: bytes,
        settings: Settings,
        *,
        may_write: bool,
    ) -> Plan:
        """What a request asks for, on a stream that is busy with it; the stream is registered unless it closes.

        Raises what refuses the request before it is sent anywhere; the stream is to be handed back then.
        """
        if stream.pin is None:
            self.check_open()
        how = {"stored": stream.stored, "settings": settings, "known": self._known(), "limits": self._streams.limits}
        plan = self._plan(decoded, body, how)
        if not plan.closes:
            self._streams.register(stream)
        if plan.stored and (pin := self._streams.drop_kept(stream)) is not None:
            self.orphaned_pins.append(pin)  # two copies of the stored texts would come to differ
        keep = plan.need is Need.LEADER and not (plan.closes or plan.stored) and self._streams.may_keep
        if keep:
            plan = replace(plan, keep=True)
        if not may_write:
            plan = replace(plan, read_only=True)
        if plan.settings is not settings:
            stream.settings = plan.settings
        return plan

    def _plan(self, decoded: PipelineBody | CursorBody, body: bytes, how: dict[str, Any]) -> Plan:
        if isinstance(decoded, CursorBody):
            return plan_cursor(decoded, body, **how)
        return plan_pipeline(decoded, body, **how)

    def finish(
        self, stream: ClientStream, plan: Plan, *, node: str, connection: int, node_stream: int, flags: ReplyFlags
    ) -> str | None:
        """A request was answered: what the stream is now. Returns its next baton, None when it is closed."""
        if plan.closes:
            if stream.kept is not None and plan.need is Need.READ:
                self.orphaned_pins.append(stream.kept)
            self._streams.close(stream)
            return None
        stream.stored = plan.stored
        self._streams.hold(
            stream,
            Pin(node, connection, node_stream) if node_stream else None,
            autocommit=bool(flags & ReplyFlags.AUTOCOMMIT),
            made_state=plan.makes_state,
            read=plan.need is Need.READ,
        )
        return self._streams.keep(stream, self._clock())

    def fail(self, stream: ClientStream, *, resumed: bool, error: BaseException) -> None:
        """A request ended with an error of the whole: a stream without state goes on, one with state usually not."""
        pin = stream.pin
        if pin is not None and not isinstance(error, Overloaded | Draining):
            self.orphaned_pins.append(pin)
            told = isinstance(error, Exception) and not isinstance(error, _ClientGone)
            self._streams.close(stream, lost=True, told=told)
        else:
            self._hand_back(stream, resumed=resumed)

    def _hand_back(self, stream: ClientStream, *, resumed: bool) -> None:
        if resumed:
            self._streams.release(stream, self._clock())
        else:
            self._streams.forget(stream)

    async def pipeline(self, endpoint: Endpoint, stream: ClientStream, resumed: bool, plan: Plan, send: Send) -> None:
        try:
            answer = await self._dispatcher.pipeline(plan, stream, endpoint.version)
        except BaseException as error:
            self.fail(stream, resumed=resumed, error=error)
            raise
        reply = answer.reply
        name = answer.backend.name
        baton = self.finish(
            stream, plan, node=name, connection=answer.connection, node_stream=reply.stream, flags=reply.flags
        )
        self.count_read(plan, name)
        headers = served(name, reply.position)
        if endpoint.verb is Verb.PIPELINE:
            await send_answer(send, reply.status, JSON_TYPE, with_baton(reply.body, baton), headers)
            return
        found = v1.answer(reply_results(reply.body)[0])
        if isinstance(found, Failure):
            await send_failure(send, found, headers)
        else:
            await send_answer(send, reply.status, JSON_TYPE, found, headers)

    async def cursor(self, stream: ClientStream, resumed: bool, plan: Plan, send: Send) -> None:
        try:
            answer = await self._dispatcher.cursor(plan, stream)
        except BaseException as error:
            self.fail(stream, resumed=resumed, error=error)
            raise
        position = answer.cursor.position
        name = answer.backend.name
        self.count_read(plan, name)
        ended = answer.cursor.ended and isinstance(answer.cursor.end, CursorEnd)
        held = b""
        try:
            if ended:  # a small one is here whole: everything about it is known before its head is sent
                baton, position = self.end_cursor(stream, plan, answer)
            else:
                baton = self._streams.promise(stream, may_hold=plan.opens or plan.makes_state)
            held = with_baton(answer.first, baton)
            await send_head(send, 200, CURSOR_TYPE, served(name, position))
            if not ended:
                # Each part waits for the next: a client that has read the last row may use the promised baton at
                # once, and by then it must be good.
                while (chunk := await answer.cursor.chunk()) is not None:
                    await _send_part(send, held)
                    held = chunk
                self.end_cursor(stream, plan, answer)
                ended = True
        except (LinkLost, CursorRefused) as error:
            ended = True
            self._fail_cursor(stream, error)
            held += cursor_error(cursor_failure(plan, error))
        finally:
            if not ended:
                answer.cursor.abandon()
                self._fail_cursor(stream, _ClientGone())
        await send({"type": "http.response.body", "body": held})

    def _fail_cursor(self, stream: ClientStream, error: BaseException) -> None:
        """As `fail`, for a client that already has the promised baton: that is the one that stays good."""
        if stream.pin is None:
            self._streams.keep(stream, self._clock())
        else:
            self.fail(stream, resumed=True, error=error)

    def end_cursor(self, stream: ClientStream, plan: Plan, answer: CursorAnswer) -> tuple[str | None, Position]:
        """A cursor was read to its end: what the stream is now, as `finish`. Raises CursorRefused."""
        end = answer.cursor.end
        if end is None or isinstance(end, Refusal):
            raise CursorRefused(end)
        self._dispatcher.settle(plan, answer.backend, end.position)
        baton = self.finish(
            stream,
            plan,
            node=answer.backend.name,
            connection=answer.connection,
            node_stream=end.stream,
            flags=end.flags,
        )
        return baton, end.position

    def count_read(self, plan: Plan, node: str) -> None:
        """Count who answered a read."""
        if plan.need is Need.READ:
            counter = self._reads.get(node)
            if counter is None:
                counter = self._reads[node] = self._metrics.reads.labels(node)
            counter.inc()

    def _measures(self, kind: str, outcome: str) -> tuple[Counter, Histogram]:
        """Looking a labelled metric up costs more than counting with it."""
        found = self._measured.get((kind, outcome))
        if found is None:
            metrics = self._metrics
            found = metrics.requests.labels(kind, outcome), metrics.request_seconds.labels(kind)
            self._measured[kind, outcome] = found
        return found


class _Request:
    """One request between its decoding and its answer."""

    def __init__(self, front: Front, endpoint: Endpoint, body: bytes, scope: Scope) -> None:
        self._front, self._endpoint = front, endpoint
        self._stream, self._resumed, self._plan = front.begin(endpoint, body, scope)

    @property
    def kind(self) -> str:
        return kind_of(self._plan)

    async def serve(self, send: Send) -> None:
        if self._endpoint.verb is Verb.CURSOR:
            await self._front.cursor(self._stream, self._resumed, self._plan, send)
        else:
            await self._front.pipeline(self._endpoint, self._stream, self._resumed, self._plan, send)


@dataclass(slots=True)
class Counted:
    """A request as the metrics will show it."""

    kind: str = "unknown"
    outcome: str = "ok"

    def planned(self, plan: Plan) -> None:
        self.kind = kind_of(plan)


def kind_of(plan: Plan) -> str:
    """The label of a request in the metrics."""
    return "read" if plan.need is Need.READ else "write"


class _ClientGone(Exception):
    """The client went away before its request was whole, or while its answer was sent."""


class CursorRefused(Exception):
    """A node ended a cursor by a refusal after it had begun."""

    def __init__(self, refusal: Refusal | None) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def cursor_failure(plan: Plan, error: LinkLost | CursorRefused) -> ErrorBody:
    """What the client is told of a cursor that ended badly, behind the rows it has."""
    if isinstance(error, CursorRefused):
        if error.refusal is None:
            return ErrorBody("the node ended the cursor without saying how", ProtocolViolation.code)
        cause = error_of(error.refusal)
        return ErrorBody(str(cause), error.refusal.code)
    if plan.need is Need.READ:
        return ErrorBody(f"{error}; the rows so far are not all. Nothing was changed", Unavailable.code)
    return ErrorBody(f"{error}; what this batch wrote may or may not be done", OutcomeUnknown.code)


class _Results(msgspec.Struct):
    results: list[msgspec.Raw]


_RESULTS = msgspec.json.Decoder(_Results)


def reply_results(body: bytes) -> list[msgspec.Raw]:
    """The StreamResults of a node's reply, each as it was written."""
    return _RESULTS.decode(body).results


def with_baton(body: bytes, baton: str | None) -> bytes:
    """The node's bytes with the proxy's baton in place of the null at their beginning."""
    if baton is None:
        return body
    if not body.startswith(NO_BATON):
        raise ProtocolViolation("a node's answer does not begin as the link protocol says")
    return b'{"baton":"' + baton.encode() + b'"' + body[len(NO_BATON) :]


def served(node: str, position: Position) -> Headers:
    """The reply headers of design.md 6. `position` covers what the reply shows, and is a token for later reads."""
    return [*CORS, (b"walship-served-by", node.encode()), (b"walship-position", str(position).encode())]


def freshness_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str | None, str | None]:
    """The values of `walship-consistency` and `walship-min-position`."""
    consistency = min_position = None
    for name, value in headers:
        if name == b"walship-consistency":
            consistency = value.decode("latin-1")
        elif name == b"walship-min-position":
            min_position = value.decode("latin-1")
    return consistency, min_position


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
