"""What the benchmark has found, for the terminal as it comes, and as a Markdown file at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Column, Table
from terminal import CONSOLE

_WIDTH = 120


@dataclass(frozen=True)
class Grid:
    """A table: its first column has names, the others figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Paper:
    """A page that grows; what is added is shown at once."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def title(self, text: str) -> None:
        """Begin the page."""
        self._parts.append(f"## {text}")

    def heading(self, text: str) -> None:
        """Begin a section."""
        CONSOLE.rule(escape(text), align="left")
        self._parts.append(f"### {text}")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        CONSOLE.print(escape(text))
        self._parts.append(textwrap.fill(text, _WIDTH, break_on_hyphens=False))

    def items(self, items: Sequence[str]) -> None:
        """Add a list."""
        for item in items:
            CONSOLE.print(f"- {escape(item)}")
        wrapped = (textwrap.fill(f"- {item}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for item in items)
        self._parts.append("\n".join(wrapped))

    def grid(self, grid: Grid) -> None:
        """Add a table."""
        table = Table(grid.columns[0], *(Column(escape(name), justify="right") for name in grid.columns[1:]))
        for row in grid.rows:
            table.add_row(*map(escape, row))
        CONSOLE.print(table)
        self._parts.append(markdown_table(grid))

    def write(self, path: Path) -> None:
        """Write the page as Markdown."""
        path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")


def markdown_table(grid: Grid) -> str:
    """Write a table as Markdown."""
    rules = ["---", *("---:" for _ in grid.columns[1:])]
    rows = [grid.columns, rules, *grid.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
