"""A planned change of leader: no write is lost, none fails, none waits long (failover.md 3.7).

    S1 pick a voter that follows closely      S5 it holds that position durably
    S3 no new writes; what runs ends          S6 one compare-and-swap: term + 1 is its, from this position on
    S4 the position is final                  S7 step down; S8 it serves without asking for votes

Up to S5 a time-out undoes everything. After S6 the record has the last word: the target leads, or, when nobody knows
whether the compare-and-swap happened, this node admits writes again only once a renewal of its own has succeeded, which
makes it impossible that the handoff still lands (R12a). One change at a time: an undo of one, amid another, would let
writes in beyond the position that the other hands over.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from walship.coordination.record import Phase, TermStart, hand_over, read_nodes
from walship.engine import failpoints
from walship.errors import CompareFailed, NotLeader, OutcomeUnknown, StoreUnavailable, Unavailable
from walship.node.leading import Leading, boottime
from walship.replication.feed import FollowerStatistics

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["switch_over"]

_log = logging.getLogger("walship.election")

CLOSE_TXIDS = 10_000  # a follower further behind than this would keep writes waiting for long
REST_SECONDS = 2.0
CATCH_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Heir:
    """Implements `record.Heir`."""

    node_id: str
    name: str
    url: str
    nonce: str


async def switch_over(node: Node, to: str | None = None) -> str:
    """Hand the lead of `node` to the voter `to`, or to the one that follows closest; returns its name.

    Raises NotLeader; Unavailable when it cannot be done: nothing has changed then, and writes go on. OutcomeUnknown
    when the store did not say whether the handoff happened; the cluster finds out by itself.
    """
    led = node.led
    if led is None:
        raise NotLeader(*node.leader)
    async with led.giving_up:
        if node.led is not led or led.acks is None:
            raise NotLeader(*node.leader)
        return await _switch_over(node, led, to)


async def _switch_over(node: Node, led: Leading, to: str | None) -> str:
    target = _pick(node, led, to)
    heir = await _heir(node, target)
    _log.info("switchover to=%s lag_txids=%d", target.name, target.lag_txids)
    tip = await led.writer.hold_still(REST_SECONDS)
    try:
        failpoints.reach("switchover.still")
        await _caught_up(node, led, target.node_id, tip.position.order())
    except BaseException:
        led.writer.go_on()
        raise
    start = TermStart(tip.position.term, tip.position.txid, tip.checksum)
    try:
        seen = await led.pause_renewal()
        async with asyncio.timeout(node.config.lease_seconds / 4):
            await hand_over(node.store, seen, to=heir, phase=Phase.HANDOFF, start=start)
    except CompareFailed as error:
        led.writer.go_on()
        led.resume_renewal()
        raise Unavailable(f"another node took the lead meanwhile: {error}") from error
    except BaseException as error:  # a cancellation too: the compare-and-swap may have been sent
        led.lease.demand_renewal(boottime())
        led.writer.go_on()
        led.resume_renewal()
        if not isinstance(error, (StoreUnavailable, TimeoutError)):
            raise
        raise OutcomeUnknown(
            f"the store did not say whether the lead went to {target.name} ({error or 'no answer in time'}). No write "
            "is lost. Look at `walship status`: either node leads a moment from now."
        ) from error
    failpoints.reach("switchover.handed_over")
    await node.sides.step_down(led.term, f"handed over to {target.name}")
    return target.name


def _pick(node: Node, led: Leading, to: str | None) -> FollowerStatistics:
    voters = [
        each
        for each in led.publisher.statistics().followers
        if each.voter and each.phase == "streaming" and each.lag_txids <= CLOSE_TXIDS and to in (None, each.name)
    ]
    if not voters:
        whom = "no voter follows" if to is None else f"{to} is not a voter that follows"
        raise Unavailable(f"{whom} closely enough to take over. Nothing was changed; see `walship status`")
    return min(voters, key=lambda each: (each.lag_txids, each.last_ack_age_seconds, each.name))


async def _heir(node: Node, target: FollowerStatistics) -> _Heir:
    try:
        record = (await read_nodes(node.store)).get(target.name)
    except StoreUnavailable as error:
        raise Unavailable(f"the store does not answer ({error}). Nothing was changed; try again later") from error
    if record is None or record.node_id != target.node_id:
        raise Unavailable(f"{target.name} has no record in the store that fits. Nothing was changed")
    return _Heir(record.node_id, record.name, record.url, record.boot_nonce)


async def _caught_up(node: Node, led: Leading, node_id: str, position: tuple[int, int]) -> None:
    """S5: the target has everything on disk, and whoever waits for acknowledgments has them."""
    changed = asyncio.Event()
    end_notice = node.watermarks.on_change(changed.set)
    try:
        async with asyncio.timeout(CATCH_UP_SECONDS):
            while True:
                durable = led.publisher.durable(node_id)
                held = durable is not None and durable.order() >= position
                if held and node.watermarks.acked.order() >= position:
                    return
                changed.clear()
                try:
                    async with asyncio.timeout(0.002):
                        await changed.wait()
                except TimeoutError:
                    continue
    except TimeoutError:
        raise Unavailable(
            f"the target did not catch up within {CATCH_UP_SECONDS:g} s. Nothing was changed, writes go on"
        ) from None
    finally:
        end_notice()
