"""The compose file and the Kubernetes manifests fit walship: each command line and environment is read by our own CLI.

Their schemas are not checked here: docs/operations.md says by what they were.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
import yaml

from tests.test_container import last, steps
from walship.cli import app as cli
from walship.cli import part
from walship.config import NODE, PROXY, NodeConfig, ProxyConfig, environment_name
from walship.coordination.etcd_url import parse_etcd_url

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yaml").read_text("utf-8"))
KUBERNETES = EXAMPLES / "kubernetes"
MANIFESTS: list[dict[str, Any]] = [
    document
    for name in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["resources"]
    for document in yaml.safe_load_all((KUBERNETES / name).read_text("utf-8"))
]
VOTERS = 3
Config = NodeConfig | ProxyConfig


@dataclass(frozen=True)
class Part:
    """One container as it is started: the words after `walship`, and its environment."""

    name: str
    words: list[str]
    environ: dict[str, str]

    def config(self, monkeypatch: pytest.MonkeyPatch) -> Config:
        """What our command makes of it. Any mistake is a UsageError, which `walship` answers with 2."""
        seen: list[Config] = []

        def take(config: Config) -> int:
            seen.append(config)
            return 0

        monkeypatch.setattr(part, "run_node", take)
        monkeypatch.setattr(part, "run_proxy", take)
        with patch.dict(os.environ, self.environ, clear=True):
            assert cli.run(self.words) == 0
        return seen[0]


def compose_parts() -> list[Part]:
    services = COMPOSE["services"].items()
    return [
        Part(name, service["command"], {**service["environment"], "WALSHIP_AUTH_TOKEN": "secret"})
        for name, service in services
        if service["image"] == "walship"
    ]


def kubernetes_parts() -> list[Part]:
    """The pods: a StatefulSet's by their ordinals, with what the downward API fills in."""
    parts = []
    for manifest in MANIFESTS:
        if manifest["kind"] not in ("StatefulSet", "Deployment"):
            continue
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        if container["image"] != "walship":
            continue
        for number in range(manifest["spec"]["replicas"]):
            name = f"{manifest['metadata']['name']}-{number}"
            parts.append(Part(name, words_of(container, name), environment_of(container, name)))
    return parts


def words_of(container: dict[str, Any], name: str) -> list[str]:
    """The words after `walship`: the arguments of the image's entrypoint, or the script's branch for `name`."""
    if "command" not in container:
        return list(container["args"])
    assert container["command"] == ["sh", "-c"]
    branches = [line.strip().partition(")") for line in container["args"][0].splitlines() if "exec" in line]
    (line,) = [line for pattern, _, line in branches if pattern == name] or [branches[-1][2]]
    words = shlex.split(line.removesuffix(";;"))
    assert words[:2] == ["exec", "walship"]  # exec: the stop signal must reach walship and no shell
    return words[2:]


def environment_of(container: dict[str, Any], name: str) -> dict[str, str]:
    filled: dict[str, str] = {}
    given = {"metadata.name": name, "status.podIP": "10.0.0.7"}
    for entry in container["env"]:
        if (source := entry.get("valueFrom")) is None:
            value = entry["value"]
            for known, put in filled.items():  # $(NAME) of an earlier entry; a later one would stay as it is
                value = value.replace(f"$({known})", put)
        else:
            value = given[source["fieldRef"]["fieldPath"]] if "fieldRef" in source else "secret"
        filled[entry["name"]] = value
    return filled


def the_voters(configs: list[NodeConfig]) -> tuple[str, ...]:
    (founder,) = [config for config in configs if config.init]
    return founder.voters


