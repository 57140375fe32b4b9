"""Failpoints: every durable step has a name, and a test can make the process die right there.

A crash at an unlucky moment is the normal case for a database, so each such moment is named where it happens
(`reach("writer.synced")`), and the crash test walks NAMES: start a process with WALSHIP_FAILPOINT set to a name, let
it die there, recover, look. SIGKILL, not an exception: no `finally`, no atexit, no buffer gets a chance to tidy up.

    WALSHIP_FAILPOINT=writer.synced        die when the point is reached for the first time
    WALSHIP_FAILPOINT=writer.synced:7      die when it is reached for the seventh time

Without the variable (read once, at import) `reach` is an empty function.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

from walship.errors import UsageError

__all__ = ["NAMES", "VARIABLE", "armed", "reach"]

VARIABLE = "WALSHIP_FAILPOINT"

NAMES = (
    # the leader's writer, in the order of a group commit
    "writer.committed",
    "writer.synced",
    "writer.logged",
    "writer.acked",
    # the leader's checkpoint and what a new -wal generation counts from (R7)
    "checkpoint.log_synced",
    "checkpoint.state_written",
    "checkpoint.wal_backfilled",
    "generation.based",
    # a follower's log and its way into the -wal and the wal-index
    "follower.logged",
    "follower.synced",
    "apply.frames_written",
    "apply.index_written",
    "apply.header_copy1",
    "apply.header_copy0",
    "follower.marked",
    # commits that are not history, kept before a copy replaces them (R12)
    "orphan.pages_kept",
    "orphan.kept",
    # a follower's first copy, or its replacement
    "seed.received",
    "seed.installing",
    "seed.installed",
    # the durable state record and the log
    "state.temp_written",
    "state.renamed",
    "log.segment_created",
    # becoming the leader (R2)
    "leader.claimed",
    "leader.term_started",
    "leader.truth_wal",
    "switchover.still",
    "switchover.handed_over",
    "leader.step_down_synced",
    "leader.truth_log",
    # the record of who votes (m8)
    "voters.marked",
    "voters.changed",
)


def armed(setting: str) -> Callable[[str], None]:
    """Return the `reach` that `setting` (the variable's value, `name` or `name:N`) asks for.

    Raises UsageError when the name is not registered or N is not a positive number: a crash test that silently
    crashes nowhere would prove nothing.
    """
    if not setting:
        return _pass
    fatal, colon, times = setting.partition(":")
    if fatal not in NAMES:
        raise UsageError(f"{VARIABLE}={setting}: there is no failpoint of that name; known: {', '.join(NAMES)}")
    if colon and not (times.isascii() and times.isdecimal() and int(times)):
        raise UsageError(f"{VARIABLE}={setting}: after the colon goes how often to reach it, a number from 1")
    last = int(times or 1)
    reached = itertools.count(1)  # next() on it is atomic: the points are reached from several threads

    def reach_armed(name: str) -> None:
        if name == fatal and next(reached) == last:
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # the status a shell shows for SIGKILL; only reached if the signal is slow to arrive

    return reach_armed


def _pass(_name: str) -> None:
    """What `reach` is in every process but a crash test's."""


reach = armed(os.environ.get(VARIABLE, ""))
