"""Prepare and run a recipe. New runs, resumed runs and baselines all take these steps:

``check``    validate the recipe before data are read or downloaded;
``resolve``  fill in what depends on the data;
``prepare``  create the task, open the artifacts of the method, and create its context;
``run``      run the steps of the method in a run folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condense import __version__, artifacts, engine, picture, recipe, registry, runs, stills
from condense.artifacts import Artifact
from condense.augment import Augment
from condense.cache import cache_folder
from condense.compute import Compute, device_name, forget_peak, prepare_device
from condense.data.datasets import Arrays, Data, name_of, names
from condense.data.layout import kind, require_kind
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
from condense.synthetic.budget import latents_per_class
from condense.synthetic.decode import Graphs, Pixels, Pixels8Bit, StaticDynamic
from condense.synthetic.patches import Patches
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Split, Task, make_task
from condense.tracking import Sink, check_sinks, detail, open_sinks, progress


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe resolved for its data; made by ``resolve``."""

    plan: Recipe
    """Resolved recipe as stored in files: it identifies the data, but not their location."""
    arrays: Arrays
    network: Functional
    source: str
    """Name or path of the data, for ``run.json`` and for the command that builds a missing artifact."""
    validates: bool = False
    """Whether the set is evaluated on the validation split during distillation."""
    stills: SyntheticSet | None = None
    """The set whose images are the stills of the decoder, if it takes them from one."""


def find_recipe(name: str, dataset: str | None = None, ipc: int | None = None) -> tuple[Recipe, str]:
    """Return the recipe for the name of a method or recipe or for a path, and a text that says where it is from.

    Raises:
        ValueError: there is no such method or recipe.
    """
    if name.endswith((".yaml", ".yml")):
        plan, origin, _ = recipe.find(name, dataset, ipc)
        return dataclasses.replace(plan, dataset=runs.source_of(expanded(name), plan.dataset)), origin
    plan, origin, _ = recipe.find(name, dataset or "digits", ipc)
    return plan, origin


