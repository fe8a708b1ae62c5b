"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from condense.names import printable

LONGEST_CELL = 1000
"""Characters of a cell that are shown."""


def print_results(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of an ``evaluation.json``, methods down, architectures across: test accuracy in percent, mean and standard
    deviation, a table a protocol."""
    for title, of_protocol in by_protocol(rows).items():
        networks = list(dict.fromkeys(row["network"] for row in of_protocol))
        sets = by_set(of_protocol)
        counts = ", ".join(map(str, sorted({row["n"] for cells in sets.values() for row in cells.values()})))
        lines = [(name, *(_cell(cells.get(network)) for network in networks)) for name, cells in sets.items()]
        print_table(f"test accuracy, %: {title}, n = {counts} networks a cell", ("", *networks), lines)


def by_set(rows: Sequence[Mapping[str, Any]], name: str = "method") -> dict[str, dict[str, Mapping[str, Any]]]:
    """Rows of one protocol by what was trained on, then by network; of several answers to one question that of the most
    networks. Sets that share a name are told apart by the start of their checksum."""
    checksums: dict[str, list[Any]] = {}
    for row in rows:
        known = checksums.setdefault(row[name], [])
        if row["synthetic_sha256"] not in known:
            known.append(row["synthetic_sha256"])
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        alone = len(checksums[row[name]]) == 1 or row["synthetic_sha256"] is None
        label = row[name] if alone else f"{row[name]} ({row['synthetic_sha256'][:6]}, {row['num_images']} images)"
        cells = found.setdefault(label, {})
        if row["network"] not in cells or cells[row["network"]]["n"] <= row["n"]:
            cells[row["network"]] = row
    return found


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
    """Without markup and control characters, for it may come from a file."""
    return Text(printable(str(value), LONGEST_CELL))


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"
