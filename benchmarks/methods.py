"""Compare every learning method with random real images on the embedded digits, under the method's own protocol.

    python -m benchmarks.methods [--only NAME ...] [--num-seeds 3] [--draws 3] [--rows results/methods]

Each method runs its recipe for the digits (``NAME-digits-ipcK``). A buffer of experts is built for methods that need
one. Then N fresh networks are trained on its set, and N on the same number of random images per class in each of D
draws, with the training that is stored in the set (``own``): the same networks, steps and augmentation.

``--rows`` keeps one JSON file per method; methods that it holds are not measured again. docs/results.md has their
table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Provenance
from condense import api, catalog, recipe, registry
from condense.artifacts import ArtifactSpec, TrainedNetworkSpec, TrajectorySpec
from condense.buffers.trajectories import Experts
from condense.data import datasets
from condense.eval.protocol import own, own_network
from condense.recipe import Recipe

EXPERTS = Experts(num_experts=5, num_epochs=12, lr=0.02, batch_size=64)
"""Training of the experts for methods that match trajectories."""
BACKBONE = Experts(num_epochs=20, lr=0.05, momentum=0.9, weight_decay=1e-4, projector=256)
"""Training of networks without labels, whose features are used."""


@dataclass(frozen=True, kw_only=True)
class Row:
    method: str
    recipe: str
    ipc: int
    num_seeds: int
    draws: int
    learned: tuple[float, ...]
    """Accuracies of networks on the set, as fractions."""
    random: tuple[float, ...]
    """Accuracies of networks on random images, draw by draw."""
    seconds: float
    """Time of the distillation, without experts."""
    provenance: Provenance
    settings: str = ""
    """Digest of the recipe and the training of its experts; empty in older rows."""

    def cells(self) -> str:
        """A row of the Markdown table."""
        accuracies = [harness.mean_and_std(self.learned), harness.mean_and_std(self.random)]
        return harness.table_line([f"`{self.recipe}`", str(self.ipc), *accuracies, f"{self.seconds:.0f}"])


HEAD = harness.table_head(["recipe", "images per class", "set, %", "random images, %", "distilled in, s"])


def tables(folder: Path) -> list[str]:
    """The lines of a table for each number of networks and draws of the rows in ``folder``."""
    rows = [harness.read(Row, file) for file in sorted(folder.glob("*.json"))]
    lines = []
    for num_seeds, draws in sorted({(row.num_seeds, row.draws) for row in rows}, reverse=True):
        given = [row for row in rows if (row.num_seeds, row.draws) == (num_seeds, draws)]
        lines += [*HEAD, *map(Row.cells, sorted(given, key=lambda row: (row.ipc, row.method))), ""]
        lines += [f"    python -m benchmarks.methods --num-seeds {num_seeds} --draws {draws}", ""]
        lines += [f"{'; '.join(dict.fromkeys(str(row.provenance) for row in given))}; seed 0.", ""]
    return lines


def names() -> list[str]:
    """Return the learning methods whose sets have classes, and recipes for the digits that are not named after a
    method."""
    recipes = {entry.stem for entry in catalog.recipes().values() if entry.dataset == "digits"}
    methods = {key: registry.load(key) for key in registry.METHODS}
    learning = [key for key, method in methods.items() if method.learns and method.has_classes]
    return learning + sorted(recipes - registry.METHODS.keys())


def digits_recipe(name: str) -> catalog.Entry:
    """Return the entry of the recipe for the digits with the budget nearest to one image per class. Raises ValueError
    if there is none."""
    entry = catalog.published(name, "digits", 1)
    if entry is None or entry.dataset != "digits":
        raise ValueError(f"{name} has no recipe for the digits; add a row to methods/recipes/{name}.yaml")
    return entry


def experts_for(spec: ArtifactSpec, augment: str) -> Experts:
    """Return the training of experts with this augmentation, or of teachers, that satisfies ``spec``."""
    if isinstance(spec, TrainedNetworkSpec):
        objective = spec.identity.get("training", {}).get("objective")
        teacher = dataclasses.replace(EXPERTS, augment="none")
        if objective is not None:
            teacher = dataclasses.replace(BACKBONE, objective=objective)
        return dataclasses.replace(teacher, num_experts=spec.num_networks)
    assert isinstance(spec, TrajectorySpec)
    ascent = {"rho": 0.01, "alpha": 0.3} if spec.experts == "gsam" else {}
    num_epochs = max(EXPERTS.num_epochs, spec.num_epochs)
    return dataclasses.replace(EXPERTS, num_epochs=num_epochs, augment=augment, **ascent)


def buffers(plan: Recipe) -> list[dict[str, Any]]:
    """Return the arguments of ``make_buffer`` for each buffer of the digits that a recipe needs."""
    task = api.plain_task(datasets.load("digits"), plan.network, plan.transform, plan.split)
    common = {"dataset": "digits", "transform": plan.transform, "split": plan.split}
    return [
        {**common, "network": spec.identity["network"], "experts": experts_for(spec, plan.augment)}
        for spec in plan.method.needs(task).values()
    ]


def make_buffers(plan: Recipe, root: Path) -> None:
    """Make the buffers of the digits that a recipe needs, below ``root``, unless they lie there."""
    for arguments in buffers(plan):
        api.make_buffer(**arguments, out=root, device="cpu")


def settings(plan: Recipe) -> str:
    """Return the digest of a recipe and of the training of its experts."""
    return harness.digest(plan.hash("digits"), buffers(plan))


def measure(name: str, folder: Path, num_seeds: int, draws: int = 1) -> Row:
    """Distil with a method's recipe for the digits, below ``folder``; evaluate its set, and random images of ``draws``
    draws, with ``num_seeds`` networks each."""
    plan = recipe.named(digits_recipe(name).name)
    options = api.RunOptions(out=folder / name, buffers=folder / f"{name}-experts", device="cpu")
    make_buffers(plan, options.buffers)
    begun = time.monotonic()
    syn = api.run(plan, options)
    seconds = time.monotonic() - begun
    random = [
        api.distill(
            "random",
            dataset="digits",
            network=plan.network,
            ipc=plan.ipc,
            seed=seed,
            out=folder / f"{name}-{seed}",
            device="cpu",
        )
        for seed in range(draws)
    ]
    network, training = own_network(syn), own(syn)
    common = {"networks": [network], "num_seeds": num_seeds, "protocol": training, "device": "cpu"}
    learned, *others = [api.evaluate(made, "digits", **common).results[0].accuracies for made in (syn, *random)]
    return Row(
        method=name,
        recipe=digits_recipe(name).name,
        ipc=plan.ipc,
        num_seeds=num_seeds,
        draws=draws,
        learned=learned,
        random=tuple(accuracy for other in others for accuracy in other),
        seconds=seconds,
        provenance=Provenance.now(torch.device("cpu")),
        settings=settings(plan),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names())
    parser.add_argument("--num-seeds", type=harness.count, default=3)
    parser.add_argument("--draws", type=harness.count, default=3, help="number of draws of random images")
    parser.add_argument("--rows", type=Path, help="folder of the rows; methods that it holds are not measured again")
    chosen = parser.parse_args()
    recipes = {name: digits_recipe(name).name for name in chosen.only}
    print("\n".join(HEAD), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen_recipe in recipes.items():
            file, row = chosen.rows and chosen.rows / f"{name}.json", None
            if file:
                facts = {"num_seeds": chosen.num_seeds, "draws": chosen.draws, "recipe": chosen_recipe}
                row = harness.kept(Row, file, {**facts, "settings": settings(recipe.named(chosen_recipe))})
            if row is None:
                row = measure(name, Path(folder), chosen.num_seeds, chosen.draws)
                if file:
                    harness.write(row, file)
            print(row.cells(), flush=True)


if __name__ == "__main__":
    sys.exit(harness.status("methods", main))
