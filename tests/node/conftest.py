from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.node.real_host import RealHost, real_follower, real_leader


@pytest.fixture
async def leader(tmp_path: Path) -> AsyncIterator[RealHost]:
    async with real_leader(tmp_path) as host:
        yield host


@pytest.fixture
async def follower(leader: RealHost) -> AsyncIterator[RealHost]:
    async with real_follower(leader) as host:
        yield host
