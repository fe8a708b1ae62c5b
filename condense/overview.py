"""``condense runs``: the runs below a folder, each in one line."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from condense import runs
from condense.eval.report import steps_of
from condense.eval.results import read_complete
from condense.files import expanded, is_locked, read_header
from condense.schema import checked, from_json
from condense.synthetic.set import RecipeRecord

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the files of one run folder say about it."""

    folder: str
    method: str
    dataset: str
    budget: str
    """The budget in words: ``ipc 10`` or ``fraction 0.3``."""
    seed: int
    state: State
    """``stopped`` for an unfinished run that no process on this machine is working on."""
    steps: int
    """Number of steps done."""
    num_steps: int | None
    """Number of steps of the recipe, as far as it is recorded."""
    best_val_accuracy: float | None
    """Highest accuracy on the validation split during the run, as a fraction; None if it was not measured."""
    last_val_accuracy: float | None
    """The same of the last set."""
    accuracy: float | None
    """Mean accuracy on the test split of networks trained on the set, as a fraction; None before an evaluation. Of
    several results it is the one on the network of the run, else the one of most networks."""
    std: float | None
    """Standard deviation over networks; None for a single network."""
    evaluated: str
    """Network, protocol and number of networks of that accuracy; empty without an accuracy."""
    minutes: float | None
    """Minutes that the distillation took; None for an unfinished run."""


@checked
def find_runs(folder: Path | str = "runs") -> list[RunSummary]:
    """Return the runs in a folder and all folders below it, by path. A run with damaged files is left out with a
    warning.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the folder that holds the runs, e.g. condense runs runs")
    found = []
    for file in sorted(root.rglob("recipe.yaml")):
        try:
            found.append(summary(file.parent))
        except ValueError as error:
            warnings.warn(f"{file.parent} is left out: {error}", stacklevel=2)
    if not found:
        raise ValueError(f"{root} holds no run that can be read; `condense distill METHOD` writes one")
    return found


def summary(folder: Path) -> RunSummary:
    """Summarise one run folder.

    Raises:
        ValueError: it holds no run, or a file is damaged.
    """
    written = runs.written_recipe(folder)
    if written is None:
        raise ValueError(f"{folder} is no run folder; give one that `condense distill` wrote")
    where = f"{folder / 'recipe.yaml'}"
    plan, seed = from_json(RecipeRecord, written, where), from_json(_Seed, written, where)
    finished = folder / "synthetic.safetensors"
    checksum = read_header(finished).get("sha256") if finished.exists() else None
    log, record = steps_of(folder), runs.read_record(folder)
    validated = [line["val_accuracy"] for line in log if "val_accuracy" in line]
    row = headline(folder / "evaluation.json", checksum, plan.network) if checksum else None
    seconds = record.get("seconds") if checksum else None
    return RunSummary(
        folder=str(folder),
        method=plan.method.name,
        dataset=seed.dataset,
        budget=f"ipc {plan.ipc}" if plan.fraction is None else f"fraction {plan.fraction:g}",
        seed=seed.seed,
        state="finished" if checksum else "running" if is_locked(folder / runs.RECORD) else "stopped",
        steps=max((line["step"] for line in log), default=0),
        num_steps=plan.method.num_steps,
        best_val_accuracy=max(validated, default=None),
        last_val_accuracy=validated[-1] if validated else None,
        accuracy=None if row is None else row["mean"],
        std=None if row is None else row["std"],
        evaluated="" if row is None else f"{row['network']}, {row['protocol']}, n = {row['n']}",
        minutes=None if seconds is None else seconds / 60,
    )


def headline(file: Path, checksum: str, network: str | None) -> Mapping[str, Any] | None:
    """Return the row of a file of results for the set with this checksum, preferably on ``network``; else None."""
    rows = read_complete(file) if file.exists() else []
    own = [row for row in rows if row["synthetic_sha256"] == checksum]
    return max(own, key=lambda row: (row["network"] == network, row["n"]), default=None)


COLUMNS = ("run", "method", "data", "budget", "seed", "steps", "best val. %", "accuracy %", "minutes", "state")


def cells(run: RunSummary) -> tuple[str, ...]:
    """Return the entries of a run below ``COLUMNS``."""
    total = run.num_steps
    return (
        run.folder,
        run.method,
        run.dataset,
        run.budget,
        str(run.seed),
        str(run.steps) if run.state == "finished" or total is None else f"{run.steps} of {total}",
        percent(run.best_val_accuracy),
        percent(run.accuracy, run.std),
        "-" if run.minutes is None else f"{run.minutes:.1f}",
        run.state,
    )


def percent(mean: float | None, std: float | None = None) -> str:
    """Return a fraction in percent with its standard deviation, for a table."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def as_json(found: Sequence[RunSummary]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(run) for run in found]


@dataclass(frozen=True)
class _Seed:
    """Further fields of a recipe that are shown."""

    dataset: str
    seed: int = 0
