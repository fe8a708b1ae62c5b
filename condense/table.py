"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of an ``evaluation.json``, methods down, architectures across: test accuracy in percent, mean and standard
    deviation, a table a protocol."""
    for title, of_protocol in by_protocol(rows).items():
        networks = list(dict.fromkeys(row["network"] for row in of_protocol))
        counts = ", ".join(map(str, sorted({row["n"] for row in of_protocol})))
        lines = []
        for method in dict.fromkeys(row["method"] for row in of_protocol):
            cells = {row["network"]: row for row in of_protocol if row["method"] == method}
            lines.append((method, *(_cell(cells.get(network)) for network in networks)))
        print_table(f"test accuracy, %: {title}, n = {counts} networks a cell", ("", *networks), lines)


def by_protocol(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows that compare, by the name of their protocol, and with the start of its hash where changed fields make
    several of one name. ``own`` means another training for each set, and stays together."""
    hashes: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault(row["protocol"], set()).add(row["protocol_hash"])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row["protocol"]
        alone = len(hashes[name]) == 1 or name == "own"
        groups.setdefault(name if alone else f"{name} {row['protocol_hash'][:6]}", []).append(row)
    return groups


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
