"""Embedded replicas: libSQL clients that keep a copy of the database and follow it by WAL frames (hrana.md 4.2).

A client asks `/info` for the current generation, fetches `/export/G` once (the database as it was when generation G
began) and then `/sync/G/A/B`: frames A to B-1 of G, again and again. It cannot notice a fork, so:

* only acknowledged frames are served;
* a generation ends with every term, and when it has grown large, so that no client's own -wal grows for ever;
* numbers come from the log, which has the same bytes on every node (`engine.numbering`). The one exception, frames
  rebuilt after a machine lost its page cache, marks the generation: a client inside it must begin again.

The leader keeps the record of generations and one image, that of the newest generation anybody asked to begin with:
`/info` on a generation without an image begins a new one at a pinned snapshot. Any node serves `/sync`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from walship.coordination.record import (
    GENERATIONS,
    Generation,
    GenerationsRecord,
    decode,
    encode,
    read_generations,
)
from walship.coordination.store import Store
from walship.engine.files import sync_directory
from walship.engine.numbering import FrameNumbering
from walship.engine.retention import Pin
from walship.engine.snapshot import Snapshot
from walship.errors import CompareFailed, CorruptState, HistoryMismatch, Unavailable, UsageError, WalshipError
from walship.formats.position import Position
from walship.hrana.http import JSON_TYPE

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["EmbeddedReplicas"]

_log = logging.getLogger("walship.embedded")

PAGE_SIZE = 4096  # the only one the client's protocol knows
GENERATION_PAGES = 16384  # at most; 64 MiB: where a client checkpoints its own -wal
KEPT_GENERATIONS = 64  # in the record; the log rarely reaches back further
MAX_FRAMES = 1024  # in one answer; clients ask for 128
_TRIES = 8
_TICK_SECONDS = 1.0
_ACK_SECONDS = 5.0
_FOLLOWER_WAIT_SECONDS = 0.05  # the leader can answer meanwhile
_HEADERS = {"cache-control": "no-store", "access-control-allow-origin": "*"}


@dataclass(frozen=True, slots=True)
class _Refusal(Exception):
    """An answer that is not frames: an HTTP status and the JSON the client sees."""

    status: int
    message: str


class EmbeddedReplicas:
    """What one node does for embedded replicas. `run` must be alive; `begin_term` is called when the node leads."""

    def __init__(self, node: Node, store: Store, directory: Path) -> None:
        self._node = node
        self._store = store
        self._directory = directory / "embedded"
        # The log is kept from where the current generation began, so one is well below the log's own bound (R9).
        self._generation_pages = min(GENERATION_PAGES, node.config.log_max_bytes // 4 // PAGE_SIZE)
        self._record: GenerationsRecord | None = None
        self._numberings: dict[int, tuple[asyncio.Lock, FrameNumbering]] = {}
        self._rolling = asyncio.Lock()
        self._pin: tuple[int, Pin] | None = None

    def routes(self) -> list[Route]:
        return [
            Route("/info", self._info, methods=["GET"]),
            Route("/export/{generation:int}", self._export, methods=["GET"]),
            Route("/sync/{generation:int}/{first:int}/{end:int}", self._sync, methods=["GET"]),
            Route("/sync/{rest:path}", self._push, methods=["POST"]),
        ]

    # --- life -------------------------------------------------------------------------------------------------

    async def begin_term(self, position: Position) -> None:
        """A term began here: its generation begins with it, as soon as the store takes it."""
        unnumbered = await asyncio.to_thread(self._page_cache_lost)
        while self._node.term == position.term:
            try:
                async with self._rolling:
                    current = self._current()
                    if current is None or _start(current).order() < position.order():
                        await self._append(position, unnumbered=unnumbered)
                return
            except (Unavailable, CorruptState, UsageError) as error:
                _log.warning("the generation of term=%d cannot begin yet: %s", position.term, error)
            await asyncio.sleep(_TICK_SECONDS)

    def close(self) -> None:
        """The log was synced to its end: a restart of the machine loses nothing of it."""
        (self._directory / "boot-id").unlink(missing_ok=True)

    def _page_cache_lost(self) -> bool:
        """Did the machine restart under a leader that had not stopped? Then the end of its log may be gone, and the
        frames rebuilt from its -wal group the same commits differently than other nodes' logs."""
        path = self._directory / "boot-id"
        present = Path("/proc/sys/kernel/random/boot_id").read_text()
        lost = path.exists() and path.read_text() != present
        path.parent.mkdir(exist_ok=True)
        path.write_text(present)
        return lost

    async def run(self) -> None:
        """Follow the record; as the leader end generations that have grown large. Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(), name="watch generations")
            tasks.create_task(self._tick(), name="generations")

    async def _watch(self) -> None:
        async for change in self._store.watch(GENERATIONS):
            if change.key == GENERATIONS and change.state is not None:
                try:
                    self._learn(decode(GenerationsRecord, GENERATIONS, change.state.value))
                except (CorruptState, UsageError) as error:
                    _log.error("skip the record of generations: %s", error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            current = self._current()
            if current is None or self._node.replica is None or self._node.database.page_size != PAGE_SIZE:
                continue
            try:
                self._keep_log(current)
                _, numbering = await self._counted(current)
                if self._node.leading is not None and numbering.page_count >= self._generation_pages:
                    async with self._rolling:
                        await self._append(self._limit())
            except (HistoryMismatch, Unavailable, CorruptState, UsageError, _Refusal) as error:
                _log.debug("generation %d is not served here: %s", current.number, error)

    def _keep_log(self, current: Generation) -> None:
        """Hold the log from where the current generation began, so that new clients can be served."""
        if self._pin is None or self._pin[0] != current.number:
            if self._pin is not None:
                self._pin[1].release()
            self._pin = None
            self._pin = (current.number, self._node.log.pin(_start(current)))
        self._pin[1].touch()

    async def _append(self, start: Position, *, unnumbered: bool = False) -> Generation:
        """Begin the next generation after `start`, by compare-and-swap."""
        for _ in range(_TRIES):
            seen = await read_generations(self._store)
            before = seen.record.generations if seen is not None else ()
            if before and unnumbered:
                before = (*before[:-1], msgspec.structs.replace(before[-1], unnumbered=True))
            number = before[-1].number + 1 if before else 1
            new = Generation(number, start.term, start.txid)
            record = GenerationsRecord(generations=(*before[-KEPT_GENERATIONS + 1 :], new))
            try:
                await self._store.put_if(GENERATIONS, encode(record), version=seen.version if seen else None)
            except CompareFailed:
                continue
            self._learn(record)
            _log.info("begin generation=%d after=%s", number, start)
            return new
        raise Unavailable("the record of generations keeps changing; nothing was begun, ask again")

    def _learn(self, record: GenerationsRecord) -> None:
        if self._record is None or record.generations[-1].number >= self._record.generations[-1].number:
            self._record = record
            kept = {each.number for each in record.generations[-4:]}
            for number in [number for number in self._numberings if number not in kept]:
                del self._numberings[number]

    # --- answers ----------------------------------------------------------------------------------------------

    async def _info(self, _: Request) -> Response:
        try:
            self._require_page_size()
            async with self._rolling:
                current = await self._with_image()
            return _json(200, {"current_generation": current.number})
        except (_Refusal, WalshipError) as error:
            return _refuse(error)

    async def _export(self, request: Request) -> Response:
        path = self._image(request.path_params["generation"])
        if not path.exists():
            return _refuse(_Refusal(404, "this node has no image of that generation; ask /info of the proxy again"))
        return FileResponse(path, media_type="application/octet-stream", headers=_HEADERS)

    async def _sync(self, request: Request) -> Response:
        parameters = request.path_params
        try:
            self._require_page_size()
            await self._reach(request.headers.get("walship-min-position"))
            return await self._frames(parameters["generation"], parameters["first"], parameters["end"])
        except HistoryMismatch as error:
            return _refuse(_Refusal(503, f"this node's log does not reach back that far: {error}"))
        except (_Refusal, WalshipError) as error:
            return _refuse(error)

    async def _reach(self, floor: str | None) -> None:
        """A client that wrote through the proxy pulls once and then reads: it must find its write."""
        if floor is None:
            return
        position, marks = Position.parse_text(floor), self._node.watermarks
        seconds = _ACK_SECONDS if self._node.leading is not None else _FOLLOWER_WAIT_SECONDS
        if not await marks.wait_acked(position, seconds) or not marks.history.covers(self._limit(), position):
            raise _Refusal(503, f"this node cannot serve up to {position} yet")

    async def _push(self, _: Request) -> Response:
        message = "writes made offline are not accepted: pages would overwrite each other. Connect with offline=False"
        return _refuse(_Refusal(403, message))

    async def _frames(self, number: int, first: int, end: int) -> Response:
        record, current = self._record, self._current()
        if record is None or current is None:
            raise _Refusal(503, "no generation has begun yet; ask again")
        found = [each for each in record.generations if each.number == number]
        if number > current.number or first < 1 or end <= first:
            raise _Refusal(404, f"generation {number}, frames {first} to {end}: there is no such range")
        if not found or found[0].unnumbered:
            raise _Refusal(
                410, f"generation {number} is no longer served; delete the local files and let them be fetched again"
            )
        lock, numbering = await self._counted(found[0])
        async with lock:
            frames = await asyncio.to_thread(numbering.frames, first, min(end - first, MAX_FRAMES))
        if frames:
            return Response(frames, media_type="application/octet-stream", headers=_HEADERS)
        # Nothing more: status 400 with a generation is how the protocol says so. A newer one is named only once all
        # of this one can have been read.
        finished = first <= numbering.page_count + 1 and self._is_complete(found[0], numbering)
        return _json(400, {"generation": current.number if finished else number})

    def _is_complete(self, generation: Generation, numbering: FrameNumbering) -> bool:
        following = self._following(generation)
        if following is None:
            return False
        return numbering.end.order() >= _start(following).order()

    async def _counted(self, generation: Generation) -> tuple[asyncio.Lock, FrameNumbering]:
        """The numbering of a generation, counted to what may be served. Raises HistoryMismatch, _Refusal."""
        if self._node.replica is None:
            raise _Refusal(503, "this node has no database yet")
        held = self._numberings.get(generation.number)
        if held is None:
            numbering = await asyncio.to_thread(FrameNumbering, self._node.log, _start(generation))
            held = self._numberings.setdefault(generation.number, (asyncio.Lock(), numbering))
        limit, following = self._limit(), self._following(generation)
        if following is not None:
            limit = min(limit, _start(following), key=Position.order)
        async with held[0]:
            await asyncio.to_thread(held[1].extend, limit)
        return held

    def _limit(self) -> Position:
        """What may be served: acknowledged, and durable here."""
        marks = self._node.watermarks
        own = marks.durable if self._node.leading is not None else marks.logged
        return min(marks.acked, own, key=Position.order)

    def _current(self) -> Generation | None:
        return self._record.generations[-1] if self._record is not None else None

    def _following(self, generation: Generation) -> Generation | None:
        generations = self._record.generations if self._record is not None else ()
        return next((each for each in generations if each.number == generation.number + 1), None)

    def _require_page_size(self) -> None:
        size = self._node.database.page_size
        if size != PAGE_SIZE:
            raise _Refusal(501, f"embedded replicas need pages of {PAGE_SIZE} bytes, this database has {size}")

    # --- images -----------------------------------------------------------------------------------------------

    def _image(self, number: int) -> Path:
        return self._directory / f"{number}.db"

    async def _with_image(self) -> Generation:
        """The current generation, one whose beginning can be exported. Only the leader makes images."""
        leading, writer = self._node.leading, self._node.writer
        if leading is None or writer is None:
            raise _Refusal(503, f"{self._node.name} follows; the leader and the proxy answer /info")
        current = self._current()
        if current is not None and self._image(current.number).exists():
            return current
        header, snapshot = await writer.run(leading.pin_snapshot)
        try:
            if not await self._node.watermarks.wait_acked(header.position, _ACK_SECONDS):
                raise _Refusal(503, "followers do not acknowledge at the moment, so nothing new may be handed out")
            temporary = self._directory / "new.db"
            await asyncio.to_thread(_write_image, temporary, snapshot)
        finally:
            await asyncio.to_thread(snapshot.close)
        new = await self._append(header.position)
        await asyncio.to_thread(_publish_image, temporary, self._image(new.number))
        return new


def _start(generation: Generation) -> Position:
    return Position(generation.term, generation.txid)


def _write_image(path: Path, snapshot: Snapshot) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for pgno, page in snapshot.pages():
            file.seek((pgno - 1) * snapshot.page_size)
            file.write(page)
        file.truncate(snapshot.commit * snapshot.page_size)
        file.flush()
        os.fsync(file.fileno())


def _publish_image(temporary: Path, path: Path) -> None:
    """Under its name, and the older ones away: a download that has begun keeps its open file."""
    temporary.rename(path)
    sync_directory(path.parent)
    for other in path.parent.glob("*.db"):
        if other != path:
            with contextlib.suppress(FileNotFoundError):
                other.unlink()


def _json(status: int, body: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(body), status, _HEADERS, JSON_TYPE)


def _refuse(error: _Refusal | WalshipError) -> Response:
    if isinstance(error, _Refusal):
        return _json(error.status, {"error": error.message})
    return _json(503, {"error": str(error), "code": error.code})
