"""The house itself: floors, sizes, and documents that keep up with the code (style.md 3, design.md 3)."""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from walship import errors
from walship.config import NODE, ORDER, PROXY, STATUS, UP, Setting
from walship.hrana.http import STATUSES
from walship.metrics import NodeMetrics, ProxyMetrics

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for part in ("walship", "proxy") for path in (ROOT / part).rglob("*.py"))
MAX_LINES = 600

# Lowest first. A module may import from its own floor and from those below. What stands on one line is one floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("walship", "walship.errors", "walship.metrics"),
    ("walship.formats",),
    ("walship.hrana",),
    ("walship.front",),
    ("walship.sql",),
    ("walship.engine",),
    ("walship.replication",),
    ("walship.coordination",),
    ("walship.config",),
    ("walship.service",),
    ("walship.archive",),
    ("walship.node",),
    ("walship.cli", "walship.__main__"),
)
PROXY_MAY = ("walship", "formats", "hrana", "front", "sql", "coordination", "errors", "metrics", "config")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules of ours that `path` names in any import, also inside functions and for types only."""
    found: set[str] = set()
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for statement in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names = {f"{base}.{alias.name}" for alias in statement.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name in MODULES}


def floor(module: str) -> int:
    for height in range(len(FLOORS) - 1, -1, -1):
        if any(module == name or (name != "walship" and module.startswith(name + ".")) for name in FLOORS[height]):
            return height
    raise AssertionError(f"{module} stands on no floor of design.md 3; give it one")


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        for name in GRAPH[ahead.pop()] - seen:
            seen.add(name)
            ahead.append(name)
    return seen


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("walship")])
def test_an_import_only_points_down(module: str) -> None:
    """design.md 3, transitively; and only the command line knows the proxy."""
    for name in reachable(module):
        if name.split(".")[0] == "proxy":
            assert module.startswith("walship.cli") or module == "walship.__main__", f"{module} reaches {name}"
        else:
            assert floor(name) <= floor(module), f"{module} reaches up to {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("proxy")])
def test_the_proxy_knows_nothing_of_the_engine(module: str) -> None:
    """design.md 3: formats, hrana, sql, coordination, errors, metrics, config."""
    for name in reachable(module):
        part = name.split(".")[1] if "." in name else name
        assert name.startswith("proxy") or part in PROXY_MAY, f"{module} reaches {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_the_error_trees_docstring_is_the_tree() -> None:
    """errors.py: each class is drawn once, under its parent, and has its own sentence; nothing else is drawn."""
    assert errors.__doc__ is not None
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if match := re.fullmatch(r"    ([│ ]*(?:[├└]── )?)([A-Z][A-Za-z]+)(?:  .*)?", line):
            depth = len(match[1])
            while above and above[-1][0] >= depth:
                above.pop()
            drawn[match[2]] = above[-1][1] if above else None
            above.append((depth, match[2]))
    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.WalshipError)
    }
    parents = {name: kind.__base__.__name__ if name != "WalshipError" else None for name, kind in classes.items()}
    assert drawn == parents
    assert set(errors.__all__) == set(classes)
    for name, kind in classes.items():
        assert kind.__doc__, f"{name} has no sentence of its own"


def section(text: str, heading: str) -> str:
    """The part of a document from a heading to the next one of its depth or above."""
    depth = heading.split(" ")[0]
    begin = text.index(f"\n{heading}\n") + len(heading) + 2
    ends = [match.start() for match in re.finditer(rf"^#{{1,{len(depth)}}} ", text[begin:], re.MULTILINE)]
    return text[begin : begin + ends[0]] if ends else text[begin:]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "table"), [("up", UP), ("node", NODE), ("proxy", PROXY), ("status", STATUS), ("switchover", ORDER)]
)
def test_every_setting_is_documented(command: str, table: tuple[Setting, ...]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert first_column(section(text, f"### `walship {command}`")) == [setting.flag for setting in table]


@pytest.mark.parametrize(("heading", "metrics"), [("### Node", NodeMetrics()), ("### Proxy", ProxyMetrics())])
def test_every_metric_is_documented(heading: str, metrics: NodeMetrics | ProxyMetrics) -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert sorted(first_column(section(text, heading))) == metrics.names()


def test_every_error_is_documented() -> None:
    """docs/errors.md: each code, and the HTTP status of those that have a row."""
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (\d{3}) \|", text, re.MULTILINE))
    for kind in (getattr(errors, name) for name in errors.__all__):
        if kind is errors.AuthFailed:
            continue  # docs/security.md has its codes
        assert f"`{kind.code}`" in text, f"{kind.__name__} is not in docs/errors.md"
        status = next(STATUSES[each] for each in kind.__mro__ if each in STATUSES)
        if kind.code in rows and kind is not errors.DatabaseRefused:
            assert rows[kind.code] == str(status), kind.code


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    listed = set(re.findall(r"^\| ([A-Za-z0-9@/_-]+) \| \S", text, re.MULTILINE)) - {"package"}
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    npm = [json.loads((ROOT / at / "package.json").read_text("utf-8")) for at in ("examples/node", "tests/clients/js")]
    wanted += [name for package in npm for name in package["dependencies"]]
    assert listed == {re.split(r"[=><]", name)[0] for name in wanted}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_and_file_names_in_documents_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = {ROOT / page / ".." / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
    links |= {ROOT / name for name in re.findall(r"\b((?:walship|proxy|tests)/[\w/]+\.py)\b", text)}
    missing = sorted(str(link) for link in links if not link.resolve().exists())
    assert not missing


def test_nothing_uses_wait_for() -> None:
    """Before Python 3.12 `asyncio.wait_for` swallows a cancellation that comes together with its result: a node that
    was told to stop then ran on. `asyncio.timeout` does not."""
    for path in SOURCES:
        assert "asyncio.wait_for(" not in path.read_text(), path
