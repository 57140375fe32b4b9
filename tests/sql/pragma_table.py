"""The table of docs/pragmas.md, made from the policy: `python -m tests.sql.pragma_table` prints it."""

from __future__ import annotations

import sys

from walship.sql.pragmas import POLICIES, Action, Policy

WORDS = {
    Action.READ: "answered",
    Action.WRITE: "leader only",
    Action.STREAM: "per stream",
    Action.ANSWER: "no-op",
    Action.WALSHIP: "walship's own",
    Action.REFUSED: "refused",
}
GROUPS = {  # a PRAGMA is in the first group that its form with an argument belongs to
    "Settings that walship decides": Action.ANSWER,
    "Settings of a connection": Action.STREAM,
    "In the database file": Action.WRITE,
    "Questions": Action.READ,
    "Refused": Action.REFUSED,
    "walship's own": Action.WALSHIP,
}


def note(policy: Policy) -> str:
    if policy.set is Action.ANSWER:
        return "what SQLite says" if policy.value is None else f"`{policy.value}`"
    return policy.reason


def table(action: Action) -> str:
    last = {Action.ANSWER: "value in force", Action.REFUSED: "reason"}.get(action)
    lines = ["| PRAGMA | asked | set |" + (f" {last} |" if last else ""), "|---|---|---|" + ("---|" if last else "")]
    for name, policy in sorted(POLICIES.items()):
        if policy.set is action:
            row = f"| `{name}` | {WORDS[policy.query]} | {WORDS[policy.set]} |"
            lines.append(row + (f" {note(policy)} |" if last else ""))
    return "\n".join(lines)


def page_tables() -> dict[str, str]:
    """Each group's heading and its table."""
    return {heading: table(action) for heading, action in GROUPS.items()}


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(f"## {heading}\n\n{text}" for heading, text in page_tables().items()) + "\n")
