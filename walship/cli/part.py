"""Running one part, node or proxy, as this process."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from walship.config import NodeConfig, ProxyConfig
from walship.errors import Unavailable

__all__ = ["PARENT", "run_node", "run_proxy"]

PARENT = "WALSHIP_PARENT"  # pid of the `walship up` that started this process
_PR_SET_PDEATHSIG = 1


def run_node(config: NodeConfig) -> int:
    """One node until SIGTERM. A database it is to adopt is checked first, unless `walship up` has done so."""
    _begin(config.log_level)
    from walship.engine.durable_state import StateFile
    from walship.node.node import run

    if PARENT not in os.environ and config.database and config.init and not StateFile.exists(config.data_dir):
        from walship.cli import adopt

        asyncio.run(adopt.check_and_switch(config.database, data_dir=config.data_dir, copies=0))

    return _finish(run(config))


def run_proxy(config: ProxyConfig) -> int:
    _begin(config.log_level)
    from proxy.app import run

    return _finish(run(config))


def _finish(result: int | Coroutine[Any, Any, int | None] | None) -> int:
    """The exit code of a part; a part that gives a coroutine is run on a loop of its own."""
    if inspect.iscoroutine(result):
        import uvloop

        result = uvloop.run(result)
    return result if isinstance(result, int) else 0


def _begin(log_level: str) -> None:
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if (parent := os.environ.get(PARENT)) is not None:
        _follow(int(parent) if parent.isdecimal() else 0)


def _follow(parent: int) -> None:
    """Have the kernel send us SIGTERM when the parent dies, however it dies (prctl(2), PR_SET_PDEATHSIG)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise Unavailable(f"cannot watch the parent process: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the call above
        raise Unavailable("the parent `walship up` is gone; this process ends before it touched anything")
