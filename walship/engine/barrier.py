"""The memory barrier between the stores that publish frames in the wal-index (R4).

x86-64 makes stores visible in program order, so nothing is needed there. On arm64 a reader in another process could
see the header before the index entries it covers; Python has no barrier, but the membarrier system call is one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Callable

from walship.errors import UsageError

__all__ = ["choose_barrier"]

_log = logging.getLogger("walship.engine")

_MEMBARRIER_ARM64 = 283  # include/uapi/asm-generic/unistd.h
_MEMBARRIER_CMD_GLOBAL = 1  # linux/membarrier.h: a full barrier on every running thread of the machine


def choose_barrier(system: str = sys.platform, machine: str = platform.machine()) -> Callable[[], None]:
    """The barrier for this machine. Raises UsageError where publishing frames is not known to be safe."""
    if system == "linux" and machine in ("x86_64", "AMD64"):
        return _none_needed
    if system == "linux" and machine in ("aarch64", "arm64"):
        _log.warning("arm64 support is experimental: frames are published through membarrier(2)")
        return _membarrier
    raise UsageError(
        f"walship nodes run on Linux on x86-64 (arm64 is experimental), this is {system} on {machine}; "
        "run the node there, proxies and clients run anywhere."
    )


def _none_needed() -> None:
    return


def _membarrier() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_MEMBARRIER_ARM64, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"membarrier failed: {os.strerror(ctypes.get_errno())}")
