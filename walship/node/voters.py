"""Voters and acknowledgments of the cluster as this node sees them: follows the record, and changes it while it leads.

The order of a change, and why it is safe, is `walship.coordination.membership`. Every node follows the cluster record;
what it says takes effect here at once: whom this node counts, whether it may lead, when it applies (R15).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import Request

from walship.coordination.follow import follow
from walship.coordination.membership import (
    Change,
    Kind,
    Standing,
    changed,
    consequences,
    mark_cluster,
    swap_cluster,
)
from walship.coordination.record import CLUSTER, ClusterRecord, Seen, decode, read_nodes
from walship.coordination.store import Change as StoreChange
from walship.engine import failpoints
from walship.engine.acks import AckRule, AckTracker
from walship.errors import (
    CompareFailed,
    Fenced,
    NotLeader,
    OutcomeUnknown,
    Refused,
    StoreUnavailable,
    Unavailable,
    UsageError,
)
from walship.front.admin import AdminVerb, body_of
from walship.node.leading import Leading

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Voters"]

_log = logging.getLogger("walship.voters")

_COVER_SECONDS: Final = 10.0  # a voter that is followed closely has what was acknowledged in a moment
_RETRY_SECONDS: Final = 1.0
CLOSE_TXIDS: Final = 1_000


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/voters: one of the three."""

    add: str | None = None
    remove: str | None = None
    ack: int | str | None = None

    def change(self) -> Change:
        given = [field for field in ("add", "remove", "ack") if getattr(self, field) is not None]
        if len(given) != 1:
            raise UsageError(
                "give one of add, remove and ack: voters and acks change one at a time. Nothing was changed"
            )
        if given == ["add"]:
            return Change(Kind.ADD, self.add or "")
        if given == ["remove"]:
            return Change(Kind.REMOVE, self.remove or "")
        text = str(self.ack)
        if text != "all" and not (text.isascii() and text.isdecimal() and len(text) < 4):
            raise UsageError(f"ack {text[:20]!r} is not allowed; allowed: 0 to 15, or all. Nothing was changed")
        return Change(Kind.ACK, acks=None if text == "all" else int(text))


def _rule(record: ClusterRecord) -> AckRule:
    return AckRule(record.acks, frozenset(record.voters))


