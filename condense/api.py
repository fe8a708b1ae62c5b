"""What a notebook user calls: make_buffer, distill, evaluate, load. The command line calls the same."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from tyro.conf import FlagConversionOff

import condense
from condense import artifacts, engine, picture, recipe, registry
from condense.augment import Augment
from condense.buffers.trajectories import Experts, build
from condense.compute import Compute, resolve_device
from condense.data.datasets import Arrays
from condense.data.datasets import load as load_data
from condense.eval import crossarch
from condense.eval.baselines import full_data
from condense.eval.protocol import Protocol, named
from condense.files import write_text
from condense.method import Context, Method
from condense.names import suggest
from condense.networks import Functional
from condense.recipe import Recipe
from condense.rng import Rng
from condense.synthetic.files import load as load
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Split, Task, make_task
from condense.tracking import check_sinks, open_sinks, progress

Data = str | Path | Arrays | Dataset[Any] | tuple[Any, ...]
"""A known name, a path, or data at hand: a Dataset, a (train, test) pair, (x_train, y_train, x_test, y_test)."""
Network = str | Callable[[tuple[int, int, int], int], nn.Module]
"""A network string, or a callable (image_shape, num_classes) -> module."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a distillation is run; nothing here decides its result."""

    out: Path | None = None
    """Run folder; default runs/METHOD-DATASET-ipcN-seedS."""
    buffers: Path = Path("artifacts")
    """Where expert buffers are looked for: a root, or one buffer."""
    resume: bool = False
    """Continue from the checkpoint; starts afresh where there is none."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: none."""
    track: tuple[str, ...] = ()
    """Trackers beside log.jsonl: wandb, tensorboard."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    download: FlagConversionOff[bool] = False
    """Let torchvision download a data set that is missing."""


def cache_folder() -> Path:
    """Where derived data are kept: $CONDENSE_CACHE, else ~/.cache/condense."""
    return Path(os.environ.get("CONDENSE_CACHE", "~/.cache/condense")).expanduser()


def make_buffer(
    dataset: Data = "digits",
    network: Network = "convnet",
    *,
    experts: Experts = Experts(),
    transform: str = "channel",
    split: Split = Split(val_fraction=0.0),
    augment: str = "dsa",
    compute: Compute = Compute(),
    out: Path | str = "artifacts",
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    **fields: Any,
) -> Path:
    """Train expert trajectories, or the ones still missing, and return the buffer's folder.

    ``fields`` are fields of ``Experts``: ``make_buffer("digits", num_experts=5, num_epochs=10)``.

    Raises:
        ValueError: bad data, network or field; the disk is full.
    """
    plan = dataclasses.replace(experts, **_known_fields(fields, experts))
    task = _task(_arrays(dataset, download), network, transform, split.resolved(False), augment, resolve_device(device))
    with progress(f"experts {task.name} {task.network.name}", plan.num_experts * plan.num_epochs) as bar:

        def report(expert: int, epoch: int, record: Mapping[str, float]) -> None:
            note = " ".join(f"{name} {value:.3f}" for name, value in record.items() if isinstance(value, float))
            bar(expert * plan.num_epochs + epoch, f"expert {expert} {note}")

        return build(task, plan, root=Path(out), seed=seed, compute=compute, progress=report)


def distill(
    method: str | Path | Method | Recipe,
    *,
    dataset: Data | None = None,
    network: Network | None = None,
    options: RunOptions = RunOptions(),
    **fields: Any,
) -> SyntheticSet:
    """Distil a data set and return the synthetic set; the run folder holds everything else.

    ``method`` is a name (with its published recipe for this data set and budget, where there is one), the name or
    path of a recipe, a ``Method`` or a ``Recipe``. ``fields`` are, by name, fields of ``RunOptions`` (out, resume,
    ...), of the recipe (ipc, seed, ...) or of the method (num_steps, ...).

    Raises:
        ValueError: one line that names the culprit and the mend.
    """
    ours = {f.name for f in dataclasses.fields(RunOptions)}
    paths = {"out", "buffers"}
    given: dict[str, Any] = {k: Path(v) if k in paths else v for k, v in fields.items() if k in ours}
    options = dataclasses.replace(options, **given)
    fields = {k: v for k, v in fields.items() if k not in ours}
    arrays = None if dataset is None else _arrays(dataset, options.download)
    if isinstance(method, Recipe):
        base = method
    elif isinstance(method, Method):
        base = Recipe(method=method)
    else:
        base, _ = find_recipe(str(method), arrays.name if arrays else None, fields.get("ipc"))
    changes: dict[str, Any] = {}
    if dataset is not None:
        assert arrays is not None
        changes["dataset"] = str(dataset) if isinstance(dataset, str | Path) else arrays.name
    if isinstance(network, str):
        changes["network"] = network
    in_recipe = {f.name for f in dataclasses.fields(Recipe)} - {"method"}
    changes |= {k: v for k, v in fields.items() if k in in_recipe}
    of_method = {k: v for k, v in fields.items() if k not in in_recipe}
    changes["method"] = dataclasses.replace(base.method, **_known_fields(of_method, base.method))
    return run(
        dataclasses.replace(base, **changes),
        options,
        arrays=arrays,
        network=network if network is not None and not isinstance(network, str) else None,
    )


def find_recipe(name: str, dataset: str | None = None, ipc: int | None = None) -> tuple[Recipe, str]:
    """The recipe meant by a method's name, a built-in recipe's name or a path; and where it came from.

    Raises:
        ValueError: none of these.
    """
    built_in = recipe.recipe_files()
    if name.endswith((".yaml", ".yml")):
        return recipe.from_yaml(Path(name)), name
    if name in registry.table():
        found = recipe.published(name, dataset or "digits", ipc or 10)
        if found is None:
            return Recipe(method=registry.load(name)()), "the defaults of the method"
        return recipe.from_yaml(built_in[found]), found
    if name in built_in:
        return recipe.from_yaml(built_in[name]), name
    raise ValueError(f"unknown method or recipe {name!r}: {suggest(name, registry.table())}")


def run(
    plan: Recipe, options: RunOptions, *, arrays: Arrays | None = None, network: Network | None = None
) -> SyntheticSet:
    """Run one recipe in one folder. ``arrays`` and ``network`` stand in for data and networks without a name.

    Raises:
        ValueError: the folder holds another run; see also ``condense.engine.run``.
    """
    arrays = arrays or load_data(plan.dataset, download=options.download)
    split = plan.split.resolved(selects=options.eval_every > 0)
    device = resolve_device(options.device)
    task = _task(arrays, network or plan.network, plan.transform, split, plan.augment, device)
    plan = dataclasses.replace(plan, split=split, network=task.network.name)
    if options.eval_every and task.val is None:
        raise ValueError(
            "--eval-every needs a validation split, the recipe holds none out; give --split.val-fraction 0.1"
        )
    folder = run_folder(plan, options, arrays)
    check_sinks(options.track)
    _claim(folder, plan, options.resume)
    _check_labels(plan)
    ctx = _context(plan, task, options.buffers)
    state = plan.method.init(ctx)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the run folder {folder}: {error.strerror}; choose another --out") from error
    write_text(folder / "recipe.yaml", recipe.to_yaml(plan))
    sinks = open_sinks(options.track, folder, recipe.to_mapping(plan))
    begun = time.monotonic()
    title = f"{registry.name_of(plan.method)} {task.name} ipc {plan.ipc}"
    with progress(title, plan.method.num_steps) as bar:
        syn = engine.run(
            plan.method,
            ctx,
            state,
            folder,
            resume=options.resume,
            eval_every=options.eval_every,
            validate=_validator(task, plan) if options.eval_every else None,
            sinks=sinks,
            on_step=lambda done, record: bar(done, f"loss {record['loss']:.4g}" if "loss" in record else ""),
        )
    picture.draw(syn, task.transform, folder / "synthetic.png")
    _write_run_record(folder, plan.dataset, device, time.monotonic() - begun)
    return syn


def evaluate(
    syn: SyntheticSet | Path | str,
    dataset: Data | None = None,
    *,
    networks: Sequence[Network] = ("convnet",),
    num_seeds: int = 5,
    protocol: str | Protocol = "canonical",
    baselines: Sequence[str] = (),
    compute: Compute = Compute(),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
) -> crossarch.Evaluation:
    """Train fresh networks on a set and score each once, at its last epoch, on the test split.

    ``syn`` is a set, its file or a run folder (then ``evaluation.json`` lands there). ``baselines`` are
    methods run at the same budget, and ``full`` for all training data.

    Raises:
        ValueError: the set does not belong to this data set; bad network or protocol.
    """
    path = None if isinstance(syn, SyntheticSet) else Path(syn)
    found = syn if isinstance(syn, SyntheticSet) else load(syn)
    arrays = _arrays(_source_of(found, path) if dataset is None else dataset, download)
    target = Path(out) if out is not None else _evaluation_path(path)
    place = resolve_device(device)
    plan = named(protocol, found) if isinstance(protocol, str) else protocol
    common: dict[str, Any] = {
        "networks": networks,
        "num_seeds": num_seeds,
        "protocol": plan,
        "seed": seed,
        "compute": compute,
        "device": place,
        "cache": cache_folder(),
    }
    results: list[crossarch.Result] = []

    def keep(result: crossarch.Result) -> None:
        results.append(result)
        if target is not None:
            crossarch.merge(target, [result])

    crossarch.evaluate(found, arrays, **common, on_result=keep)
    for name in baselines:
        if name == "full":
            for network in networks:
                keep(full_data(arrays, network=network, transform=_transform_name(found), **_full(common)))
        else:
            made = _baseline(name, found, arrays, seed, place)
            theirs = {"protocol": named("own", made)} if plan.name == "own" else {}
            crossarch.evaluate(made, arrays, **common | theirs, on_result=keep)
    return crossarch.Evaluation(tuple(results))


def run_folder(plan: Recipe, options: RunOptions, arrays: Arrays) -> Path:
    """Where a recipe is run: ``options.out``, or a name made of method, data set, budget and seed."""
    method = registry.name_of(plan.method).replace(":", ".")
    return options.out or Path("runs") / f"{method}-{arrays.name}-ipc{plan.ipc}-seed{plan.seed}"


def _arrays(dataset: Data, download: bool = False) -> Arrays:
    return dataset if isinstance(dataset, Arrays) else load_data(dataset, download=download)


def _task(arrays: Arrays, network: Network, transform: str, split: Split, augment: str, device: torch.device) -> Task:
    return make_task(
        arrays,
        transform=transform,
        split=split,
        network=Functional(network, arrays.image_shape, arrays.num_classes, device),
        augment=Augment.parse(augment, own=arrays.strategy),
        device=device,
        cache=cache_folder(),
    )


def _baseline(name: str, syn: SyntheticSet, arrays: Arrays, seed: int, device: torch.device) -> SyntheticSet:
    """The set that another method makes with the budget, transform and split of ``syn``."""
    stored = syn.origin.recipe
    plan = Recipe(
        method=find_recipe(name, arrays.name)[0].method,
        dataset=arrays.name,
        transform=stored.get("transform", "channel"),
        split=Split(**stored.get("split", {"val_fraction": 0.0})),
        network=stored.get("network", "convnet"),
        ipc=len(syn) // syn.origin.num_classes,
        seed=seed,
    )
    task = _task(arrays, plan.network, plan.transform, plan.split, plan.augment, device)
    return engine.compute(plan.method, _context(plan, task, Path("artifacts")))


def _full(common: Mapping[str, Any]) -> dict[str, Any]:
    """What training on all data shares with training on a set; it has a protocol of its own."""
    return {k: v for k, v in common.items() if k not in ("networks", "protocol")}


def _transform_name(syn: SyntheticSet) -> str:
    return str(syn.origin.recipe.get("transform", "channel"))


def make_plain_task(arrays: Arrays, network: str, transform: str, split: Split) -> Task:
    """A task on the CPU without augmentation, for what only needs shapes and identities."""
    return _task(arrays, network, transform, split.resolved(False), "none", torch.device("cpu"))


def _context(plan: Recipe, task: Task, buffers: Path) -> Context:
    found = {type(spec): spec.open(artifacts.find(buffers, spec, plan.dataset)) for spec in plan.method.needs(task)}
    used = [artifact.describe() for artifact in found.values()]
    origin = Origin(
        dataset=task.dataset(),
        transform=task.transform.describe(),
        training=dataclasses.asdict(plan.method.training(task)) | {"augment": str(task.augment)},
        recipe=recipe.to_mapping(plan) | {"dataset": task.name},
        recipe_hash=plan.hash(task.fingerprint, used),
        artifacts=used,
        code=condense.__version__,
    )
    return Context(
        task=task,
        rng=Rng(plan.seed),
        ipc=plan.ipc,
        decode=plan.decode,
        labels=plan.labels,
        compute=plan.compute,
        origin=origin,
        artifacts=found,
    )


def _claim(folder: Path, plan: Recipe, resume: bool) -> None:
    """Refuse a folder that holds something else, before anything is written."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    written = folder / "recipe.yaml"
    if not written.exists():
        raise ValueError(f"{folder} holds other files and is no run; choose another --out")
    if not resume:
        raise ValueError(f"{folder} already holds a run; give --resume to continue it, or another --out")
    there = yaml.safe_load(written.read_text(encoding="utf-8"))
    different = _difference(there, recipe.to_mapping(plan))
    if different is not None:
        name, old, new = different
        raise ValueError(
            f"{folder} was begun with {name} = {old}, not {new}: it is another recipe; choose another --out"
        )


