"""Every test here is a soak test, uses the cluster harness, and prints its figures (docs/soak.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.conftest import pytest_runtest_makereport, start_cluster, start_up

__all__ = ["pytest_runtest_makereport", "start_cluster", "start_up"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.soak)
            item.add_marker(pytest.mark.timeout(1800))