@pytest.mark.parametrize("parts", [compose_parts, kubernetes_parts])
def test_our_own_command_takes_every_part_and_the_parts_fit_each_other(
    parts: Callable[[], list[Part]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One founder whose voters are the nodes, one store, and addresses that lead back to each part."""
    configs = [each.config(monkeypatch) for each in parts()]
    nodes = [config for config in configs if isinstance(config, NodeConfig)]
    proxies = [config for config in configs if isinstance(config, ProxyConfig)]
    assert len(nodes) == VOTERS
    assert len(proxies) == 2
    assert sorted(the_voters(nodes)) == sorted(node.name for node in nodes)
    assert next(node.ack for node in nodes if node.init) == 1
    assert len({config.cluster_url for config in configs}) == 1
    assert {config.auth_token for config in configs} == {"secret"}
    for config in configs:
        assert config.listen_host == "0.0.0.0"
        assert str(config.listen_port) == last("EXPOSE")  # the image's health check asks this port
        advertised = urlsplit(config.advertise or "")
        assert advertised.port == config.listen_port
        assert isinstance(config, ProxyConfig) or (advertised.hostname or "").split(".")[0] == config.name
    assert {str(node.data_dir) for node in nodes} == {last("VOLUME")}


@pytest.mark.parametrize("part", [*compose_parts(), *kubernetes_parts()], ids=lambda part: part.name)
def test_no_variable_is_misspelt(part: Part) -> None:
    """A WALSHIP_ that no setting reads would be ignored without a word."""
    known = {environment_name(setting.flag) for setting in (NODE if part.words[0] == "node" else PROXY)}
    assert {name for name in part.environ if name.startswith("WALSHIP_")} <= known


def test_no_token_is_written_into_an_example() -> None:
    """A default token would be everybody's."""
    token = {
        service["environment"]["WALSHIP_AUTH_TOKEN"] for service in COMPOSE["services"].values() if "build" in service
    }
    assert {value[: value.index("?") + 1] for value in token} == {"${WALSHIP_AUTH_TOKEN:?"}
    assert not [manifest for manifest in MANIFESTS if manifest["kind"] == "Secret"]
    assert "examples/.env" in (EXAMPLES.parent / ".gitignore").read_text("utf-8").splitlines()


@pytest.mark.parametrize("parts", [compose_parts, kubernetes_parts])
def test_the_store_is_the_etcd_of_the_example(parts: Callable[[], list[Part]], monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {urlsplit(url).hostname for url in parse_etcd_url(parts()[0].config(monkeypatch).cluster_url).endpoints}
    if parts is compose_parts:
        assert hosts == {"etcd"}
    else:
        (etcd,) = [each for each in MANIFESTS if each["kind"] == "StatefulSet" and "etcd" in each["metadata"]["name"]]
        service = etcd["spec"]["serviceName"]
        assert hosts == {f"{etcd['metadata']['name']}-{n}.{service}" for n in range(etcd["spec"]["replicas"])}


@pytest.mark.parametrize(
    "words",
    [
        COMPOSE["services"]["etcd"]["command"],
        next(m for m in MANIFESTS if m["metadata"]["name"] == "walship-etcd" and m["kind"] == "StatefulSet")["spec"][
            "template"
        ]["spec"]["containers"][0]["command"],
    ],
)
def test_etcd_compacts_its_history(words: list[str]) -> None:
    """The lease makes a revision several times a second; uncompacted they fill etcd's quota, and it stops writing."""
    assert "--auto-compaction-mode=periodic" in words
    assert "--auto-compaction-retention=1h" in words


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_every_compose_service_is_confined_and_keeps_its_data(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == "unless-stopped"
    volumes = dict(reversed(volume.split(":")) for volume in service["volumes"])
    assert set(volumes.values()) <= set(COMPOSE["volumes"])
    assert list(volumes) == {"etcd": ["/etcd-data"], "prox": ["/locks"], "node": ["/data", "/locks"]}[name[:4]]
    if name != "etcd":
        config = next(part for part in compose_parts() if part.name == name)
        assert int(service["stop_grace_period"].removesuffix("s")) > 10  # drain-seconds
        assert config.environ["WALSHIP_NAME"] == name
        assert volumes[config.environ["TMPDIR"]] == "locks"
        assert config.environ["TMPDIR"] in next(rest for verb, rest in steps() if "useradd" in rest)  # its owner


def test_nothing_but_the_proxies_of_the_compose_file_is_reached_from_outside() -> None:
    services = COMPOSE["services"]
    assert COMPOSE["networks"]["cluster"]["internal"] is True
    assert {name for name, service in services.items() if "ports" in service} == {"proxy1", "proxy2"}
    assert {name for name, service in services.items() if "front" in service["networks"]} == {"proxy1", "proxy2"}


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (manifest["metadata"]["name"] + "/" + manifest["kind"], manifest["spec"]["template"]["spec"])
        for manifest in MANIFESTS
        if manifest["kind"] in ("StatefulSet", "Deployment")
    ]


@pytest.mark.parametrize(("name", "pod"), pods())
def test_every_pod_is_confined(name: str, pod: dict[str, Any]) -> None:
    user = int(last("USER").split(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "WALSHIP_... of service links would stand where settings are"
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/data"}
    assert "walship" not in container["image"] or f"TMPDIR={last('VOLUME')}" in last("ENV").split()


@pytest.mark.parametrize(("name", "pod"), [(n, p) for n, p in pods() if p["containers"][0]["image"] == "walship"])
def test_probes_ask_what_we_answer_and_only_readiness_asks_for_health(name: str, pod: dict[str, Any]) -> None:
    """A node that waits for a leader must not be restarted for it."""
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/version", "port": "http"}
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": int(last("EXPOSE"))}
    assert pod["terminationGracePeriodSeconds"] >= 30


def test_services_and_budgets_select_what_is_there() -> None:
    labels = [
        manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in MANIFESTS
        if manifest["kind"] in ("StatefulSet", "Deployment")
    ]
    for manifest in MANIFESTS:
        match manifest["kind"]:
            case "Service":
                selector = manifest["spec"]["selector"]
            case "PodDisruptionBudget":
                selector = manifest["spec"]["selector"]["matchLabels"]
                assert manifest["spec"]["maxUnavailable"] == 1
            case "NetworkPolicy":
                selector = manifest["spec"]["podSelector"]["matchLabels"]
            case _:
                continue
        assert selector in labels
    headless = [m for m in MANIFESTS if m["kind"] == "Service" and m["spec"].get("clusterIP") == "None"]
    assert {m["metadata"]["name"] for m in headless} == {
        m["spec"]["serviceName"] for m in MANIFESTS if m["kind"] == "StatefulSet"
    }
    assert all(m["spec"]["publishNotReadyAddresses"] is True for m in headless)
