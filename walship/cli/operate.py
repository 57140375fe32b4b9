"""The commands of whoever runs a cluster: hand the lead over, explain elections, look at orphans, change voters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from walship.cli.options import (
    ADMIN_TOKEN,
    AUTH_TOKEN,
    CLUSTER_OF,
    ONE_LINE,
    PROXY_OR_NODE,
    ConfigFile,
    Flag,
    Text,
    option,
    settings_of,
)
from walship.config import OrderConfig, StatusConfig

__all__ = ["add_to"]


def switchover(
    context: typer.Context,
    url: Annotated[Text, PROXY_OR_NODE] = None,
    to: Annotated[Text, option("to", "NAME", "The node that shall lead. Default: who follows closest.")] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    timeout_seconds: Annotated[Text, option("timeout-seconds", "S", "Give up waiting after this. Default 30.")] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(OrderConfig, context, without=("to",))
    from walship.cli.switchover import run as run_switchover

    return run_switchover(settings, to)


_failover = typer.Typer(help="Elections: why the last one went as it did, or why none happens.", no_args_is_help=True)


@_failover.command(
    help=(
        "Ask every node how it sees the election: who leads and since which term, how long each phase of the last "
        "election took, what the voters said, or why there is none. Settings are those of [bold]status[/bold]."
    ),
    epilog="Examples:\n\n  walship failover explain\n\n  walship failover explain http://127.0.0.1:9001 --json",
)
def explain(
    context: typer.Context,
    url: Annotated[Text, PROXY_OR_NODE] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    timeout_seconds: Annotated[Text, option("timeout-seconds", "S", "Give up on a node after this. Default 5.")] = None,
    auth_token: Annotated[Text, AUTH_TOKEN] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(StatusConfig, context)
    from walship.cli.failover import run as run_explain

    return run_explain(settings)


_orphans = typer.Typer(
    help="Commits that never became history, as a node keeps them: list, show, export.", no_args_is_help=True
)
_NODE = typer.Option("--url", metavar="URL", help="The node to ask. Default http://127.0.0.1:8080.")
_DATA = typer.Option("--data", metavar="DIR", help="The directory of a node instead, running or not.")
_NAME = typer.Argument(metavar="NAME", help="As the list shows it.")


@_orphans.command(
    name="list",
    help="The orphans of a node, oldest first. Each node keeps its own: ask every one.",
    epilog="Example:\n\n  walship orphans list --data walship-data/node1",
)
def orphans_list(
    context: typer.Context,
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = settings_of(OrderConfig, context, without=("data",))
    return orphans.listing(settings, data)


@_orphans.command(name="show", help="One orphan: what was lost, when, and whether a client may have been told of it.")
def orphans_show(
    context: typer.Context,
    name: Annotated[str, _NAME],
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = settings_of(OrderConfig, context, without=("data", "name"))
    return orphans.show(settings, data, name)


@_orphans.command(
    name="export",
    help=(
        "Write an orphan's pages as an LTX file; with --database as a database that can be opened, made of a copy at "
        "the very position where the lost commits began."
    ),
    epilog="Example:\n\n  walship orphans export 3-101-104 lost.ltx --data walship-data/node1",
)
def orphans_export(
    context: typer.Context,
    name: Annotated[str, _NAME],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="What to write; must not exist.")],
    database: Annotated[
        Path | None, typer.Option("--database", metavar="BASE", help="The database where the lost commits began.")
    ] = None,
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = settings_of(OrderConfig, context, without=("data", "name", "target", "database"))
    return orphans.export(settings, data, name, target, database)


_voters = typer.Typer(
    help=(
        "Voters and acknowledgments: list, add, remove, ack. Voters acknowledge writes and may lead; other nodes only "
        "follow."
    ),
    no_args_is_help=True,
)
_ASKED = typer.Option("--url", metavar="URL", help="A proxy or node. Default http://127.0.0.1:8080.")


@_voters.command(name="list", help="Who votes, who could, and what the rule promises.")
def voters_list(
    context: typer.Context,
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = settings_of(OrderConfig, context)
    return voters.listing(settings)


@_voters.command(name="add", help="Let a node vote that follows closely. Its acknowledgments count from then on.")
def voters_add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = settings_of(OrderConfig, context, without=("name",))
    return voters.change(settings, {"add": name})


@_voters.command(name="remove", help="Take a node's vote, also of one that is gone. It may go on following.")
def voters_remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node; not the leader.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = settings_of(OrderConfig, context, without=("name",))
    return voters.change(settings, {"remove": name})


@_voters.command(name="ack", help="How many followers must hold a write on disk before it is acknowledged.")
def voters_ack(
    context: typer.Context,
    acks: Annotated[str, typer.Argument(metavar="N|all", help="A number, or all: every voter but the leader.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, ONE_LINE] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    cluster: Annotated[Text, CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = settings_of(OrderConfig, context, without=("acks",))
    return voters.change(settings, {"ack": acks})


def add_to(app: typer.Typer) -> None:
    """Make these commands part of `app`."""
    app.command(
        help=(
            "Hand the lead to another node, with no write lost and none failed: to the one named by --to, or to the "
            "one that follows closest. Nothing changes when that cannot be done. SIGTERM to a leader does the same."
        ),
        epilog="Examples:\n\n  walship switchover\n\n  walship switchover http://127.0.0.1:8080 --to node2",
    )(switchover)
    app.add_typer(_failover, name="failover")
    app.add_typer(_orphans, name="orphans")
    app.add_typer(_voters, name="voters")
