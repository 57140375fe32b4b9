"""`walship status`: asks one process for its /status and shows it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import httpx
from rich.console import Group
from rich.live import Live
from rich.text import Text

from walship.cli import output
from walship.config import StatusConfig
from walship.errors import Unavailable

__all__ = ["ask", "describe", "run"]

WATCH_SECONDS = 1.0
_COLUMNS = ("node", "role", "healthy", "position", "durable", "lag_txids", "lag_s", "zone", "pid", "url")


def run(config: StatusConfig) -> int:
    console = output.console()
    headers = {} if config.auth_token is None else {"authorization": f"Bearer {config.auth_token}"}
    with httpx.Client(timeout=config.timeout_seconds, headers=headers) as client:
        if not config.watch:
            _show_once(ask(client, config.url), as_json=config.json)
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            if config.json or not console.is_terminal:
                while True:
                    _show_once(ask(client, config.url), as_json=config.json)
                    time.sleep(WATCH_SECONDS)
            with Live(console=console, screen=False, auto_refresh=False) as live:
                while True:
                    live.update(_rich(ask(client, config.url), console.width), refresh=True)
                    time.sleep(WATCH_SECONDS)
    return 0


def ask(client: httpx.Client, url: str) -> dict[str, Any]:
    """The decoded /status of `url`. Raises Unavailable in words when there is none."""
    try:
        reply = client.get(f"{url}/status")
        found = reply.raise_for_status().json()
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 401:
            raise Unavailable(f"{url}/status asks for a token; give --auth-token or WALSHIP_AUTH_TOKEN") from error
        raise Unavailable(f"{url}/status answered {error.response.status_code}: is this a walship proxy?") from error
    except httpx.HTTPError as error:
        raise Unavailable(
            f"{url} does not answer ({error or type(error).__name__}). Is the cluster up? Start it with: walship up"
        ) from error
    except ValueError as error:
        raise Unavailable(f"{url}/status is not JSON: is this a walship proxy?") from error
    if not isinstance(found, dict):
        raise Unavailable(f"{url}/status is not an object: is this a walship proxy?")
    return found


def describe(status: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """A headline, the columns and the rows of a status, of a proxy (with nodes) or of a single node."""
    if not isinstance(status.get("nodes"), list):
        return "node", ("key", "value"), [(key, _cell(value)) for key, value in status.items()]
    headline = (
        f"cluster {_cell(status.get('cluster'))}  term {_cell(status.get('term'))}  "
        f"leader {_cell(status.get('leader'))}  ack {_cell(status.get('ack'))}\n"
        f"failover: {_cell(status.get('failover'))}"
    )
    return headline, _COLUMNS, [_row(node) for node in status["nodes"] if isinstance(node, dict)]


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    shown = node | {"node": node.get("name"), "position": _position(node, "txid")}
    shown |= {"durable": _position(node, "durable_txid"), "lag_s": node.get("lag_seconds")}
    return tuple(_cell(shown.get(column)) for column in _COLUMNS)


def _position(node: dict[str, Any], key: str) -> str | None:
    return None if node.get(key) is None else f"{_cell(node.get('term'))}.{node[key]}"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return value if isinstance(value, str) else json.dumps(value)


def _show_once(status: dict[str, Any], *, as_json: bool) -> None:
    console = output.console()
    if as_json:
        output.line(json.dumps(status, separators=(",", ":")))
    elif console.is_terminal:
        console.print(_rich(status, console.width))
    else:
        headline, columns, rows = describe(status)
        output.line(headline)
        output.line(output.plain_table(columns, rows))


def _rich(status: dict[str, Any], width: int) -> Group:
    headline, columns, rows = describe(status)
    return Group(output.rich_table(headline, columns, rows, width=width), Text(""))
