"""Read and check the files of a run folder, or the file of a set that has none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from condense import runs
from condense.eval.results import fits, read_complete
from condense.exchange import is_foreign
from condense.files import checksum, read_json
from condense.names import spelt
from condense.schema import from_json, mismatch
from condense.synthetic.files import load
from condense.synthetic.set import SyntheticSet
from condense.tracking import read_log

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished distillation with its log and its results, or a set of which less is known."""

    path: Path
    """The run folder, or the file of a set without one."""
    syn: SyntheticSet
    snapshots: Mapping[int, SyntheticSet]
    """Snapshots by number of steps done, in order; the last one is the set itself. Empty for the file of a set."""
    log: Sequence[Mapping[str, Any]]
    """The logged numbers of each step."""
    results: Sequence[Mapping[str, Any]]
    """Rows of the file of results."""
    uses: Sequence[Mapping[str, Any]]
    """Tables of applications; see ``uses_of``."""
    record: Mapping[str, Any]
    """Content of ``run.json``: time, memory, device and versions."""

    @property
    def method(self) -> str:
        return self.syn.origin.method or "set"

    @property
    def dataset(self) -> str:
        return self.syn.origin.dataset_name

    @property
    def ipc(self) -> int:
        return self.syn.ipc

    @property
    def budget(self) -> str:
        """The budget in words."""
        return self.syn.budget_in_words

    @property
    def network(self) -> str:
        return self.syn.origin.network or NOT_RECORDED

    @property
    def is_recorded(self) -> bool:
        """Whether the set records how it was made; sets that were imported, or made in Python, do not."""
        return bool(self.syn.origin.recipe_hash)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tensors of the set, as in results."""
        return checksum(self.syn.state_dict())

    @property
    def own_results(self) -> list[Mapping[str, Any]]:
        """Results of the set itself, without baselines."""
        return [row for row in self.results if row["synthetic_sha256"] == self.sha256 and fits(row, self.syn)]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a number was logged, and its values."""
        points = [(record["step"], record[name]) for record in self.log if name in record]
        return [step for step, _ in points], [value for _, value in points]


def collect(path: Path) -> Run:
    """Read a run folder, or the file of a set with the results beside it.

    Raises:
        ValueError: the folder holds no finished run, the file is no set, or a file is damaged.
    """
    is_run = (path / "recipe.yaml").exists()
    if path.exists() and is_foreign(path) and not is_run:
        raise ValueError(
            f"{path} does not say which data it was made from; first run `condense import {path} set.safetensors "
            "--dataset NAME`"
        )
    if not path.is_file() and not is_run:
        raise ValueError(
            f"{path} is no run folder and no set; give a folder that `condense distill` wrote, or a file that "
            "`condense import` wrote"
        )
    evaluation = path / "evaluation.json" if is_run else path.with_suffix(".evaluation.json")
    results = read_complete(evaluation) if evaluation.exists() else []
    run = _of_folder(path, results) if is_run else _of_file(path, results)
    if any(len(row["metrics"]["per_class"][0]) != run.syn.origin.num_classes for row in run.own_results):
        raise ValueError(
            f"{evaluation} has accuracies for another number of classes than the set; move it away and evaluate again"
        )
    return run


def _of_file(file: Path, results: Sequence[Mapping[str, Any]]) -> Run:
    syn = load(file)
    record = {
        "dataset": runs.source_of(file, syn.origin.dataset_name),
        "buffers": runs.read_record(file.parent).get("buffers", {}),
    }
    return Run(path=file, syn=syn, snapshots={}, log=[], results=results, uses=[], record=record)


def _of_folder(folder: Path, results: Sequence[Mapping[str, Any]]) -> Run:
    finished = folder / "synthetic.safetensors"
    if not finished.exists():
        raise ValueError(f"{folder} is not finished; repeat the command that started it with {spelt('resume', True)}")
    syn = load(finished)
    snapshots = {int(file.stem.removeprefix("step_")): load(file) for file in _snapshots(folder)}
    log, record = steps_of(folder), runs.read_record(folder)
    num_steps = record.get("steps", len(log) if syn.origin.num_steps is None else syn.origin.num_steps)
    return Run(
        path=folder,
        syn=syn,
        snapshots={**{step: snapshot for step, snapshot in snapshots.items() if step < num_steps}, num_steps: syn},
        log=log,
        results=results,
        uses=uses_of(folder),
        record=record,
    )


def steps_of(folder: Path) -> list[Mapping[str, Any]]:
    """Return the numbers that a run's log has for each step."""
    lines = [line for line in read_log(folder / "log.jsonl") if "event" not in line]
    numbers = [{name: value for name, value in line.items() if mismatch(value, float) is None} for line in lines]
    return [line for line in numbers if isinstance(line.get("step"), int)]


def uses_of(folder: Path) -> list[Mapping[str, Any]]:
    """Return the tables (title, columns, rows) that ``condense apply`` wrote.

    Raises:
        ValueError: an ``apply-*.json`` file has no such table.
    """
    fix = "move it away or run condense apply again"
    tables: list[Mapping[str, Any]] = []
    for file in sorted(folder.glob("apply-*.json")):
        content = read_json(file, fix=fix, finite=False)
        try:
            tables.append(dataclasses.asdict(from_json(_Uses, content, "it").table))
        except ValueError as error:
            raise ValueError(f"{file} holds no findings: {error}; {fix}") from error
    return tables


@dataclass(frozen=True)
class _Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row does not have {len(self.columns)} entries, one for each column")


@dataclass(frozen=True)
class _Uses:
    """The part of ``apply-*.json`` that the report reads."""

    table: _Table


def _snapshots(folder: Path) -> list[Path]:
    files = sorted((folder / "snapshots").glob("step_*.safetensors"))
    return [file for file in files if re.fullmatch(r"step_\d+", file.stem)]
