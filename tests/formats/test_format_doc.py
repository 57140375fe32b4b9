"""docs/format.md says what the code does: every table with a `Layout:` line agrees with the struct it names."""

from __future__ import annotations

import importlib
import pkgutil
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from walship import formats

DOC = Path(__file__).parents[2] / "docs" / "format.md"
_LAYOUT = re.compile(r"^Layout: `([\w.]+)\.(\w+)`")
_ROW = re.compile(r"^\| (\d+) \| (\d+) \| (.+) \|$")
_ITEM = re.compile(r"(\d*)([a-zA-Z?])")


@dataclass(frozen=True)
class Table:
    """One `offset | size | field` table: its line number, the struct it names, its rows (offset, size)."""

    line: int
    layout: tuple[str, str] | None
    rows: tuple[tuple[int, int], ...]

    def struct(self) -> struct.Struct:
        """The struct named, as the code has it."""
        assert self.layout is not None
        module, name = self.layout
        layout = getattr(importlib.import_module(module), name)
        assert isinstance(layout, struct.Struct)
        return layout


def tables(text: str) -> list[Table]:
    """All tables whose rows begin with two numbers. A `Layout:` line binds to the next table."""
    found: list[Table] = []
    layout: tuple[str, str] | None = None
    rows: list[tuple[int, int]] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.startswith("#"):
            layout = None
        elif match := _LAYOUT.match(line):
            layout = match[1], match[2]
        elif match := _ROW.match(line):
            rows.append((int(match[1]), int(match[2])))
        elif rows and not line.startswith("|"):
            found.append(Table(number, layout, tuple(rows)))
            layout, rows = None, []
    return found


def boundaries(layout: struct.Struct) -> set[int]:
    """Offsets at which the fields of a struct begin and end; `8s` is one field, `5I` are five."""
    order, items = layout.format[0], layout.format[1:]
    edges = {0}
    done = order
    for count, kind in _ITEM.findall(items):
        for piece in [count + kind] if kind in "sx" else [kind] * int(count or 1):
            done += piece
            edges.add(struct.calcsize(done))
    return edges


TABLES = tables(DOC.read_text(encoding="utf-8"))
BOUND = [table for table in TABLES if table.layout]


@pytest.mark.parametrize(
    "table", BOUND, ids=lambda table: f"{table.layout[0]}.{table.layout[1]}".removeprefix("walship.formats.")
)
def test_table_agrees_with_the_struct_it_names(table: Table) -> None:
    """A row may join neighbouring fields of the struct, but never split one, and the rows cover it whole."""
    layout = table.struct()
    edges = boundaries(layout)
    assert table.rows[0][0] == 0
    assert {offset for offset, _ in table.rows} <= edges
    assert sum(table.rows[-1]) == layout.size


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"line-{table.line}")
def test_rows_of_a_table_follow_each_other_without_gap(table: Table) -> None:
    """Offsets and sizes are of one piece: no byte of a structure is left undescribed."""
    ends = [offset + size for offset, size in table.rows[:-1]]
    assert ends == [offset for offset, _ in table.rows[1:]]


def test_every_layout_of_the_formats_is_documented() -> None:
    """A public struct named *_LAYOUT is part of a format, so it has its table."""
    documented = {id(table.struct()) for table in BOUND}
    names = [module.name for module in pkgutil.walk_packages(formats.__path__, "walship.formats.")]
    missing = [
        f"{name}.{attribute}"
        for name in names
        if not name.endswith("_numpy")  # an optional extra
        for attribute, value in vars(importlib.import_module(name)).items()
        if re.match(r"[A-Z]\w*_LAYOUT$", attribute) and id(value) not in documented
    ]
    assert missing == []
