"""From a recipe to a running method, the same way for new runs, resumed runs and baselines.

``check``    what the recipe says, before data are read or downloaded;
``resolve``  the recipe and its data: nothing is left open;
``prepare``  the task, what the method needs from disk, and the context that the method is given;
``run``      the method, step by step, in a run folder.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condense import __version__, artifacts, engine, picture, recipe, registry, runs
from condense.artifacts import Artifact
from condense.augment import Augment
from condense.cache import cache_folder
from condense.compute import Compute, forget_peak, prepare_device
from condense.data.datasets import Arrays, Data, name_of, names
from condense.data.transform import check_transform
from condense.distributed import Ranks
from condense.files import expanded, reporting, write_text
from condense.method import Context, Method
from condense.names import spelt
from condense.networks import Factory, Functional, parse
from condense.objective import OBJECTIVES
from condense.recipe import Recipe
from condense.rng import Rng
from condense.runs import RunOptions
from condense.schema import replaced
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Split, Task, make_task
from condense.tracking import Sink, check_sinks, open_sinks, progress


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe that has met its data, made by ``resolve``."""

    plan: Recipe
    """With nothing left open, as files hold it: it says which data are needed, not where they lie."""
    arrays: Arrays
    network: Functional
    source: str
    """Where the data lie, for the command that builds a missing artifact and for ``run.json``."""
    validates: bool = False
    """Whether the set is evaluated on the validation split while it is distilled."""


def find_recipe(name: str, dataset: str | None = None, ipc: int | None = None) -> tuple[Recipe, str]:
    """The recipe meant by a method's name, a built-in recipe's name or a path; and where it came from.

    Raises:
        ValueError: none of these.
    """
    if name.endswith((".yaml", ".yml")):
        plan, origin, _ = recipe.find(name, dataset, ipc)
        return dataclasses.replace(plan, dataset=runs.source_of(expanded(name), plan.dataset)), origin
    plan, origin, _ = recipe.find(name, dataset or "digits", ipc)
    return plan, origin


def recipe_for(method: str | Path | Method | Recipe, dataset: str | None, fields: Mapping[str, Any]) -> Recipe:
    """A recipe with some of its fields, or of those of its method, replaced.

    Args:
        method: a name or path for ``find_recipe``, a method or a recipe.
        dataset: the name of the data set.
        fields: by name; choices (``decode="factor"``) may be given by theirs.

    Raises:
        ValueError: neither the recipe nor its method has such a field, or its value is refused.
    """
    if isinstance(method, Recipe):
        base = method
    elif isinstance(method, Method):
        base = Recipe(method=method)
    else:
        base, _ = find_recipe(str(method), dataset, fields.get("ipc"))
    ours = [f.name for f in dataclasses.fields(Recipe) if f.name != "method"]
    chosen = {name: recipe.choice(name, value) for name, value in fields.items()}
    of_method = {name: value for name, value in chosen.items() if name not in ours}
    others = [*ours, *(f.name for f in dataclasses.fields(RunOptions))]
    changed = replaced(base.method, of_method, others)
    return dataclasses.replace(base, method=changed, **{k: v for k, v in chosen.items() if k in ours})


def check(plan: Recipe, network: str | Factory | None = None, *, validates: bool = False) -> None:
    """Raise ValueError for what is wrong with a recipe whatever the data are.

    Args:
        plan: the recipe.
        network: stands in for the recipe's.
        validates: whether the set is evaluated on the validation split while it is distilled.
    """
    check_names(network or plan.network, plan.transform, plan.augment)
    if validates and not plan.split.resolved(selects=True).val_fraction:
        raise ValueError(
            f"{spelt('eval_every')} needs a validation split, the recipe holds none out; "
            f"give {spelt('split.val_fraction', 0.1)}"
        )
    reason = plan.method.incompatibility(plan.decode, plan.labels, plan.transform, plan.objective)
    if reason is not None:
        raise ValueError(f"{registry.name_of(plan.method)} {reason}")


