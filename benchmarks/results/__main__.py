"""Fill the table of results and make its pages.

    python -m benchmarks.results [--data FOLDER] [--work build/results] [--device cpu] [--limit MINUTES] [--threads 2]
                                 [--only NAME ...] [--commit HASH]

Rows that have a record are skipped, unless their settings in the table have changed. Without a folder of data, or
without the file of a data set there, its rows stay open. Every row is written as soon as it is complete, then the pages
are made from the records alone. Sets that the table names are copied to the zoo of the package.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import condense.zoo
from benchmarks.harness import commit, mean_and_std, status
from benchmarks.results import page, queue, record, table, zoo
from benchmarks.results.table import Row
from condense.files import locked
from condense.names import suggest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the .npz files")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "results", help="folder of runs and buffers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=float, default=float("inf"), help="minutes after which the queue is stopped")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of a process")
    parser.add_argument("--only", nargs="+", help="rows to measure; their names may end with *")
    parser.add_argument("--commit", help="commit of the code, where there is no repository")
    chosen = parser.parse_args()
    return status("results", lambda: run(chosen))


def run(chosen: argparse.Namespace) -> int:
    """Measure what is open and was asked for, and make the pages; return the exit status."""
    deadline = time.monotonic() + 60 * chosen.limit
    rows = table.read(RESULTS / "table.yaml")
    done = measured(rows)
    if chosen.data and not chosen.data.is_dir():
        raise ValueError(f"there is no folder {chosen.data}; give --data the folder of the .npz files")
    for name in chosen.only or ():
        if not any(_asked(row, [name]) for row in rows.rows):
            raise ValueError(f"no row is named {name}: {suggest(name, [row.name for row in rows.rows])}")
    files = queue.files(rows.data, chosen.data)
    due = [
        row
        for row in queue.order(rows.rows)
        if row.device == chosen.device and row.name not in done and row.dataset in files and _asked(row, chosen.only)
    ]
    if due and not (chosen.commit or commit()):
        raise ValueError("there is no repository here to read the commit of the code from; give it with --commit")
    work = queue.Queue(
        data=files,
        work=chosen.work.resolve(),
        rows=RESULTS / "rows",
        threads=chosen.threads,
        commit=lambda: chosen.commit or commit(),
        deadline=deadline,
    )
    failed = False
    if due:
        chosen.work.mkdir(parents=True, exist_ok=True)
        try:
            with locked(chosen.work / "queue", wait=False):
                failed = measure(work, due)
        except BlockingIOError as error:
            raise ValueError(f"{error} measures in {chosen.work}; wait for its end, or give another --work") from error
        done = measured(rows)
    page.write(rows, done, ROOT)
    zoo.write(rows, done, {row.name: work.folder(row) for row in rows.rows}, condense.zoo.FOLDER)
    print(f"{len(done)} of {len(rows.rows)} rows are measured; docs/results.md is made from them", flush=True)
    return int(failed)


def measure(work: queue.Queue, due: list[Row]) -> bool:
    """Measure rows until they are done or the time is over; return whether one failed."""
    failed = False
    for position, row in enumerate(due):
        print(f"{row.name} ({position + 1} of {len(due)}) ...", flush=True)
        try:
            found = work.measure(row)
        except queue.Stopped:
            print(f"the time is over: {row.name} and what follows stay open; the next queue goes on here", flush=True)
            break
        except queue.Failed as error:
            print(f"{row.name} failed: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        scores = {name: mean_and_std(found.accuracies(name)) for name in found.protocols}
        print(f"{row.name}: {scores}, {page.in_minutes(found)} minutes", flush=True)
    return failed


def measured(rows: table.Table) -> dict[str, record.Record]:
    """The records whose settings are those of the table."""
    wanted = {row.name: row for row in rows.rows}
    found = record.read_all(RESULTS / "rows")
    return {name: found[name] for name in wanted if name in found and found[name].row == wanted[name]}


def _asked(row: Row, only: list[str] | None) -> bool:
    return only is None or any(
        row.name == name or (name.endswith("*") and row.name.startswith(name[:-1])) for name in only
    )


if __name__ == "__main__":
    sys.exit(main())
