"""An orphan's commits over a copy of the database that they were made on: what a person opens to see what was lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from walship.engine.orphans import Manifest
from walship.engine.seed import scan_file
from walship.errors import CorruptDatabase, UsageError
from walship.formats.checksum import PageChecksums, page_checksum
from walship.formats.ltx import LtxDecoder

__all__ = ["export_database"]

_READ_BYTES = 1 << 20


def export_database(manifest: Manifest, ltx: Path, base: Path, target: Path) -> None:
    """Write `target`: a copy of `base`, which must be exactly the state the orphan's commits began at, with its pages.

    Raises UsageError (nothing is written) when `base` is another state or in use, or `target` exists; CorruptData.
    """
    wal = base.with_name(base.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise UsageError(f"{base} has a -wal: its content is not all in the file. Checkpoint it, or stop what uses it")
    with base.open("rb") as file:
        found_page_size = int.from_bytes(file.read(18)[16:18], "big")
    if (65536 if found_page_size == 1 else found_page_size) != manifest.page_size:
        raise UsageError(f"{base} has other pages than the orphan, whose have {manifest.page_size} bytes")
    checksums = scan_file(base, manifest.page_size)
    if f"{checksums.rolling:016x}" != manifest.base_checksum:
        raise UsageError(
            f"{base} has checksum {checksums.rolling:016x}; the orphan's commits began at {manifest.base}, which has "
            f"{manifest.base_checksum}. Give a copy of the database at that very position."
        )
    temporary = target.with_name(target.name + ".tmp")
    if target.exists():
        raise UsageError(f"{target} exists already; nothing was written")
    shutil.copyfile(base, temporary)
    try:
        _write_pages(ltx, temporary, manifest, checksums)
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_pages(ltx: Path, database: Path, manifest: Manifest, checksums: PageChecksums) -> None:
    decoder = LtxDecoder()
    with ltx.open("rb") as source, database.open("r+b", buffering=0) as file:
        while data := source.read(_READ_BYTES):
            decoder.receive_data(data)
            for pgno, page in decoder.pages():
                os.pwrite(file.fileno(), page, (pgno - 1) * manifest.page_size)
                checksums.set_many({pgno: page_checksum(pgno, page)}, max(checksums.commit, pgno))
        decoder.finish()
        checksums.set_many({}, manifest.commit)
        if f"{checksums.rolling:016x}" != manifest.tip_checksum:
            raise CorruptDatabase(
                f"with the orphan's pages the database has checksum {checksums.rolling:016x}, not "
                f"{manifest.tip_checksum}; nothing was written"
            )
        os.ftruncate(file.fileno(), manifest.commit * manifest.page_size)
        os.fsync(file.fileno())
