"""Settings: what a command may be told, by flag, environment or file, checked once and together.

Each command has one frozen dataclass and one table of `Setting`s. A value is taken from the first place that has it:
the flag, `WALSHIP_<FLAG>` in the environment, the command's table in the TOML file of `--config`, the default.
`build` gathers every problem before it raises, and names key and allowed values. No dict travels past this module.

It imports nothing of walship but the error tree, levels, tokens, and the check of a cluster URL, so that node and
proxy may import it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from walship.coordination.store import check_store_url
from walship.errors import UsageError
from walship.hrana.admin import AdminGate
from walship.hrana.auth import Authenticator, Gate
from walship.hrana.types import Level

__all__ = [
    "DEFAULT_FOLLOWERS",
    "NODE",
    "ORDER",
    "PROXY",
    "STATUS",
    "UP",
    "NodeConfig",
    "OrderConfig",
    "ProxyConfig",
    "Setting",
    "StatusConfig",
    "UpConfig",
    "build",
    "environment_name",
    "open_gate",
]

MIB = 1 << 20
GIB = 1 << 30
DEFAULT_FOLLOWERS = 2  # with the leader three voters: any one may be lost
MAX_FOLLOWERS = 16  # each is a process on this machine; more is a mistake or a benchmark


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One node. Sizes in bytes, durations in seconds; port 0 = any free port."""

    name: str
    data_dir: Path
    cluster_url: str = dataclasses.field(repr=False)  # it may have a password
    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    advertise: str | None = None  # URL others reach this node by; None: from the address really bound
    init: bool = False  # found the cluster if it has no record, and lead it if nobody ever has
    voters: tuple[str, ...] = ()  # with init: names of all voters; empty: this node alone
    ack: int = 0  # with init: follower acknowledgments a commit waits for
    database: Path | None = None  # adopt this file in place; None: the one already recorded, else data_dir/data.db
    priority: int = 0
    zone: str = ""
    replace_local: bool = False
    log_max_bytes: int = GIB  # a GiB holds minutes of heavy writing, and a laggard beyond that is faster re-seeded
    log_keep_seconds: float = 3600.0  # longer than a restart or a reboot takes
    orphan_max_bytes: int = GIB
    orphan_keep_seconds: float = 7 * 86400.0  # a weekend, and the week in which somebody looks
    stream_idle_seconds: float = 10.0  # an open transaction without a request; other state idles in proportion
    body_max_bytes: int = 16 * MIB
    lease_seconds: float = 3.0  # how long a leader that is silent leads on; process death on one host shows at once
    statement_seconds: float = 30.0  # a read; longer ones are reports that belong on a copy
    write_seconds: float = 300.0  # a write outside of a transaction, during which nobody else writes
    value_max_bytes: int = 64 * MIB  # several are in memory at once, a few times over
    auth_token: str | None = dataclasses.field(default=None, repr=False)  # clients must show it, or a JWT
    auth_jwt_key: Path | None = None  # file of Ed25519 public keys that sign JWTs; with neither, nobody is asked
    auth_status: bool = False  # /status and /metrics need a token too
    admin_token: str | None = dataclasses.field(default=None, repr=False)  # what the verbs under /admin/ ask for
    drain_seconds: float = 10.0
    log_level: str = "info"

    @property
    def database_path(self) -> Path:
        """Where the database lies when nothing is recorded yet."""
        return self.database or self.data_dir / "data.db"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """One proxy. `wait_seconds` bounds how long a read waits on a follower before it goes to the leader."""

    cluster_url: str = dataclasses.field(repr=False)  # it may have a password
    name: str = "proxy"
    listen_host: str = "127.0.0.1"
    listen_port: int = 8080
    advertise: str | None = None
    consistency: Level = Level.SESSION  # what a read gets that asks for nothing
    session_scope: str = "cluster"  # or "proxy": other proxies' writes are not waited for
    wait_seconds: float = 0.05  # above the apply lag of a healthy follower, below what a person notices
    deadline_seconds: float = 10.0  # a whole request, waits for a leader included
    hold_seconds: float = 10.0  # a write while there is no leader; an election takes seconds at most
    hold_requests: int = 1000
    hold_max_bytes: int = 16 * MIB  # of the bodies of all that are held
    stream_idle_seconds: float = 10.0  # an open transaction without a request; other state idles in proportion
    body_max_bytes: int = 16 * MIB
    auth_token: str | None = dataclasses.field(default=None, repr=False)  # clients must show it, or a JWT
    auth_jwt_key: Path | None = None  # file of Ed25519 public keys that sign JWTs; with neither, nobody is asked
    auth_status: bool = False  # /status and /metrics need a token too
    admin_token: str | None = dataclasses.field(default=None, repr=False)  # what the verbs under /admin/ ask for
    drain_seconds: float = 10.0
    log_level: str = "info"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpConfig:
    """A whole cluster on this machine."""

    database: Path | None = None
    followers: int | None = None  # None: DEFAULT_FOLLOWERS; on a resumed cluster what its record says
    listen_host: str = "127.0.0.1"
    listen_port: int = 8080
    data_dir: Path = Path("walship-data")
    ack: int | None = None  # None: 1, or 0 without followers; on a resumed cluster what its record says
    json: bool = False
    consistency: Level = Level.SESSION  # passed to the proxy
    log_max_bytes: int = GIB
    ready_seconds: float = 60.0
    stream_idle_seconds: float = 10.0  # passed to each part
    lease_seconds: float = 3.0
    statement_seconds: float = 30.0
    write_seconds: float = 300.0
    value_max_bytes: int = 64 * MIB
    auth_token: str | None = dataclasses.field(default=None, repr=False)  # clients must show it, or a JWT
    auth_jwt_key: Path | None = None  # file of Ed25519 public keys that sign JWTs; with neither, nobody is asked
    auth_status: bool = False  # /status and /metrics need a token too
    admin_token: str | None = dataclasses.field(default=None, repr=False)  # what the verbs under /admin/ ask for
    drain_seconds: float = 10.0
    log_level: str = "info"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """What `walship status` asks, and how it answers."""

    url: str = "http://127.0.0.1:8080"
    json: bool = False
    watch: bool = False
    timeout_seconds: float = 5.0
    auth_token: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Whom an operator's command gives its order to, and what shows that it may."""

    url: str = "http://127.0.0.1:8080"
    json: bool = False
    timeout_seconds: float = 30.0
    admin_token: str | None = dataclasses.field(default=None, repr=False)
    cluster_url: str | None = dataclasses.field(default=None, repr=False)  # it may have a password


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One key of a command: its flag without dashes, the parser, and what is allowed (for messages and the docs).

    The value of a `secret` one is in no message. `parse` takes the raw value (text from flag or environment, a TOML
    value from a file) and gives the dataclass fields; it raises ValueError for anything outside `allowed`.
    """

    flag: str
    parse: Callable[[Any], dict[str, Any]]
    allowed: str
    required: bool = False
    secret: bool = False


C = TypeVar("C", NodeConfig, ProxyConfig, UpConfig, StatusConfig, OrderConfig)


def open_gate(config: NodeConfig | ProxyConfig | UpConfig, credential: Callable[[], str] = str) -> Gate:
    """Who is let in. Raises UsageError when the file of --auth-jwt-key cannot be read, or holds no key.

    credential: gives the cluster's own credential for `admin` (`ClusterRecord.credential`); empty: it opens nothing.
    """
    try:
        keys = None if config.auth_jwt_key is None else config.auth_jwt_key.read_bytes()
    except OSError as error:
        raise UsageError(f"--auth-jwt-key {config.auth_jwt_key}: {error.strerror}. Nothing was started") from error
    clients = Authenticator.of(config.auth_token, keys)
    admin = AdminGate(token=config.admin_token, credential=credential, from_this_machine=not clients.enabled)
    return Gate(clients, config.auth_status, admin)


def environment_name(flag: str) -> str:
    """`log-max` -> `WALSHIP_LOG_MAX`."""
    return "WALSHIP_" + flag.upper().replace("-", "_")


def _field(name: str, convert: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda raw: {name: convert(raw)}


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def convert(raw: Any) -> int:
        if isinstance(raw, bool) or not (isinstance(raw, int) or re.fullmatch(r"-?\d{1,18}", str(raw))):
            raise ValueError
        if not low <= (number := int(raw)) <= high:
            raise ValueError
        return number

    return convert


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def convert(raw: Any) -> float:
        if isinstance(raw, bool) or not low <= (number := float(raw)) <= high:
            raise ValueError
        return number

    return convert


_UNITS = {"": 1, "B": 1, "K": 1 << 10, "KIB": 1 << 10, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB, "T": 1 << 40}


def _size(low: int) -> Callable[[Any], int]:
    def convert(raw: Any) -> int:
        match = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]{0,3})", str(raw).strip())
        if isinstance(raw, bool) or match is None or match[2].upper() not in _UNITS:
            raise ValueError
        if (number := int(match[1]) * _UNITS[match[2].upper()]) < low:
            raise ValueError
        return number

    return convert


def _text(pattern: str) -> Callable[[Any], str]:
    def convert(raw: Any) -> str:
        if not isinstance(raw, str) or not re.fullmatch(pattern, raw):
            raise ValueError
        return raw

    return convert


def _level(raw: Any) -> Level:
    return Level.SESSION if raw == "global" else Level(raw)


def _yes(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if (word := str(raw).lower()) not in words:
        raise ValueError
    return words[word]


def _path(raw: Any) -> Path:
    if not isinstance(raw, str | Path) or not str(raw) or "\0" in str(raw):
        raise ValueError
    return Path(raw).expanduser().absolute()


def _listen(raw: Any) -> dict[str, Any]:
    """`HOST:PORT`, `[v6]:PORT`, `:PORT` (this machine only) or a bare port."""
    match = re.fullmatch(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]*)):)?(\d{1,5})", str(raw).strip())
    if isinstance(raw, bool) or match is None or int(match[3]) > 65535:
        raise ValueError
    return {"listen_host": match[1] or match[2] or "127.0.0.1", "listen_port": int(match[3])}


def _url(raw: Any) -> str:
    parts = urlsplit(raw) if isinstance(raw, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    return str(raw).rstrip("/")


def _cluster(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError
    check_store_url(raw)  # its own words are better than "allowed"
    return raw


def _names(raw: Any) -> tuple[str, ...]:
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list | tuple):
        raise ValueError
    names = tuple(_text(_NAME)(part.strip() if isinstance(part, str) else part) for part in parts)
    if len(set(names)) != len(names):
        raise ValueError
    return names


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_NAME_WORDS = "1 to 63 letters, digits, dots, dashes or underscores, first a letter or digit"
_LISTEN_WORDS = "HOST:PORT, such as 127.0.0.1:8080; port 0 takes any free one"
_SIZE_WORDS = "a size such as 512MiB or 4GiB"
_URL_WORDS = "an http:// or https:// URL"
_LEVELS = "debug|info|warning|error"

_CLUSTER = Setting(
    "cluster",
    _field("cluster_url", _cluster),
    "file:///DIRECTORY (absolute), or etcd://HOST:2379[,HOST:2379]/NAME",
    required=True,
    secret=True,  # it may have a password
)
_LISTEN = Setting("listen", _listen, _LISTEN_WORDS)
_ADVERTISE = Setting("advertise", _field("advertise", _url), _URL_WORDS + " that others can reach")
_CONSISTENCY = Setting("consistency", _field("consistency", _level), "any, session, linearizable")
_DRAIN = Setting("drain-seconds", _field("drain_seconds", _seconds(0.1, 3600)), "0.1 to 3600 seconds")
_LEVEL = Setting("log-level", _field("log_level", _text(_LEVELS)), _LEVELS.replace("|", ", "))
_BODY = Setting("body-max", _field("body_max_bytes", _size(64 << 10)), _SIZE_WORDS + ", at least 64KiB")
_LOG_MAX = Setting("log-max", _field("log_max_bytes", _size(8 * MIB)), _SIZE_WORDS + ", at least 8MiB")
_STREAM_IDLE = Setting("stream-idle-seconds", _field("stream_idle_seconds", _seconds(0.5, 3600)), "0.5 to 3600 seconds")
_JSON = Setting("json", _field("json", _yes), "true or false")
_AUTH_TOKEN = Setting(
    "auth-token", _field("auth_token", _text(r"[!-~]{1,4096}")), "1 to 4096 visible ASCII characters", secret=True
)
_ADMIN_TOKEN = Setting(
    "admin-token", _field("admin_token", _text(r"[!-~]{1,4096}")), "1 to 4096 visible ASCII characters", secret=True
)
_AUTH = (
    _AUTH_TOKEN,
    Setting("auth-jwt-key", _field("auth_jwt_key", _path), "a file of Ed25519 public keys: PEM, or one in base64url"),
    Setting("auth-status", _field("auth_status", _yes), "true or false"),
    _ADMIN_TOKEN,
)
_WORK = (
    Setting("lease-seconds", _field("lease_seconds", _seconds(0.3, 600)), "0.3 to 600 seconds"),
    Setting("statement-seconds", _field("statement_seconds", _seconds(0.1, 86400)), "0.1 to 86400 seconds"),
    Setting("write-seconds", _field("write_seconds", _seconds(0.1, 86400)), "0.1 to 86400 seconds"),
    Setting("value-max", _field("value_max_bytes", _size(1 * MIB)), _SIZE_WORDS + ", at least 1MiB"),
)
_ACK_WORDS = "0 to 15 follower acknowledgments, fewer than there are voters"

NODE = (
    Setting("name", _field("name", _text(_NAME)), _NAME_WORDS, required=True),
    Setting("data", _field("data_dir", _path), "a directory", required=True),
    _CLUSTER,
    _LISTEN,
    _ADVERTISE,
    Setting("init", _field("init", _yes), "true or false"),
    Setting("voters", _field("voters", _names), "names separated by commas, each once"),
    Setting("ack", _field("ack", _whole(0, 15)), _ACK_WORDS),
    Setting("database", _field("database", _path), "path of a SQLite database"),
    Setting("priority", _field("priority", _whole(-100, 100)), "-100 to 100"),
    Setting("zone", _field("zone", _text(r"[A-Za-z0-9._-]{0,63}")), "up to 63 letters, digits, dots, dashes"),
    Setting("replace-local", _field("replace_local", _yes), "true or false"),
    _LOG_MAX,
    Setting("log-keep-seconds", _field("log_keep_seconds", _seconds(0, 10**8)), "0 to 100000000 seconds"),
    Setting("orphan-max", _field("orphan_max_bytes", _size(0)), _SIZE_WORDS),
    Setting("orphan-keep-seconds", _field("orphan_keep_seconds", _seconds(0, 10**8)), "0 to 100000000 seconds"),
    _STREAM_IDLE,
    _BODY,
    *_WORK,
    *_AUTH,
    _DRAIN,
    _LEVEL,
)

PROXY = (
    _CLUSTER,
    Setting("name", _field("name", _text(_NAME)), _NAME_WORDS),
    _LISTEN,
    _ADVERTISE,
    _CONSISTENCY,
    Setting("session-scope", _field("session_scope", _text("cluster|proxy")), "cluster, proxy"),
    Setting("wait-seconds", _field("wait_seconds", _seconds(0, 60)), "0 to 60 seconds"),
    Setting("deadline-seconds", _field("deadline_seconds", _seconds(0.1, 600)), "0.1 to 600 seconds"),
    Setting("hold-seconds", _field("hold_seconds", _seconds(0, 600)), "0 to 600 seconds"),
    Setting("hold-requests", _field("hold_requests", _whole(0, 100_000)), "0 to 100000 requests"),
    Setting("hold-bytes", _field("hold_max_bytes", _size(64 << 10)), _SIZE_WORDS + ", at least 64KiB"),
    _STREAM_IDLE,
    _BODY,
    *_AUTH,
    _DRAIN,
    _LEVEL,
)

UP = (
    Setting("database", _field("database", _path), "path of a SQLite database"),
    Setting("followers", _field("followers", _whole(0, MAX_FOLLOWERS)), f"0 to {MAX_FOLLOWERS}"),
    _LISTEN,
    Setting("data", _field("data_dir", _path), "a directory"),
    Setting("ack", _field("ack", _whole(0, 15)), _ACK_WORDS),
    _JSON,
    _CONSISTENCY,
    _LOG_MAX,
    Setting("ready-seconds", _field("ready_seconds", _seconds(1, 3600)), "1 to 3600 seconds"),
    _STREAM_IDLE,
    *_WORK,
    *_AUTH,
    _DRAIN,
    _LEVEL,
)

STATUS = (
    Setting("url", _field("url", _url), _URL_WORDS + " of a proxy or node"),
    _JSON,
    Setting("watch", _field("watch", _yes), "true or false"),
    Setting("timeout-seconds", _field("timeout_seconds", _seconds(0.1, 60)), "0.1 to 60 seconds"),
    _AUTH_TOKEN,
)

ORDER = (
    Setting("url", _field("url", _url), _URL_WORDS + " of a proxy or node"),
    _JSON,
    Setting("timeout-seconds", _field("timeout_seconds", _seconds(0.1, 600)), "0.1 to 600 seconds"),
    _ADMIN_TOKEN,
    dataclasses.replace(_CLUSTER, required=False),
)

_TABLES: dict[type[Any], tuple[str, tuple[Setting, ...]]] = {
    NodeConfig: ("node", NODE),
    ProxyConfig: ("proxy", PROXY),
    UpConfig: ("up", UP),
    StatusConfig: ("status", STATUS),
    OrderConfig: ("order", ORDER),
}


def build(
    kind: type[C],
    flags: Mapping[str, object],
    *,
    environ: Mapping[str, str],
    config_file: Path | None = None,
) -> C:
    """The settings of one command. `flags` by flag name; a value of None means that the flag was not given.

    Raises UsageError with every problem found, one a line.
    """
    command, settings = _TABLES[kind]
    table = _read_table(config_file, command, settings)
    fields: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        name = environment_name(setting.flag)
        if flags.get(setting.flag) is not None:
            source, raw = f"--{setting.flag}", flags[setting.flag]
        elif name in environ:
            source, raw = name, environ[name]
        elif setting.flag in table:
            source, raw = f"[{command}] {setting.flag} in {config_file}", table[setting.flag]
        else:
            if setting.required:
                problems.append(
                    f"--{setting.flag} is missing (or {name}, or {setting.flag} under [{command}] in the file of "
                    f"--config); allowed: {setting.allowed}"
                )
            continue
        try:
            fields |= setting.parse(raw)
        except UsageError as error:
            problems.append(f"{source}: {error}")
        except (ValueError, TypeError, OverflowError):
            shown = "" if setting.secret else f" = {str(raw)[:100]!r}"
            problems.append(f"{source}{shown} is not allowed; allowed: {setting.allowed}")
    if not problems:
        problems = _CROSS_CHECKS[kind](fields) if kind in _CROSS_CHECKS else []
    if problems:
        raise UsageError("\n".join(problems))
    return kind(**fields)


def _read_table(path: Path | None, command: str, settings: tuple[Setting, ...]) -> dict[str, Any]:
    """The command's table of a TOML file. Raises UsageError for what is no TOML and for keys nobody knows."""
    if path is None:
        return {}
    try:
        whole = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML: {error}") from error
    commands = sorted(name for name, _ in _TABLES.values())
    if unknown := sorted(whole.keys() - set(commands)):
        raise UsageError(f"--config {path}: unknown {', '.join(unknown)}; allowed: the tables {', '.join(commands)}")
    table = whole.get(command, {})
    known = {setting.flag for setting in settings}
    if not isinstance(table, dict) or (unknown := sorted(table.keys() - known)):
        what = ", ".join(unknown) if isinstance(table, dict) else "a value where a table belongs"
        raise UsageError(f"--config {path}: [{command}] has {what}; allowed: {', '.join(sorted(known))}")
    return table


