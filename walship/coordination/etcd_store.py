"""The store for nodes on different machines: etcd 3.4 or newer, over its JSON gateway.

Why the gateway: no gRPC and no protobuf in the user's process, every deadline in our hands, a millisecond a call
(failover.md 6).

Plan. A change is one transaction: "if the key's mod_revision is V, put". mod_revision is etcd's counter of all changes,
so a version is never used twice for a key; an absent key has 0. Reads are linearizable, never `serializable`.

Endpoints. Calls go to one endpoint as long as it answers. What surely did not happen (no connection, a token that ran
out) is tried at the next one, and so is a read whatever happened to it, until the deadline. A change that was sent and
not answered is not sent again: nobody can say whether it happened, and the caller has to read (store.py).

Watches. Each round lists the prefix, tells what differs from what was told before, then streams etcd's events from
the revision after the list's: nothing falls between the two. A broken stream, a compaction that overtook it, an etcd
without a leader, and SILENCE_SECONDS without an event (a stream to a member that was cut off says nothing for ever)
all end in the next round. So a gap cannot be overlooked, not even after an etcd that was put back to an older state.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from walship.coordination.etcd_url import EtcdAddress
from walship.coordination.store import Change, Versioned
from walship.errors import CompareFailed, StoreUnavailable, UsageError

__all__ = ["EtcdStore"]

T = TypeVar("T")

DEADLINE_SECONDS = 5.0  # of one call with all its tries; rides through a restart of etcd, which takes about 2 s
CONNECT_SECONDS = 1.0
READ_SECONDS = 1.0  # of one try of a read: a member that hangs is left for the next one
ROUND_SECONDS = 0.1  # pause after all endpoints failed
SILENCE_SECONDS = 2.0  # the belt under the stream of a watch

# gRPC's codes, which the gateway puts in the body of an error.
_DEFINITE = {3: "", 5: "", 7: "permission denied: ", 12: ""}  # invalid argument, not found, denied, unimplemented
_UNAUTHENTICATED = 16
_TOKEN_WORDS = ("invalid auth token", "revision of auth store is old", "user name is empty")

log = logging.getLogger("walship.store")


class _Header(msgspec.Struct):
    revision: int = 0


class _Record(msgspec.Struct):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class _Range(msgspec.Struct):
    header: _Header = msgspec.field(default_factory=_Header)
    kvs: list[_Record] = msgspec.field(default_factory=list)


class _Response(msgspec.Struct):
    response_range: _Range | None = None


class _Txn(msgspec.Struct):
    header: _Header
    succeeded: bool = False
    responses: list[_Response] = msgspec.field(default_factory=list)


class _Token(msgspec.Struct):
    token: str


class _Event(msgspec.Struct):
    kv: _Record
    type: str = "PUT"


class _Events(msgspec.Struct):
    header: _Header = msgspec.field(default_factory=_Header)
    events: list[_Event] = msgspec.field(default_factory=list)
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0


class _Line(msgspec.Struct):
    result: _Events | None = None
    error: Any = None


class _NotSent(Exception):
    """The request surely changed nothing, and may succeed at another endpoint or another time."""


class _BadToken(_NotSent):
    """etcd does not know our token (any more)."""


class _NoAnswer(Exception):
    """The request may have been carried out."""


class _Denied(Exception):
    """etcd refused, and will refuse again."""


class EtcdStore:
    """`Store` on an etcd. Use it on one event loop; any number of processes and machines may have one each.

    Raises UsageError when a certificate's file cannot be used.
    """

    def __init__(self, address: EtcdAddress, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._address = address
        self._deadline_seconds = deadline_seconds
        self._at = 0  # the endpoint in use
        self._token = ""
        self._closed = False
        self._patience: set[asyncio.Timeout] = set()  # of watches that wait for an event
        self._pauses = asyncio.Event()  # set at the end: nobody sleeps on
        self._client = httpx.AsyncClient(
            verify=_tls(address),
            trust_env=False,  # an HTTP proxy of the environment is for the web, not for the store
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # the rest is bounded around each call
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )

    async def get(self, key: str) -> Versioned | None:
        found = await self._read({"key": self._key(key)}, f"reading {key}")
        return Versioned(found.kvs[0].value, found.kvs[0].mod_revision) if found.kvs else None

    async def put_if(self, key: str, value: bytes, *, version: int | None) -> int:
        put = {"request_put": {"key": self._key(key), "value": _text(value)}}
        return await self._change(key, version, put, f"changing {key}")

    async def delete(self, key: str, *, version: int) -> None:
        await self._change(key, version, {"request_delete_range": {"key": self._key(key)}}, f"deleting {key}")

    async def list(self, prefix: str) -> dict[str, Versioned]:
        return (await self._list(prefix))[1]

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        known: dict[str, Versioned] = {}
        while not self._closed:
            try:
                revision, present = await self._list(prefix)
                gone = [Change(key, None) for key in known.keys() - present.keys()]
                fresh = [Change(key, state) for key, state in present.items() if known.get(key) != state]
                known = present
                for change in gone + fresh:
                    yield change
                async with contextlib.aclosing(self._events(prefix, revision + 1)) as events:
                    async for change in events:
                        if change.state is None:
                            known.pop(change.key, None)
                        else:
                            known[change.key] = change.state
                        yield change
            except StoreUnavailable as error:
                if not self._closed:
                    log.warning("watch %s: %s; trying again", prefix, error)
                    await self._pause(ROUND_SECONDS)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._pauses.set()
        for patience in self._patience:
            patience.reschedule(asyncio.get_running_loop().time())
        await self._client.aclose()

    # --- keys ---------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return _text((self._address.prefix + key).encode())

    def _under(self, prefix: str) -> dict[str, str]:
        """The range of all keys that start with `prefix`; keys are ASCII, so the last byte can grow by one."""
        first = (self._address.prefix + prefix).encode()
        return {"key": _text(first), "range_end": _text(first[:-1] + bytes([first[-1] + 1]))}

    def _name(self, key: bytes) -> str:
        return key.decode("utf-8", "replace").removeprefix(self._address.prefix)

    # --- calls --------------------------------------------------------------------------------------------------

    async def _read(self, body: dict[str, Any], doing: str) -> _Range:
        return await self._call("/v3/kv/range", body, _Range, doing, change=False)

    async def _list(self, prefix: str) -> tuple[int, dict[str, Versioned]]:
        """(etcd's revision, the records of that moment); range sorts by key."""
        found = await self._read(self._under(prefix), f"listing {prefix or 'everything'}")
        return found.header.revision, {
            self._name(each.key): Versioned(each.value, each.mod_revision) for each in found.kvs
        }

    async def _change(self, key: str, version: int | None, success: dict[str, Any], doing: str) -> int:
        same = {"key": self._key(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(version or 0)}
        look = {"request_range": {"key": self._key(key)}}
        body = {"compare": [same], "success": [success], "failure": [look]}
        done = await self._call("/v3/kv/txn", body, _Txn, doing, change=True)
        if done.succeeded:
            return done.header.revision
        have = next((one.mod_revision for each in done.responses if each.response_range for one in _all(each)), None)
        raise CompareFailed(
            f"{key} is {_version(have)}, not {_version(version)}; somebody else changed it: read it again"
        )

    async def _call(self, path: str, body: dict[str, Any], kind: type[T], doing: str, *, change: bool) -> T:
        """The answer of some endpoint, within the deadline. Raises StoreUnavailable."""
        loop = asyncio.get_running_loop()
        until, tries = loop.time() + self._deadline_seconds, 0
        while True:
            if self._closed:
                raise StoreUnavailable(f"{self._address}: closed while {doing}")
            endpoint, seconds = self._at, until - loop.time()
            try:
                headers = await self._authorization(min(seconds, READ_SECONDS))
                seconds = until - loop.time()
                return await self._post(path, body, kind, headers, seconds if change else min(seconds, READ_SECONDS))
            except _Denied as error:
                raise StoreUnavailable(
                    f"{self._address} refused while {doing}: {error}. Nothing was changed; check the user, the "
                    "password and the address in --cluster"
                ) from error
            except _NoAnswer as error:
                self._leave(endpoint)
                why = str(error)
                if change:
                    raise StoreUnavailable(
                        f"{self._address} failed while {doing}: {why}; a change may or may not have happened: "
                        "read it again"
                    ) from error
            except _NotSent as error:
                if not isinstance(error, _BadToken):
                    self._leave(endpoint)
                why = str(error)
            tries += 1
            pause = ROUND_SECONDS if tries % len(self._address.endpoints) == 0 else 0.0
            if loop.time() + pause >= until:
                raise StoreUnavailable(
                    f"{self._address} did not answer within {self._deadline_seconds} s while {doing}: {why}. Nothing "
                    "was changed, and data is not affected; check etcd and the way to it"
                )
            await self._pause(pause)

    async def _authorization(self, seconds: float) -> dict[str, str]:
        """The header that says who we are; asks etcd for a token first when there is none."""
        if not self._address.user:
            return {}
        if not self._token:
            login = {"name": self._address.user, "password": self._address.password}
            try:
                self._token = (await self._post("/v3/auth/authenticate", login, _Token, {}, seconds)).token
            except _NoAnswer as error:  # a login changes no record
                raise _NotSent(str(error)) from error
        return {"authorization": self._token}

    async def _post(self, path: str, body: dict[str, Any], kind: type[T], headers: dict[str, str], seconds: float) -> T:
        """One request at the endpoint in use. Raises _NotSent, _NoAnswer, _Denied."""
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.post(self._url(path), content=msgspec.json.encode(body), headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _NotSent(f"{self._url()} cannot be reached ({str(error) or 'no connection in time'})") from error
        except TimeoutError as error:
            raise _NoAnswer(f"{self._url()} did not answer in time") from error
        except httpx.HTTPError as error:
            raise _NoAnswer(f"{self._url()}: {str(error) or type(error).__name__}") from error
        if response.status_code != 200:
            raise self._error(response.status_code, response.content)
        try:
            return msgspec.json.decode(response.content, type=kind, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _NoAnswer(f"{self._url()} does not answer as etcd 3.4 or newer does: {error}") from error

    def _error(self, status: int, content: bytes) -> Exception:
        """What the gateway's error means for the request that got it."""
        code, words = _grpc_error(content)
        words = f"{self._url()}: {words or f'HTTP {status}'}"
        if code == _UNAUTHENTICATED or any(each in words for each in _TOKEN_WORDS):
            if not self._address.user:
                return _Denied(f"{words}; it asks for a user and a password")
            self._token = ""
            return _BadToken(words)
        if code in _DEFINITE or status in (401, 403, 404, 405):
            return _Denied(_DEFINITE.get(code, "") + words)
        return _NoAnswer(words)  # no leader, leader changed, timed out in raft, and whatever we do not know

    def _url(self, path: str = "") -> str:
        return self._address.endpoints[self._at] + path

    def _leave(self, endpoint: int) -> None:
        """Go on to the next endpoint, unless another call did already."""
        if self._at == endpoint:
            self._at = (endpoint + 1) % len(self._address.endpoints)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past `close`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._pauses.wait()

    # --- the stream of a watch ----------------------------------------------------------------------------------

    async def _events(self, prefix: str, revision: int) -> AsyncGenerator[Change, None]:
        """Changes from `revision` on; returns when the caller should list again. Raises StoreUnavailable."""
        create = {**self._under(prefix), "start_revision": str(revision)}
        # "hasleader": a member that loses its leader ends the stream instead of going silent.
        headers = {"grpc-metadata-hasleader": "true"}
        if self._token:
            headers["authorization"] = self._token
        endpoint, content = self._at, msgspec.json.encode({"create_request": create})
        request = self._client.build_request("POST", self._url("/v3/watch"), content=content, headers=headers)
        try:
            async with asyncio.timeout(READ_SECONDS):
                response = await self._client.send(request, stream=True)
            async with contextlib.aclosing(response):
                lines = response.aiter_lines()
                while (line := await self._next_line(lines)) is not None:
                    if response.status_code != 200:
                        raise self._error(response.status_code, line.encode())
                    events = self._parse(line)
                    if events is None:
                        return
                    for event in events:
                        state = None if event.type == "DELETE" else Versioned(event.kv.value, event.kv.mod_revision)
                        yield Change(self._name(event.kv.key), state)
        except TimeoutError as error:
            self._leave(endpoint)
            raise StoreUnavailable(f"{self._address}: no watch within {READ_SECONDS} s") from error
        except (httpx.HTTPError, _NotSent, _NoAnswer, _Denied) as error:
            self._leave(endpoint)
            raise StoreUnavailable(f"{self._address}: the watch ended: {str(error) or type(error).__name__}") from error

    async def _next_line(self, lines: AsyncIterator[str]) -> str | None:
        """The next line; None at the end, after SILENCE_SECONDS, or when the store closes."""
        if self._closed:
            return None
        with contextlib.suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(SILENCE_SECONDS) as patience:
                self._patience.add(patience)
                try:
                    return await anext(lines)
                finally:
                    self._patience.discard(patience)
        return None

    def _parse(self, line: str) -> Sequence[_Event] | None:
        """The events of a line; None when they were compacted away, so that a list has to tell what they did."""
        try:
            message = msgspec.json.decode(line, type=_Line, strict=False)
        except msgspec.DecodeError as error:
            raise _NoAnswer(f"{self._url()} does not answer as etcd does: {error}") from error
        if message.result is None:
            raise self._error(200, line.encode())
        if message.result.canceled:
            if message.result.compact_revision:
                return None
            raise self._error(200, msgspec.json.encode({"message": message.result.cancel_reason}))
        return message.result.events


def _grpc_error(content: bytes) -> tuple[int, str]:
    """(code, words) of an error body: `{code, message}`, or inside `error`, as the version and the call have it."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return -1, content[:100].decode("utf-8", "replace")
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    if not isinstance(body, dict):
        return -1, str(body)[:100]
    code = body.get("code", body.get("grpc_code", -1))
    return code if isinstance(code, int) else -1, str(body.get("message") or body.get("error") or "")[:200]


def _all(response: _Response) -> Sequence[_Record]:
    return response.response_range.kvs if response.response_range else []


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _version(version: int | None) -> str:
    return "absent" if version is None else f"at version {version}"


def _tls(address: EtcdAddress) -> ssl.SSLContext | bool:
    if not address.tls:
        return False
    try:
        context = ssl.create_default_context(cafile=address.ca)
        if address.cert is not None:
            context.load_cert_chain(address.cert, address.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(each) for each in (address.ca, address.cert, address.key) if each is not None)
        raise UsageError(f"the certificates of --cluster cannot be used ({files}): {error}") from error
    return context
