"""Choose settings of recipes for the digits, and of rows of the table of results, on held-out training images.

    python -m benchmarks.choices [--data FOLDER] [--only NAME ...] [--rows results/choices]

``results/choices.yaml`` names recipes or rows, and the values of their fields. Each combination of values is distilled
from the training images less a fifth of each class, with several seeds. Its sets are scored on that fifth, under the
training of the method (``own``), whose fields begin with ``protocol.``; the network is that of the method, or the first
one on which a row is scored. Test images are not used. FOLDER has the ``.npz`` files of rows. ``--rows`` keeps one JSON
file per name; those that it holds are not measured again. docs/results.md has their table, and recipes and rows have
the values of the best combination.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
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
from benchmarks.methods import buffers, make_buffers
from benchmarks.results import queue, table
from benchmarks.results.table import Row
from condense import api, recipe, sweep
from condense.commands import Buffer, Evaluate
from condense.eval.protocol import own, own_network
from condense.files import read_yaml
from condense.names import suggest
from condense.recipe import Recipe
from condense.synthetic.set import SyntheticSet
from condense.task import Split

ROOT = Path(__file__).parents[1]
CHOICES = ROOT / "results" / "choices.yaml"
TABLE = ROOT / "results" / "table.yaml"

HELD_OUT = Split(val_fraction=0.2)
SCORING = "protocol."
"""Beginning of the fields of the training on a set, which need no other set."""
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
    """Name of a recipe or of a row."""
    axes: tuple[str, ...]
    """The fields and their values, as ``condense distill --sweep`` takes them."""
    tried: tuple[Tried, ...]
    minutes: float
    provenance: Provenance
    settings: str = ""
    """Digest of the recipe with its first combination, of its experts and of the scoring; empty in older ones."""

    @property
    def ranked(self) -> list[Tried]:
        """The combinations, best first; of equal ones, the one that ``axes`` names first."""
        return sorted(self.tried, key=lambda one: -statistics.fmean(one.accuracies))

    def cells(self) -> str:
        """A row of the Markdown table."""
        best, second = self.ranked[:2]
        described = [text for one in (best, second) for text in (_named(one), harness.mean_and_std(one.accuracies))]
        return harness.table_line([f"`{self.recipe}`", str(len(self.tried)), *described, f"{self.minutes:.1f}"])


HEAD = harness.table_head(["recipe or row", "combinations", "best", "held-out, %", "second", "held-out, %", "minutes"])


def tables(folder: Path) -> list[str]:
    """The lines of a table of the choices in ``folder``."""
    choices = [harness.read(Choice, file) for file in sorted(folder.glob("*.json"))]
    if not choices:
        return []
    places = "; ".join(dict.fromkeys(str(choice.provenance) for choice in choices))
    rows = [choice.cells() for choice in choices]
    return [*HEAD, *rows, "", "    python -m benchmarks.choices --data FOLDER", "", f"{places}.", ""]


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


def base(name: str) -> tuple[Recipe, Row | None]:
    """Return the recipe of that name, or else that of a row, and the row.

    Raises:
        ValueError: there is neither.
    """
    rows = {row.name: row for row in table.read(TABLE).rows}
    row = rows.get(name)
    if row is None:
        return recipe.named(name), None
    plan = recipe.find(row.method, row.dataset, row.ipc).recipe
    flags = ["--dataset", row.dataset, "--ipc", str(row.ipc), *shlex.split(row.flags)]
    return recipe.parse(tyro.conf.FlagConversionOff[Recipe], flags, plan), row


def settings(name: str, axes: Sequence[str]) -> str:
    """Return the digest of all settings of a choice but its axes.

    The fields that are chosen have their first values in it, because the recipe gets the best ones afterwards.
    """
    plan, row = base(name)
    first = dict(sweep.grid(axes, ())[0].values)
    plan = with_values(plan, {field: text for field, text in first.items() if not field.startswith(SCORING)})
    plan = dataclasses.replace(plan, split=HELD_OUT)
    how = [row.buffer, _networks(row)] if row else buffers(plan)
    return harness.digest(plan.hash(row.dataset if row else "digits"), how, SEEDS, NUM_NETWORKS)


def measure(name: str, axes: Sequence[str], folder: Path, data: Path | None = None) -> Choice:
    """Distil every combination, below ``folder``, and score it. ``data`` is the folder of the files of rows.

    Raises:
        ValueError: there are not two combinations; the file of the data of a row is missing.
    """
    cells = sweep.grid(axes, ())
    if len(cells) < 2:
        raise ValueError(f"{name} has nothing to choose from; give a field two values in {CHOICES}")
    plan, row = base(name)
    held_out = dataclasses.replace(plan, dataset=_file(row, data) if row else "digits", split=HELD_OUT)
    root = folder / "buffers"
    made: dict[str, SyntheticSet] = {}

    def distilled(values: Mapping[str, str], seed: int) -> SyntheticSet:
        out = folder / sweep.Cell(tuple(values.items()), seed).name
        if out.name not in made:
            plan = with_values(held_out, values)
            if row is None:
                make_buffers(plan, root)
            elif row.buffer:
                flags = recipe.parse(Buffer, shlex.split(row.buffer), Buffer())
                places = {"dataset": plan.dataset, "split": HELD_OUT, "out": root, "device": "cpu"}
                api.make_buffer(**vars(dataclasses.replace(flags, **places)))
            options = api.RunOptions(out=out, buffers=root, device="cpu")
            made[out.name] = api.run(dataclasses.replace(plan, seed=seed), options)
        return made[out.name]

    begun, tried = time.monotonic(), []
    for cell in cells:
        values, accuracies = dict(cell.values), []
        training = [f"--{field}={value}" for field, value in values.items() if field.startswith(SCORING)]
        for seed in SEEDS:
            syn = distilled({field: text for field, text in values.items() if not field.startswith(SCORING)}, seed)
            found = api.evaluate(
                syn,
                held_out.dataset,
                networks=_networks(row) or own_network(syn),
                num_seeds=NUM_NETWORKS,
                protocol=recipe.parse(Evaluate, training, Evaluate(protocol=own(syn))).protocol,
                split="validation",
                compute=held_out.compute,
                device="cpu",
            )
            accuracies += found.results[0].accuracies
        tried.append(Tried(values=values, accuracies=tuple(accuracies)))
        print(f"{name}: {_named(tried[-1])}: {harness.mean_and_std(accuracies)}", flush=True)
    return Choice(
        recipe=name,
        axes=tuple(axes),
        tried=tuple(tried),
        minutes=(time.monotonic() - begun) / 60,
        provenance=Provenance.now(torch.device("cpu")),
        settings=settings(name, axes),
    )


def _networks(row: Row | None) -> str | None:
    """Return the networks on which a row is scored."""
    return recipe.take(shlex.split(row.scoring), "--networks")[1] if row else None


def _file(row: Row, data: Path | None) -> str:
    files = queue.files(table.read(TABLE).data, data)
    if row.dataset not in files:
        raise ValueError(f"{row.name} needs the file of {row.dataset}; give --data the folder that has it")
    return str(files[row.dataset])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the .npz files")
    parser.add_argument("--only", nargs="+", help="recipes or rows")
    parser.add_argument("--rows", type=Path, default=ROOT / "results" / "choices", help="folder of the results")
    chosen = parser.parse_args()
    named = read(CHOICES)
    asked = chosen.only or [*named]
    for name in asked:
        if name not in named:
            raise ValueError(f"{CHOICES} has no recipe or row {name!r}; {suggest(name, named)}")
    for name in asked:
        file = chosen.rows / f"{name}.json"
        choice = harness.kept(Choice, file, {"axes": named[name], "settings": settings(name, named[name])})
        if choice is None:
            with tempfile.TemporaryDirectory() as folder:
                choice = measure(name, named[name], Path(folder), chosen.data)
            harness.write(choice, file)
        print(
            f"{name}:", *(f"{_named(one)}: {harness.mean_and_std(one.accuracies)}" for one in choice.ranked), sep="\n  "
        )


def _named(one: Tried) -> str:
    return ", ".join(f"`{name} {value}`" for name, value in one.values.items())


if __name__ == "__main__":
    sys.exit(harness.status("choices", main))
