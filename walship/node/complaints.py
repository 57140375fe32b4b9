"""A leader that its voters cannot reach, while both reach the store, must give the lead up (failover.md 3.11).

Its lease is renewed, so nobody may claim; its frames are not acknowledged, so nobody can write. Only the store sees
both sides: a voter that cannot follow for a while leaves a complaint there, about one term; a leader without enough
voters looks for complaints, and when there are some, releases the term. Voters that are dead complain of nothing, and
a leader is no worse than none then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from walship.coordination.record import LeaderRecord, Seen, read_leader, release
from walship.errors import CompareFailed, CorruptState, StoreUnavailable, UsageError
from walship.node.leading import Leading, boottime
from walship.replication.subscriber import Link

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["COMPLAINTS", "Complaints"]

_log = logging.getLogger("walship.election")

COMPLAINTS = "complaints/"
LOOK_SECONDS = 0.5
COMPLAIN_SECONDS = 2.0  # longer than a reconnection takes
ALONE_SECONDS = 4.0  # longer than a complaint takes to be made


class _Complaint(msgspec.Struct, frozen=True):
    term: int
    format: int = 1


class Complaints:
    """Both ends of it on one node. `run` must be alive."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._since: float | None = None  # following: not streaming; leading: without enough voters
        self._about = 0  # the term of that
        self._complained = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                async with asyncio.timeout(self._node.config.lease_seconds):
                    wanted = await self._look()
            except (StoreUnavailable, CompareFailed, TimeoutError) as error:
                _log.info("complaints: %s", error or "the store gave no answer in time")
            else:
                if wanted is not None:
                    await self._release(wanted)

    async def _look(self) -> Leading | None:
        """The leadership that has to be given up, if any."""
        node = self._node
        led, record = node.led, node.sides.leader_record
        if led is not None:
            if self._lasts(led.term, _has_voters(led), ALONE_SECONDS) and await self._complaints(led.term):
                return led
        elif node.voter and record is not None:
            subscriber = node.subscriber
            well = subscriber is None or subscriber.link in (Link.STREAMING, Link.SEEDING)
            if self._lasts(record.term, well, COMPLAIN_SECONDS) and self._complained < record.term:
                await self._complain(record.term)
        return None

    def _lasts(self, term: int, well: bool, seconds: float) -> bool:
        """True when it has not been well in `term` for so long."""
        now = boottime()
        if well or term != self._about or self._since is None:
            self._about, self._since = term, None if well else now
            return False
        return now - self._since >= seconds

    async def _complaints(self, term: int) -> list[str]:
        found = await self._node.store.list(COMPLAINTS)
        names = []
        for key, state in found.items():
            name = key.removeprefix(COMPLAINTS)
            if name in self._node.elector.core.voters and _term_of(state.value) == term:
                names.append(name)
        return names

    async def _complain(self, term: int) -> None:
        node = self._node
        key = COMPLAINTS + node.name
        there = await node.store.get(key)
        body = msgspec.json.encode(_Complaint(term))
        await node.store.put_if(key, body, version=None if there is None else there.version)
        self._complained = term
        _log.warning("complain: the leader of term=%d cannot be followed from here", term)

    async def _release(self, led: Leading) -> None:
        node = self._node
        async with led.giving_up:
            if node.led is not led:
                return
            _log.warning("release term=%d: voters complain that they cannot reach this node", led.term)
            seen = await led.pause_renewal()
            await node.sides.step_down(led.term, "its voters cannot reach it, and say so in the store")
        await self._give_back(seen)

    async def _give_back(self, seen: Seen[LeaderRecord]) -> None:
        """Release the term of `seen`, until the store says that it is done, or that the record is another's. This node
        takes no part in elections before."""
        mine = seen.record
        while True:
            try:
                async with asyncio.timeout(self._node.config.lease_seconds / 4):
                    await release(self._node.store, seen)
                    return
            except (StoreUnavailable, TimeoutError) as error:
                _log.warning("cannot release term=%d yet: %s", mine.term, error or "no answer in time")
            except CompareFailed:  # a renewal may have landed whose answer was lost
                there = await self._read()
                if there is not None and not there.record.serves_as(mine):
                    return
                seen = there or seen
            await asyncio.sleep(LOOK_SECONDS)

    async def _read(self) -> Seen[LeaderRecord] | None:
        with contextlib.suppress(StoreUnavailable, CorruptState, UsageError, TimeoutError):
            async with asyncio.timeout(self._node.config.lease_seconds / 4):
                return await read_leader(self._node.store)
        return None


def _has_voters(led: Leading) -> bool:
    """Enough voters acknowledge; always with `--ack 0`."""
    acks = led.acks
    if acks is None or not acks.required:
        return True
    heard = [
        each
        for each in led.publisher.statistics().followers
        if each.voter and each.last_ack_age_seconds < ALONE_SECONDS
    ]
    return len(heard) >= acks.required


def _term_of(data: bytes) -> int | None:
    try:
        return msgspec.json.decode(data, type=_Complaint).term
    except msgspec.DecodeError:
        return None
