"""What a run folder says of itself, read once and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from condense import runs
from condense.eval import crossarch
from condense.files import checksum
from condense.names import spelt
from condense.synthetic.files import load
from condense.synthetic.set import SyntheticSet
from condense.tracking import read_log


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished distillation and what was measured of it."""

    folder: Path
    syn: SyntheticSet
    snapshots: Mapping[int, SyntheticSet]
    """By steps done, in order; the last one is the set itself."""
    log: Sequence[Mapping[str, Any]]
    """The numbers of each step."""
    results: Sequence[Mapping[str, Any]]
    """Rows of ``evaluation.json``."""
    uses: Sequence[Mapping[str, Any]]
    """See ``uses_of``."""
    record: Mapping[str, Any]
    """What it cost, and where it ran."""

    @property
    def method(self) -> str:
        return self.syn.origin.method or "set"

    @property
    def dataset(self) -> str:
        return str(self.syn.origin.dataset["name"])

    @property
    def ipc(self) -> int:
        return int(self.syn.origin.recipe.get("ipc", len(self.syn) // self.syn.origin.num_classes))

    @property
    def network(self) -> str:
        return str(self.syn.origin.recipe.get("network", "unknown"))

    @cached_property
    def sha256(self) -> str:
        """Of the tensors of the set, as results carry it."""
        return checksum(self.syn.state_dict())

    @property
    def own_results(self) -> list[Mapping[str, Any]]:
        """Of the set, without its baselines."""
        return [row for row in self.results if row["synthetic_sha256"] == self.sha256]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number of the log."""
        points = [(record["step"], record[name]) for record in self.log if name in record]
        return [step for step, _ in points], [value for _, value in points]


def collect(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: there is no finished run, or one of its files is damaged.
    """
    finished = folder / "synthetic.safetensors"
    if not folder.is_dir() or not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder} is no run folder; give one that `condense distill` wrote")
    if not finished.exists():
        raise ValueError(f"{folder} is not finished; the command that began it continues with {spelt('resume', True)}")
    syn, evaluation = load(finished), folder / "evaluation.json"
    snapshots = {int(file.stem.removeprefix("step_")): load(file) for file in _snapshots(folder)}
    log = steps_of(folder)
    num_steps = int(syn.origin.recipe.get("method", {}).get("num_steps", len(log)))
    return Run(
        folder=folder,
        syn=syn,
        snapshots={**{step: kept for step, kept in snapshots.items() if step < num_steps}, num_steps: syn},
        log=log,
        results=crossarch.read_complete(evaluation) if evaluation.exists() else [],
        uses=uses_of(folder),
        record=runs.read_record(folder),
    )


def steps_of(folder: Path) -> list[Mapping[str, Any]]:
    """The lines of a run's log that are steps."""
    return [
        line
        for line in read_log(folder / "log.jsonl")
        if isinstance(line, dict) and "step" in line and "event" not in line
    ]


def uses_of(folder: Path) -> list[Mapping[str, Any]]:
    """Title, columns and rows of what ``condense apply`` found.

    Raises:
        ValueError: a file of that name holds something else.
    """
    tables: list[Mapping[str, Any]] = []
    for file in sorted(folder.glob("apply-*.json")):
        try:
            table = json.loads(file.read_text(encoding="utf-8"))["table"]
            tables.append({name: table[name] for name in ("title", "columns", "rows")})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} holds no findings: {error!r}; remove it or run condense apply again") from error
    return tables


def _snapshots(folder: Path) -> list[Path]:
    files = sorted((folder / "snapshots").glob("step_*.safetensors"))
    return [file for file in files if re.fullmatch(r"step_\d+", file.stem)]
