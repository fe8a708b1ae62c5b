"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from condense.names import printable

LONGEST_CELL = 1000
"""Largest number of characters of a cell that are shown."""


def print_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table below its title."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(_cell_text(column))
    for row in rows:
        table.add_row(*map(_cell_text, row))
    console = Console()
    if title:
        console.print(f"\n{printable(title)}", highlight=False, markup=False)
    console.print(table)


def _cell_text(value: Any) -> Text:
    """Return a value as text without markup and control characters, because it may come from a file."""
    return Text(printable(str(value), LONGEST_CELL))