def check_run(
    plan: Recipe,
    options: RunOptions,
    network: str | Factory | None = None,
    *,
    dataset: Data,
    ranks: Ranks = Ranks(),
) -> torch.device:
    """``check``, with what is wrong with the options of a run whatever the data hold; the device, ready for work.

    Args:
        plan: the recipe.
        options: how it is run.
        network: stands in for the recipe's.
        dataset: the data, which are not read.
        ranks: of these the first process checks the folder.

    Raises:
        ValueError: one line that names the culprit and how to correct it.
    """
    check(plan, network, validates=options.eval_every > 0)
    check_sinks(options.track)
    if ranks.first and (options.out is not None or isinstance(dataset, Arrays) or dataset in names()):
        runs.check_folder(runs.run_folder(plan, options.out, name_of(dataset)), options.resume or ranks.restarted)
    return prepare_device(options.device)


def check_names(network: str | Factory, transform: str, augment: str = "none") -> None:
    """Raise ValueError for a network, transform or augmentation that does not exist."""
    if isinstance(network, str):
        parse(network)
    check_transform(transform)
    Augment.parse(augment)


def resolve(
    plan: Recipe,
    arrays: Arrays,
    *,
    device: torch.device,
    network: str | Factory | None = None,
    validates: bool = False,
    earlier: Mapping[str, Any] | None = None,
) -> Experiment:
    """Settle what a recipe leaves open: the split, the spelling of the network, how it is computed.

    Args:
        plan: the recipe.
        arrays: the data.
        device: of the networks.
        network: stands in for the recipe's.
        validates: whether the set is evaluated on the validation split while it is distilled.
        earlier: the recipe of the run that is resumed, by field; its ``compute`` is taken.

    Raises:
        ValueError: see ``check``; these are not the data of the recipe; the network or the decoder does not take them.
    """
    check(plan, network, validates=validates)
    fingerprint = arrays.fingerprint["train"]
    if plan.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"the recipe is for data with fingerprint {plan.fingerprint[:12]}, {arrays.name} has "
            f"{fingerprint[:12]}; give {spelt('dataset')} with the right data, or "
            f"{spelt('fingerprint', None)} to distil these data by that recipe"
        )
    plan.decode.require_kind(arrays.input_shape)
    functional = Functional(network or plan.network, arrays.input_shape, arrays.num_classes, device)
    resolved = dataclasses.replace(
        plan,
        dataset=arrays.name,
        fingerprint=fingerprint,
        split=plan.split.resolved(selects=validates),
        network=functional.name,
        compute=_resolved_compute(plan, arrays, functional, earlier.get("compute") if earlier else None),
    )
    return Experiment(plan=resolved, arrays=arrays, network=functional, source=plan.dataset, validates=validates)


def _resolved_compute(plan: Recipe, arrays: Arrays, network: Functional, earlier: Mapping[str, Any] | None) -> Compute:
    """A function of the planned work, or of ``earlier``."""
    latents = plan.decode.latents_per_class(plan.ipc, arrays.input_shape, arrays.num_classes)
    per_class = latents * plan.decode.expansion
    passes = plan.method.estimated_work(len(arrays.x_train), arrays.num_classes, per_class)
    return plan.compute.resolved(network.flops * passes, network.device, earlier)


def prepare(
    experiment: Experiment, buffers: Path = artifacts.DEFAULT_ROOT, *, ranks: Ranks = Ranks(), like: Task | None = None
) -> Context:
    """What the method of an experiment is given.

    Args:
        experiment: made by ``resolve``.
        buffers: where artifacts are looked for: a root, or one of them.
        ranks: the processes that share the parts of a step.
        like: a task of the same data, transform, split and network, whose images are taken.

    Raises:
        ValueError: a class without training or validation images; a missing artifact, with the command that builds it.
    """
    plan, arrays = experiment.plan, experiment.arrays
    if like is None:
        task = open_task(arrays, experiment.network, transform=plan.transform, split=plan.split, augment=plan.augment)
    else:
        task = dataclasses.replace(like, augment=Augment.parse(plan.augment, own=arrays.strategy))
    if experiment.validates:
        _check_validation(task)
    opened = _open_artifacts(plan, task, buffers, experiment.source)
    described = [artifact.describe() for artifact in opened.values()]
    return Context(
        task=task,
        rng=Rng(plan.seed),
        ipc=plan.ipc,
        decode=plan.decode,
        labels=plan.labels,
        compute=plan.compute,
        origin=_origin(plan, task, described),
        artifacts=opened,
        ranks=ranks,
        objective=OBJECTIVES[plan.objective](),
    )


