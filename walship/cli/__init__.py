"""The `walship` command: reads flags, hands them to config.py, runs one part, turns errors into words and a code."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 runtime failure, 2 usage or configuration."""
    from walship.cli.app import run  # here, so that importing walship.cli costs nothing

    return run(arguments)
