"""Clusters that end with their test, and logs in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness import Cluster, Up

_LINES = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        root = getattr(item, "funcargs", {}).get("tmp_path")
        for path in sorted(root.rglob("*.log")) if root is not None else ():
            tail = "\n".join(path.read_text("utf-8", "replace").splitlines()[-_LINES:])
            report.sections.append((f"log {path.relative_to(root)}", tail))
    return report


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes a started cluster under the test's directory; ends it whatever happens."""
    clusters: list[Cluster] = []

    def start(**settings: Any) -> Cluster:
        cluster = Cluster(tmp_path, **settings)
        clusters.append(cluster)
        return cluster.start()

    yield start
    for cluster in clusters:
        cluster.end()


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Makes a started `walship up` on `tmp_path/data`; ends it whatever happens."""
    ups: list[Up] = []

    def start(*words: str) -> Up:
        up = Up(tmp_path / "data", *words)
        ups.append(up)
        return up.start()

    yield start
    for up in ups:
        up.end()
