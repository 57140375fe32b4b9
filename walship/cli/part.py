"""Running one part, node or proxy, as this process."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from walship.config import NodeConfig, ProxyConfig
from walship.errors import Unavailable

__all__ = ["PARENT", "run_node", "run_proxy"]

PARENT = "WALSHIP_PARENT"  # pid of the `walship up` that started this process
_PR_SET_PDEATHSIG = 1
_MOST_FILES = 65_536


def run_node(config: NodeConfig) -> int:
    """One node until SIGTERM. A database it is to adopt is checked first, unless `walship up` has done so."""
    _begin(config.log_level)
    from walship.engine.durable_state import StateFile
    from walship.node.run import run

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
    for library in ("httpx", "httpcore", "watchdog"):  # a line for each request or file event says nothing of ours
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("uvicorn", "websockets"):  # at DEBUG they write out heads and messages, tokens and rows included
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLevelName(log_level.upper())))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)  # until the part has started and takes signals itself
    _open_many_files()
    if (parent := os.environ.get(PARENT)) is not None:
        _follow(int(parent) if parent.isdecimal() else 0)


def _end_at_once(number: int, frame: object) -> None:
    """Asked to stop before it serves anybody: there is nothing to finish, and a start is safe to break off anywhere,
    also one that scans or replays for minutes in a thread that nobody could interrupt."""
    del number, frame
    os._exit(0)


def _open_many_files() -> None:
    """Take what the system allows: the usual soft limit of 1024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _follow(parent: int) -> None:
    """Have the kernel send us SIGTERM when the parent dies, however it dies (prctl(2), PR_SET_PDEATHSIG)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise Unavailable(f"cannot watch the parent process: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the call above
        raise Unavailable("the parent `walship up` is gone; this process ends before it touched anything")
