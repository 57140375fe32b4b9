"""`walship up`: a whole cluster on this machine, under one parent.

The steps, each of which leaves nothing behind when it refuses: take the data directory's lock; see that the port is
free; check the database to adopt; found the cluster (R1: one compare-and-swap with all voters) or read its record;
switch the database to WAL; start the nodes and the proxy; wait until the proxy sees all of them healthy; say where to
connect; keep the children running; on a signal stop proxy, followers, leader, in this order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from walship.cli import adopt, output
from walship.cli.children import Child
from walship.cli.status import describe
from walship.config import DEFAULT_FOLLOWERS, NODE, PROXY, STATUS, UP, UpConfig, environment_name, open_gate
from walship.coordination.file_store import FileStore, HeldLock
from walship.coordination.record import ClusterRecord, create_cluster, read_cluster, read_leader
from walship.errors import StorageFailed, StoreUnavailable, Unavailable, UsageError, WalshipError
from walship.front.listen import Address, listen

__all__ = ["run"]

POLL_SECONDS = 0.05  # of the proxy's /status while waiting; a whole cluster is up in about a second
STOP_MARGIN_SECONDS = 5.0  # beyond a child's own drain deadline before it is killed
PROXY_NAME = "proxy"


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What this run is to start, after everything that can be checked was checked."""

    record: ClusterRecord
    founding: bool  # nobody has ever led: the first node does
    database: Path | None  # given to the first node when founding
    port: int
    cluster_url: str


def run(config: UpConfig) -> int:
    """Run until a signal (0) or a failure (raised). Blocks; the cluster lives in child processes."""
    config = dataclasses.replace(config, data_dir=config.data_dir.absolute())
    open_gate(config)  # a bad key is said before anything starts
    return asyncio.run(_up(config))


async def _up(config: UpConfig) -> int:
    loop = asyncio.get_running_loop()
    end: asyncio.Future[WalshipError | None] = loop.create_future()  # None: a signal asked for it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, _settle, end, None)
    with _data_lock(config.data_dir):
        port = _free_port(config.listen_host, config.listen_port)
        store = FileStore(config.data_dir / "store")
        try:
            plan = await _before(end, _plan(store, config, port))
            error = None if plan is None else await _run_cluster(config, plan, store, end)
        finally:
            await store.close()
    if error is None:
        return 0
    raise error


async def _before(end: asyncio.Future[WalshipError | None], work: Coroutine[Any, Any, _Plan]) -> _Plan | None:
    """What `work` gives, or None when the end came first; then it is cancelled and waited for."""
    task = asyncio.ensure_future(work)
    try:
        both: set[asyncio.Future[Any]] = {task, end}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _settle(end: asyncio.Future[WalshipError | None], reason: WalshipError | None) -> None:
    """The first reason to end counts; later ones are its consequences."""
    if not end.done():
        end.set_result(reason)


def _data_lock(data_dir: Path) -> HeldLock:
    """Make the data directory ours. Raises UsageError when another `up` has it, or when it cannot be written."""
    try:
        (data_dir / "logs").mkdir(parents=True, exist_ok=True)
        return HeldLock(data_dir / "up.lock")
    except OSError as error:
        raise UsageError(
            f"--data {data_dir}: {error.strerror}. Nothing was changed. Name a directory this user can write"
        ) from error


def _free_port(host: str, port: int) -> int:
    """The port the proxy is to use; 0 becomes a free one. Raises UsageError when it is taken."""
    with contextlib.closing(listen(host, port)) as probe:
        return Address.of(probe).port


async def _plan(store: FileStore, config: UpConfig, port: int) -> _Plan:
    """Found the cluster, or read what it is and see that the flags agree with it."""
    cluster_url = "file://" + quote(str(config.data_dir / "store"))
    seen = await read_cluster(store)
    if seen is not None:
        _check_resumed(config, seen.record)
        founding = await read_leader(store) is None
        database = Path(seen.record.database) if founding and seen.record.database else None
        return _Plan(seen.record, founding, database, port, cluster_url)
    if left := [path for path in sorted(config.data_dir.glob("node*")) if path.is_dir() and any(path.iterdir())]:
        raise UsageError(
            f"{left[0]} has a node's data, but {config.data_dir}/store has no cluster record: the record was lost. "
            "Nothing was changed (R1: a new cluster is never founded over old data). "
            "Bring the store back from a copy, or start elsewhere with --data and give the database by name"
        )
    followers = DEFAULT_FOLLOWERS if config.followers is None else config.followers
    database = None
    if config.database is not None:
        verdict = await adopt.check_and_switch(config.database, data_dir=config.data_dir, copies=followers)
        database = verdict.path
    voters = tuple(f"node{number}" for number in range(1, followers + 2))
    record = ClusterRecord(
        cluster_id=secrets.token_hex(16),
        created_ms=time.time_ns() // 1_000_000,
        voters=voters,
        acks=min(1, followers) if config.ack is None else config.ack,
        database=str(database or ""),
        secret=secrets.token_hex(32),
    )
    await create_cluster(store, record)
    return _Plan(record, True, database, port, cluster_url)