def recipe_for(method: str | Path | Method | Recipe, dataset: str | None, fields: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some fields of the recipe or of its method replaced.

    Args:
        method: a name or path for ``find_recipe``, a method or a recipe.
        dataset: the name of the data set.
        fields: new values by field name; choices may be given by name (``decode="factor"``).

    Raises:
        ValueError: unknown field or invalid value.
    """
    if isinstance(method, Recipe):
        base = method
    elif isinstance(method, Method):
        base = Recipe(method=method)
    else:
        base, _ = find_recipe(str(method), dataset, fields.get("ipc"))
    given = [name for name in recipe.BUDGETS if fields.get(name) is not None]
    if len(given) == 1:
        fields = {**dict.fromkeys(recipe.BUDGETS), **fields}
    ours = [f.name for f in dataclasses.fields(Recipe) if f.name != "method"]
    chosen = {name: recipe.choice(name, value) for name, value in fields.items()}
    theirs = {f.name for f in dataclasses.fields(base.method)}  # kernel methods have an objective of their own
    of_method = {name: value for name, value in chosen.items() if name in theirs or name not in ours}
    others = [*ours, *(f.name for f in dataclasses.fields(RunOptions))]
    changed = replaced(base.method, of_method, others)
    return dataclasses.replace(base, method=changed, **{k: v for k, v in chosen.items() if k not in of_method})


def check(plan: Recipe, network: str | Factory | None = None, *, validates: bool = False) -> None:
    """Raise ValueError if a recipe is invalid for any data.

    Args:
        plan: the recipe.
        network: replaces the network of the recipe.
        validates: whether the set is evaluated on the validation split during distillation.
    """
    check_names(network or plan.network, plan.transform, plan.augment)
    if validates and not plan.split.resolved(selects=True).val_fraction:
        raise ValueError(
            f"{spelt('eval_every')} needs a validation split, but the recipe has none; "
            f"give {spelt('split.val_fraction', 0.1)}"
        )
    if validates and not plan.method.has_classes:
        raise ValueError(
            f"{spelt('eval_every')} measures accuracies, but the sets of {registry.name_of(plan.method)} have no "
            f"classes; give {spelt('eval_every', 0)}"
        )
    reason = plan.method.incompatibility(plan.decode, plan.labels, plan.transform, plan.objective)
    if reason is None and plan.fraction is not None:
        reason = _why_no_fraction(plan)
    if reason is None and plan.ipc_policy != "refuse":
        reason = _why_not_by_policy(plan)
    if reason is None and plan.method.private:
        reason = _why_not_private(plan, validates)
    if reason is not None:
        raise ValueError(f"{registry.name_of(plan.method)} {reason}")
    stills.opened(plan.decode)


_REAL = (Pixels, Pixels8Bit, Patches, Graphs)
"""Decoders that store the real samples, or parts of them, one by one."""


def _why_no_fraction(plan: Recipe) -> str | None:
    """Return why the budget of a recipe cannot be a fraction of each class; None if it can."""
    if not plan.method.selects:
        return f"makes equally many images of each class, not a fraction of the real ones; give {spelt('ipc', 10)}"
    if not isinstance(plan.decode, _REAL):
        return f"stores a fraction of the real images, one in each latent; give {spelt('decode', 'pixels')}"
    return None


def _why_not_by_policy(plan: Recipe) -> str | None:
    """Return why a recipe cannot treat classes with few images as its policy says; None if it can."""
    if plan.ipc_policy == "repeat":
        fix = spelt("ipc_policy", "all")
        return f"selects different images of each class and repeats none; give {fix}" if plan.method.selects else None
    if not plan.method.selects:
        return f"makes equally many images of each class; give {spelt('ipc_policy', 'repeat')}"
    if not isinstance(plan.decode, _REAL):
        return f"stores all images of a small class, one in each latent; give {spelt('decode', 'pixels')}"
    return None


def _why_not_private(plan: Recipe, validates: bool) -> str | None:
    """Return what in a recipe reads the data beside its private method; None if nothing does."""
    if validates:
        return f"is private, and accuracies on validation images are not; give {spelt('eval_every', 0)}"
    if plan.transform not in ("none", "channel"):
        return (
            f"is private, and {plan.transform} is fitted to the data without noise; give {spelt('transform', 'none')}"
        )
    if isinstance(plan.decode, StaticDynamic):
        return f"is private, and stills would be real images or noise; give {spelt('decode', 'pixels')}"
    return None


def check_run(
    plan: Recipe,
    options: RunOptions,
    network: str | Factory | None = None,
    *,
    dataset: Data,
    ranks: Ranks = Ranks(),
) -> torch.device:
    """Check a recipe and the options of its run without reading the data, and return the prepared device.

    Args:
        plan: the recipe.
        options: the options of the run.
        network: replaces the network of the recipe.
        dataset: the data, which are not read.
        ranks: the processes; rank 0 checks the run folder.

    Raises:
        ValueError: one line that says what is wrong and how to correct it.
    """
    check(plan, network, validates=options.eval_every > 0)
    check_sinks(options.track)
    if ranks.first and (options.out is not None or isinstance(dataset, Arrays) or dataset in names()):
        runs.check_folder(runs.run_folder(plan, options.out, name_of(dataset)), options.resume or ranks.restarted)
    return prepare_device(options.device)


def is_finished(plan: Recipe, options: RunOptions, arrays: Arrays, folder: Path) -> bool:
    """Return whether a folder holds the finished run of a recipe, with all of its files.

    Raises:
        ValueError: it holds a run of another recipe.
    """
    written, ended = runs.written_recipe(folder), "finished" in runs.read_record(folder)
    if written is None or not ended or not (folder / "synthetic.safetensors").exists():
        return False
    device = prepare_device(options.device)
    resolved = resolve(plan, arrays, device=device, validates=options.eval_every > 0, earlier=written)
    runs.claim(folder, resolved.plan, written)
    return True


def check_names(network: str | Factory, transform: str, augment: str = "none") -> None:
    """Raise ValueError for an unknown network, transform or augmentation."""
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
    """Resolve the fields of a recipe that depend on the data: split, full name of the network, ``compute``.

    The stills of a decoder are named by the checksum of their set instead of its path.

    Args:
        plan: the recipe.
        arrays: the data.
        device: device of the networks.
        network: replaces the network of the recipe.
        validates: whether the set is evaluated on the validation split during distillation.
        earlier: fields of the recipe of the run to be resumed, whose ``compute`` is used.

    Raises:
        ValueError: see ``check``; the data have another fingerprint, or do not fit the network, the decoder or its
            stills.
    """
    check(plan, network, validates=validates)
    fingerprint = arrays.fingerprint["train"]
    if plan.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"the recipe is for data with fingerprint {plan.fingerprint[:12]}, {arrays.name} has "
            f"{fingerprint[:12]}; give {spelt('dataset')} with the right data, or "
            f"{spelt('fingerprint', None)} to distil these data by that recipe"
        )
    if plan.method.private and plan.transform == "channel" and arrays.known is None:
        raise ValueError(
            f"{registry.name_of(plan.method)} is private, and there are no published mean and std of {arrays.name}: "
            f"they would be measured without noise; give {spelt('transform', 'none')}"
        )
    plan = _for_kind(plan, arrays)
    plan.decode.require_kind(arrays.input_shape)
    spec, shape = network or plan.network, arrays.input_shape
    functional = Functional(spec, shape, plan.method.num_outputs(spec, shape, arrays.num_classes), device)
    resolved = dataclasses.replace(
        plan,
        dataset=arrays.name,
        fingerprint=fingerprint,
        split=plan.split.resolved(selects=validates),
        network=functional.name,
        compute=_resolved_compute(plan, arrays, functional, earlier.get("compute") if earlier else None),
    )
    given = stills.opened(plan.decode)
    if given is not None:
        stills.check(given, resolved, arrays.input_shape, arrays.classes)
        resolved = dataclasses.replace(resolved, decode=stills.named(given, plan.decode))
    return Experiment(
        plan=resolved, arrays=arrays, network=functional, source=plan.dataset, validates=validates, stills=given
    )


def _for_kind(plan: Recipe, arrays: Arrays) -> Recipe:
    """Return the recipe for samples of this kind: graphs are stored as whole numbers.

    Raises:
        ValueError: the method does not take samples of this kind.
    """
    shape = arrays.input_shape
    if kind(shape) not in plan.method.takes:
        fitting = [name for name in registry.METHODS if kind(shape) in registry.load(name).takes]
        remedy = f"give another method; those for {kind(shape)} are {', '.join(fitting)}"
        require_kind(f"method {registry.name_of(plan.method)}", plan.method.takes, shape, remedy)
    if kind(shape) == "graphs" and isinstance(plan.decode, Pixels):
        return dataclasses.replace(plan, decode=Graphs())
    return plan


def _resolved_compute(plan: Recipe, arrays: Arrays, network: Functional, earlier: Mapping[str, Any] | None) -> Compute:
    """Resolve ``compute`` from the estimated work of the run, or from ``earlier`` where it is given."""
    num_images, classes = len(arrays.x_train), arrays.num_classes
    latents = latents_per_class(
        plan.budget,
        _ipc(plan, num_images, classes),
        plan.decode,
        plan.labels,
        arrays.input_shape,
        classes,
        network.num_outputs,
    )
    work = plan.method.estimated_work(num_images, classes, latents * plan.decode.expansion)
    begun = None if earlier is None else dict.fromkeys(recipe.LEFT_OUT) | dict(earlier)
    return network.settled(plan.compute, work, begun)


def _ipc(plan: Recipe, num_images: int, num_classes: int) -> int:
    """Return the budget in images per class; where it is a fraction of the images, the mean over classes."""
    if plan.fraction is None:
        assert plan.ipc is not None
        return plan.ipc
    return max(1, round(plan.fraction * num_images / num_classes))


def prepare(
    experiment: Experiment, buffers: Path = artifacts.DEFAULT_ROOT, *, ranks: Ranks = Ranks(), like: Task | None = None
) -> Context:
    """Create the context of a method.

    Args:
        experiment: made by ``resolve``.
        buffers: folder to search for artifacts, or the folder of one artifact.
        ranks: the processes that share the parts of a step.
        like: a task with the same data, transform, split and network, whose images are reused.

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
        ipc=_ipc(plan, len(task.train), task.num_classes),
        decode=plan.decode,
        labels=plan.labels,
        compute=plan.compute,
        origin=_origin(plan, task, described),
        artifacts=opened,
        ranks=ranks,
        objective=OBJECTIVES[plan.objective](),
        fraction=plan.fraction,
        budget=plan.budget,
        ipc_policy=plan.ipc_policy,
        first_images=None if experiment.stills is None else stills.clips(experiment.stills, plan.decode, task),
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
    """Distil in a run folder, which rank 0 has locked, and write all files of the run.

    Args:
        experiment: made by ``resolve``.
        ctx: made by ``prepare``.
        folder: the result of ``condense.runs.run_folder``.
        options: the options of the run.
        resume: whether to continue from a checkpoint.
        validate: evaluates a set every ``options.eval_every`` steps.

    Raises:
        ValueError: see ``condense.engine.run``.
    """
    plan, ranks, device = experiment.plan, ctx.ranks, experiment.network.device
    title = f"{registry.name_of(plan.method)} {ctx.task.name} {plan.budget_in_words}"
    ctx = dataclasses.replace(ctx, scratch=folder / engine.SCRATCH)
    stopwatch, has_ended = runs.Stopwatch(folder), resume and "finished" in runs.read_record(folder)
    with plan.compute.arithmetic():
        state, total = plan.method.init(ctx), plan.method.total_steps(ctx)
        with reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)  # on every machine
        sinks: tuple[Sink, ...] = ()
        if ranks.first:
            if not (resume and engine.has_checkpoint(folder)):
                write_text(folder / "recipe.yaml", recipe.to_yaml(plan))
            sinks = open_sinks(options.track, folder, ctx.origin.recipe)
            if not has_ended:
                runs.write_start(folder, experiment.source, total)
        forget_peak(device)
        detail(f"{folder}, {device_name(device)}, {torch.get_num_threads()} threads\n{recipe.to_yaml(plan)}")
        with progress(title, total) as bar:
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
                on_save=stopwatch.save,
            )
    if ranks.first:
        picture.draw(syn, ctx.task.transform, folder / "synthetic.png")
    if ranks.first and not has_ended:
        stopwatch.save()
        plans = {artifact.folder.resolve().name: artifact.plan for artifact in ctx.artifacts.values()}
        runs.write_record(folder, device, ranks.size, {name: plan for name, plan in plans.items() if plan})
    ranks.barrier()
    return syn


