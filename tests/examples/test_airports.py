"""The examples, run as a user runs them (issue 3 item 9)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.airports import own_cluster

EXAMPLES = Path(__file__).parents[2] / "examples"
AIRPORTS = [sys.executable, str(EXAMPLES / "airports.py"), "--rows", "300", "--readers", "1", "--seconds", "1"]


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with own_cluster(tmp_path_factory.mktemp("cluster") / "data") as url:
        yield url


def test_airports_compares_the_files_of_its_own_cluster() -> None:
    """Byte-identical after a checkpoint, at equal position (design.md 7)."""
    shown = run([*AIRPORTS, "--up"])
    assert "300 airports loaded" in shown
    assert "0 misses" in shown
    assert "the 3 database files are byte-identical" in shown


@pytest.mark.parametrize("client", ["libsql", "turso"])
def test_airports_runs_on_a_cluster_that_is_there(url: str, client: str) -> None:
    shown = run([*AIRPORTS, "--url", url, "--client", client])
    assert "0 misses" in shown
    assert "all 3 nodes at position and rolling checksum" in shown


def test_the_javascript_example_reads_its_own_writes(url: str) -> None:
    if shutil.which("node") is None or not (EXAMPLES / "node" / "node_modules" / "@libsql" / "client").is_dir():
        pytest.skip("node or @libsql/client is not installed: `make clients`")
    run([*AIRPORTS, "--url", url])
    shown = run(["node", str(EXAMPLES / "node" / "airports.mjs"), url])
    assert "visits written 1,2,3, read back 1,2,3" in shown
