"""`walship voters`: who votes, how many acknowledgments a write needs, and changing either."""

from __future__ import annotations

import json
from typing import Any

from walship.cli import output
from walship.cli.orders import Orders
from walship.config import OrderConfig

__all__ = ["change", "listing"]

_COLUMNS = ("node", "voter", "leads", "caught_up", "why")


def listing(config: OrderConfig) -> int:
    """Print who votes. Raises Unavailable."""
    with Orders(config) as orders:
        _show(orders.get("voters"), as_json=config.json)
    return 0


def change(config: OrderConfig, order: dict[str, str]) -> int:
    """Give one order, wait for its end, print who votes then. Raises Unavailable when it was not done, and why."""
    with Orders(config) as orders:
        _show(orders.post("voters", order), as_json=config.json)
    return 0


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.line(json.dumps(found, separators=(",", ":")))
        return
    rows = [
        (node["name"], _yes(node["voter"]), _yes(node["leads"]), _yes(node["caught_up"]), node["why"] or "-")
        for node in found["nodes"]
    ]
    every = ", all voters but the leader" if found["ack_all"] else ""
    output.line(f"{len(found['voters'])} voters; a write waits for {found['ack']} acknowledgments{every}")
    output.line(output.plain_table(_COLUMNS, rows))
    for note in found["notes"]:
        output.line(note)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