def _check_resumed(config: UpConfig, record: ClusterRecord) -> None:
    """Flags of a second run must agree with the cluster that is there; defaults always do."""
    given = None if config.database is None else os.path.realpath(config.database)
    if given is not None and given != record.database:
        there = record.database or "a database of its own"
        raise UsageError(
            f"{config.data_dir} holds a cluster with {there}, not with {given}. Nothing was changed. "
            "Name another --data directory for another database, or leave DATABASE out to resume"
        )
    if config.ack is not None and config.ack != record.acks:
        raise UsageError(
            f"--ack {config.ack}: this cluster was founded with --ack {record.acks}, which `walship "
            "voters ack` changes while it runs. Nothing was changed. Leave --ack out to resume"
        )
    followers = len(record.voters) - 1
    if config.followers not in (None, followers):
        raise UsageError(
            f"--followers {config.followers}: this cluster was founded with {followers}, which are its voters. "
            "Nothing was changed. Leave --followers out to resume"
        )


async def _run_cluster(
    config: UpConfig, plan: _Plan, store: FileStore, end: asyncio.Future[WalshipError | None]
) -> WalshipError | None:
    """Run the children until `end`, then stop them; returns why it ended, None for a signal."""
    children = _children(config, plan)
    environment = _child_environment(os.environ, config)

    async def until_end(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except WalshipError as error:
            _settle(end, error)
        except OSError as error:
            _settle(end, StorageFailed(f"a process or its log could not be started: {error}. The data is kept"))

    async with asyncio.TaskGroup() as group:
        for child in children:
            group.create_task(until_end(child.supervise(environment)), name=f"supervise {child.name}")
        ready = group.create_task(until_end(_announce(config, plan)), name="wait until ready")
        try:
            return await asyncio.shield(end)
        finally:
            ready.cancel()
            await _stop_in_order(config, children, store)


def _children(config: UpConfig, plan: _Plan) -> list[Child]:
    walship = [sys.executable, "-m", "walship"]

    both = ["--drain-seconds", str(config.drain_seconds), "--log-level", config.log_level]
    both += ["--stream-idle-seconds", str(config.stream_idle_seconds)]
    if config.auth_jwt_key is not None:
        both += ["--auth-jwt-key", str(config.auth_jwt_key)]
    if config.auth_status:
        both += ["--auth-status"]

    def node(name: str, *, first: bool) -> list[str]:
        words = [*walship, "node", "--name", name, "--data", str(config.data_dir / name), "--cluster", plan.cluster_url]
        words += ["--listen", "127.0.0.1:0", "--log-max", str(config.log_max_bytes), *both]
        words += ["--lease-seconds", str(config.lease_seconds)]
        words += ["--statement-seconds", str(config.statement_seconds), "--write-seconds", str(config.write_seconds)]
        words += ["--value-max", str(config.value_max_bytes)]
        if first and plan.founding:
            words += ["--init", "--voters", ",".join(plan.record.voters), "--ack", str(plan.record.acks)]
        if first and plan.founding and plan.database is not None:
            words += ["--database", str(plan.database)]
        return words

    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    proxy = [*walship, "proxy", "--name", PROXY_NAME, "--cluster", plan.cluster_url, "--listen", f"{host}:{plan.port}"]
    proxy += ["--consistency", config.consistency.value]
    proxy += both
    logs = config.data_dir / "logs"
    nodes = [
        Child(name, node(name, first=index == 0), log_path=logs / f"{name}.log", say=_say)
        for index, name in enumerate(plan.record.voters)
    ]
    return [*nodes, Child(PROXY_NAME, proxy, log_path=logs / f"{PROXY_NAME}.log", say=_say)]


def _say(text: str) -> None:
    output.note(f"walship: {text}")


def _child_environment(environ: Mapping[str, str], config: UpConfig) -> dict[str, str]:
    """Ours without our settings: WALSHIP_LISTEN is for the proxy's address, not for each node's.

    Tokens go this way and not as flags, since everybody on the machine can read a process's flags.
    """
    ours = {environment_name(setting.flag) for table in (NODE, PROXY, UP, STATUS) for setting in table}
    kept = {name: value for name, value in environ.items() if name not in ours} | {"PYTHONUNBUFFERED": "1"}
    tokens = {"auth-token": config.auth_token, "admin-token": config.admin_token}
    return kept | {environment_name(flag): token for flag, token in tokens.items() if token is not None}


async def _announce(config: UpConfig, plan: _Plan) -> None:
    """Wait until the proxy sees every node healthy, then say so on stdout. Raises Unavailable after the deadline."""
    url = _client_url(config.listen_host, plan.port)
    console = output.console()
    wait = _wait_ready(url, set(plan.record.voters), config)
    if config.json:
        output.line(json.dumps(await wait, separators=(",", ":")))
        return
    if not console.is_terminal:
        output.line(_words(config, plan, url, await wait))
        return
    with console.status(f"starting {len(plan.record.voters)} nodes and a proxy"):
        status = await wait
    console.print(output.rich_table(*describe(status), width=console.width))
    console.print(_words(config, plan, url, status), markup=False)


def _words(config: UpConfig, plan: _Plan, url: str, status: dict[str, Any]) -> str:
    """Where to connect, for people."""
    leader = status["leader"]
    followers = ", ".join(name for name in plan.record.voters if name != leader) or "none"
    select = '{"requests":[{"type":"execute","stmt":{"sql":"select 1"}}]}'
    lines = [
        f"walship is up: leader {leader}, followers {followers}; ack {plan.record.acks}",
        f"  proxy     {url}",
        f"  python    turso_serverless.connect({url!r})   # pip install turso-serverless",
        f"  node      createClient({{ url: {url!r} }})   # npm install @libsql/client",
        f"  curl      curl -s {url}/v2/pipeline -d '{select}'",
        f"  status    walship status {url}",
        f"  files     {config.data_dir}; logs in {config.data_dir / 'logs'}",
    ]
    if status.get("failover") not in (None, "possible"):
        lines.append(f"  failover  {status['failover']}")
    return "\n".join([*lines, "Stop it with Ctrl-C; run the same command again to resume."])


def _client_url(host: str, port: int) -> str:
    """Where a client on this machine connects, also when the proxy listens on every address."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


async def _wait_ready(url: str, names: set[str], config: UpConfig) -> dict[str, Any]:
    missing: str = "the proxy does not answer yet"
    headers = {} if config.auth_token is None else {"authorization": f"Bearer {config.auth_token}"}
    async with httpx.AsyncClient(timeout=2.0, headers=headers) as client:
        until = time.monotonic() + config.ready_seconds
        while time.monotonic() < until:
            try:
                status: dict[str, Any] = (await client.get(f"{url}/status")).raise_for_status().json()
                missing = _missing(status, names)
            except (httpx.HTTPError, ValueError) as error:
                missing = f"the proxy does not answer ({error or type(error).__name__})"
            if not missing:
                return status
            await asyncio.sleep(POLL_SECONDS)
    raise Unavailable(
        f"the cluster is not healthy after {config.ready_seconds:.0f} s: {missing}. Everything is stopped, the data is "
        f"kept; the reasons are in {config.data_dir / 'logs'}"
    )


def _missing(status: dict[str, Any], names: set[str]) -> str:
    """What is not there yet, in words; empty when the cluster is whole."""
    healthy = {node.get("name") for node in status.get("nodes", []) if node.get("healthy")}
    if absent := sorted(names - healthy):
        return f"not healthy: {', '.join(absent)}"
    return "" if status.get("leader") else "no leader"


async def _stop_in_order(config: UpConfig, children: list[Child], store: FileStore) -> None:
    """Proxy first, so that clients hear no errors of a dying node; the leader last, so that followers miss nothing."""
    leader = None
    with contextlib.suppress(StoreUnavailable):
        seen = await read_leader(store)
        leader = seen.record.name if seen else None
    order = {PROXY_NAME: 0, leader: 2}
    for stage in (0, 1, 2):
        those = [child for child in children if order.get(child.name, 1) == stage]
        await asyncio.gather(*(child.stop(config.drain_seconds + STOP_MARGIN_SECONDS) for child in those))
