"""What a node runs while it follows: the engine's follower and the subscriber that feeds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from walship.engine.follower import Follower
from walship.engine.replica import Replica
from walship.engine.retention import LogLimits
from walship.errors import WalshipError
from walship.replication.subscriber import Identity, Link, Subscriber

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["Following"]


class Following:
    """One stretch of following, from its making to `retire` (this node will lead) or `stop` (it ends)."""

    def __init__(
        self,
        node: Node,
        replica: Replica | None,
        *,
        limits: LogLimits,
        locate_leader: Callable[[], Awaitable[tuple[str, int] | None]],
        on_replica: Callable[[Replica], None],
    ) -> None:
        member = node.member
        self.follower = Follower(
            directory=node.config.data_dir,
            state=member.state,
            cluster=node.cluster,
            voter=node.voter,
            acks=node.acks_required,
            limits=limits,
            replica=replica,
            marks=member.marks,
            watermarks=node.watermarks,
            on_replica=on_replica,
            on_failure=node.fail,
            on_sync=node.report.observe_log_sync,
            on_orphan=node.orphans.kept,
        )
        self.subscriber = Subscriber(
            self.follower,
            locate_leader,
            Identity(node.cluster, node.node_id, node.name, node.boot_nonce),
            credential=member.record.credential("replication"),
        )
        self._fail = node.fail
        self._joined = False
        self._task = asyncio.get_running_loop().create_task(self._subscribe(), name="subscriber")

    @property
    def joined(self) -> bool:
        """True once a leader's stream was followed: until then this node may show an orphan tail (failover.md I21)."""
        self._joined = self._joined or self.subscriber.link is Link.STREAMING
        return self._joined

    async def retire(self) -> Replica:
        """End the stream and apply the log to its end, to lead. Raises CorruptDatabase: it cannot, `stop` it then."""
        await self._end_stream()
        return await self.follower.retire()

    async def stop(self) -> None:
        """End the stream, log what came, save a mark. The replica stays open. Idempotent."""
        await self._end_stream()
        await self.follower.stop()

    async def _subscribe(self) -> None:
        try:
            await self.subscriber.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - handed to the node, which ends with it
            self._fail(error)

    async def _end_stream(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, WalshipError):
            await asyncio.wait({self._task})
