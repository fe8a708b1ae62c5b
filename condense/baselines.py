"""Baselines of a set: sets that other recipes make from the same data at the same budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from condense import engine, registry
from condense.cache import Cache, cache_folder
from condense.data.datasets import Arrays
from condense.exchange import External
from condense.experiment import check, find_recipe, prepare, resolve
from condense.method import Context
from condense.names import spelt
from condense.networks import Factory
from condense.plugins import code_of
from condense.recipe import Recipe
from condense.rng import VERSION
from condense.synthetic.decode import Pixels8Bit
from condense.synthetic.files import load, save
from condense.synthetic.labels import Hard
from condense.synthetic.patches import Patches
from condense.synthetic.set import SyntheticSet
from condense.task import IpcPolicy, Task
from condense.tracking import progress

Budget = Literal["images", "bytes"]
"""What a baseline and the set have in common: images per class, or total bytes of images, labels and decoder."""


def check_baselines(
    names: Sequence[str], read: SyntheticSet | External, network: str | Factory, seed: int, budget: Budget = "images"
) -> None:
    """Raise ValueError if a baseline of a set is invalid, as far as this can be checked without the data.

    For published images only the names of the baselines are checked, since their budget depends on the data.
    """
    if isinstance(read, SyntheticSet):
        _recipes(names, read, _network(read, network), seed, budget)
    else:
        for name in names:
            find_recipe(name)


def require_classes_alone(names: Sequence[str], syn: SyntheticSet) -> None:
    """Raise ValueError if a baseline of a set whose views are labelled has labels of its own, which would be lost."""
    for name in names:
        plan, _ = find_recipe(name, syn.origin.dataset_name, syn.ipc)
        if not isinstance(plan.labels, Hard):
            raise ValueError(
                f"{name} has labels of its own, and here the teacher of the set labels the views of its baselines; "
                f"give {spelt('baselines', ('random',))}, or compare the set before `condense relabel`"
            )


def prepare_baselines(
    names: Sequence[str],
    syn: SyntheticSet,
    arrays: Arrays,
    network: str | Factory,
    device: torch.device,
    seed: int,
    budget: Budget = "images",
) -> dict[str, Callable[[], SyntheticSet]]:
    """Prepare all baselines of a set, and return one function per name that makes the baseline when it is called.

    A baseline uses the recipe of its name with the budget, transform, split and network of the set.

    Args:
        names: methods or recipes.
        syn: the set to compare with.
        arrays: the data of the set.
        network: replaces the network of the set if that was given as a callable.
        device: the device to compute on.
        seed: seed of all random numbers.
        budget: whether the baselines have the same images per class or the same bytes as the set.

    Raises:
        ValueError: unknown name, or a recipe that ``condense distill`` refuses too.
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
        if plan.method.private:
            raise ValueError(
                f"{name} is no baseline: each set that it makes spends privacy; distil one, and compare its results "
                "with condense report"
            )
        if not syn.decode.differentiable and not plan.method.learns:
            whole = isinstance(syn.decode, Patches)
            plan = dataclasses.replace(plan, decode=Pixels8Bit() if whole else syn.decode)
        recipes[name] = dataclasses.replace(
            plan,
            dataset=origin.dataset_name,
            transform=origin.transform_name,
            split=origin.split,
            **_budget(syn, plan, budget),
            seed=seed,
        )
        check(recipes[name], network)
    return recipes


def _make(name: str, plan: Recipe, ctx: Context, max_bytes: int | None) -> SyntheticSet:
    made = _cached(name, plan, ctx)
    if max_bytes is not None and sum(made.cost()) > max_bytes:
        warnings.warn(
            f"the baseline {name} takes {sum(made.cost())} bytes, more than the {max_bytes} bytes of the set",
            stacklevel=2,
        )
    return made


def _cached(name: str, plan: Recipe, ctx: Context) -> SyntheticSet:
    """Return the set that a recipe makes, from the cache if it is there."""
    device = ctx.task.device
    listed = registry.name_of(plan.method) in registry.METHODS and not plan.network.startswith("custom:")
    cache = Cache(cache_folder() if listed else None, "baselines")
    values = (plan.method, *vars(plan.method).values(), plan.decode, plan.labels)
    code = code_of(*(type(value).__module__ for value in values), ctx.task.network.module)
    key = {"recipe": ctx.origin.recipe_hash, "device": device.type, "code": code, "draws": VERSION}
    cached = cache.read(key, load)
    if cached is not None:
        return cached.to(device)
    title = f"{name} {ctx.task.name} {plan.budget_in_words}"
    with plan.compute.arithmetic(), progress(title, plan.method.total_steps(ctx)) as bar:
        made = engine.compute(plan.method, ctx, lambda done, record: bar(done))
    cache.write(key, lambda folder: save(made, folder / "synthetic.safetensors"), about=title)
    return made


def _budget(syn: SyntheticSet, plan: Recipe, budget: Budget) -> dict[str, Any]:
    """Return the fields of a recipe that give the budget of ``syn``. Where the set was made although classes have few
    images, a selection takes all of them and other methods repeat them."""
    policy: IpcPolicy = "refuse"
    if syn.origin.ipc_policy != "refuse":
        policy = "all" if plan.method.selects else "repeat"
    if budget == "bytes":
        return {"ipc": _affordable(syn, plan), "fraction": None, "budget": "floats", "ipc_policy": policy}
    fraction = syn.origin.fraction
    ipc = syn.ipc if fraction is None else None
    unit = syn.origin.budget if plan.decode == syn.decode else "floats"
    return {"ipc": ipc, "fraction": fraction, "budget": unit, "ipc_policy": policy}


def _affordable(syn: SyntheticSet, plan: Recipe) -> int:
    """Return the largest number of images per class (at least 1) whose images and labels take at most the bytes of
    ``syn``. Pixels are of its number type; of float32 where ``syn`` has 8-bit pixels and the recipe has not. Baselines
    of a set whose views are labelled get the same labels."""
    classes, shape = syn.origin.num_classes, syn.origin.input_shape
    kind = syn.label_kind if syn.label_kind.of_views else plan.labels
    same_type = syn.decode.differentiable or not plan.decode.differentiable
    itemsize = syn.latents.itemsize if same_type else 4

    def labels(ipc: int) -> int:
        with torch.device("meta"):
            provider = kind.provider(torch.zeros(classes * ipc, dtype=torch.long), classes, shape, 1)
        return sum(tensor.nbytes for tensor in provider.state_dict().values())

    each = labels(2) - labels(1)
    fixed = labels(1) - each
    return max(1, (sum(syn.cost()) - fixed) // (classes * math.prod(shape) * itemsize + each))
