"""What a notebook user calls: make_buffer, distill, evaluate, load. The command line calls the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from tyro.conf import FlagConversionOff

import condense
from condense import artifacts, engine, exchange, picture, recipe, registry, runs
from condense.allocator import keep_freed_memory
from condense.augment import Augment
from condense.buffers.trajectories import Experts, build
from condense.cache import Cache
from condense.cache import cache_folder as cache_folder
from condense.compute import Compute, forget_peak, keep_compiled, resolve_device
from condense.data.datasets import Arrays, names
from condense.data.datasets import load as load_data
from condense.data.transform import Transform
from condense.distributed import Ranks
from condense.eval import crossarch
from condense.eval.applications import APPLICATIONS, Application, Setting
from condense.eval.applications.application import Findings
from condense.eval.baselines import full_data
from condense.eval.crossarch import Network
from condense.eval.journal import CachedCells, Journal
from condense.eval.protocol import Protocol, named, own_network
from condense.files import expanded, reporting, temporary, write_text
from condense.method import Context, Method
from condense.names import spelt, suggest
from condense.networks import Functional
from condense.objective import OBJECTIVES
from condense.recipe import Recipe
from condense.rng import Rng, check_seed
from condense.schema import Checked, accepted, checked
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.files import load as load
from condense.synthetic.files import save
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Split, Task, make_task
from condense.tracking import Sink, check_sinks, open_sinks, progress

Data = str | Path | Arrays | Dataset[Any] | tuple[Any, ...]
"""A known name, a path, or data at hand: a Dataset, a (train, test) pair, (x_train, y_train, x_test, y_test)."""

Budget = Literal["images", "bytes"]
"""What a baseline has as much of as the set: images a class, or bytes of images, labels and decoder together."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """How a distillation is run; nothing here decides its result, but ``eval_every`` asks for a validation split where
    the recipe leaves that open."""

    out: Path | None = None
    """Run folder; default runs/METHOD-DATASET-ipcN-seedS."""
    buffers: Path = Path("artifacts")
    """Where expert buffers are looked for: a root, or one buffer."""
    resume: bool = False
    """Continue from the checkpoint; starts afresh where there is none. Implied where torchrun starts a run again."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: none."""
    track: tuple[str, ...] = ()
    """Trackers beside log.jsonl: wandb, tensorboard."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    download: FlagConversionOff[bool] = False
    """Let torchvision download a data set that is missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0, got {self.eval_every}; give {spelt('eval_every', 100)}")


@checked
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
    ranks: Ranks = Ranks(),
    **fields: Any,
) -> Path:
    """Train expert trajectories, or the ones still missing, and return the buffer's folder.

    ``fields`` are fields of ``Experts``: ``make_buffer("digits", num_experts=5, num_epochs=10)``. ``ranks``, of
    ``condense.distributed.init_distributed``, deal the experts out among the processes of torchrun.

    Raises:
        ValueError: bad data, network or field; the disk is full.
    """
    plan = dataclasses.replace(experts, **_known_fields(fields, experts))
    check_seed(seed)
    with ranks.rank_zero_first():
        arrays = open_data(dataset, download)
        skeleton = Functional(network, arrays.input_shape, arrays.num_classes, _prepare(device))
        task = _task(arrays, skeleton, transform=transform, split=split.resolved(False), augment=augment)
    title = f"experts {task.name} {task.network.name}"
    with compute.arithmetic(), progress(title, plan.num_experts * plan.num_epochs) as bar:

        def report(expert: int, epoch: int, record: Mapping[str, float]) -> None:
            note = " ".join(f"{name} {value:.3f}" for name, value in record.items() if isinstance(value, float))
            bar(expert * plan.num_epochs + epoch, f"expert {expert} {note}")

        return build(task, plan, root=expanded(out), seed=seed, compute=compute, progress=report, ranks=ranks)


