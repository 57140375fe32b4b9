"""What the commands share: options that mean the same everywhere, and how what was given becomes settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from walship.config import NodeConfig, OrderConfig, ProxyConfig, StatusConfig, UpConfig, build

__all__ = [
    "ADMIN_TOKEN",
    "ADVERTISE",
    "AUTH_JWT_KEY",
    "AUTH_STATUS",
    "AUTH_TOKEN",
    "BODY",
    "CLUSTER",
    "CLUSTER_OF",
    "CONSISTENCY",
    "DRAIN",
    "JSON",
    "LEASE",
    "LEVEL",
    "LOG_MAX",
    "ONE_LINE",
    "PROXY_OR_NODE",
    "STATEMENT",
    "STREAM_IDLE",
    "VALUE_MAX",
    "WRITE",
    "ConfigFile",
    "Flag",
    "Text",
    "option",
    "settings_of",
]

C = TypeVar("C", NodeConfig, ProxyConfig, UpConfig, StatusConfig, OrderConfig)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with a table per command.")
]
Text = str | None
Flag = bool | None


def option(flag: str, metavar: str, words: str) -> Any:
    return typer.Option(f"--{flag}", metavar=metavar, help=words)


CLUSTER = option(
    "cluster", "URL", "Where the cluster's records are: file:///DIRECTORY, or etcd://HOST/NAME; the same for all parts."
)
ADVERTISE = option("advertise", "URL", "How others reach this process. Default: the address it listens on.")
DRAIN = option("drain-seconds", "S", "Time to finish running requests when stopped. Default 10.")
LEVEL = option("log-level", "LEVEL", "debug, info, warning or error. Default info.")
BODY = option("body-max", "SIZE", "Largest request body. Default 16MiB.")
STREAM_IDLE = option("stream-idle-seconds", "S", "Longest an open transaction waits for its client. Default 10.")
LOG_MAX = option("log-max", "SIZE", "Most bytes of log a node keeps for followers that were away. Default 1GiB.")
LEASE = option("lease-seconds", "S", "How long a leader that is silent still leads. Default 3.")
STATEMENT = option("statement-seconds", "S", "Longest a statement may read. Default 30.")
WRITE = option("write-seconds", "S", "Longest a statement may write outside of a transaction. Default 300.")
VALUE_MAX = option("value-max", "SIZE", "Largest text, blob or row of a statement. Default 64MiB.")
AUTH_TOKEN = option("auth-token", "TOKEN", "Token clients must show. Better in WALSHIP_AUTH_TOKEN: flags show in ps.")
AUTH_JWT_KEY = option("auth-jwt-key", "FILE", "Ed25519 public keys: their JWTs are taken as tokens.")
ADMIN_TOKEN = option("admin-token", "TOKEN", "Token of the admin verbs. Better in WALSHIP_ADMIN_TOKEN.")
AUTH_STATUS = option("auth-status", "", "Ask for a token on /status and /metrics too.")
CONSISTENCY = option("consistency", "LEVEL", "Of reads that ask for none: any, session (default), linearizable.")
JSON = option("json", "", "One line of JSON, shaped as /status, instead of words.")
CLUSTER_OF = option("cluster", "URL", "The cluster's store, whose record opens the admin verbs.")
ONE_LINE = option("json", "", "One line of JSON instead of words.")
PROXY_OR_NODE = typer.Argument(metavar="[URL]", help="A proxy or node. Default http://127.0.0.1:8080.")


def settings_of(kind: type[C], context: typer.Context, *, without: tuple[str, ...] = ()) -> C:
    """The settings of a command: each of its options that was given is the key of the same name. `without`: parameters
    that are no settings. A flag that was not given is silent, so that environment and file are heard."""
    given = {name: value for name, value in context.params.items() if name not in (*without, "config")}
    flags = {name.replace("_", "-"): None if value is False else value for name, value in given.items()}
    return build(kind, flags, environ=os.environ, config_file=context.params["config"])
