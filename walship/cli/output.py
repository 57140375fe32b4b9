"""What the command prints: rich on a terminal, plain aligned text otherwise. Results to stdout, the rest to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "fail", "line", "note", "plain_table", "rich_table"]


def console() -> Console:
    """A console on the present stdout (tests replace it)."""
    return Console(highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """One line of result to stdout, flushed: somebody may be reading a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Progress or a warning, to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fail(text: str) -> None:
    """An error, as one paragraph to stderr."""
    stream = Console(stderr=True, highlight=False, soft_wrap=True)
    stream.print(Text.assemble(("walship: ", "bold red"), text))


def rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 1000) -> Table:
    """A table for a terminal of `width`: columns without any value are left out, and the last ones that do not fit."""
    shown = [index for index in range(len(columns)) if not rows or any(row[index] != "-" for row in rows)]
    while len(shown) > 2 and sum(_width(columns, rows, index) + 3 for index in shown) > width:
        shown.pop()
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index in shown:
        numbers = bool(rows) and all(_number(row[index]) for row in rows)
        table.add_column(columns[index], justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[index], style=_style(row[index])) for index in shown))
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a pipe: columns separated by two blanks, no lines, no colours."""
    widths = [_width(columns, rows, index) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *rows]
    )


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]], index: int) -> int:
    return max(len(row[index]) for row in [columns, *rows])


def _number(cell: str) -> bool:
    return cell == "-" or cell.replace(".", "", 1).isdecimal()


def _style(cell: str) -> str:
    return {"yes": "green", "no": "bold red", "leader": "bold cyan"}.get(cell, "")