@checked
def distill(
    method: str | Path | Method | Recipe,
    *,
    dataset: Data | None = None,
    network: Network | None = None,
    options: RunOptions = RunOptions(),
    ranks: Ranks = Ranks(),
    **fields: Any,
) -> SyntheticSet:
    """Distil a data set and return the synthetic set; the run folder holds everything else.

    ``method`` is a name (with its published recipe for this data set and budget, where there is one), the name or
    path of a recipe, a ``Method`` or a ``Recipe``. ``fields`` are, by name, fields of ``RunOptions`` (out, resume,
    ...), of the recipe (ipc, seed, ...) or of the method (num_steps, ...). ``ranks``, of
    ``condense.distributed.init_distributed``, deal the parts of a step out among the processes of torchrun.

    Raises:
        ValueError: one line that names the culprit and the mend.
    """
    ours = [f.name for f in dataclasses.fields(RunOptions)]
    given: dict[str, Any] = {k: _option(k, v) for k, v in fields.items() if k in ours}
    options = dataclasses.replace(options, **given)
    fields = {k: v for k, v in fields.items() if k not in ours}
    if "ipc" in fields:
        fields["ipc"] = accepted(fields["ipc"], int, "distill", "ipc")
    with ranks.rank_zero_first():
        arrays = None if dataset is None else open_data(dataset, options.download)
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
    in_recipe = [f.name for f in dataclasses.fields(Recipe) if f.name != "method"]
    changes |= {k: recipe.choice(k, v) for k, v in fields.items() if k in in_recipe}
    of_method = {k: recipe.choice(k, v) for k, v in fields.items() if k not in in_recipe}
    changes["method"] = dataclasses.replace(base.method, **_known_fields(of_method, base.method, [*in_recipe, *ours]))
    return run(
        dataclasses.replace(base, **changes),
        options,
        arrays=arrays,
        network=network if network is not None and not isinstance(network, str) else None,
        ranks=ranks,
    )


def find_recipe(name: str, dataset: str | None = None, ipc: int | None = None) -> tuple[Recipe, str]:
    """The recipe meant by a method's name, a built-in recipe's name or a path; and where it came from.

    Raises:
        ValueError: none of these.
    """
    built_in = recipe.recipe_files()
    if name.endswith((".yaml", ".yml")):
        found = recipe.from_yaml(expanded(name))
        return dataclasses.replace(found, dataset=runs.source_of(expanded(name), found.dataset)), name
    if name in registry.table() or ":" in name:
        best = recipe.published(name, dataset or "digits", ipc or 10)
        if best is None:
            return Recipe(method=registry.load(name)()), "the defaults of the method"
        return recipe.from_yaml(built_in[best]), best
    if name in built_in:
        return recipe.from_yaml(built_in[name]), name
    raise ValueError(f"unknown method or recipe {name!r}: {suggest(name, registry.table())}")


@checked
def run(
    plan: Recipe,
    options: RunOptions,
    *,
    arrays: Arrays | None = None,
    network: Network | None = None,
    ranks: Ranks = Ranks(),
) -> SyntheticSet:
    """Run one recipe in one folder. ``arrays`` and ``network`` stand in for data and networks without a name.

    Of several processes the first one writes. Processes that the launcher started again resume.

    Raises:
        ValueError: the folder holds another run; see also ``condense.engine.run``.
    """
    with ranks.rank_zero_first():
        if arrays is None:
            plan = located(plan, options)
            arrays = open_data(plan.dataset, options.download)
    _check_data(plan, arrays)
    device = _prepare(options.device)
    skeleton = Functional(network or plan.network, arrays.input_shape, arrays.num_classes, device)
    plan = dataclasses.replace(plan, split=plan.split.resolved(selects=options.eval_every > 0), network=skeleton.name)
    if options.eval_every and not plan.split.val_fraction:
        raise ValueError(
            f"{spelt('eval_every')} needs a validation split, the recipe holds none out; "
            f"give {spelt('split.val_fraction', 0.1)}"
        )
    _check_composition(plan)
    check_sinks(options.track)
    folder = run_folder(plan, options, arrays)
    source, plan = plan.dataset, _shared(plan, arrays)
    with runs.held(folder) if ranks.first else contextlib.nullcontext():
        return _run_in(folder, plan, source, options, arrays, skeleton, ranks)


