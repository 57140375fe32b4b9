"""The admin verbs of a node: what an operator asks of it, beyond reading its status."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from walship.front.admin import AdminVerb, admin_routes, body_of
from walship.hrana.admin import AdminGate
from walship.node.switchover import switch_over

if TYPE_CHECKING:
    from walship.node.node import Node

__all__ = ["routes"]


class _Switchover(msgspec.Struct):
    to: str | None = None


def routes(node: Node) -> list[Route]:
    """The routes under /admin/, behind the gate of this node's settings."""
    config = node.config
    gate = AdminGate(
        token=config.admin_token,
        credential=lambda: node.member.record.credential("admin"),
        from_this_machine=config.auth_token is None and config.auth_jwt_key is None,
    )

    async def switchover(request: Request) -> object:
        asked = await body_of(request, _Switchover)
        before = node.term
        return {"from": node.name, "to": await switch_over(node, asked.to), "term": before + 1}

    return admin_routes(
        gate, [AdminVerb("POST", "switchover", switchover), *node.orphans.verbs(), *node.voters.verbs()]
    )