def _check_node(fields: dict[str, Any]) -> list[str]:
    """Founding settings belong to --init, and the acknowledgments must be possible."""
    if not fields.get("init"):
        return [
            f"--{flag} is part of founding a cluster: give it with --init, or leave it out"
            for flag in ("voters", "ack")
            if flag in fields
        ]
    voters = fields.setdefault("voters", ()) or (fields["name"],)
    ack = fields.setdefault("ack", 1 if len(voters) > 1 else 0)
    problems = []
    if fields["name"] not in voters:
        problems.append(f"--voters {','.join(voters)} lacks this node, {fields['name']!r}: the founder leads first")
    if ack >= len(voters):
        problems.append(_too_many(ack, len(voters)))
    return problems


def _check_up(fields: dict[str, Any]) -> list[str]:
    if fields.get("auth_status") and "auth_jwt_key" in fields and "auth_token" not in fields:
        return ["--auth-status: `up` itself asks for /status and has no JWT; give --auth-token beside --auth-jwt-key"]
    voters = int(fields.get("followers", DEFAULT_FOLLOWERS)) + 1
    ack = fields.get("ack")
    return [_too_many(ack, voters)] if ack is not None and ack >= voters else []


def _too_many(ack: int, voters: int) -> str:
    return (
        f"--ack {ack} can never be met: of {voters} voter{'s' * (voters > 1)} the leader does not count; "
        f"allowed: 0 to {voters - 1}"
    )


_CROSS_CHECKS: dict[type[Any], Callable[[dict[str, Any]], list[str]]] = {NodeConfig: _check_node, UpConfig: _check_up}