def _run_in(
    folder: Path,
    plan: Recipe,
    source: str,
    options: RunOptions,
    arrays: Arrays,
    skeleton: Functional,
    ranks: Ranks,
) -> SyntheticSet:
    """Run a recipe whose split and network are settled in a folder that is held by the first process."""
    resume, device = options.resume or ranks.restarted, skeleton.device
    with ranks.rank_zero_first():
        plan = dataclasses.replace(
            plan, compute=_settle(plan, arrays, skeleton, runs.settled(folder) if resume else None)
        )
        if ranks.first:
            runs.claim(folder, plan, resume)
        task = _task(arrays, skeleton, transform=plan.transform, split=plan.split, augment=plan.augment)
    if options.eval_every:
        _check_validation(task)
    ctx = _context(plan, task, expanded(options.buffers), source, ranks)
    with plan.compute.arithmetic():
        state = plan.method.init(ctx)
    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)  # on every machine
    sinks: tuple[Sink, ...] = ()
    if ranks.first:
        if not (resume and engine.has_checkpoint(folder)):
            write_text(folder / "recipe.yaml", recipe.to_yaml(plan))
        sinks = open_sinks(options.track, folder, recipe.to_mapping(plan))
        runs.write_source(folder, source)
    begun = time.monotonic()
    forget_peak(device)
    title = f"{registry.name_of(plan.method)} {task.name} ipc {plan.ipc}"
    with plan.compute.arithmetic(), progress(title, plan.method.num_steps) as bar:
        syn = engine.run(
            plan.method,
            ctx,
            state,
            folder,
            resume=resume,
            eval_every=options.eval_every,
            validate=_validator(task, plan) if options.eval_every else None,
            sinks=sinks,
            on_step=lambda done, record: bar(done, f"loss {record['loss']:.4g}" if "loss" in record else ""),
        )
    if ranks.first:
        picture.draw(syn, task.transform, folder / "synthetic.png")
        runs.write_record(folder, source, device, time.monotonic() - begun, ranks.size)
    ranks.barrier()
    return syn


