"""Sets of the same budget that other recipes make of the same data, to compare a set with."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from condense import __version__, engine, registry
from condense.cache import Cache, cache_folder
from condense.data.datasets import Arrays
from condense.exchange import External
from condense.experiment import check, find_recipe, prepare, resolve
from condense.method import Context
from condense.networks import Factory
from condense.recipe import Recipe
from condense.synthetic.files import load, save
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.tracking import progress

Budget = Literal["images", "bytes"]
"""What a baseline has as much of as the set: images a class, or bytes of images, labels and decoder together."""


def check_baselines(
    names: Sequence[str], read: SyntheticSet | External, network: str | Factory, seed: int, budget: Budget = "images"
) -> None:
    """Raise ValueError where a baseline of a set would be refused, as far as that is known without its data.

    Of published images, of which the budget is known with the data, the names of the baselines are checked.
    """
    if isinstance(read, SyntheticSet):
        _recipes(names, read, _network(read, network), seed, budget)
    else:
        for name in names:
            find_recipe(name)


def prepare_baselines(
    names: Sequence[str],
    syn: SyntheticSet,
    arrays: Arrays,
    network: str | Factory,
    device: torch.device,
    seed: int,
    budget: Budget = "images",
) -> dict[str, Callable[[], SyntheticSet]]:
    """What makes each baseline of a set, by name. All are prepared now; each is made when it is called.

    A baseline is made by the recipe of its name with the budget, transform, split and network of the set.

    Args:
        names: methods or recipes.
        syn: the set to compare with.
        arrays: its data.
        network: stands in for the network of the set where only the code of its user can build that.
        device: where the baselines are made.
        seed: root of every random draw.
        budget: what the baselines have as much of as the set.

    Raises:
        ValueError: an unknown name; a recipe that is refused, in the words of a distillation by it.
    """
    makers: dict[str, Callable[[], SyntheticSet]] = {}
    task: Task | None = None
    max_bytes = sum(syn.cost()) if budget == "bytes" else None
    network = _network(syn, network)
    for name, plan in _recipes(names, syn, network, seed, budget).items():
        experiment = resolve(plan, arrays, device=device, network=network)
        ctx = prepare(experiment, like=task)
        task = ctx.task
        makers[name] = functools.partial(_make, name, experiment.plan, ctx, max_bytes)
    return makers


def _network(syn: SyntheticSet, default: str | Factory) -> str | Factory:
    network = syn.origin.network or "auto"
    return default if network.startswith("custom:") else network


def _recipes(
    names: Sequence[str], syn: SyntheticSet, network: str | Factory, seed: int, budget: Budget
) -> dict[str, Recipe]:
    origin, recipes = syn.origin, {}
    for name in names:
        plan, _ = find_recipe(name, origin.dataset_name, syn.ipc)
        recipes[name] = dataclasses.replace(
            plan,
            dataset=origin.dataset_name,
            transform=origin.transform_name,
            split=origin.split,
            ipc=_affordable(syn, plan) if budget == "bytes" else syn.ipc,
            seed=seed,
        )
        check(recipes[name], network)
    return recipes


def _make(name: str, plan: Recipe, ctx: Context, max_bytes: int | None) -> SyntheticSet:
    made = _cached(name, plan, ctx)
    if max_bytes is not None and sum(made.cost()) > max_bytes:
        warnings.warn(f"{name} takes {sum(made.cost())} bytes, the set {max_bytes}", stacklevel=2)
    return made


def _cached(name: str, plan: Recipe, ctx: Context) -> SyntheticSet:
    """The set that a recipe makes; made once, then cached."""
    device = ctx.task.device
    listed = registry.name_of(plan.method) in registry.METHODS and not plan.network.startswith("custom:")
    cache = Cache(cache_folder() if listed else None, "baselines")
    key = {"recipe": ctx.origin.recipe_hash, "device": device.type, "code": __version__}
    cached = cache.read(key, load)
    if cached is not None:
        return cached.to(device)
    title = f"{name} {ctx.task.name} ipc {plan.ipc}"
    with plan.compute.arithmetic(), progress(title, plan.method.num_steps) as bar:
        made = engine.compute(plan.method, ctx, lambda done, record: bar(done))
    cache.write(key, lambda folder: save(made, folder / "synthetic.safetensors"), about=title)
    return made


def _affordable(syn: SyntheticSet, plan: Recipe) -> int:
    """Images a class, in the arithmetic of ``syn``, whose images and labels take no more bytes than all of ``syn``; at
    least one."""
    classes = syn.origin.num_classes
    labels = plan.labels.build(torch.zeros(1, dtype=torch.long), classes).state_dict().values()
    each = math.prod(syn.origin.input_shape) * syn.latents.itemsize + sum(t.nbytes for t in labels)
    return max(1, sum(syn.cost()) // (classes * each))
