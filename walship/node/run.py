"""The `walship node` command: one node as a process, from its lock to its exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from typing import NoReturn

from walship.config import NodeConfig, open_gate
from walship.coordination.baton_key import baton_key
from walship.coordination.store import open_store
from walship.front.listen import Address, listen
from walship.node import admin
from walship.node.app import NodeApp
from walship.node.deathwatch import hold_life_lock
from walship.node.http_server import serving
from walship.node.join import join, lock_directory
from walship.node.node import Node
from walship.node.relay import RELAY_PATH, Relay
from walship.replication.peer import PATH as PEER_PATH

__all__ = ["run"]


async def run(config: NodeConfig) -> int:
    """The `walship node` command: run until SIGTERM or SIGINT. Returns 0; raises what made it impossible."""
    with lock_directory(config.data_dir):
        store = open_store(config.cluster_url)
        try:
            member = await join(config, store)
            listener = listen(config.listen_host, config.listen_port)
            node = Node(config, store, member, config.advertise or Address.of(listener).url)
            life = hold_life_lock(config.cluster_url, node.boot_nonce)
            await node.start()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, node.stop.set)
            app = NodeApp(
                node,
                node.report,
                name=node.name,
                max_body_bytes=config.body_max_bytes,
                baton_key=await baton_key(store),
                gate=open_gate(config),
                drain_seconds=config.drain_seconds,
                routes=[*node.embedded.routes(), *admin.routes(node)],
            )
            relay = Relay(
                lambda: None if node.leading is not None else node.leader_url,
                credential=member.record.credential("link"),
            )
            upgrades = {
                "/walship/link": node.links.serve,
                "/walship/replication": node.serve_replication,
                PEER_PATH: node.elector.serve,
                RELAY_PATH: relay.serve,
            }
            credentials = {path: member.record.credential(path.rpartition("/")[2]) for path in upgrades}
            async with serving(
                app,
                listener,
                upgrades=upgrades,
                credentials=credentials,
                drain_seconds=config.drain_seconds,
                message_max_bytes=config.body_max_bytes,
            ):
                _say_ready(node)
                failure = await node.serve()
                if failure is not None:
                    _end_now(failure)
            await node.close()
            life.release()
        finally:
            await store.close()
    return 0


def _say_ready(node: Node) -> None:
    line = json.dumps({"ready": True, "url": node.url, "name": node.name, "pid": os.getpid()})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _end_now(error: BaseException) -> NoReturn:
    """After a failure nothing may be tidied up: closing could change what a restart counts from (R5, R7)."""
    sys.stderr.write(f"walship: {error}\n")
    sys.stderr.flush()
    logging.shutdown()
    os._exit(1)
