"""Compare every learning method with random real images on the embedded digits, under the method's own protocol.

    python -m benchmarks.methods [--only NAME ...] [--num-seeds N] [--draws D]

Each method runs its recipe for the digits (``NAME-digits-ipcK``). A buffer of experts is built for methods that need
one. Then N fresh networks are trained on its set and N on the same number of random images per class, with the training
that is stored in the set (``own``): the same networks, steps and augmentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from condense import api, catalog, recipe, registry
from condense.artifacts import ArtifactSpec, TrainedNetworkSpec, TrajectorySpec
from condense.buffers.trajectories import Experts
from condense.data import datasets
from condense.eval.protocol import own, own_network
from condense.eval.results import Result

EXPERTS = Experts(num_experts=5, num_epochs=12, lr=0.02, batch_size=64)
"""Training of the experts for methods that match trajectories."""
BACKBONE = Experts(num_epochs=20, lr=0.05, momentum=0.9, weight_decay=1e-4, projector=256)
"""Training of networks without labels, whose features are used."""


class Row(NamedTuple):
    method: str
    ipc: int
    learned: Result
    random: Result
    seconds: float
    """Time of the distillation, without experts."""

    def __str__(self) -> str:
        accuracies = [f"{100 * r.mean:.1f} ± {100 * (r.std or 0):.1f}" for r in (self.learned, self.random)]
        name, seconds = f"`{self.method}`", f"{self.seconds:.0f}"
        return f"| {name} | {self.ipc} | {accuracies[0]} | {accuracies[1]} | {self.learned.n} | {seconds} |"


HEADER = "| method | images a class | accuracy, % | random, % | n | seconds |\n|---|---|---|---|---|---|"


def names() -> list[str]:
    """Return the learning methods whose sets have classes, and recipes for the digits that are not named after a
    method."""
    recipes = {entry.stem for entry in catalog.recipes().values() if entry.dataset == "digits"}
    methods = {key: registry.load(key) for key in registry.METHODS}
    learning = [key for key, method in methods.items() if method.learns and method.has_classes]
    return learning + sorted(recipes - registry.METHODS.keys())


def digits_recipe(name: str) -> recipe.Recipe:
    """Return the recipe for the digits with the budget nearest to one image per class. Raises ValueError if there is
    none."""
    entry = catalog.published(name, "digits", 1)
    if entry is None or entry.dataset != "digits":
        raise ValueError(f"{name} has no recipe for the digits; add a row to methods/recipes/{name}.yaml")
    return recipe.named(entry.name)


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


def measure(name: str, folder: Path, num_seeds: int, draws: int = 1) -> Row:
    """Distil with a method's recipe for the digits, below ``folder``; evaluate its set, and random images of ``draws``
    draws, with ``num_seeds`` networks each."""
    plan = digits_recipe(name)
    options = api.RunOptions(out=folder / name, buffers=folder / f"{name}-experts")
    task = api.plain_task(datasets.load("digits"), plan.network, plan.transform, plan.split)
    for spec in plan.method.needs(task).values():
        common = {"experts": experts_for(spec, plan.augment), "transform": plan.transform}
        api.make_buffer("digits", spec.identity["network"], out=options.buffers, **common)
    begun = time.monotonic()
    syn = api.run(plan, options)
    seconds = time.monotonic() - begun
    random = [
        api.distill(
            "random", dataset="digits", network=plan.network, ipc=plan.ipc, seed=seed, out=folder / f"{name}-{seed}"
        )
        for seed in range(draws)
    ]
    network, training = own_network(syn), own(syn)
    learned, *others = [
        api.evaluate(made, "digits", networks=[network], num_seeds=num_seeds, protocol=training).results[0]
        for made in (syn, *random)
    ]
    accuracies = tuple(accuracy for other in others for accuracy in other.accuracies)
    metrics = {key: [value for other in others for value in other.metrics[key]] for key in others[0].metrics}
    merged = dataclasses.replace(others[0], accuracies=accuracies, metrics=metrics)
    return Row(name, plan.ipc, learned, merged, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names())
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1, help="number of draws of random images (default: 1)")
    chosen = parser.parse_args()
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only:
            print(measure(name, Path(folder), chosen.num_seeds, chosen.draws), flush=True)


if __name__ == "__main__":
    main()