@checked
def evaluate(
    syn: SyntheticSet | Path | str,
    dataset: Data | None = None,
    *,
    networks: Network | Sequence[Network] | None = None,
    num_seeds: int = 5,
    protocol: str | Protocol = "canonical",
    baselines: str | Sequence[str] = (),
    budget: Budget = "images",
    compute: Compute = Compute(),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    ranks: Ranks = Ranks(),
) -> crossarch.Evaluation:
    """Train fresh networks on a set and score each once, at its last epoch, on the test split.

    ``syn`` is a set, its file or a run folder (then ``evaluation.json`` lands there). ``networks`` are by default those
    of ``default_networks``; the results name them. ``baselines`` are methods or recipes that are run at the same
    ``budget``, images a class or bytes, and ``full`` for all training data; sets with soft labels are trained on these.
    ``ranks``, of ``condense.distributed.init_distributed``, deal the networks out among the processes of torchrun.

    An evaluation that was stopped goes on with the networks that are missing. Baselines are kept in the cache.

    Raises:
        ValueError: the set does not belong to this data set; bad network or protocol.
    """
    path = None if isinstance(syn, SyntheticSet) else expanded(syn)
    with ranks.rank_zero_first():
        found, arrays = open_set(syn, dataset, download=download)
    crossarch.check(found, arrays)
    target = expanded(out) if out is not None else _evaluation_path(path)
    baselines = (baselines,) if isinstance(baselines, str) else baselines
    check_seed(seed)
    plan = named(protocol, found) if isinstance(protocol, str) else protocol
    networks = default_networks(found, plan) if networks is None else networks
    networks = (networks,) if isinstance(networks, str) or callable(networks) else networks
    if not networks:
        raise ValueError(f"an evaluation needs a network; give {spelt('networks', ('convnet',))}")
    _check_place(target)
    if target is not None and target.exists():
        crossarch.read(target)
    chosen = _prepare(device)
    named_only = all(isinstance(network, str) for network in networks)  # a callable's name does not say its code
    rivals = _rivals([b for b in baselines if b != "full"], found, arrays, networks[0], chosen, seed, budget)
    common: dict[str, Any] = {
        "num_seeds": num_seeds,
        "seed": seed,
        "compute": compute,
        "device": chosen,
        "cache": cache_folder(),
        "ranks": ranks,
    }
    journal = None if target is None else Journal(target, ranks.rank)
    results: list[crossarch.Result] = []

    def keep(result: crossarch.Result) -> None:
        results.append(result)
        if target is not None and ranks.first:
            crossarch.merge(target, [result])

    with compute.arithmetic():
        crossarch.evaluate(found, arrays, networks=networks, protocol=plan, **common, journal=journal, on_result=keep)
        if baselines and named_only:
            common["journal"] = CachedCells(cache_folder())
        for name in baselines:
            if name == "full":
                transform = str(found.origin.recipe.get("transform", "channel"))
                for network in networks:
                    keep(full_data(arrays, network=network, transform=transform, **common))
            else:
                made = rivals[name]()
                if budget == "bytes" and sum(made.cost()) > sum(found.cost()):
                    warnings.warn(f"{name} takes {sum(made.cost())} bytes, the set {sum(found.cost())}", stacklevel=2)
                ranks.broadcast(list(made.state_dict().values()))
                theirs = plan if plan.name != "own" else _own(made, plan, found)
                if made.label_kind.space == "probabilities":
                    theirs = dataclasses.replace(theirs, labels="own")

                def keep_as(result: crossarch.Result, name: str = name) -> None:
                    keep(dataclasses.replace(result, method=name))

                crossarch.evaluate(made, arrays, networks=networks, protocol=theirs, **common, on_result=keep_as)
    ranks.barrier()
    if journal is not None and ranks.first:
        journal.remove()
    return crossarch.Evaluation(tuple(results))


@checked
def apply(
    application: str | Application,
    syn: SyntheticSet | Path | str,
    dataset: Data | None = None,
    *,
    baselines: str | Sequence[str] = (),
    compute: Compute = Compute(),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    **fields: Any,
) -> Findings:
    """What a set is worth: ``continual``, ``nas``, ``privacy`` or ``ranking``, beside baselines of the same budget.

    ``fields`` are those of the application. The findings land in ``apply-NAME.json`` in the run folder, or in ``out``.

    Raises:
        ValueError: unknown application or field; the set does not belong to the data.
    """
    if isinstance(application, str):
        if application not in APPLICATIONS:
            raise ValueError(f"unknown application {application!r}: {suggest(application, APPLICATIONS)}")
        application = APPLICATIONS[application]()
    application = dataclasses.replace(application, **_known_fields(fields, application))
    name = next((name for name, kind in APPLICATIONS.items() if kind is type(application)), type(application).__name__)
    baselines = (baselines,) if isinstance(baselines, str) else baselines
    check_seed(seed)
    path = None if isinstance(syn, SyntheticSet) else expanded(syn)
    target = expanded(out) if out is not None else path / f"apply-{name}.json" if path and path.is_dir() else None
    _check_place(target)
    found, arrays = open_set(syn, dataset, download=download)
    crossarch.check(found, arrays)
    application.check(found, baselines)
    chosen = _prepare(device)
    setting = Setting(syn=found, arrays=arrays, device=chosen, compute=compute, seed=seed, cache=cache_folder())
    rivals = _rivals(baselines, found, arrays, "convnet", chosen, seed)
    others = {other: make() for other, make in rivals.items()}
    with compute.arithmetic():
        findings = application.run(setting, others)
    if target is not None:
        table = {"title": findings.title, "columns": findings.columns, "rows": findings.rows}
        record = {
            "application": name,
            **dataclasses.asdict(application),
            "seed": seed,
            **findings.record,
            "table": table,
        }
        about = {"set": found.origin.recipe_hash, "dataset": arrays.name, "code": condense.__version__}
        write_text(target, json.dumps({**about, **record}, indent=1) + "\n")
    return findings


