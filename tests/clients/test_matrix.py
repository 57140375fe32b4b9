"""Every client in the matrix does every step through the proxy of a three-node cluster, and docs/clients.md says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.matrix import CLIENTS, PAGE, Client, Outcome, installed, render, replaced, row, run_all
from tests.clients.steps import STEPS
from tests.cluster.harness import Up

pytestmark = pytest.mark.timeout(300)  # the first test waits for the run of all clients
PRESENT = tuple(client for client in CLIENTS if not installed(client))
of_each_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("clients") / "data")
    try:
        yield up.start()
    finally:
        up.end()


@pytest.fixture(scope="module")
def outcomes(cluster: Up) -> dict[str, Outcome]:
    return run_all(cluster.url, PRESENT)


def outcome_of(client: Client, outcomes: dict[str, Outcome]) -> Outcome:
    if why := installed(client):
        pytest.skip(why)
    return outcomes[client.name]


@of_each_client
@pytest.mark.parametrize("step", STEPS)
def test_a_client_does_what_it_offers(client: Client, step: str, outcomes: dict[str, Outcome]) -> None:
    result, detail = outcome_of(client, outcomes).steps[step]
    assert result != "error", detail


@of_each_client
def test_the_document_has_the_clients_row(client: Client, outcomes: dict[str, Outcome]) -> None:
    wanted = row(client, outcome_of(client, outcomes))
    assert wanted in PAGE.read_text("utf-8").splitlines(), f"run `make clients-table`; wanted:\n{wanted}"


def test_the_document_is_what_the_run_makes_it(outcomes: dict[str, Outcome]) -> None:
    if len(PRESENT) < len(CLIENTS):
        pytest.skip("not all clients are installed: `make clients`")
    page = PAGE.read_text("utf-8")
    assert page == replaced(page, render(outcomes)), "run `make clients-table`"


def test_nothing_that_clients_did_made_a_traceback(cluster: Up, outcomes: dict[str, Outcome]) -> None:
    assert outcomes
    cluster.wait_level()
    for path in cluster.logs():
        assert "Traceback" not in path.read_text("utf-8", "replace"), path