class Voters:
    """Follows and changes the cluster record, for one node. `watch` must be alive."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._changing = asyncio.Lock()

    def verbs(self) -> list[AdminVerb]:
        return [AdminVerb("GET", "voters", self._list), AdminVerb("POST", "voters", self._order)]

    # --- following the record ---------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Take over what the record says, until cancelled."""
        await follow(self._node.store, CLUSTER, self._changed, retry_seconds=_RETRY_SECONDS)

    def _changed(self, change: StoreChange) -> None:
        if change.key == CLUSTER and change.state is not None:
            self.take(decode(ClusterRecord, CLUSTER, change.state.value))

    async def mark(self, term: int) -> None:
        """A candidate's step before it asks voters: no change of an older term lands after it. Raises as
        `mark_cluster`."""
        seen = await mark_cluster(self._node.store, term)
        failpoints.reach("voters.marked")
        self.take(seen.record)

    def take(self, record: ClusterRecord) -> None:
        """The record says so now. An older one than is known changes nothing."""
        node, known = self._node, self._node.member.record
        if (record.term, record.gen) <= (known.term, known.gen) or record.cluster_id != known.cluster_id:
            return
        node.member = dataclasses.replace(node.member, record=record)
        if (record.voters, record.acks) == (known.voters, known.acks):
            return
        _log.warning("voters=%s ack=%d gen=%d", ",".join(record.voters), record.acks, record.gen)
        node.voter = node.member.is_voter(node.name)
        node.elector.core.voters, node.elector.core.acks = record.voters, record.acks
        if (follower := node.follower) is not None:
            follower.set_rule(voter=node.voter, acks=record.acks)

    # --- changing it, on the leader ---------------------------------------------------------------------------

    async def change(self, change: Change) -> ClusterRecord:
        """Carry `change` out; returns the record that holds then.

        Raises NotLeader, Refused (not allowed), Unavailable (nothing was changed), OutcomeUnknown (the store did not
        say whether it was; both rules are in force until it does).
        """
        led, acks = self._led()
        if self._changing.locked():
            raise Refused("busy", "another change of the voters is under way. Nothing was changed; ask again")
        async with self._changing:
            seen = await self._settled(led, acks)
            record = changed(seen.record, change, leader=self._node.name, nodes=await self._standings())
            if record == seen.record:
                return record
            await self._cover(led, acks, _rule(record))
            try:
                await swap_cluster(self._node.store, seen, record, still=lambda: led.established)
            except (StoreUnavailable, CompareFailed) as error:
                self._node.spawn(self._resolve(led, acks), "resolve voters")
                raise OutcomeUnknown(
                    f"whether the voters have changed is not known ({error}). Nothing acknowledged is at risk: until "
                    "the store answers, writes need the acknowledgments of the old rule and of the new. Look with: "
                    "walship voters"
                ) from error
            failpoints.reach("voters.changed")
            self._enforce(led, acks, record)
            return record

    def _led(self) -> tuple[Leading, AckTracker]:
        led = self._node.led
        if led is None or led.acks is None:
            raise NotLeader(*self._node.leader)
        if not led.established:
            raise Unavailable(
                f"{self._node.name} leads, but its term is not acknowledged yet, or its lease has ended. Nothing was "
                "changed; ask again"
            )
        return led, led.acks

    async def _settled(self, led: Leading, acks: AckTracker) -> Seen[ClusterRecord]:
        """The record, with no change of ours under way: an earlier one whose outcome was not known can land no more.

        A write of the same record moves its version, which an earlier compare-and-swap does not name.
        """
        seen = await mark_cluster(self._node.store, led.term)
        if acks.coming is not None:
            same = msgspec.structs.replace(seen.record, gen=seen.record.gen + 1)
            seen = await swap_cluster(self._node.store, seen, same, still=lambda: self._node.led is led)
            self._enforce(led, acks, seen.record)
        self.take(seen.record)
        return seen

    async def _resolve(self, led: Leading, acks: AckTracker) -> None:
        """After an unknown outcome: find out, until it is known or this term ends here."""
        while self._node.led is led and acks.coming is not None:
            await asyncio.sleep(_RETRY_SECONDS)
            with contextlib.suppress(StoreUnavailable, CompareFailed, Fenced):
                async with self._changing:
                    await self._settled(led, acks)

    async def _cover(self, led: Leading, acks: AckTracker, rule: AckRule) -> None:
        """Take both rules, and wait until the new one covers what was acknowledged. Raises Unavailable: neither."""
        marks = self._node.watermarks
        before = acks.rule
        acks.propose(rule)
        led.publisher.require(acks.required)
        try:
            async with asyncio.timeout(_COVER_SECONDS):
                while acks.covered_by(rule, marks.durable).order() < marks.acked.order():
                    led.ack_heard.clear()
                    await led.ack_heard.wait()  # followers acknowledge by themselves, ten times a second
        except TimeoutError:
            acks.settle(before)
            led.publisher.require(before.required)
            led.move_acked()
            raise Unavailable(
                f"not enough voters of the new rule hold what was acknowledged, after {_COVER_SECONDS:g} s. Nothing "
                "was changed; see `walship status` for who is behind"
            ) from None

    def _enforce(self, led: Leading, acks: AckTracker, record: ClusterRecord) -> None:
        """The record holds for certain: its rule alone is in force."""
        acks.settle(_rule(record))
        self.take(record)
        led.publisher.set_rule(record.acks, frozenset(record.voters))
        led.move_acked()

    async def _standings(self) -> dict[str, Standing]:
        node = self._node
        publisher = node.publisher
        followers = {} if publisher is None else {each.name: each for each in publisher.statistics().followers}
        found = {}
        for name in await read_nodes(node.store):
            each = followers.get(name)
            if each is None:
                found[name] = Standing(False, "it is not connected to the leader")
            elif each.phase != "streaming":
                found[name] = Standing(False, "it is being given a copy of the database")
            else:
                close = each.lag_txids <= CLOSE_TXIDS
                found[name] = Standing(close, "" if close else f"it is {each.lag_txids} commits behind")
        found.pop(node.name, None)
        return found

    # --- admin verbs ------------------------------------------------------------------------------------------

    async def _list(self, _request: Request) -> object:
        self._led()
        return await self._answer(self._node.member.record)

    async def _order(self, request: Request) -> object:
        order = await body_of(request, _Order)
        return await self._answer(await self.change(order.change()))

    async def _answer(self, record: ClusterRecord) -> dict[str, object]:
        node, standings = self._node, await self._standings()
        names = sorted({node.name, *record.voters, *standings})
        return {
            "voters": list(record.voters),
            "ack": record.acks,
            "ack_all": record.ack_all,
            "gen": record.gen,
            "term": node.term,
            "nodes": [
                {
                    "name": name,
                    "voter": name in record.voters,
                    "leads": name == node.name,
                    "caught_up": name == node.name or (name in standings and standings[name].caught_up),
                    "why": standings[name].why if name in standings else "",
                }
                for name in names
            ],
            "notes": consequences(record),
        }