def _check_labels(plan: Recipe) -> None:
    if plan.labels.learned and not plan.method.learns_labels:
        raise ValueError(
            f"{registry.name_of(plan.method)} gives labels no gradient: {plan.labels.name} would stay as they begin; "
            "give --labels hard"
        )


def _difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two recipes differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def _validator(task: Task, plan: Recipe) -> engine.Validate:
    """Accuracy on the validation split of one network trained briefly on the set."""
    assert task.val is not None
    val = task.val
    scorer = crossarch.SetScorer(task.network, crossarch.BRIEF, plan.compute)

    def validate(syn: SyntheticSet, step: int) -> dict[str, float]:
        images, labels = crossarch.decoded(syn, soft=False)
        rng = Rng(plan.seed).child("validation", step)
        return {"val_accuracy": scorer.score(images, labels, val.images, val.labels, rng)}

    return validate


def _known_fields(fields: Mapping[str, Any], owner: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(owner)]
    for name in fields:
        if name not in names:
            kind = type(owner).__name__
            raise ValueError(f"{kind} has no field {name!r}: {suggest(name, names)}")
    return dict(fields)


def _source_of(syn: SyntheticSet, path: Path | None) -> str:
    """Where the data of a set lie: as the run recorded it, else by the name in the file."""
    record = path / "run.json" if path is not None and path.is_dir() else None
    if record is not None and record.exists():
        return str(json.loads(record.read_text(encoding="utf-8"))["dataset"])
    return str(syn.origin.dataset["name"])


def _evaluation_path(path: Path | None) -> Path | None:
    if path is None:
        return None
    return path / "evaluation.json" if path.is_dir() else path.with_suffix(".evaluation.json")


def _write_run_record(folder: Path, dataset: str, device: torch.device, seconds: float) -> None:
    """What is true of this run and not of its result: place, time, machine."""
    path = folder / "run.json"
    before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
    local = Path(dataset).exists()
    record = {
        "dataset": str(Path(dataset).resolve()) if local else dataset,
        "seconds": round(before + seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "condense": condense.__version__,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
