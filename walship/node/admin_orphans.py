"""The orphans of a node: counted, told to operators, and deleted when they are old or too many."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse

from walship.engine.orphans import ORPHANS, Manifest, list_orphans, prune_orphans
from walship.errors import UsageError
from walship.front.admin import AdminVerb
from walship.metrics import NodeMetrics

__all__ = ["Orphanage"]

_PRUNE_SECONDS = 600.0


class Orphanage:
    """What a node does with the orphans in its directory (engine/orphans.py writes them)."""

    def __init__(self, directory: Path, numbers: NodeMetrics, *, keep_seconds: float, keep_bytes: int) -> None:
        self._directory = directory
        self._numbers = numbers
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes

    def kept(self, manifest: Manifest) -> None:
        """Commits have just become an orphan. In any thread."""
        self._numbers.orphan_transactions.inc(max(manifest.transactions, 1))

    def count(self) -> int:
        """How many there are: looks into the directory, so it counts those of earlier processes too."""
        return sum(1 for _ in (self._directory / ORPHANS).glob("*.json"))

    async def run(self) -> None:
        """Prune now and then. Until cancelled."""
        while True:
            await asyncio.to_thread(
                prune_orphans,
                self._directory,
                keep_seconds=self._keep_seconds,
                keep_bytes=self._keep_bytes,
                now_seconds=time.time(),
            )
            await asyncio.sleep(_PRUNE_SECONDS)

    def verbs(self) -> list[AdminVerb]:
        """GET orphans (manifests), orphans/NAME (one), orphans/NAME/ltx (the file)."""
        return [
            AdminVerb("GET", "orphans", self._list),
            AdminVerb("GET", "orphans/{name}", self._show),
            AdminVerb("GET", "orphans/{name}/ltx", self._export),
        ]

    async def _list(self, _: Request) -> object:
        return await asyncio.to_thread(list_orphans, self._directory)

    async def _show(self, request: Request) -> object:
        return await self._find(request)

    async def _export(self, request: Request) -> object:
        manifest = await self._find(request)
        return FileResponse(self._directory / ORPHANS / f"{manifest.name}.ltx")

    async def _find(self, request: Request) -> Manifest:
        name = request.path_params["name"]
        for manifest in await asyncio.to_thread(list_orphans, self._directory):
            if manifest.name == name:
                return manifest
        raise UsageError(f"this node has no orphan {name[:60]!r}; /admin/orphans lists those it has")
