"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of an ``evaluation.json``, methods down, architectures across: test accuracy in percent, mean and standard
    deviation, a table a protocol."""
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        of_protocol = [row for row in rows if row["protocol"] == protocol]
        networks = list(dict.fromkeys(row["network"] for row in of_protocol))
        seeds = sorted({row["n"] for row in of_protocol})
        counts = ", ".join(map(str, seeds))
        lines = []
        for method in dict.fromkeys(row["method"] for row in of_protocol):
            cells = {row["network"]: row for row in of_protocol if row["method"] == method}
            lines.append((method, *(_cell(cells.get(network)) for network in networks)))
        title = f"test accuracy, %: {protocol}, n = {counts} networks a cell"
        print_table(title, ("", *networks), lines)


def print_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table below its title."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    if title:
        console.print(f"\n{title}", highlight=False, markup=False)
    console.print(table)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"
