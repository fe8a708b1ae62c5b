"""Tables of single benchmarks: a record of each in ``results/costs``, and its place in the page that quotes it.

A benchmark prints the rows of its table as they are measured. With ``--write`` it also writes the record, and the table
between the markers ``<!-- name -->`` and ``<!-- /name -->`` of the page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Provenance, count, table_head, table_line
from benchmarks.report import replace_part
from condense.files import check_new_folder

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "costs"
PAGES: Mapping[str, str] = {
    "buffer-read": "buffers.md",
    "data-memory": "performance.md",
    "inner-memory": "inner-loop.md",
    "parts": "performance.md",
    "photos": "photos.md",
    "recovery-memory": "performance.md",
    "tesla-error": "inner-loop.md",
    "tesla-error-experts": "inner-loop.md",
    "waiting": "performance.md",
}
"""The page of each table, in ``docs``."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A table, with its provenance."""

    command: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str
    """What else was measured; empty if nothing."""
    machine: str
    cores: int
    load: float
    """Average number of processes that kept the cores busy in the minute before the benchmark began."""
    minutes: float
    """Wall time."""
    provenance: Provenance

    def text(self) -> str:
        """The command, the table and the provenance, as a part of a page."""
        lines = [f"    {self.command}", "", *table_head(self.columns), *map(table_line, self.rows), ""]
        if self.remark:
            lines += [self.remark, ""]
        return "\n".join(
            [
                *lines,
                f"{self.machine}, {self.cores} cores, load average {self.load:.1f} at the start.",
                f"{self.provenance}, {self.minutes:.1f} minutes.",
            ]
        )


class Table:
    """The rows of a table that is being measured."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.rows: list[tuple[str, ...]] = []
        self.remark = ""
        print("\n".join(table_head(self.columns)), flush=True)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise TypeError(f"{len(cells)} cells do not fill the {len(self.columns)} columns; give one for each")
        self.rows.append(cells)
        print(table_line(cells), flush=True)


def parser(module: str, doc: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of all benchmarks that print such a table."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc, formatter_class=formatter)
    made.add_argument("--threads", type=count, default=torch.get_num_threads())
    made.add_argument("--write", action="store_true", help="write the record and the table of its page")
    return made


@contextmanager
def measuring(
    name: str, used: argparse.ArgumentParser, words: Sequence[str] | None, columns: Sequence[str], *, write: bool
) -> Iterator[Table]:
    """Collect the rows of the table ``name``; write its record and its page at the end, if no error is raised.

    Args:
        name: a key of ``PAGES``.
        used: the parser of the benchmark.
        words: the words of its command; None: those of this process.
        columns: titles of the columns.
        write: whether anything is written.

    Raises:
        ValueError: the folder of the records is not writable; nothing was measured.
    """
    if write:
        check_new_folder(RECORDS)
    cpu = torch.device("cpu")
    provenance = Provenance.now(cpu)
    table, begun, load = Table(columns), time.monotonic(), os.getloadavg()[0]
    yield table
    given = [Path(word).name for word in (sys.argv[1:] if words is None else words) if word != "--write"]
    costs = Costs(
        command=" ".join([used.prog, shlex.join(given)]).strip(),
        columns=table.columns,
        rows=tuple(table.rows),
        remark=table.remark,
        machine=harness.machine(cpu),
        cores=harness.cores(),
        load=round(load, 1),
        minutes=round((time.monotonic() - begun) / 60, 2),
        provenance=provenance,
    )
    if costs.remark:
        print(f"\n{costs.remark}")
    if write:
        harness.write(costs, RECORDS / f"{name}.json")
        replace_part(ROOT / "docs" / PAGES[name], name, costs.text())
