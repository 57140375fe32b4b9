"""Giving orders to a cluster: the client side of the admin verbs (`walship.front.admin`).

What opens them, in this order: `--admin-token`; with `--cluster URL` the cluster's own credential, which whoever can
read the coordination store has; else nothing, which is enough on the same machine while nobody is asked for a token.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import httpx

from walship.config import OrderConfig
from walship.coordination.record import read_cluster
from walship.coordination.store import open_store
from walship.errors import Unavailable, UsageError

__all__ = ["Orders"]

_HOPS = 3  # to the leader, and once more when it changes meanwhile


class Orders:
    """A client of the admin verbs of one proxy or node; an order that only the leader can take follows it there."""

    def __init__(self, config: OrderConfig) -> None:
        token = config.admin_token
        if token is None and config.cluster_url is not None:
            token = asyncio.run(_credential(config.cluster_url))
        headers = {} if not token else {"authorization": f"Bearer {token}"}
        self._url = config.url
        self._client = httpx.Client(timeout=config.timeout_seconds, headers=headers, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, verb: str) -> Any:
        """The answer to GET /admin/<verb>. Raises Unavailable, UsageError."""
        return self._ask("GET", verb, None)

    def post(self, verb: str, body: object) -> Any:
        """The answer to POST /admin/<verb>. Raises Unavailable, UsageError in the words of the answer."""
        return self._ask("POST", verb, body)

    def download(self, verb: str) -> bytes:
        """The bytes of GET /admin/<verb>. Raises Unavailable."""
        try:
            reply = self._client.get(f"{self._url}/admin/{verb}")
            return reply.raise_for_status().content
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._url}/admin/{verb} cannot be had: {error or type(error).__name__}") from error

    def _ask(self, method: str, verb: str, body: object) -> Any:
        url = self._url
        for _ in range(_HOPS):
            try:
                reply = self._client.request(method, f"{url}/admin/{verb}", json=body)
                found = reply.json()
            except httpx.HTTPError as error:
                raise Unavailable(
                    f"{url} does not answer ({error or type(error).__name__}); whether it was carried out is not "
                    "known: look at `walship status`"
                ) from error
            except ValueError as error:
                raise Unavailable(f"{url}/admin/{verb} is not JSON: is this a walship proxy or node?") from error
            if reply.status_code < 300:
                return found
            said = found.get("error", {}) if isinstance(found, dict) else {}
            if reply.status_code == httpx.codes.MISDIRECTED_REQUEST and said.get("url"):
                url = str(said["url"])
                continue
            message = str(said.get("message") or f"{url} answered {reply.status_code}")
            raise (UsageError if reply.status_code in (400, 401) else Unavailable)(message)
        raise Unavailable("the leader keeps changing; nothing was changed by this order. Try again")


async def _credential(cluster_url: str) -> str:
    store = open_store(cluster_url)
    try:
        seen = await read_cluster(store)
    finally:
        await store.close()
    if seen is None:
        raise UsageError("there is no cluster record in this store. Nothing was changed")
    return seen.record.credential("admin")
