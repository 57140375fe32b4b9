"""The role of a node, as a table: which event leads where, and which durable steps belong to each transition (R2).

    STARTING   recovery: the -wal and the log fsynced before any position is reported
    FOLLOWER   accepts frames of the newest term, applies them, acknowledges
    CLAIMING   holds term t by compare-and-swap and opens it; nobody may be told yet
    LEADER     the term-start frame and `truth=wal` are durable; commits, ships, acknowledges
    STOPPING   no new work; what was acknowledged is durable already

A missing entry is an error: the event cannot happen in that role. When a node claims, and when it steps down, is the
election's to say (`walship.coordination.election`).
"""

from __future__ import annotations

from enum import StrEnum

from walship.errors import Fenced

__all__ = ["DURABLE_STEPS", "TRANSITIONS", "Event", "Role", "next_role"]


class Role(StrEnum):
    STARTING = "starting"
    FOLLOWER = "follower"
    CLAIMING = "claiming"
    LEADER = "leader"
    STOPPING = "stopping"


class Event(StrEnum):
    RECOVERED = "recovered"
    CLAIM_WON = "claim won"
    TERM_STARTED = "term started"
    DEPOSED = "deposed"
    STOP = "stop"


TRANSITIONS: dict[Role, dict[Event, Role]] = {
    Role.STARTING: {Event.RECOVERED: Role.FOLLOWER, Event.STOP: Role.STOPPING},
    Role.FOLLOWER: {Event.CLAIM_WON: Role.CLAIMING, Event.STOP: Role.STOPPING},
    Role.CLAIMING: {Event.TERM_STARTED: Role.LEADER, Event.DEPOSED: Role.FOLLOWER, Event.STOP: Role.STOPPING},
    Role.LEADER: {Event.DEPOSED: Role.FOLLOWER, Event.STOP: Role.STOPPING},
    Role.STOPPING: {Event.STOP: Role.STOPPING},
}

DURABLE_STEPS: dict[tuple[Role, Event], tuple[str, ...]] = {
    (Role.STARTING, Event.RECOVERED): ("fdatasync -wal", "fsync log", "rebuilt frames fsynced"),
    (Role.FOLLOWER, Event.CLAIM_WON): ("promised=t",),
    (Role.CLAIMING, Event.TERM_STARTED): ("fdatasync -wal", "term-start frame fsynced", "truth=wal, led=t, base"),
    (Role.CLAIMING, Event.DEPOSED): ("fsync log", "truth=log"),
    (Role.LEADER, Event.DEPOSED): ("fdatasync -wal", "fsync log", "truth=log"),
    (Role.LEADER, Event.STOP): ("fsync log", "next_base", "mark"),
    (Role.FOLLOWER, Event.STOP): ("fsync log", "fdatasync -wal", "mark"),
}


def next_role(role: Role, event: Event) -> Role:
    """Raises Fenced when `event` is not possible in `role`."""
    try:
        return TRANSITIONS[role][event]
    except KeyError:
        raise Fenced(f"{event} is not possible for a node that is {role}; nothing was changed") from None
