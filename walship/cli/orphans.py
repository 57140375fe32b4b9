"""`walship orphans`: the commits that never became history, as a node keeps them."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import msgspec

from walship.cli import output
from walship.cli.orders import Orders
from walship.config import OrderConfig
from walship.engine.orphan_export import export_database
from walship.engine.orphans import ORPHANS, Manifest, list_orphans
from walship.errors import CorruptData, UsageError

__all__ = ["Kept", "export", "listing", "show"]

_COLUMNS = ("name", "reason", "transactions", "after", "to", "acknowledged", "pages", "bytes", "last commit")


class Kept:
    """The orphans in a node's directory, or those that a running node tells of."""

    def __init__(self, config: OrderConfig, data: Path | None) -> None:
        if data is not None and not (data / "state").exists():
            raise UsageError(f"{data} is not the directory of a node: it has no state record")
        self._config = config
        self._data = data

    def all(self) -> list[Manifest]:
        """Oldest first. Raises Unavailable, UsageError."""
        if self._data is not None:
            return list_orphans(self._data)
        with Orders(self._config) as orders:
            return msgspec.convert(orders.get("orphans"), list[Manifest])

    def find(self, name: str) -> Manifest:
        """Raises UsageError when there is none of that name."""
        found = self.all()
        for manifest in found:
            if manifest.name == name:
                return manifest
        names = ", ".join(manifest.name for manifest in found) or "none"
        raise UsageError(f"there is no orphan {name}; there are: {names}")

    def save(self, manifest: Manifest, target: Path) -> None:
        """Write the LTX file, its digest checked. Raises UsageError when `target` exists, CorruptData, Unavailable."""
        if target.exists():
            raise UsageError(f"{target} exists already; nothing was written")
        if self._data is not None:
            data = (self._data / ORPHANS / f"{manifest.name}.ltx").read_bytes()
        else:
            with Orders(self._config) as orders:
                data = orders.download(f"orphans/{manifest.name}/ltx")
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise CorruptData(f"the file of orphan {manifest.name} is not what its manifest says; nothing was written")
        target.write_bytes(data)


def listing(config: OrderConfig, data: Path | None) -> int:
    found = Kept(config, data).all()
    if config.json:
        output.line(json.dumps([msgspec.to_builtins(manifest) for manifest in found]))
    elif not found:
        output.line("no orphans: every commit became history")
    else:
        output.line(output.plain_table(_COLUMNS, [_row(manifest) for manifest in found]))
    return 0


def show(config: OrderConfig, data: Path | None, name: str) -> int:
    manifest = Kept(config, data).find(name)
    if config.json:
        output.line(json.dumps(msgspec.to_builtins(manifest)))
        return 0
    facts: dict[str, Any] = msgspec.to_builtins(manifest)
    facts |= {key: _when(facts[key]) for key in ("first_time_ms", "last_time_ms")}
    output.line(str(manifest))
    output.line(output.plain_table(("key", "value"), [(key, str(value)) for key, value in facts.items()]))
    return 0


def export(config: OrderConfig, data: Path | None, name: str, target: Path, database: Path | None) -> int:
    kept = Kept(config, data)
    manifest = kept.find(name)
    if database is None:
        kept.save(manifest, target)
        output.line(f"{target}: {manifest.pages} pages of {manifest.transactions} transactions, an LTX file")
        return 0
    pages = target.with_name(target.name + ".ltx.tmp")
    kept.save(manifest, pages)
    try:
        export_database(manifest, pages, database, target)
    finally:
        pages.unlink()
    output.line(f"{target}: the database as it was at {manifest.tip}, with the commits that were lost")
    return 0


def _row(manifest: Manifest) -> tuple[str, ...]:
    return (
        manifest.name,
        manifest.reason.value,
        str(manifest.transactions or "?"),
        manifest.base,
        manifest.tip,
        "maybe" if manifest.may_be_acknowledged else "no",
        str(manifest.pages),
        str(manifest.size_bytes),
        _when(manifest.last_time_ms),
    )


def _when(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000))
