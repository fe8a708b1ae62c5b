"""Choose settings of the recipes for the digits on held-out training images.

    python -m benchmarks.choices [--only RECIPE ...] [--rows results/choices]

``results/choices.yaml`` names the recipes and the values of their fields. Each combination of values is distilled from
the training images less a fifth of each class, with several seeds. Its sets are scored on that fifth, under the
training of the method (``own``). Test images are not used. ``--rows`` keeps one JSON file per recipe; recipes that it
holds are not measured again. docs/results.md has their table, and the recipes have the values of the best combination.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import harness
from benchmarks.harness import Provenance
from benchmarks.methods import make_buffers
from condense import api, recipe, sweep
from condense.eval.protocol import own_network
from condense.files import read_yaml
from condense.names import suggest
from condense.recipe import Recipe
from condense.task import Split

ROOT = Path(__file__).parents[1]
CHOICES = ROOT / "results" / "choices.yaml"

HELD_OUT = 0.2
SEEDS = (0, 1)
"""Seeds of the distillations of each combination."""
NUM_NETWORKS = 2
"""Networks that are trained on each set."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One combination of values."""

    values: Mapping[str, str]
    accuracies: tuple[float, ...]
    """Accuracies on the held-out images of all networks of all distillations, as fractions."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    recipe: str
    axes: tuple[str, ...]
    """The fields and their values, as ``condense distill --sweep`` takes them."""
    tried: tuple[Tried, ...]
    minutes: float
    provenance: Provenance

    @property
    def ranked(self) -> list[Tried]:
        """The combinations, best first; of equal ones, the one that ``axes`` names first."""
        return sorted(self.tried, key=lambda one: -statistics.fmean(one.accuracies))

    def cells(self) -> str:
        """A row of the Markdown table."""
        best, second = self.ranked[:2]
        described = [text for one in (best, second) for text in (_named(one), harness.mean_and_std(one.accuracies))]
        return harness.table_line([f"`{self.recipe}`", str(len(self.tried)), *described, f"{self.minutes:.1f}"])


HEAD = harness.table_head(["recipe", "combinations", "best", "held-out, %", "second", "held-out, %", "minutes"])


def tables(folder: Path) -> list[str]:
    """The lines of a table of the choices in ``folder``."""
    choices = [harness.read(Choice, file) for file in sorted(folder.glob("*.json"))]
    if not choices:
        return []
    places = "; ".join(dict.fromkeys(str(choice.provenance) for choice in choices))
    return [*HEAD, *map(Choice.cells, choices), "", "    python -m benchmarks.choices", "", f"{places}.", ""]


def read(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the axes of each recipe. Raises ValueError if the file is no mapping of lists."""
    content = read_yaml(path, fix="mend it")
    if not isinstance(content, Mapping) or not all(isinstance(axes, list) for axes in content.values()):
        raise ValueError(f"{path} is no mapping of recipes to lists of fields and values")
    return {str(name): tuple(map(str, axes)) for name, axes in content.items()}


def with_values(plan: Recipe, values: Mapping[str, str]) -> Recipe:
    """Return a recipe with other values of fields, which have the names of flags."""
    return recipe.parse(
        tyro.conf.FlagConversionOff[Recipe], [f"--{name}={text}" for name, text in values.items()], plan
    )


def measure(name: str, axes: Sequence[str], folder: Path) -> Choice:
    """Distil and score every combination, below ``folder``. Raises ValueError if there are not two of them."""
    cells = sweep.grid(axes, ())
    if len(cells) < 2:
        raise ValueError(f"{name} has nothing to choose from; give a field two values in {CHOICES}")
    held_out = dataclasses.replace(recipe.named(name), split=Split(val_fraction=HELD_OUT))
    begun, tried, buffers = time.monotonic(), [], folder / "buffers"
    for cell in cells:
        plan, accuracies = with_values(held_out, dict(cell.values)), []
        make_buffers(plan, buffers)
        for seed in SEEDS:
            out = folder / dataclasses.replace(cell, seed=seed).name
            syn = api.run(dataclasses.replace(plan, seed=seed), api.RunOptions(out=out, buffers=buffers))
            found = api.evaluate(
                syn, "digits", networks=own_network(syn), num_seeds=NUM_NETWORKS, protocol="own", split="validation"
            )
            accuracies += found.results[0].accuracies
        tried.append(Tried(values=dict(cell.values), accuracies=tuple(accuracies)))
    return Choice(
        recipe=name,
        axes=tuple(axes),
        tried=tuple(tried),
        minutes=(time.monotonic() - begun) / 60,
        provenance=Provenance.now(torch.device("cpu")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="recipes")
    parser.add_argument("--rows", type=Path, default=ROOT / "results" / "choices", help="folder of the results")
    chosen = parser.parse_args()
    named = read(CHOICES)
    for name in chosen.only or named:
        if name not in named:
            raise ValueError(f"{CHOICES} has no recipe {name!r}; {suggest(name, named)}")
        file = chosen.rows / f"{name}.json"
        choice = harness.kept(Choice, file, {"axes": named[name]})
        if choice is None:
            with tempfile.TemporaryDirectory() as folder:
                choice = measure(name, named[name], Path(folder))
            harness.write(choice, file)
        print(
            f"{name}:", *(f"{_named(one)}: {harness.mean_and_std(one.accuracies)}" for one in choice.ranked), sep="\n  "
        )


def _named(one: Tried) -> str:
    return ", ".join(f"`{name} {value}`" for name, value in one.values.items())


if __name__ == "__main__":
    sys.exit(harness.status("choices", main))
