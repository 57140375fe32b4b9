"""`walship switchover`: hands the lead to another node, by an order to the leader."""

from __future__ import annotations

import json

from walship.cli import output
from walship.cli.orders import Orders
from walship.config import OrderConfig

__all__ = ["run"]


def run(config: OrderConfig, to: str | None) -> int:
    """Ask, wait for the end, say who leads. Raises Unavailable when it was not done; nothing has changed then."""
    with Orders(config) as orders:
        done = orders.post("switchover", {"to": to})
    if config.json:
        output.line(json.dumps(done, separators=(",", ":")))
    else:
        output.line(f"{done['to']} leads from term {done['term']} on; {done['from']} follows it")
    return 0
