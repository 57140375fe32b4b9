"""The `walship` command: reads flags, hands them to config.py, runs one part, turns errors into words and a code."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 runtime failure, 2 usage or configuration.

    Main thread only, for the signals. Until a command takes them itself nothing has begun, and they end the process:
    Ctrl-C while modules load must not print a traceback, and pid 1 of a container is not sent a SIGTERM it has no
    handler for, so `docker stop` would wait and then kill.
    """
    on_interrupt = signal.signal(signal.SIGINT, _end)
    on_terminate = signal.signal(signal.SIGTERM, _end)
    try:
        try:
            from walship.cli.app import run  # here, so that importing walship.cli costs nothing
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        return run(arguments)
    finally:
        if signal.getsignal(signal.SIGTERM) is _end:  # the command had no use for it
            signal.signal(signal.SIGTERM, on_terminate)


def _end(number: int, frame: object) -> None:
    """Exit code as a shell gives it for a signal."""
    del frame
    os._exit(128 + number)
