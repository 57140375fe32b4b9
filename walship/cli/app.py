"""The commands, their flags and their help. Every flag is a key of config.py; a test compares the two.

Flags arrive here as text or None and are judged by config.py, so that a flag, an environment variable and a key of
the file mean the same and fail with the same words. Heavy parts are imported by the command that runs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import walship
from walship.cli import operate, output
from walship.cli.options import (
    ADMIN_TOKEN,
    ADVERTISE,
    AUTH_JWT_KEY,
    AUTH_STATUS,
    AUTH_TOKEN,
    BODY,
    CLUSTER,
    CONSISTENCY,
    DRAIN,
    JSON,
    LEASE,
    LEVEL,
    LOG_MAX,
    PROXY_OR_NODE,
    STATEMENT,
    STREAM_IDLE,
    VALUE_MAX,
    WRITE,
    ConfigFile,
    Flag,
    Text,
    option,
    settings_of,
)
from walship.config import NodeConfig, ProxyConfig, StatusConfig, UpConfig
from walship.errors import UsageError, WalshipError

__all__ = ["app", "run"]

# Click's own base error. Newer typers carry a click of their own, so it is found through what typer exports.
_CommandLineError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="walship",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "One SQLite database, a small cluster: a leader ships its WAL frames to followers, a proxy speaks libSQL.\n\n"
        "Start with [bold]walship up[/bold]: it needs nothing else.\n\n"
        "Each flag is also WALSHIP_<FLAG> in the environment, and a key of the command's table in a TOML file given "
        "with --config. Exit codes: 0 ok, 1 runtime failure, 2 usage or configuration."
    ),
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        output.line(f"walship {walship.__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        output.line(context.get_help())
        raise typer.Exit(UsageError.exit_code)


@app.command(
    help=(
        "A whole cluster on this machine: a leader, followers and a proxy under one parent.\n\n"
        "Give an ordinary SQLite file as DATABASE and it becomes the leader's database, in place; it is checked "
        "first, and not touched when it cannot be used. Without it a new database is made under --data. Run the "
        "same command again and the cluster resumes. Ctrl-C stops everything cleanly."
    ),
    epilog=(
        "Examples:\n\n"
        "  walship up\n\n"
        "  walship up app.db --followers 2 --listen 127.0.0.1:8080\n\n"
        "  walship up --data /var/lib/walship --ack 0 --json"
    ),
)
def up(
    context: typer.Context,
    database: Annotated[str | None, typer.Argument(metavar="[DATABASE]", help="SQLite file to adopt.")] = None,
    followers: Annotated[Text, option("followers", "N", "Followers beside the leader. Default 2.")] = None,
    listen: Annotated[Text, option("listen", "H:P", "Where the proxy listens. Default 127.0.0.1:8080.")] = None,
    data: Annotated[Text, option("data", "DIR", "Where nodes, records and logs live. Default ./walship-data.")] = None,
    ack: Annotated[
        Text, option("ack", "N", "Followers that must hold a commit on disk before it is acknowledged. Default 1.")
    ] = None,
    json: Annotated[Flag, JSON] = None,
    consistency: Annotated[Text, CONSISTENCY] = None,
    log_max: Annotated[Text, LOG_MAX] = None,
    ready_seconds: Annotated[Text, option("ready-seconds", "S", "Give up if not healthy by then. Default 60.")] = None,
    stream_idle_seconds: Annotated[Text, STREAM_IDLE] = None,
    lease_seconds: Annotated[Text, LEASE] = None,
    statement_seconds: Annotated[Text, STATEMENT] = None,
    write_seconds: Annotated[Text, WRITE] = None,
    value_max: Annotated[Text, VALUE_MAX] = None,
    auth_token: Annotated[Text, AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, AUTH_STATUS] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, DRAIN] = None,
    log_level: Annotated[Text, LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(UpConfig, context)
    from walship.cli.up import run as run_up

    return run_up(settings)


@app.command(
    help=(
        "One node: a directory with one database, its log and its state. Its role comes from the cluster's records.\n\n"
        "The first node of a new cluster is started with --init and leads; all others only name the cluster. When it "
        "is ready it prints one line of JSON with its URL."
    ),
    epilog=(
        "Examples:\n\n"
        "  walship node --name a --data /srv/a --listen 127.0.0.1:9001 --cluster file:///srv/store "
        "--init --voters a,b,c --ack 1\n\n"
        "  walship node --name b --data /srv/b --listen 127.0.0.1:9002 --cluster file:///srv/store"
    ),
)
def node(
    context: typer.Context,
    name: Annotated[Text, option("name", "NAME", "Name of this node, unique in the cluster.")] = None,
    data: Annotated[Text, option("data", "DIR", "Directory of this node.")] = None,
    cluster: Annotated[Text, CLUSTER] = None,
    listen: Annotated[Text, option("listen", "H:P", "Where it listens. Default 127.0.0.1 and any free port.")] = None,
    advertise: Annotated[Text, ADVERTISE] = None,
    init: Annotated[Flag, option("init", "", "Found the cluster if it has no record yet, and lead it.")] = None,
    voters: Annotated[
        Text, option("voters", "NAMES", "With --init: all voters, separated by commas. Default: this node.")
    ] = None,
    ack: Annotated[
        Text, option("ack", "N", "With --init: follower acks a commit waits for. Default 1 if it can.")
    ] = None,
    database: Annotated[
        Text, option("database", "FILE", "SQLite file to adopt in place. Default: data.db under --data.")
    ] = None,
    priority: Annotated[
        Text, option("priority", "P", "Kept for later: no election looks at it yet. Default 0.")
    ] = None,
    zone: Annotated[Text, option("zone", "Z", "A label for where this node runs.")] = None,
    replace_local: Annotated[
        Flag,
        option("replace-local", "", "Move a database that is not the cluster's aside, then join. Deletes nothing."),
    ] = None,
    log_max: Annotated[Text, LOG_MAX] = None,
    log_keep_seconds: Annotated[
        Text, option("log-keep-seconds", "S", "Age up to which log is kept. Default 3600.")
    ] = None,
    orphan_max: Annotated[
        Text, option("orphan-max", "SIZE", "Most bytes of orphans kept; the newest stays in any case. Default 1GiB.")
    ] = None,
    orphan_keep_seconds: Annotated[
        Text, option("orphan-keep-seconds", "S", "Age up to which orphans are kept. Default 604800.")
    ] = None,
    stream_idle_seconds: Annotated[Text, STREAM_IDLE] = None,
    body_max: Annotated[Text, BODY] = None,
    lease_seconds: Annotated[Text, LEASE] = None,
    statement_seconds: Annotated[Text, STATEMENT] = None,
    write_seconds: Annotated[Text, WRITE] = None,
    value_max: Annotated[Text, VALUE_MAX] = None,
    auth_token: Annotated[Text, AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, AUTH_STATUS] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, DRAIN] = None,
    log_level: Annotated[Text, LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(NodeConfig, context)
    from walship.cli.part import run_node

    return run_node(settings)


@app.command(
    help=(
        "One proxy: clients connect here with any libSQL client. It sends writes to the leader and reads to followers "
        "that are fresh enough."
    ),
    epilog="Example:\n\n  walship proxy --listen 0.0.0.0:8080 --cluster file:///srv/store",
)
def proxy(
    context: typer.Context,
    cluster: Annotated[Text, CLUSTER] = None,
    name: Annotated[Text, option("name", "NAME", "Name of this proxy in logs and replies. Default proxy.")] = None,
    listen: Annotated[Text, option("listen", "H:P", "Where clients connect. Default 127.0.0.1:8080.")] = None,
    advertise: Annotated[Text, ADVERTISE] = None,
    consistency: Annotated[Text, CONSISTENCY] = None,
    session_scope: Annotated[
        Text,
        option(
            "session-scope",
            "SCOPE",
            "cluster (default): a session read also sees writes through other proxies; proxy: through this one only.",
        ),
    ] = None,
    wait_seconds: Annotated[
        Text, option("wait-seconds", "S", "Longest wait for a follower to catch up with a read. Default 0.05.")
    ] = None,
    deadline_seconds: Annotated[
        Text, option("deadline-seconds", "S", "Longest time for a whole request. Default 10.")
    ] = None,
    hold_seconds: Annotated[
        Text, option("hold-seconds", "S", "Longest time a write is held while there is no leader. Default 10.")
    ] = None,
    hold_requests: Annotated[Text, option("hold-requests", "N", "Most writes held at once. Default 1000.")] = None,
    hold_bytes: Annotated[Text, option("hold-bytes", "SIZE", "Most bytes held at once. Default 16MiB.")] = None,
    stream_idle_seconds: Annotated[Text, STREAM_IDLE] = None,
    body_max: Annotated[Text, BODY] = None,
    auth_token: Annotated[Text, AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, AUTH_STATUS] = None,
    admin_token: Annotated[Text, ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, DRAIN] = None,
    log_level: Annotated[Text, LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(ProxyConfig, context)
    from walship.cli.part import run_proxy

    return run_proxy(settings)


@app.command(
    help="Roles, terms, positions, lag and health, as a proxy or a node sees them.",
    epilog=(
        "Examples:\n\n"
        "  walship status\n\n"
        "  walship status http://127.0.0.1:8080 --watch\n\n"
        "  walship status --json | jq .leader"
    ),
)
def status(
    context: typer.Context,
    url: Annotated[Text, PROXY_OR_NODE] = None,
    json: Annotated[Flag, JSON] = None,
    watch: Annotated[Flag, option("watch", "", "Ask again every second until Ctrl-C.")] = None,
    timeout_seconds: Annotated[Text, option("timeout-seconds", "S", "Give up after this long. Default 5.")] = None,
    auth_token: Annotated[Text, AUTH_TOKEN] = None,
    config: ConfigFile = None,
) -> int:
    settings = settings_of(StatusConfig, context)
    from walship.cli.status import run as run_status

    return run_status(settings)


operate.add_to(app)


def run(arguments: Sequence[str] | None) -> int:
    """Run the command line; every expected failure becomes one paragraph on stderr and an exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except WalshipError as error:
        output.fail(str(error))
        return error.exit_code
    except _CommandLineError as error:
        output.fail(f"{error.format_message()} (walship --help shows what there is)")
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # `walship status | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
