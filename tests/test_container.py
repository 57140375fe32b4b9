"""The Dockerfile fits the code it packs. It is read, not built: docs/operations.md says what was built and run."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from walship.config import UpConfig, build

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def steps() -> list[tuple[str, str]]:
    """Instructions with their arguments; comments left out, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    return re.findall(r"^([A-Z]+) +(.+)$", re.sub(r"\\\n", " ", text), re.MULTILINE)


def last(name: str) -> str:
    """The argument that counts: of the last such instruction."""
    return [rest for instruction, rest in steps() if instruction == name][-1]


def copied() -> set[str]:
    """What is taken from the build context."""
    lines = [rest.split() for name, rest in steps() if name == "COPY" and not rest.startswith("--from=")]
    return {source for line in lines for source in line[:-1]}


def test_every_file_it_copies_exists_and_is_in_the_build_context() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied())
    assert copied() == let_in


def test_it_copies_every_package_and_what_their_build_reads() -> None:
    """A package of pyproject.toml that is not copied would be missing from the image without a word."""
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    packages = {name for name in top if any(fnmatch(name, pattern) for pattern in patterns)}
    assert packages == {"walship", "proxy"}
    assert copied() == packages | {"pyproject.toml", PROJECT["project"]["readme"]}


def test_the_default_base_is_a_python_that_walship_runs_on() -> None:
    (base,) = re.findall(r"^BASE=python:3\.(\d+)", last("ARG"))
    (least,) = re.findall(r"^>=3\.(\d+)$", PROJECT["project"]["requires-python"])
    assert int(base) >= int(least)


def test_it_never_runs_as_root() -> None:
    """By number: an engine that is told to refuse root cannot judge a name."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    assert last("USER").split(":")[0] in re.findall(r"--uid (\d+)", " ".join(rest for _, rest in steps()))


@pytest.mark.parametrize("name", ["ENTRYPOINT", "CMD", "HEALTHCHECK"])
def test_no_shell_stands_between_the_engine_and_walship(name: str) -> None:
    """A shell as pid 1 would keep the stop signal to itself."""
    words: Any = json.loads(last(name)[last(name).index("[") :])
    assert words
    assert all(isinstance(word, str) for word in words)


def test_the_default_command_health_check_port_and_volume_agree() -> None:
    entrypoint, command = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))
    assert entrypoint[0] in PROJECT["project"]["scripts"]
    assert command[0] == "up"
    flags = {flag.removeprefix("--"): value for flag, value in zip(command[1::2], command[2::2], strict=True)}
    config = build(UpConfig, flags, environ={}, config_file=None)
    assert config.listen_host == "0.0.0.0"
    assert last("EXPOSE") == str(config.listen_port)
    assert last("VOLUME") == last("WORKDIR") == str(config.data_dir)
    assert f"WALSHIP_HEALTH=http://127.0.0.1:{config.listen_port}/health" in last("ENV").split()
    assert "WALSHIP_HEALTH" in last("HEALTHCHECK")
    assert last("STOPSIGNAL") == "SIGTERM"
