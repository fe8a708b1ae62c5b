"""Several distillations of one command: seeds, and a grid of fields that is chosen from on validation images."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense.names import percent
from condense.overview import RunSummary
from condense.rng import check_seed

MOST_CELLS = 10_000
"""Largest number of distillations of one command."""

LAST_STEP = 10**9
"""Number of steps between evaluations that leaves the one after the last step."""


@dataclass(frozen=True)
class Cell:
    """One distillation of a sweep."""

    values: tuple[tuple[str, str], ...]
    """The swept fields and their values."""
    seed: int | None
    """Seed of the recipe; None where the seed is not swept."""

    @property
    def flags(self) -> list[str]:
        pairs = [*self.values, *([] if self.seed is None else [("seed", str(self.seed))])]
        return [f"--{field}={value}" for field, value in pairs]

    @property
    def name(self) -> str:
        """Name of the run folder, such as ``method.optim.lr=10,seed0``."""
        parts = [f"{field}={value}" for field, value in self.values]
        parts += [] if self.seed is None else [f"seed{self.seed}"]
        return re.sub(r"[^\w.,=+-]", "_", ",".join(parts))


def seeds_of(text: str) -> tuple[int, ...]:
    """Read seeds: ``0-4``, ``0,3,7`` or both.

    Raises:
        ValueError: the text has another form, or a seed occurs twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first or last - first >= MOST_CELLS:
            raise ValueError(f"--seeds takes whole numbers, not {text!r}; give e.g. --seeds 0-4 or --seeds 0,3,7")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text} has a seed twice; leave one out")
    for seed in seeds:
        check_seed(seed)
    return tuple(seeds)


def grid(axes: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a grid, with the last axis changing first and the seed before it.

    Args:
        axes: texts such as ``method.optim.lr=1,10,100``.
        seeds: seeds of every point of the grid; none leaves the seed of the recipe.

    Raises:
        ValueError: an axis has another form or occurs twice; the grid is too large.
    """
    fields: dict[str, list[str]] = {}
    for axis in axes:
        field, _, text = axis.partition("=")
        field, values = field.removeprefix("--").replace("_", "-"), text.split(",")
        if not field or not all(values) or len(set(values)) < len(values):
            raise ValueError(
                f"--sweep takes a field and its different values, not {axis!r}; give e.g. --sweep method.optim.lr=1,10"
            )
        if field in fields:
            raise ValueError(f"--sweep names {field} twice; give all of its values together")
        if field in ("dataset", "out", "seed", "seeds", "sweep", "resume"):
            instead = "--seeds 0-4" if field.startswith("seed") else "one command for each"
            raise ValueError(f"--sweep does not take {field}; give {instead}")
        fields[field] = values
    points = itertools.product(*([(field, value) for value in values] for field, values in fields.items()))
    cells = [
        Cell(point, seed) for point in itertools.islice(points, MOST_CELLS + 1) for seed in (seeds if seeds else [None])
    ]
    if len(cells) > MOST_CELLS:
        raise ValueError(f"the sweep has more than {MOST_CELLS} distillations; give fewer values")
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(
            "two cells of the sweep would share a run folder; give values that differ in letters or digits"
        )
    return cells


@dataclass(frozen=True, kw_only=True)
class Point:
    """The distillations of one point of the grid."""

    values: Mapping[str, str]
    folders: tuple[str, ...]
    diverged: int
    """Number of distillations that diverged."""
    val_accuracies: tuple[float, ...]
    """Accuracies of the last sets on the validation split, one for each seed; empty without a validation split."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.val_accuracies) if self.val_accuracies else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation between distillations; None for a single seed."""
        return statistics.stdev(self.val_accuracies) if len(self.val_accuracies) > 1 else None


def points(cells: Sequence[Cell], folders: Sequence[Path], found: Sequence[RunSummary | None]) -> list[Point]:
    """Group the distillations of a sweep by point of the grid. ``found`` is None for those that diverged."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for k, cell in enumerate(cells):
        groups.setdefault(cell.values, []).append(k)
    return [
        Point(
            values=dict(values),
            folders=tuple(str(folders[k]) for k in group),
            diverged=sum(found[k] is None for k in group),
            val_accuracies=tuple(
                run.last_val_accuracy for k in group if (run := found[k]) and run.last_val_accuracy is not None
            ),
        )
        for values, group in groups.items()
    ]


def best(of: Sequence[Point]) -> Point | None:
    """Return the point with the highest mean accuracy on the validation split, among those of which every distillation
    has one; the first of equal ones, and None if there is none."""
    eligible = [point for point in of if len(point.val_accuracies) == len(point.folders)]
    return max(eligible, key=lambda point: point.mean or 0.0, default=None)


def table(of: Sequence[Point], chosen: Point | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows for the terminal; the chosen point has a star."""
    columns = (*of[0].values, "seeds", "validation %", "diverged", "")
    rows = [
        (
            *point.values.values(),
            str(len(point.folders)),
            percent(point.mean, point.deviation),
            str(point.diverged or "-"),
            "*" if point is chosen else "",
        )
        for point in of
    ]
    return columns, rows


def as_json(of: Sequence[Point], chosen: Point | None) -> dict[str, Any]:
    """Return the points for JSON."""
    described = [
        {
            "values": dict(point.values),
            "folders": list(point.folders),
            "diverged": point.diverged,
            "val_accuracies": list(point.val_accuracies),
        }
        for point in of
    ]
    return {"points": described, "best": None if chosen is None else dict(chosen.values)}