def default_networks(syn: SyntheticSet, protocol: Protocol) -> tuple[str, ...]:
    """The networks of an evaluation that names none: under ``own`` the one that the set is meant for, else a ConvNet.

    Raises:
        ValueError: that network has no name, since it was given as a callable.
    """
    return (own_network(syn),) if protocol.name == "own" else ("convnet",)


@checked
def open_set(
    syn: SyntheticSet | Path | str, dataset: Data | None = None, *, download: bool = False
) -> tuple[SyntheticSet, Arrays]:
    """A set, its file or run folder, or labelled pixels of any origin (``.npz``, a folder of images); and the data.

    ``dataset`` is where the data lie: by default as the run recorded it, else by the name in the file.

    Raises:
        ValueError: it cannot be read; pixels of any origin without ``dataset``.
    """
    if isinstance(syn, SyntheticSet):
        source = str(syn.origin.dataset["name"]) if dataset is None else dataset
        return syn, open_data(source, download)
    path = expanded(syn)
    if not exchange.is_foreign(path):
        found = load(path)
        source = runs.source_of(path, str(found.origin.dataset["name"])) if dataset is None else dataset
        return found, open_data(source, download)
    read = exchange.read(path)
    if dataset is None:
        raise ValueError(
            f"{path} does not say which data it was made from; give e.g. {spelt('dataset', 'fashion-mnist')}"
        )
    if read.space == "transformed":
        raise ValueError(
            f"{path} does not say through which transform its images went; first `condense import {path} "
            "set.safetensors --dataset NAME --transform channel` (or zca)"
        )
    arrays = open_data(dataset, download)
    return _adopt(read, arrays, "channel", Pixels()), arrays


@checked
def import_set(
    path: Path | str,
    dataset: Data,
    *,
    transform: str = "channel",
    decode: Decode | str = Pixels(),
    download: bool = False,
) -> SyntheticSet:
    """A published set (see ``condense.exchange.published``) as one of ours, by the caller's word on data and transform.

    Raises:
        ValueError: it cannot be read, or does not fit the data.
    """
    chosen = recipe.choice("decode", decode)
    return _adopt(exchange.read(expanded(path)), open_data(dataset, download), transform, chosen)


@checked
def report(
    folders: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    dataset: Data | None = None,
    *,
    download: bool = False,
) -> Path:
    """Write runs, side by side, as one HTML file that asks nothing of a network; by default report.html in the first.

    ``dataset`` is where the data of whitened sets lie, if not where their runs recorded it.

    Raises:
        ValueError: a folder holds no finished run; the file cannot be written.
    """
    from condense.eval import report

    paths = [expanded(folder) for folder in ((folders,) if isinstance(folders, Path | str) else folders)]
    if not paths:
        raise ValueError("a report needs a run; give one or more folders that `condense distill` wrote")
    target = expanded(out) if out is not None else paths[0] / "report.html"
    found = [report.collect(path) for path in paths]
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} for the report; make it or give another {spelt('out')}")
    pixels: list[Transform | None] = []
    for run, path in zip(found, paths, strict=True):
        try:
            pixels.append(_pixels(run.syn, path, dataset, download))
        except ValueError as error:
            warnings.warn(f"no pictures of {path}: {error}", stacklevel=2)
            pixels.append(None)
    write_text(target, report.render(found, pixels))
    return target


@checked
def draw(syn: SyntheticSet | Path | str, out: Path | str, dataset: Data | None = None) -> None:
    """Draw the images of a set as one PNG, a row for each class.

    Raises:
        ValueError: the set is whitened and its data are not at hand; the file cannot be written.
    """
    found = syn if isinstance(syn, SyntheticSet) else load(syn)
    picture.draw(found, _pixels(found, syn, dataset), expanded(out))


