"""The commands, their flags and their help. Every flag is a key of config.py; a test compares the two.

Flags arrive here as text or None and are judged by config.py, so that a flag, an environment variable and a key of
the file mean the same and fail with the same words. Heavy parts are imported by the command that runs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import walship
from walship.cli import output
from walship.config import NodeConfig, OrderConfig, ProxyConfig, StatusConfig, UpConfig, build
from walship.errors import UsageError, WalshipError

__all__ = ["app", "run"]

# Click's own base error. Newer typers carry a click of their own, so it is found through what typer exports.
_CommandLineError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

C = TypeVar("C", NodeConfig, ProxyConfig, UpConfig, StatusConfig, OrderConfig)

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

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with a table per command.")
]
Text = str | None
Flag = bool | None


def _option(flag: str, metavar: str, words: str) -> Any:
    return typer.Option(f"--{flag}", metavar=metavar, help=words)


_CLUSTER = _option(
    "cluster", "URL", "Where the cluster's records are: file:///DIRECTORY, or etcd://HOST/NAME; the same for all parts."
)
_ADVERTISE = _option("advertise", "URL", "How others reach this process. Default: the address it listens on.")
_DRAIN = _option("drain-seconds", "S", "Time to finish running requests when stopped. Default 10.")
_LEVEL = _option("log-level", "LEVEL", "debug, info, warning or error. Default info.")
_BODY = _option("body-max", "SIZE", "Largest request body. Default 16MiB.")
_STREAM_IDLE = _option("stream-idle-seconds", "S", "Longest an open transaction waits for its client. Default 10.")
_LOG_MAX = _option("log-max", "SIZE", "Most bytes of log a node keeps for followers that were away. Default 1GiB.")
_LEASE = _option("lease-seconds", "S", "How long a leader that is silent still leads. Default 3.")
_STATEMENT = _option("statement-seconds", "S", "Longest a statement may read. Default 30.")
_WRITE = _option("write-seconds", "S", "Longest a statement may write outside of a transaction. Default 300.")
_VALUE_MAX = _option("value-max", "SIZE", "Largest text, blob or row of a statement. Default 64MiB.")
_AUTH_TOKEN = _option("auth-token", "TOKEN", "Token clients must show. Better in WALSHIP_AUTH_TOKEN: flags show in ps.")
_AUTH_JWT_KEY = _option("auth-jwt-key", "FILE", "Ed25519 public keys: their JWTs are taken as tokens.")
_ADMIN_TOKEN = _option("admin-token", "TOKEN", "Token of the admin verbs. Better in WALSHIP_ADMIN_TOKEN.")
_AUTH_STATUS = _option("auth-status", "", "Ask for a token on /status and /metrics too.")
_CONSISTENCY = _option("consistency", "LEVEL", "Of reads that ask for none: any, session (default), linearizable.")
_JSON = _option("json", "", "One line of JSON, shaped as /status, instead of words.")


def _build(kind: type[C], config_file: Path | None, **flags: object) -> C:
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return build(kind, given, environ=os.environ, config_file=config_file)


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
    database: Annotated[str | None, typer.Argument(metavar="[DATABASE]", help="SQLite file to adopt.")] = None,
    followers: Annotated[Text, _option("followers", "N", "Followers beside the leader. Default 2.")] = None,
    listen: Annotated[Text, _option("listen", "H:P", "Where the proxy listens. Default 127.0.0.1:8080.")] = None,
    data: Annotated[Text, _option("data", "DIR", "Where nodes, records and logs live. Default ./walship-data.")] = None,
    ack: Annotated[
        Text, _option("ack", "N", "Followers that must hold a commit on disk before it is acknowledged. Default 1.")
    ] = None,
    json: Annotated[Flag, _JSON] = None,
    consistency: Annotated[Text, _CONSISTENCY] = None,
    log_max: Annotated[Text, _LOG_MAX] = None,
    ready_seconds: Annotated[Text, _option("ready-seconds", "S", "Give up if not healthy by then. Default 60.")] = None,
    stream_idle_seconds: Annotated[Text, _STREAM_IDLE] = None,
    lease_seconds: Annotated[Text, _LEASE] = None,
    statement_seconds: Annotated[Text, _STATEMENT] = None,
    write_seconds: Annotated[Text, _WRITE] = None,
    value_max: Annotated[Text, _VALUE_MAX] = None,
    auth_token: Annotated[Text, _AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, _AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, _AUTH_STATUS] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, _DRAIN] = None,
    log_level: Annotated[Text, _LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        UpConfig,
        config,
        database=database,
        followers=followers,
        listen=listen,
        data=data,
        ack=ack,
        json=json or None,
        consistency=consistency,
        log_max=log_max,
        ready_seconds=ready_seconds,
        stream_idle_seconds=stream_idle_seconds,
        lease_seconds=lease_seconds,
        statement_seconds=statement_seconds,
        write_seconds=write_seconds,
        value_max=value_max,
        auth_token=auth_token,
        auth_jwt_key=auth_jwt_key,
        auth_status=auth_status or None,
        admin_token=admin_token,
        drain_seconds=drain_seconds,
        log_level=log_level,
    )
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
    name: Annotated[Text, _option("name", "NAME", "Name of this node, unique in the cluster.")] = None,
    data: Annotated[Text, _option("data", "DIR", "Directory of this node.")] = None,
    cluster: Annotated[Text, _CLUSTER] = None,
    listen: Annotated[Text, _option("listen", "H:P", "Where it listens. Default 127.0.0.1 and any free port.")] = None,
    advertise: Annotated[Text, _ADVERTISE] = None,
    init: Annotated[Flag, _option("init", "", "Found the cluster if it has no record yet, and lead it.")] = None,
    voters: Annotated[
        Text, _option("voters", "NAMES", "With --init: all voters, separated by commas. Default: this node.")
    ] = None,
    ack: Annotated[
        Text, _option("ack", "N", "With --init: follower acks a commit waits for. Default 1 if it can.")
    ] = None,
    database: Annotated[
        Text, _option("database", "FILE", "SQLite file to adopt in place. Default: data.db under --data.")
    ] = None,
    priority: Annotated[Text, _option("priority", "P", "Preference in elections, higher first. Default 0.")] = None,
    zone: Annotated[Text, _option("zone", "Z", "A label for where this node runs.")] = None,
    replace_local: Annotated[
        Flag,
        _option("replace-local", "", "Move a database that is not the cluster's aside, then join. Deletes nothing."),
    ] = None,
    log_max: Annotated[Text, _LOG_MAX] = None,
    log_keep_seconds: Annotated[
        Text, _option("log-keep-seconds", "S", "Age up to which log is kept. Default 3600.")
    ] = None,
    orphan_max: Annotated[
        Text, _option("orphan-max", "SIZE", "Most bytes of orphans kept; the newest stays in any case. Default 1GiB.")
    ] = None,
    orphan_keep_seconds: Annotated[
        Text, _option("orphan-keep-seconds", "S", "Age up to which orphans are kept. Default 604800.")
    ] = None,
    stream_idle_seconds: Annotated[Text, _STREAM_IDLE] = None,
    body_max: Annotated[Text, _BODY] = None,
    lease_seconds: Annotated[Text, _LEASE] = None,
    statement_seconds: Annotated[Text, _STATEMENT] = None,
    write_seconds: Annotated[Text, _WRITE] = None,
    value_max: Annotated[Text, _VALUE_MAX] = None,
    auth_token: Annotated[Text, _AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, _AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, _AUTH_STATUS] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, _DRAIN] = None,
    log_level: Annotated[Text, _LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        NodeConfig,
        config,
        name=name,
        data=data,
        cluster=cluster,
        listen=listen,
        advertise=advertise,
        init=init or None,
        voters=voters,
        ack=ack,
        database=database,
        priority=priority,
        zone=zone,
        replace_local=replace_local or None,
        log_max=log_max,
        log_keep_seconds=log_keep_seconds,
        orphan_max=orphan_max,
        orphan_keep_seconds=orphan_keep_seconds,
        stream_idle_seconds=stream_idle_seconds,
        body_max=body_max,
        lease_seconds=lease_seconds,
        statement_seconds=statement_seconds,
        write_seconds=write_seconds,
        value_max=value_max,
        auth_token=auth_token,
        auth_jwt_key=auth_jwt_key,
        auth_status=auth_status or None,
        admin_token=admin_token,
        drain_seconds=drain_seconds,
        log_level=log_level,
    )
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
    cluster: Annotated[Text, _CLUSTER] = None,
    name: Annotated[Text, _option("name", "NAME", "Name of this proxy in logs and replies. Default proxy.")] = None,
    listen: Annotated[Text, _option("listen", "H:P", "Where clients connect. Default 127.0.0.1:8080.")] = None,
    advertise: Annotated[Text, _ADVERTISE] = None,
    consistency: Annotated[Text, _CONSISTENCY] = None,
    session_scope: Annotated[
        Text,
        _option(
            "session-scope",
            "SCOPE",
            "cluster (default): a session read also sees writes through other proxies; proxy: through this one only.",
        ),
    ] = None,
    wait_seconds: Annotated[
        Text, _option("wait-seconds", "S", "Longest wait for a follower to catch up with a read. Default 0.05.")
    ] = None,
    deadline_seconds: Annotated[
        Text, _option("deadline-seconds", "S", "Longest time for a whole request. Default 10.")
    ] = None,
    hold_seconds: Annotated[
        Text, _option("hold-seconds", "S", "Longest time a write is held while there is no leader. Default 10.")
    ] = None,
    hold_requests: Annotated[Text, _option("hold-requests", "N", "Most writes held at once. Default 1000.")] = None,
    hold_bytes: Annotated[Text, _option("hold-bytes", "SIZE", "Most bytes held at once. Default 16MiB.")] = None,
    stream_idle_seconds: Annotated[Text, _STREAM_IDLE] = None,
    body_max: Annotated[Text, _BODY] = None,
    auth_token: Annotated[Text, _AUTH_TOKEN] = None,
    auth_jwt_key: Annotated[Text, _AUTH_JWT_KEY] = None,
    auth_status: Annotated[Flag, _AUTH_STATUS] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    drain_seconds: Annotated[Text, _DRAIN] = None,
    log_level: Annotated[Text, _LEVEL] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        ProxyConfig,
        config,
        cluster=cluster,
        name=name,
        listen=listen,
        advertise=advertise,
        consistency=consistency,
        session_scope=session_scope,
        wait_seconds=wait_seconds,
        deadline_seconds=deadline_seconds,
        hold_seconds=hold_seconds,
        hold_requests=hold_requests,
        hold_bytes=hold_bytes,
        stream_idle_seconds=stream_idle_seconds,
        body_max=body_max,
        auth_token=auth_token,
        auth_jwt_key=auth_jwt_key,
        auth_status=auth_status or None,
        admin_token=admin_token,
        drain_seconds=drain_seconds,
        log_level=log_level,
    )
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
    url: Annotated[
        Text, typer.Argument(metavar="[URL]", help="A proxy or node. Default http://127.0.0.1:8080.")
    ] = None,
    json: Annotated[Flag, _JSON] = None,
    watch: Annotated[Flag, _option("watch", "", "Ask again every second until Ctrl-C.")] = None,
    timeout_seconds: Annotated[Text, _option("timeout-seconds", "S", "Give up after this long. Default 5.")] = None,
    auth_token: Annotated[Text, _AUTH_TOKEN] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        StatusConfig,
        config,
        url=url,
        json=json or None,
        watch=watch or None,
        timeout_seconds=timeout_seconds,
        auth_token=auth_token,
    )
    from walship.cli.status import run as run_status

    return run_status(settings)


@app.command(
    help=(
        "Hand the lead to another node, with no write lost and none failed: to the one named by --to, or to the one "
        "that follows closest. Nothing changes when that cannot be done. SIGTERM to a leader does the same."
    ),
    epilog="Examples:\n\n  walship switchover\n\n  walship switchover http://127.0.0.1:8080 --to node2",
)
def switchover(
    url: Annotated[
        Text, typer.Argument(metavar="[URL]", help="A proxy or node. Default http://127.0.0.1:8080.")
    ] = None,
    to: Annotated[Text, _option("to", "NAME", "The node that shall lead. Default: who follows closest.")] = None,
    json: Annotated[Flag, _option("json", "", "One line of JSON instead of words.")] = None,
    timeout_seconds: Annotated[Text, _option("timeout-seconds", "S", "Give up waiting after this. Default 30.")] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[
        Text, _option("cluster", "URL", "The cluster's store, whose record opens the admin verbs.")
    ] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        OrderConfig,
        config,
        url=url,
        json=json or None,
        timeout_seconds=timeout_seconds,
        admin_token=admin_token,
        cluster=cluster,
    )
    from walship.cli.switchover import run as run_switchover

    return run_switchover(settings, to)


_failover = typer.Typer(help="Elections: why the last one went as it did, or why none happens.", no_args_is_help=True)
app.add_typer(_failover, name="failover")


@_failover.command(
    help=(
        "Ask every node how it sees the election: who leads and since which term, how long each phase of the last "
        "election took, what the voters said, or why there is none. Settings are those of [bold]status[/bold]."
    ),
    epilog="Examples:\n\n  walship failover explain\n\n  walship failover explain http://127.0.0.1:9001 --json",
)
def explain(
    url: Annotated[
        Text, typer.Argument(metavar="[URL]", help="A proxy or node. Default http://127.0.0.1:8080.")
    ] = None,
    json: Annotated[Flag, _option("json", "", "One line of JSON instead of words.")] = None,
    timeout_seconds: Annotated[
        Text, _option("timeout-seconds", "S", "Give up on a node after this. Default 5.")
    ] = None,
    auth_token: Annotated[Text, _AUTH_TOKEN] = None,
    config: ConfigFile = None,
) -> int:
    settings = _build(
        StatusConfig, config, url=url, json=json or None, timeout_seconds=timeout_seconds, auth_token=auth_token
    )
    from walship.cli.failover import run as run_explain

    return run_explain(settings)


_orphans = typer.Typer(
    help="Commits that never became history, as a node keeps them: list, show, export.", no_args_is_help=True
)
app.add_typer(_orphans, name="orphans")
_NODE = typer.Option("--url", metavar="URL", help="The node to ask. Default http://127.0.0.1:8080.")
_DATA = typer.Option("--data", metavar="DIR", help="The directory of a node instead, running or not.")
_NAME = typer.Argument(metavar="NAME", help="As the list shows it.")
_CLUSTER_OF = _option("cluster", "URL", "The cluster's store, whose record opens the admin verbs.")


@_orphans.command(
    name="list",
    help="The orphans of a node, oldest first. Each node keeps its own: ask every one.",
    epilog="Example:\n\n  walship orphans list --data walship-data/node1",
)
def orphans_list(
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    json: Annotated[Flag, _option("json", "", "One line of JSON instead of words.")] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
    return orphans.listing(settings, data)


@_orphans.command(name="show", help="One orphan: what was lost, when, and whether a client may have been told of it.")
def orphans_show(
    name: Annotated[str, _NAME],
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    json: Annotated[Flag, _option("json", "", "One line of JSON instead of words.")] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
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
    name: Annotated[str, _NAME],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="What to write; must not exist.")],
    database: Annotated[
        Path | None, typer.Option("--database", metavar="BASE", help="The database where the lost commits began.")
    ] = None,
    url: Annotated[Text, _NODE] = None,
    data: Annotated[Path | None, _DATA] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import orphans

    settings = _build(OrderConfig, config, url=url, admin_token=admin_token, cluster=cluster)
    return orphans.export(settings, data, name, target, database)


_voters = typer.Typer(
    help=(
        "Voters and acknowledgments: list, add, remove, ack. Voters acknowledge writes and may lead; other nodes only "
        "follow."
    ),
    no_args_is_help=True,
)
app.add_typer(_voters, name="voters")
_ASKED = typer.Option("--url", metavar="URL", help="A proxy or node. Default http://127.0.0.1:8080.")
_ONE_LINE = _option("json", "", "One line of JSON instead of words.")


@_voters.command(name="list", help="Who votes, who could, and what the rule promises.")
def voters_list(
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, _ONE_LINE] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
    return voters.listing(settings)


@_voters.command(name="add", help="Let a node vote that follows closely. Its acknowledgments count from then on.")
def voters_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, _ONE_LINE] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
    return voters.change(settings, {"add": name})


@_voters.command(name="remove", help="Take a node's vote, also of one that is gone. It may go on following.")
def voters_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node; not the leader.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, _ONE_LINE] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
    return voters.change(settings, {"remove": name})


@_voters.command(name="ack", help="How many followers must hold a write on disk before it is acknowledged.")
def voters_ack(
    acks: Annotated[str, typer.Argument(metavar="N|all", help="A number, or all: every voter but the leader.")],
    url: Annotated[Text, _ASKED] = None,
    json: Annotated[Flag, _ONE_LINE] = None,
    admin_token: Annotated[Text, _ADMIN_TOKEN] = None,
    cluster: Annotated[Text, _CLUSTER_OF] = None,
    config: ConfigFile = None,
) -> int:
    from walship.cli import voters

    settings = _build(OrderConfig, config, url=url, json=json or None, admin_token=admin_token, cluster=cluster)
    return voters.change(settings, {"ack": acks})


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