def _open_artifacts(plan: Recipe, task: Task, buffers: Path, source: str) -> dict[str, Artifact]:
    """Open the artifacts that the method needs, by the names in ``Method.needs``."""
    needs = plan.method.needs(task)
    return {name: spec.open(artifacts.find(buffers, spec, source)) for name, spec in needs.items()}


def _origin(plan: Recipe, task: Task, described: list[dict[str, Any]]) -> Origin:
    """Return the origin that is stored in the sets of a recipe. ``described`` are descriptions of its artifacts."""
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
        privacy=plan.method.privacy(),
    )


def _check_validation(task: Task) -> None:
    """Raise ValueError if a class has no validation image."""
    train = task.train.labels.bincount(minlength=task.num_classes)
    held_out = torch.zeros_like(train) if task.val is None else task.val.labels.bincount(minlength=task.num_classes)
    if not held_out.all():
        rarest, name = int((train + held_out)[held_out == 0].min()), task.classes[int(held_out.argmin())]
        wider = spelt("split.val_fraction", math.ceil(100 / rarest) / 100)
        fix = f"{wider} or {spelt('eval_every', 0)}" if rarest > 1 else spelt("eval_every", 0)
        raise ValueError(
            f"{spelt('eval_every')} needs validation images of every class, but split.val_fraction "
            f"{task.split.val_fraction} holds out none of class {name!r}; give {fix}"
        )


def open_task(arrays: Arrays, network: Functional, *, transform: str, split: Split, augment: str) -> Task:
    """Call ``make_task`` with an augmentation given by name, the device of the network and the user's cache."""
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
    """Create a task on the CPU without augmentation, for uses that need only shapes and identities."""
    functional = Functional(network, arrays.input_shape, arrays.num_classes)
    return open_task(arrays, functional, transform=transform, split=split.resolved(False), augment="none")