def _pixels(
    found: SyntheticSet, syn: SyntheticSet | Path | str, dataset: Data | None, download: bool = False
) -> Transform:
    """The way back to pixels of the set ``found`` at ``syn``. Raises ValueError of a whitened set without its data."""
    if found.origin.transform.get("kind") != "zca":
        return Transform.from_description(dict(found.origin.transform))
    return crossarch.transform_of(*open_set(syn, dataset, download=download), cache_folder())


@checked
def export_set(syn: SyntheticSet | Path | str, out: Path | str, kind: str, dataset: Data | None = None) -> None:
    """Write a set as ``npz``, ``folder`` or ``huggingface``; see ``condense.exchange.export``.

    Raises:
        ValueError: unknown format, something is at ``out``, or it cannot be written.
    """
    found = syn if isinstance(syn, SyntheticSet) else load(syn)
    exchange.export(found, _pixels(found, syn, dataset), expanded(out), kind)


def _adopt(read: exchange.External, arrays: Arrays, transform: str, decode: Decode) -> SyntheticSet:
    task = plain_task(arrays, "mlp", transform, Split(val_fraction=0.0))
    return exchange.as_set(read, arrays, task.transform, transform, decode=decode)


def _check_place(target: Path | None) -> None:
    """Raise ValueError before the work where its results could not be written."""
    if target is not None:
        if target.is_dir():
            raise ValueError(f"{target} is a folder; give a file for the results as {spelt('out')}")
        if not target.parent.is_dir():
            raise ValueError(
                f"there is no folder {target.parent} for the results; make it or give another {spelt('out')}"
            )
        with reporting(target), temporary(target.parent):
            pass


def _own(made: SyntheticSet, plan: Protocol, found: SyntheticSet) -> Protocol:
    """The protocol ``own`` of a baseline, with the fields that the user changed in that of the set."""
    usual = named("own", found)
    changed = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    changed = {name: value for name, value in changed.items() if value != getattr(usual, name)}
    return dataclasses.replace(named("own", made), **changed)


def choose_compiled_folder() -> None:
    """Say where torch.compile keeps what it makes; torch's compiler must not be imported before.

    Each instruction set has a folder of its own: torch takes code of another one from its cache, which gives NaN.
    """
    _compiled.close()
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    cache = Cache(cache_folder(), "compiled")
    folder = _compiled.enter_context(cache.held({"instructions": instructions}, about=instructions))
    keep_compiled(folder if folder is not None and os.access(folder, os.W_OK) else None)


_compiled = contextlib.ExitStack()
"""Holds the entry of the cache in which this process keeps compiled code."""


def _prepare(device: str) -> torch.device:
    """The device of this name, and the process made ready for work on it."""
    chosen = resolve_device(device)
    choose_compiled_folder()
    if chosen.type == "cpu":
        keep_freed_memory()
    return chosen


def _settle(plan: Recipe, arrays: Arrays, network: Functional, earlier: Mapping[str, Any] | None = None) -> Compute:
    """The recipe's ``compute`` with nothing left open: a function of its planned work, or of what is settled."""
    latents = plan.decode.latents_per_class(plan.ipc, arrays.input_shape, arrays.num_classes)
    per_class = latents * plan.decode.expansion
    passes = plan.method.estimated_work(len(arrays.x_train), arrays.num_classes, per_class)
    return plan.compute.resolved(network.flops * passes, network.device, earlier)


def run_folder(plan: Recipe, options: RunOptions, arrays: Arrays) -> Path:
    """Where a recipe is run: ``options.out``, or a name made of method, data set, budget and seed."""
    method = registry.name_of(plan.method).replace(":", ".").replace("<locals>.", "")
    return expanded(options.out or Path("runs") / f"{method}-{arrays.name}-ipc{plan.ipc}-seed{plan.seed}")


