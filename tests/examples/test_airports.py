"""The examples, run as a user runs them (issue 3 item 9)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Up

EXAMPLES = Path(__file__).parents[2] / "examples"
AIRPORTS = [sys.executable, str(EXAMPLES / "airports.py"), "--rows", "300", "--readers", "1", "--seconds", "1"]
PYTHON_CLIENTS = ["libsql", "turso", "sqlalchemy", "libsql-client", "libsql-client-ws", "django"]


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    up = Up(tmp_path_factory.mktemp("cluster") / "data")
    try:
        yield up.start().url
    finally:
        up.end()


def test_airports_compares_the_files_of_its_own_cluster() -> None:
    """Byte-identical after a checkpoint, at equal position (design.md 7)."""
    shown = run([*AIRPORTS, "--up"])
    assert "300 airports loaded" in shown
    assert "0 misses" in shown
    assert "the 3 database files are byte-identical" in shown


@pytest.mark.parametrize("client", PYTHON_CLIENTS)
def test_sixteen_writers_of_each_client_read_every_own_write(url: str, client: str) -> None:
    """Issue 4: on a cluster that is there already, and no client retries."""
    shown = run([*AIRPORTS, "--url", url, "--client", client, "--writers", "16"])
    assert re.search(r"[1-9][0-9,]* visits written one by one and [0-9,]+ reads by 17 processes", shown), shown
    assert "0 misses" in shown
    assert "all 3 nodes at position and rolling checksum" in shown


def test_the_javascript_example_reads_its_own_writes(url: str) -> None:
    if shutil.which("node") is None or not (EXAMPLES / "node" / "node_modules" / "@libsql" / "client").is_dir():
        pytest.skip("node or @libsql/client is not installed: `make clients`")
    run([*AIRPORTS, "--url", url])
    shown = run(["node", str(EXAMPLES / "node" / "airports.mjs"), url])
    assert "visits written 1,2,3, read back 1,2,3" in shown