def run(
    experiment: Experiment,
    ctx: Context,
    folder: Path,
    options: RunOptions,
    *,
    resume: bool = False,
    validate: engine.Validate | None = None,
) -> SyntheticSet:
    """Distil in a run folder, which the first process holds, and leave there everything that belongs to a run.

    Args:
        experiment: made by ``resolve``.
        ctx: made by ``prepare``.
        folder: of ``condense.runs.run_folder``.
        options: how it is run.
        resume: whether to continue from a checkpoint.
        validate: evaluates a set every ``options.eval_every`` steps.

    Raises:
        ValueError: see ``condense.engine.run``.
    """
    plan, ranks, device = experiment.plan, ctx.ranks, experiment.network.device
    title = f"{registry.name_of(plan.method)} {ctx.task.name} ipc {plan.ipc}"
    with plan.compute.arithmetic():
        state = plan.method.init(ctx)
        with reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)  # on every machine
        sinks: tuple[Sink, ...] = ()
        if ranks.first:
            if not (resume and engine.has_checkpoint(folder)):
                write_text(folder / "recipe.yaml", recipe.to_yaml(plan))
            sinks = open_sinks(options.track, folder, ctx.origin.recipe)
            runs.write_source(folder, experiment.source)
        begun = time.monotonic()
        forget_peak(device)
        with progress(title, plan.method.num_steps) as bar:
            syn = engine.run(
                plan.method,
                ctx,
                state,
                folder,
                resume=resume,
                eval_every=options.eval_every,
                validate=validate,
                sinks=sinks,
                on_step=lambda done, record: bar(done, f"loss {record['loss']:.4g}" if "loss" in record else ""),
            )
    if ranks.first:
        picture.draw(syn, ctx.task.transform, folder / "synthetic.png")
        runs.write_record(folder, device, time.monotonic() - begun, ranks.size)
    ranks.barrier()
    return syn


def _open_artifacts(plan: Recipe, task: Task, buffers: Path, source: str) -> dict[str, Artifact]:
    """The artifacts that the method asks for, by the names that it gives them."""
    needs = plan.method.needs(task)
    return {name: spec.open(artifacts.find(buffers, spec, source)) for name, spec in needs.items()}


def _origin(plan: Recipe, task: Task, described: list[dict[str, Any]]) -> Origin:
    """What the sets of a recipe say of themselves; ``described``: the artifacts that were read."""
    training = plan.method.training(task)
    if plan.objective != "cross-entropy":
        training = dataclasses.replace(training, loss=plan.objective)
    described_training = training.content() | {
        "augment": str(plan.method.training_augment(task)),
        "network": plan.method.training_network(task),
    }
    return Origin(
        dataset=task.dataset(),
        transform=task.transform.describe(),
        training=described_training,
        recipe=recipe.to_mapping(plan),
        recipe_hash=plan.hash(dataset=task.fingerprint, network=task.network.identity(), artifacts=described),
        artifacts=described,
        code=__version__,
    )


def _check_validation(task: Task) -> None:
    """Raise ValueError where a class has no validation image."""
    train = task.train.labels.bincount(minlength=task.num_classes)
    held_out = torch.zeros_like(train) if task.val is None else task.val.labels.bincount(minlength=task.num_classes)
    if not held_out.all():
        rarest, name = int((train + held_out)[held_out == 0].min()), task.classes[int(held_out.argmin())]
        wider = spelt("split.val_fraction", math.ceil(100 / rarest) / 100)
        fix = f"{wider} or {spelt('eval_every', 0)}" if rarest > 1 else spelt("eval_every", 0)
        raise ValueError(
            f"{spelt('eval_every')} needs validation images of every class, split.val_fraction "
            f"{task.split.val_fraction} holds none of class {name!r} out; give {fix}"
        )


def open_task(arrays: Arrays, network: Functional, *, transform: str, split: Split, augment: str) -> Task:
    """``make_task`` with an augmentation by its name, on the network's device, with the cache of this user."""
    return make_task(
        arrays,
        transform=transform,
        split=split,
        network=network,
        augment=Augment.parse(augment, own=arrays.strategy),
        device=network.device,
        cache=cache_folder(),
    )


def plain_task(arrays: Arrays, network: str, transform: str, split: Split) -> Task:
    """A task on the CPU without augmentation, where only shapes and identities are needed."""
    functional = Functional(network, arrays.input_shape, arrays.num_classes)
    return open_task(arrays, functional, transform=transform, split=split.resolved(False), augment="none")
