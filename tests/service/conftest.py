"""The leader that most tests of the service talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.service.bench import Bench, leading
from walship.service.limits import Limits


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with leading(tmp_path / "n1", Limits()) as leader:
        yield leader
