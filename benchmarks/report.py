"""Write measurements to a JSON file as they come, and at the end their table to docs/performance.md.

python -m benchmarks.report performance-gpu.json           # put the rows of this file into docs
python -m benchmarks.report docs/partial-performance.json  # the rows of a run that was stopped
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import status
from condense.files import read_json, write_text
from condense.schema import from_json

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLES = {"table": "performance.json", "gpu-table": "performance-gpu.json"}
"""The file of each table in docs/performance.md, by the name of its markers there."""
PARTIAL = "partial-"
"""Beginning of the names of the files of runs that have not ended."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity of one path. Ratios are gains of the engine: more than one is better. ``ask`` is the target. A row
    without a value of the engine was not measured."""

    path: str
    quantity: str
    unit: str
    textbook: float | None
    textbook_same_allocator: float | None
    engine: float | None
    ratio: float | None
    ratio_same_allocator: float | None
    ask: str | None
    met: bool | None
    n: int

    @property
    def key(self) -> tuple[str, str]:
        return self.path, self.quantity


def row(
    path: str,
    quantity: str,
    unit: str,
    engine: float | None,
    n: int,
    *,
    textbook: float | None = None,
    same: float | None = None,
    at_least: float | None = None,
    target: float | None = None,
) -> Row:
    """Return a row with its ratios, and whether it meets its target: a ratio of ``at_least``, or a value that is at
    least ``target`` for a rate and at most ``target`` for everything else."""
    higher_is_better = unit.endswith(("/s", "%"))

    def gain(theirs: float | None) -> float | None:
        if theirs is None or engine is None or 0 in (theirs, engine):
            return None
        return engine / theirs if higher_is_better else theirs / engine

    ratio, ask, met = gain(textbook), None, None
    if at_least is not None:
        ask, met = f">= {at_least:g} x", ratio is not None and ratio >= at_least
    elif target is not None:
        ask = f"{'>=' if higher_is_better else '<='} {target:,g} {unit}"
        met = engine is not None and (engine >= target if higher_is_better else engine <= target)
    return Row(
        path=path,
        quantity=quantity,
        unit=unit,
        textbook=textbook,
        textbook_same_allocator=same,
        engine=engine,
        ratio=ratio,
        ratio_same_allocator=gain(same),
        ask=ask,
        met=None if engine is None else met,
        n=n,
    )


@dataclass
class Report:
    """The rows of one table. Each is printed when it is measured. If there is a ``folder``, all are then written to a
    file beside that of the table, which ``finish`` replaces."""

    name: str
    """A key of ``TABLES``."""
    head: dict[str, Any]
    """Machine, versions, commit and date; written with the rows."""
    folder: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def plan(self, path: str, quantity: str, unit: str, target: float | None = None) -> None:
        """Add a row that is not measured yet."""
        self.rows.append(row(path, quantity, unit, None, 0, target=target))

    def add(self, *args: Any, **options: Any) -> None:
        """Add a row, in place of the row of the same path and quantity if there is one."""
        new = row(*args, **options)
        places = [i for i, old in enumerate(self.rows) if old.key == new.key]
        if places:
            self.rows[places[0]] = new
        else:
            self.rows.append(new)
        print(_cells([new], table_columns([new])), flush=True)
        if self.folder is not None:
            self.write(self.folder)

    def write(self, folder: Path) -> Path:
        """Write all rows beside the file of the table; return the file."""
        file, fields = folder / f"{PARTIAL}{TABLES[self.name]}", [dataclasses.asdict(r) for r in self.rows]
        write_text(file, json.dumps({**self.head, "rows": fields}, indent=1) + "\n")
        return file

    def finish(self, folder: Path) -> None:
        """Replace the file of the table, and the table in performance.md."""
        os.replace(self.write(folder), folder / TABLES[self.name])
        replace_part(folder / "performance.md", self.name, self.text())

    def measured(self, path: str, quantity: str) -> Row | None:
        return next((r for r in self.rows if r.key == (path, quantity) and r.engine is not None), None)

    def text(self) -> str:
        """The table, and the line about the machine."""
        return f"{table(self.rows)}\n\n{about(self.head)}"


COLUMNS = {
    "path": "---",
    "quantity": "---",
    "textbook": "---:",
    "same allocator": "---:",
    "engine": "---:",
    "ratio": "---:",
    "ratio, same allocator": "---:",
    "target": "---",
    "met": "---",
    "n": "---:",
}


def table_columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of the columns; those about the allocator only if some row has them."""
    return [name for name in COLUMNS if "allocator" not in name or any(r.textbook_same_allocator for r in rows)]


def table(rows: Sequence[Row]) -> str:
    columns = table_columns(rows)
    rule = "|".join(COLUMNS[name] for name in columns)
    return f"| {' | '.join(columns)} |\n|{rule}|\n{_cells(rows, columns)}"


def _cells(rows: Sequence[Row], columns: Sequence[str]) -> str:
    lines = []
    for r in rows:
        cells = {
            "path": r.path,
            "quantity": f"{r.quantity}, {r.unit}" if r.unit else r.quantity,
            "textbook": _figure(r.textbook),
            "same allocator": _figure(r.textbook_same_allocator),
            "engine": "not measured" if r.engine is None else _figure(r.engine),
            "ratio": _figure(r.ratio),
            "ratio, same allocator": _figure(r.ratio_same_allocator),
            "target": r.ask or "",
            "met": {True: "yes", False: "**no**", None: ""}[r.met],
            "n": str(r.n or ""),
        }
        lines.append(f"| {' | '.join(cells[name] for name in columns)} |")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    """Format a number with three significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def about(head: Mapping[str, Any]) -> str:
    """Return the line about the machine, the versions and the date."""
    named = ", ".join(f"{name} {_figure(value)}" for name, value in head["limits"].items())
    driver = f", driver {head['driver']}" if head.get("driver") else ""
    return (
        f"{head['machine']}{driver}, {head['cores']} cores, {head['threads']} threads, torch {head['torch']}, commit "
        f"{head['commit']}, {head['date']}." + (f" Rates of the machine in GFLOP/s: {named}." if named else "")
    )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What ``Report.add`` writes."""

    machine: str
    cores: int
    threads: int
    torch: str
    commit: str
    date: str
    limits: Mapping[str, float]
    rows: tuple[Row, ...]
    driver: str | None = None


def read(file: Path) -> Report:
    """Read a file that ``Report.add`` wrote. Raises ValueError if it has the name of no table, or is damaged."""
    names = {written: name for name, written in TABLES.items()}
    name = names.get(file.name.removeprefix(PARTIAL))
    if name is None:
        raise ValueError(f"{file} has the name of no table; name it {' or '.join(names)}")
    head = dict(vars(from_json(_Written, read_json(file, fix="give another one"), str(file))))
    return Report(name, head, rows=list(head.pop("rows")))


def replace_part(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page, if the page exists."""
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
        _, marker, after = rest.partition(f"<!-- /{name} -->")
        assert marker, f"{page} has no markers for {name}"
        write_text(page, f"{before}<!-- {name} -->\n{text}\n{marker}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file of a table")
    file = parser.parse_args().file
    report = read(file)
    write_text(DOCS / TABLES[report.name], file.read_text(encoding="utf-8"))
    replace_part(DOCS / "performance.md", report.name, report.text())


if __name__ == "__main__":
    sys.exit(status("report", main))