def open_data(dataset: Data, download: bool = False) -> Arrays:
    """The data, decoded once and then mapped from the cache; see ``condense.data.datasets.load``."""
    return dataset if isinstance(dataset, Arrays) else load_data(dataset, download=download, cache=cache_folder())


def located(plan: Recipe, options: RunOptions) -> Recipe:
    """The recipe with the place of its data: where the run to be resumed recorded it, else as the recipe says.

    Raises:
        ValueError: the recipe has a name and a fingerprint only, and there are no such data here.
    """
    run = expanded(options.out) if options.resume and options.out is not None else None
    source = runs.source_of(run, plan.dataset)
    if plan.fingerprint is not None and source not in names() and not expanded(source).exists():
        raise ValueError(
            f"the recipe is for the data set {plan.dataset!r} with fingerprint {plan.fingerprint[:12]}, which is no "
            f"known name and no file here; give {spelt('dataset', 'PATH')}"
        )
    return dataclasses.replace(plan, dataset=source)


def _check_data(plan: Recipe, arrays: Arrays) -> None:
    if plan.fingerprint not in (None, arrays.fingerprint["train"]):
        raise ValueError(
            f"the recipe is for data with fingerprint {plan.fingerprint[:12]}, {arrays.name} has "
            f"{arrays.fingerprint['train'][:12]}; give {spelt('dataset')} with the right data, or "
            f"{spelt('fingerprint', None)} to distil these data by that recipe"
        )


def _shared(plan: Recipe, arrays: Arrays) -> Recipe:
    """The recipe as files hold it: it says which data are needed, not where they lie on this machine."""
    return dataclasses.replace(plan, dataset=arrays.name, fingerprint=arrays.fingerprint["train"])


def _task(arrays: Arrays, network: Functional, *, transform: str, split: Split, augment: str) -> Task:
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
    """A task on the CPU without augmentation, for what only needs shapes and identities."""
    skeleton = Functional(network, arrays.input_shape, arrays.num_classes)
    return _task(arrays, skeleton, transform=transform, split=split.resolved(False), augment="none")


def _rivals(
    names: Sequence[str],
    syn: SyntheticSet,
    arrays: Arrays,
    otherwise: Network,
    device: torch.device,
    seed: int,
    budget: Budget = "images",
) -> dict[str, Callable[[], SyntheticSet]]:
    """What makes each baseline of ``syn``, by name; their recipes are checked at once.

    ``otherwise`` is the network they are made with where that of ``syn`` has no name.
    """
    if not names:
        return {}
    stored = str(syn.origin.recipe.get("network", "convnet"))
    chosen = otherwise if stored.startswith("custom:") else stored
    network = Functional(chosen, arrays.input_shape, arrays.num_classes, device)
    recipes = {name: _baseline_recipe(name, syn, arrays, network, seed, budget) for name in names}
    return {name: functools.partial(_baseline, name, plan, arrays, network) for name, plan in recipes.items()}


