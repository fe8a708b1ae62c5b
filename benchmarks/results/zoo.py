"""The zoo of the package: sets of measured rows, and an index of what was measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results.queue import SET, checksum
from benchmarks.results.record import Record
from benchmarks.results.table import Table
from condense.files import replacing, write_text
from condense.zoo import INDEX, Entry


def index(table: Table, records: Mapping[str, Record], folder: Path) -> dict[str, Any]:
    """Return the content of the index: the first set of each row that the table names and whose file is there."""
    found = {}
    for name, row in table.zoo.items():
        if row in records and _is_measured(folder / f"{name}.safetensors", records[row]):
            found[name] = dataclasses.asdict(entry(records[row], table.terms[records[row].row.dataset]))
    return found


def entry(record: Record, terms: str) -> Entry:
    """Return what is known of the first set of a row, with the accuracies under the first protocol."""
    first = record.distillations[0]
    score = next(score for score in first.scores if score.method == record.row.method)
    return Entry(
        dataset=record.row.dataset,
        ipc=record.row.ipc,
        method=record.row.method,
        network=score.network,
        protocol=score.protocol,
        accuracies=score.accuracies,
        distillation=first.command,
        evaluation=record.evaluation,
        minutes=first.minutes if record.row.device == "cuda" else first.cpu_minutes,
        device=record.provenance.device,
        commit=record.provenance.commit,
        date=record.provenance.date,
        terms=terms,
    )


def _is_measured(file: Path, record: Record) -> bool:
    """Whether a file is there and, where the record has its checksum, is the set of which the record speaks."""
    return file.exists() and record.checksum in ("", checksum(file))


def write(table: Table, records: Mapping[str, Record], runs: Mapping[str, Path], folder: Path) -> None:
    """Copy the sets of the named rows from their ``runs`` (the folder of each row) to the zoo, and write its index."""
    for name, row in table.zoo.items():
        made = runs.get(row, folder) / "0" / SET
        if row in records and _is_measured(made, records[row]):
            target = folder / f"{name}.safetensors"
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as fresh:
                shutil.copyfile(made, fresh)
    write_text(folder / INDEX, json.dumps(index(table, records, folder), indent=1) + "\n")
