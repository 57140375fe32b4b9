"""`walship failover explain`: asks every node how it sees the election, and says why the last one went as it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from walship.cli import output
from walship.cli.status import ask
from walship.config import StatusConfig
from walship.errors import Unavailable

__all__ = ["explain", "gather", "run"]

Status = Mapping[str, Any]
Seen = Mapping[str, Status | str]  # node -> its /status, or why it gave none


def run(config: StatusConfig) -> int:
    """Print the explanation; 0 also when nobody leads, since that is what was asked for."""
    headers = {} if config.auth_token is None else {"authorization": f"Bearer {config.auth_token}"}
    with httpx.Client(timeout=config.timeout_seconds, headers=headers) as client:
        seen = gather(client, config.url)
    lines = explain(seen)
    if config.json:
        told = {name: {"error": each} if isinstance(each, str) else _told(each) for name, each in seen.items()}
        output.line(json.dumps({"explanation": lines, "nodes": told}, separators=(",", ":")))
    else:
        output.line("\n".join(lines))
    return 0


def gather(client: httpx.Client, url: str) -> dict[str, Status | str]:
    """/status of every node that `url`, a proxy or a node, knows of. Raises Unavailable when `url` does not answer."""
    status = ask(client, url)
    if not isinstance(status.get("nodes"), list):
        seen: dict[str, Status | str] = {str(status.get("name")): status}
        leader, leader_url = status.get("leader"), status.get("leader_url")
        if leader and leader_url and leader not in seen:
            seen[str(leader)] = _try(client, str(leader_url))
        return seen
    return {str(node.get("name")): _try(client, str(node.get("url"))) for node in status["nodes"]}


def explain(seen: Seen) -> list[str]:
    """The words, a line each: who leads, how the last election went, why none happens, what each node waits for."""
    up = {name: each for name, each in seen.items() if not isinstance(each, str)}
    lines = [_headline(up), *_last_elections(up)]
    if _leader(up) is None:
        lines.append(_possible(seen, up))
    lines += ["", "Each node:"]
    for name, each in sorted(seen.items()):
        if isinstance(each, str):
            lines.append(f"  {name}: does not answer ({each})")
        else:
            lines.append(f"  {name}: {each.get('role')}, {_election(each).get('state', '?')}; {_why(each)}")
    return lines


def _leader(up: Mapping[str, Status]) -> tuple[str, int] | None:
    """Who says that it leads, in the highest term: an older one's word is about to end."""
    leading = [(int(each.get("term") or 0), name) for name, each in up.items() if each.get("role") == "leader"]
    term, name = max(leading, default=(0, ""))
    return (name, term) if name else None


def _headline(up: Mapping[str, Status]) -> str:
    leader = _leader(up)
    if leader is not None:
        return f"{leader[0]} leads in term {leader[1]}."
    newest = max((int(each.get("term") or 0) for each in up.values()), default=0)
    return f"Nobody leads. The newest term that a node knows is {newest}."


def _last_elections(up: Mapping[str, Status]) -> list[str]:
    """The newest candidacy in full, then in a line each those of other nodes."""
    found = sorted(
        ((last, name) for name, each in up.items() if (last := _election(each).get("last"))),
        key=lambda each: (int(each[0]["term"]), each[0]["ended_seconds_ago"] is None, -_age(each[0])),
        reverse=True,
    )
    if not found:
        return ["No node has been a candidate since it started."]
    (last, name), *others = found
    phases = last["phases"]
    took = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in phases.items())
    said = "; ".join(f"{answer['name']} {answer['said']}" for answer in last["answers"])
    lines = [
        f"Last candidate: {name}, for term {last['term']}{_ago(last)}.",
        f"  because: {last['cause']}",
        f"  it took: {took or 'nothing yet'} ({sum(phases.values()):.3f} s in all)",
        f"  voters:  {said or 'none has answered'}",
        f"  outcome: {last['outcome']}",
    ]
    lines += [f"Before: {name}, for term {last['term']}{_ago(last)}: {last['outcome']}" for last, name in others]
    return lines


def _possible(seen: Seen, up: Mapping[str, Status]) -> str:
    """Are there enough voters for an election?"""
    elections = [_election(each) for each in up.values() if _election(each)]
    if not elections:
        return "No node tells of its election: none answers, or all are of an older walship."
    voters = max(int(each.get("voters") or 0) for each in elections)
    needed = max(int(each.get("needed") or 0) for each in elections)
    answering = sum(bool(each.get("voter")) for each in up.values())
    silent = ", ".join(sorted(name for name, each in seen.items() if isinstance(each, str)))
    if answering < needed:
        return (
            f"No election can succeed: {answering} of {voters} voters answer, and {needed} are needed to be sure that "
            f"no acknowledged write is lost. Bring back {silent or 'a voter'}, or read about a lost quorum in "
            "docs/operations.md."
        )
    return f"{answering} of {voters} voters answer, and {needed} are needed: an election can succeed."


def _told(status: Status) -> dict[str, Any]:
    return {key: status.get(key) for key in ("role", "term", "voter", "durable_txid", "healthy", "election")}


def _election(status: Status) -> Mapping[str, Any]:
    found = status.get("election")
    return found if isinstance(found, dict) else {}


def _why(status: Status) -> str:
    unhealthy = status.get("unhealthy_reason")
    why = _election(status).get("why") or "it tells nothing of its election"
    return f"{why}; it serves nothing: {unhealthy}" if unhealthy else str(why)


def _age(last: Mapping[str, Any]) -> float:
    return float(last["ended_seconds_ago"] or 0.0)


def _ago(last: Mapping[str, Any]) -> str:
    return "" if last["ended_seconds_ago"] is None else f", ended {_age(last):.0f} s ago"


def _try(client: httpx.Client, url: str) -> Status | str:
    try:
        return ask(client, url)
    except Unavailable as error:
        return str(error).partition(". ")[0]