def _baseline_recipe(
    name: str, syn: SyntheticSet, arrays: Arrays, network: Functional, seed: int, budget: Budget = "images"
) -> Recipe:
    """The recipe of this name with the budget, transform and split of ``syn``.

    Raises:
        ValueError: unknown, or a composition that makes no sense: the line of ``distill``.
    """
    stored = syn.origin.recipe
    ipc = int(stored.get("ipc", len(syn) // syn.origin.num_classes))
    theirs = find_recipe(name, arrays.name, ipc)[0]
    plan = dataclasses.replace(
        _shared(theirs, arrays),
        transform=stored.get("transform", "channel"),
        split=Split(**stored.get("split", {"val_fraction": 0.0})),
        network=network.name,
        ipc=_affordable(syn, theirs) if budget == "bytes" else ipc,
        seed=seed,
    )
    _check_composition(plan)
    return dataclasses.replace(plan, compute=_settle(plan, arrays, network))


def _baseline(name: str, plan: Recipe, arrays: Arrays, network: Functional) -> SyntheticSet:
    """The set that a recipe of ``_baseline_recipe`` makes; made once, then cached."""
    task = _task(arrays, network, transform=plan.transform, split=plan.split, augment=plan.augment)
    ctx = _context(plan, task, artifacts.DEFAULT_ROOT, arrays.name)
    known = registry.name_of(plan.method) in registry.METHODS and not network.name.startswith("custom:")
    cache = Cache(cache_folder() if known else None, "baselines")
    key = {"recipe": ctx.origin.recipe_hash, "device": network.device.type, "code": condense.__version__}
    cached = cache.read(key, load)
    if cached is not None:
        return cached.to(network.device)
    title = f"{name} {arrays.name} ipc {plan.ipc}"
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


def _context(plan: Recipe, task: Task, buffers: Path, source: str, ranks: Ranks = Ranks()) -> Context:
    """``source``: where the data lie, for the command that builds what is missing."""
    found = {type(spec): spec.open(artifacts.find(buffers, spec, source)) for spec in plan.method.needs(task)}
    used = [artifact.describe() for artifact in found.values()]
    method = plan.method
    own = method.training(task)
    if plan.objective != "cross-entropy":
        own = dataclasses.replace(own, loss=plan.objective)
    training = own.content() | {
        "augment": str(method.training_augment(task)),
        "network": method.training_network(task),
    }
    origin = Origin(
        dataset=task.dataset(),
        transform=task.transform.describe(),
        training=training,
        recipe=recipe.to_mapping(plan),
        recipe_hash=plan.hash(dataset=task.fingerprint, network=task.network.identity(), artifacts=used),
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
        ranks=ranks,
        objective=OBJECTIVES[plan.objective](),
    )


def _check_composition(plan: Recipe) -> None:
    reason = plan.method.incompatibility(plan.decode, plan.labels, plan.transform, plan.objective)
    if reason is not None:
        raise ValueError(f"{registry.name_of(plan.method)} {reason}")


def _check_validation(task: Task) -> None:
    """Raise ValueError where a class has no validation image."""
    train = task.train.labels.bincount(minlength=task.num_classes)
    held = torch.zeros_like(train) if task.val is None else task.val.labels.bincount(minlength=task.num_classes)
    if not held.all():
        rarest, name = int((train + held)[held == 0].min()), task.classes[int(held.argmin())]
        wider = spelt("split.val_fraction", math.ceil(100 / rarest) / 100)
        mend = f"{wider} or {spelt('eval_every', 0)}" if rarest > 1 else spelt("eval_every", 0)
        raise ValueError(
            f"{spelt('eval_every')} needs validation images of every class, split.val_fraction "
            f"{task.split.val_fraction} holds none of class {name!r} out; give {mend}"
        )


def _validator(task: Task, plan: Recipe) -> engine.Validate:
    """Accuracy on the validation split of one network trained briefly on the set."""
    assert task.val is not None
    val = task.val
    scorer = crossarch.SetScorer(task.network, crossarch.BRIEF, plan.compute)

    def validate(syn: SyntheticSet, step: int) -> dict[str, float]:
        images, labels = crossarch.decoded(syn, soft=False)
        rng = Rng(plan.seed).child("validation", step)
        return {"val_accuracy": scorer.score(images, labels, val.images, val.labels, [rng])[0].accuracy}

    return validate


def _known_fields(fields: Mapping[str, Any], owner: Any, others: Sequence[str] = ()) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(owner)]
    for name in fields:
        if name not in names:
            kind = type(owner).__name__
            raise ValueError(f"{kind} has no field {name!r}: {suggest(name, [*names, *others])}")
    return dict(fields)


def _option(name: str, value: Any) -> Any:
    """A run option as people write it in Python: one tracker by its name."""
    return (value,) if name == "track" and isinstance(value, str) else value


def _evaluation_path(path: Path | None) -> Path | None:
    if path is None:
        return None
    return path / "evaluation.json" if path.is_dir() else path.with_suffix(".evaluation.json")
