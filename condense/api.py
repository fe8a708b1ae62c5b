"""Public functions of the package, which the command line also calls: make_buffer, distill, evaluate, load, ..."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import __version__, artifacts, exchange, experiment, picture, recipe, runs, sets, zoo
from condense.augment import Augment
from condense.baselines import Budget as Budget
from condense.baselines import check_baselines, prepare_baselines, require_classes_alone
from condense.buffers.trajectories import Experts, build, check_augment
from condense.cache import cache_folder
from condense.compute import Compute, prepare_device
from condense.data import datasets
from condense.data.datasets import Arrays, Data, name_of, open_data
from condense.data.hugging_face import HuggingFace, is_name, list_rows
from condense.data.hugging_face import named as named_rows
from condense.data.images import Images
from condense.data.layout import require_kind
from condense.data.listing import list_photos
from condense.data.photos import Preparation, Prepared
from condense.data.photos import prepare as prepare_photos
from condense.data.transform import Transform, check_transform
from condense.distributed import Ranks
from condense.eval import evaluate as evaluation
from condense.eval import teachers
from condense.eval.applications import Application, Findings, Setting, name_and_application
from condense.eval.applications.pruning import PRUNING, Pruning
from condense.eval.baselines import FULL, compare
from condense.eval.journal import Journal
from condense.eval.kept import Kept
from condense.eval.protocol import Protocol, named, own_network
from condense.eval.results import Evaluation, Result, merge, read, read_complete
from condense.eval.results import Scored as Scored
from condense.eval.subject import Subject
from condense.experiment import find_recipe as find_recipe
from condense.experiment import plain_task as plain_task
from condense.files import (
    check_new_file,
    check_new_folder,
    check_replaceable,
    checksum,
    expanded,
    read_header,
    read_json,
    replacing,
    write_text,
)
from condense.labelling import NamedTeacher, is_open_clip, open_teachers, relabelled, teacher_of, trained_projector
from condense.method import Context, Method
from condense.methods.selection import Selection
from condense.names import spelt
from condense.networks import Factory, Functional
from condense.recipe import Recipe
from condense.rng import check_seed
from condense.runs import RunOptions as RunOptions
from condense.schema import accepted, brief, checked, replaced
from condense.sets import Readable
from condense.sets import open_set as open_set
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.files import load as load
from condense.synthetic.files import save
from condense.synthetic.labels import Hard, Labels
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import Projector, Stored, ViewLabels
from condense.task import Split
from condense.teachers import Teacher
from condense.tracking import progress


@checked
def make_buffer(
    dataset: Data = "digits",
    network: str | Factory = "auto",
    *,
    experts: Experts = Experts(),
    transform: str = "channel",
    split: Split = Split(val_fraction=0.0),
    compute: Compute = Compute(),
    out: Path | str = "artifacts",
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    on_data: Callable[[Arrays], None] | None = None,
    ranks: Ranks = Ranks(),
    **fields: Any,
) -> Path:
    """Train expert trajectories that the buffer lacks, and return the folder of the buffer.

    ``fields`` are fields of ``Experts``: ``make_buffer("digits", num_experts=5, num_epochs=10)``. ``on_data`` is called
    with the data before training starts. The processes of ``ranks`` (see ``condense.distributed.init_distributed``)
    share the experts.

    Raises:
        ValueError: invalid data, network or field; the disk is full.
    """
    plan = replaced(experts, fields)
    check_seed(seed)
    experiment.check_names(network, transform)
    check_augment(plan.augmentation(Augment()))
    root, chosen = expanded(out), prepare_device(device)
    check_new_folder(root)
    with ranks.rank_zero_first():
        arrays = open_data(dataset, download)
        if on_data is not None:
            on_data(arrays)
        functional = Functional(network, arrays.input_shape, arrays.num_classes, chosen)
        resolved = split.resolved(selects=False)
        task = experiment.open_task(arrays, functional, transform=transform, split=resolved, augment="dsa")
    title = f"experts {task.name} {task.network.name}"
    with compute.arithmetic(), progress(title, plan.num_experts * plan.num_epochs) as bar:

        def report(expert: int, epoch: int, record: Mapping[str, float]) -> None:
            note = " ".join(f"{name} {value:.3f}" for name, value in record.items() if isinstance(value, float))
            bar(expert * plan.num_epochs + epoch, f"expert {expert} {note}")

        return build(task, plan, root=root, seed=seed, compute=compute, progress=report, ranks=ranks)


@checked
def distill(
    method: str | Path | Method | Recipe,
    *,
    dataset: Data | None = None,
    network: str | Factory | None = None,
    options: RunOptions = RunOptions(),
    ranks: Ranks = Ranks(),
    **fields: Any,
) -> SyntheticSet:
    """Distil a data set and return the synthetic set. All other output is written to the run folder.

    ``method`` is the name of a method (run with its published recipe for this data set and budget, if there is one),
    the name or path of a recipe, a ``Method`` or a ``Recipe``. ``fields`` are fields of ``RunOptions`` (out, resume,
    ...), of the recipe (ipc, seed, ...) or of the method (num_steps, ...). The processes of ``ranks`` (see
    ``condense.distributed.init_distributed``) share the parts of a step.

    Raises:
        ValueError: invalid input; one line that says what is wrong and how to correct it.
    """
    names = [f.name for f in dataclasses.fields(RunOptions)]
    options = dataclasses.replace(options, **{k: _option(k, v) for k, v in fields.items() if k in names})
    fields = {k: v for k, v in fields.items() if k not in names}
    if "ipc" in fields:
        fields["ipc"] = accepted(fields["ipc"], int | None, "distill", "ipc")
    if isinstance(network, str):
        fields["network"] = network
    if dataset is None:
        return run(experiment.recipe_for(method, None, fields), options, network=network, ranks=ranks)
    name, source = name_of(dataset), {"dataset": str(dataset)} if isinstance(dataset, str | Path) else {}
    plan = experiment.recipe_for(method, name, {"dataset": name, **fields, **source})
    with ranks.rank_zero_first():
        experiment.check_run(plan, options, network, dataset=dataset, ranks=ranks)
        arrays = open_data(dataset, options.download)
    if arrays.name != name:  # the file holds a known data set
        plan = experiment.recipe_for(method, arrays.name, {"dataset": arrays.name, **fields, **source})
    return run(plan, options, arrays=arrays, network=network, ranks=ranks)


@checked
def run(
    plan: Recipe,
    options: RunOptions,
    *,
    arrays: Arrays | None = None,
    network: str | Factory | None = None,
    ranks: Ranks = Ranks(),
) -> SyntheticSet:
    """Run a recipe in its run folder. ``arrays`` and ``network`` replace the data and the network of the recipe.

    Only rank 0 writes files. A run that its launcher restarted is resumed.

    Raises:
        ValueError: the folder holds another run; see also ``condense.engine.run``.
    """
    validates, resume = options.eval_every > 0, options.resume or ranks.restarted
    with ranks.rank_zero_first():
        plan = plan if arrays is not None else runs.located(plan, options)
        data = plan.dataset if arrays is None else arrays
        device = experiment.check_run(plan, options, network, dataset=data, ranks=ranks)
        arrays = open_data(data, options.download)
    folder = runs.run_folder(plan, options.out, arrays.name)
    with runs.held(folder) if ranks.first else contextlib.nullcontext():
        with ranks.rank_zero_first():
            written = runs.written_recipe(folder) if resume else None
            resolved = experiment.resolve(
                plan, arrays, device=device, network=network, validates=validates, earlier=written
            )
            if ranks.first:
                runs.claim(folder, resolved.plan, written)
            ctx = experiment.prepare(resolved, expanded(options.buffers), ranks=ranks)
        validate = evaluation.validator(ctx.task, ctx.compute, resolved.plan.seed) if validates else None
        return experiment.run(resolved, ctx, folder, options, resume=resume, validate=validate)


@checked
def evaluate(
    syn: Readable,
    dataset: Data | None = None,
    *,
    networks: str | Factory | Sequence[str | Factory] | None = None,
    num_seeds: int = 5,
    protocol: str | Protocol | Sequence[str | Protocol] = "canonical",
    baselines: str | Sequence[str] = (),
    budget: Budget = "images",
    split: Scored = "test",
    keep: Path | str | None = None,
    buffers: Path | str = artifacts.DEFAULT_ROOT,
    compute: Compute = Compute(),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    ranks: Ranks = Ranks(),
) -> Evaluation:
    """Train new networks on a set and score each once, after its last epoch, on the test split.

    With ``split`` ``"validation"``, networks are scored on the training images that the set was not made from, so that
    choices can be made before the test split is used.

    ``syn`` is a set, its file or a run folder, to which ``evaluation.json`` is written, or ``validation.json`` for
    scores on held-out images. By default ``networks`` are those of ``default_networks``. ``protocol`` may be several
    protocols, one after the other. ``baselines`` are methods or recipes that are run at the same ``budget`` (images per
    class or bytes), and ``full`` for all training data. If a set has labels of its views (``relabel``) that a protocol
    uses, baselines are labelled in the same way, by the same teacher. ``buffers`` is the folder in which a teacher that
    the set does not hold is found. The processes of ``ranks`` (see ``condense.distributed.init_distributed``) share the
    networks.

    ``keep`` is a folder for the weights of the networks that are trained on the set, as state dicts in files
    ``NETWORK-PROTOCOL-K.safetensors``.

    An evaluation that was stopped continues with the missing networks, but with ``keep`` trains all of them. Baselines
    are cached.

    Raises:
        ValueError: the set does not belong to this data set; invalid network or protocol; with ``split``
            ``"validation"``, the set was made from all training images.
    """
    check_seed(seed)
    target = expanded(out) if out is not None else evaluation_file(syn, split)
    if target is not None:
        check_new_file(target, "results")
        for row in read(target) if target.exists() else []:
            if (other := row.get("split", "test")) != split:
                raise ValueError(f"{target} holds {brief(other)} accuracies; give {spelt('out')} with another file")
    folder = None if keep is None else expanded(keep)
    if folder is not None:
        check_new_folder(folder)
    given, data = sets.read_set(syn, dataset)
    known = given if isinstance(given, SyntheticSet) else None
    several = [protocol] if isinstance(protocol, str | Protocol) else protocol
    plans = [named(one, known) if isinstance(one, str) else one for one in several]
    if not plans:
        raise ValueError("an evaluation needs a protocol; give protocol='canonical'")
    baselines = (baselines,) if isinstance(baselines, str) else baselines
    rivals = [name for name in baselines if name != FULL]
    networks = default_networks(known, plans[0]) if networks is None else networks
    networks = (networks,) if isinstance(networks, str) or callable(networks) else networks
    if split == "validation" and FULL in baselines:
        raise ValueError(
            f"the baseline {FULL} is trained on the held-out images too; leave it out, or give {spelt('split', 'test')}"
        )
    for plan in plans:
        evaluation.check(known, networks, plan, num_seeds, split=split)
    check_baselines(rivals, given, networks[0], seed, budget)
    if known is not None and any(plan.view_labels(known) for plan in plans):
        require_classes_alone(rivals, known)
    chosen = prepare_device(device)
    with ranks.rank_zero_first():
        syn, arrays = sets.with_data(given, open_data(data, download))
    makers = prepare_baselines(rivals, syn, arrays, networks[0], chosen, seed, budget)
    opened = [teachers.opened(plan, syn.origin, chosen) for plan in plans]
    plans = [plan for plan, _ in opened]
    found: dict[str, Teacher | NamedTeacher] = {name: one for _, of in opened for name, one in of.items()}
    of_set, makers = _labelled(syn, plans, makers, expanded(buffers), arrays.strategy, chosen, compute)
    subject = Subject(syn=syn, arrays=arrays, device=chosen, cache=cache_folder(), teachers=found | of_set)
    journal = None if target is None else Journal(target, ranks.rank)
    kept = None if folder is None else Kept(folder, subject, networks, plans, num_seeds)
    unfinished = None if kept is None else kept.unfinished
    results: list[Result] = []

    def record(result: Result) -> None:
        results.append(result)
        if target is not None and ranks.first:
            merge(target, [result])

    common: dict[str, Any] = {
        "networks": networks,
        "num_seeds": num_seeds,
        "seed": seed,
        "compute": compute,
        "ranks": ranks,
        "on_result": record,
        "split": split,
    }
    with compute.arithmetic():
        for plan in plans:
            evaluation.evaluate(subject, protocol=plan, journal=journal, keep=unfinished, **common)
        compare(subject, baselines, makers, protocols=plans, **common)
    ranks.barrier()
    if kept is not None:
        kept.finish()
    if journal is not None and ranks.first:
        journal.remove()
    return Evaluation(tuple(results), tuple(arrays.classes))


def _labelled(
    syn: SyntheticSet,
    plans: Sequence[Protocol],
    makers: Mapping[str, Callable[[], SyntheticSet]],
    buffers: Path,
    strategy: str,
    device: torch.device,
    compute: Compute,
) -> tuple[dict[str, NamedTeacher], dict[str, Callable[[], SyntheticSet]]]:
    """Return the teacher of a set whose views are labelled, by its name, and functions that make its baselines with
    labels of the same kind. Without such labels, or where nothing needs the teacher, there is none."""
    kind = next((kind for plan in plans if (kind := plan.view_labels(syn)) is not None), None)
    if kind is None or not (makers or not isinstance(kind, Stored)):
        return {}, dict(makers)
    by = teacher_of(syn, buffers, device)

    def label(make: Callable[[], SyntheticSet]) -> SyntheticSet:
        return relabelled(make(), kind, by, strategy=strategy, compute=compute)

    return {by.name: by}, {name: functools.partial(label, make) for name, make in makers.items()}


@checked
def relabel(
    syn: Readable,
    teacher: Path | str | Sequence[Path | str],
    labels: Labels | str = Stored(),
    *,
    weak_teachers: Path | str | None = None,
    dataset: Data | None = None,
    out: Path | str | None = None,
    compute: Compute = Compute(),
    device: str = "auto",
    download: bool = False,
    **fields: Any,
) -> SyntheticSet:
    """Label the views of a set by a trained network, or by the mean logits of several, and return the set with these
    labels.

    Args:
        syn: a set, its file or a run folder.
        teacher: the folder of a buffer, whose first network labels the views, or a folder with one such buffer. For
            ``projector`` labels this network is the encoder, which ``open_clip:MODEL/WEIGHTS`` takes from that
            package. Several such folders give ``stored`` labels, or
            ``online`` ones with ``keep_weights=False``, the mean of the logits of their networks.
        labels: ``Stored``, ``Online`` or ``Projector``, or the name of one of these kinds.
        weak_teachers: for ``projector`` labels, the folder of a buffer of trajectories, whose first expert gives the
            weak teachers, or a folder with one such buffer; by default ``teacher``.
        dataset: for ``projector`` labels, the data of the set; by default the location that the run recorded, else
            the name in the set.
        out: the file to write; by default nothing is written for a set, and a file beside the set otherwise
            (``relabelled_file``). An earlier set is replaced, a file of another kind is not.
        compute: compute policy of the teacher.
        device: device to compute on.
        download: let torchvision download missing data.
        fields: fields of the labels (epochs, keep, ...).

    Raises:
        ValueError: the set cannot be read or has no classes; the buffer is of other data, another split or another
            transform; the file cannot be written.
    """
    chosen = recipe.choice("labels", labels)
    if not isinstance(chosen, ViewLabels):
        raise ValueError(
            f"a teacher gives labels of the kinds stored, online and projector, not {chosen.name}; give one of these"
        )
    kind = replaced(chosen, fields)
    if weak_teachers is not None and not isinstance(kind, Projector):
        raise ValueError(
            f"{kind.name} labels have no weak teachers; leave out {spelt('weak_teachers')}, or give "
            f"{spelt('labels', 'projector')}"
        )
    teachers = [expanded(path) for path in ([teacher] if isinstance(teacher, Path | str) else teacher)]
    if isinstance(kind, Projector) and weak_teachers is None and any(is_open_clip(path) for path in teachers):
        raise ValueError(
            "an encoder of open_clip has no epochs to be the weak teachers of a projector; give "
            f"{spelt('weak_teachers')} with the folder of a buffer of trajectories"
        )
    target = expanded(out) if out is not None else None if isinstance(syn, SyntheticSet) else relabelled_file(syn, kind)
    if target is not None:
        check_new_file(target, "set")
        if target.exists() and read_header(target).get("kind") != "synthetic set":
            raise ValueError(f"{target} exists already and is no set; give another path, or move it away")
    given = syn if isinstance(syn, SyntheticSet) else load(syn)
    origin = given.origin
    if origin.privacy:
        raise ValueError(
            f"the set is private (epsilon {origin.privacy.get('epsilon')}), and labels of a teacher that was trained "
            "on the data are not; keep the labels that it has"
        )
    strategy = datasets.strategy(origin.dataset_name, origin.fingerprint, origin.input_shape)
    by = open_teachers(teachers, kind, origin, prepare_device(device))
    with progress(f"{kind.name} labels {origin.dataset_name}", kind.num_rounds) as bar:
        common: dict[str, Any] = {"strategy": strategy, "compute": compute, "on_epoch": lambda done: bar(done, "")}
        if isinstance(kind, Projector):
            _, source = sets.read_set(syn, dataset)
            arrays = open_data(source, download)
            train = Subject(syn=given, arrays=arrays, device=by.device, cache=cache_folder()).train
            weak = teachers[0] if weak_teachers is None else expanded(weak_teachers)
            by = trained_projector(kind, by, weak, train, origin, **common)
        result = relabelled(given, kind, by, **common)
    if target is not None:
        save(result, target)
    return result


def relabelled_file(syn: Path | str, kind: ViewLabels) -> Path:
    """Return the file that ``relabel`` writes by default: ``synthetic-LABELS.safetensors`` in the run folder, or
    ``FILE-LABELS.safetensors``, where LABELS is the kind of labels (``stored``, ``online`` or ``projector``); a set of
    the zoo is written to the current folder."""
    path = zoo.beside(syn)
    path = path / "synthetic.safetensors" if path.is_dir() else path
    return path.with_name(f"{path.stem}-{kind.name}.safetensors")


@checked
def apply(
    application: str | Application,
    syn: Readable,
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
    """Test a set in an application: ``continual``, ``nas``, ``privacy``, ``probe``, ``ranking`` or ``transfer``.

    ``baselines`` are methods or recipes that are run at the same budget.
    ``fields`` are fields of the application. The results are written to ``out``, by default ``apply-NAME.json`` in the
    run folder.

    Raises:
        ValueError: unknown application or field; the set does not belong to the data; ``out`` cannot be written, or
            it exists and holds no results.
    """
    name, application = name_and_application(application)
    application = replaced(application, fields)
    baselines = (baselines,) if isinstance(baselines, str) else baselines
    check_seed(seed)
    folder = None if isinstance(syn, SyntheticSet) else expanded(syn)
    target = expanded(out) if out is not None else folder / f"apply-{name}.json" if folder and folder.is_dir() else None
    if target is not None:
        check_new_file(target, "results")
        _check_findings(target)
    given, data = sets.read_set(syn, dataset)
    if isinstance(given, SyntheticSet):
        if application.needs_classes:
            given.require_classes(f"the application {name}")
        application.check(given, baselines)
    check_baselines(baselines, given, "auto", seed)
    chosen = prepare_device(device)
    syn, arrays = sets.with_data(given, open_data(data, download))
    subject = Subject(syn=syn, arrays=arrays, device=chosen, cache=cache_folder())
    application.check(syn, baselines)
    makers = prepare_baselines(baselines, syn, arrays, "auto", chosen, seed)
    rivals = {rival: make() for rival, make in makers.items()}
    with compute.arithmetic():
        findings = application.run(Setting(subject=subject, compute=compute, seed=seed, download=download), rivals)
    if target is not None:
        about = {"set": syn.origin.recipe_hash, "dataset": arrays.name, "code": __version__, "application": name}
        content = {**about, **dataclasses.asdict(application), "seed": seed, **findings.content()}
        write_text(target, json.dumps(content, indent=1) + "\n")
    return findings


def _check_findings(file: Path) -> None:
    """Raise ValueError if a file exists that ``apply`` did not write."""
    if not file.exists() or not file.stat().st_size:
        return
    check_replaceable(file, "file of results", b"{")
    content = read_json(file, fix="give another path, or move it away")
    if not isinstance(content, Mapping) or "application" not in content:
        raise ValueError(f"{file} exists already and is not from condense apply; give another path, or move it away")


@checked
def prune(
    dataset: Data = "digits",
    plan: Pruning = PRUNING,
    *,
    transform: str = "channel",
    compute: Compute = Compute(),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    **fields: Any,
) -> Findings:
    """Measure accuracy against the share of the training images that selection methods keep, with and without a
    teacher.

    ``fields`` are fields of ``Pruning``: ``prune("digits", fractions=(0.1, 0.3), methods=("random", "el2n"))``. The
    accuracies are written to the folder ``out`` as ``apply-pruning.json`` and drawn in ``pruning.svg``. Networks are
    cached, so that a call that was stopped continues with the missing ones.

    Raises:
        ValueError: unknown field or method; a method that selects no real images; the folder cannot be written.
    """
    plan = replaced(plan, fields)
    plan.check()
    check_seed(seed)
    folder = None if out is None else expanded(out)
    if folder is not None:
        check_new_folder(folder)
        _check_findings(folder / "apply-pruning.json")
    common: dict[str, Any] = {"transform": transform, "split": Split(val_fraction=0.0), "network": plan.network}

    def recipe_of(method: str, fraction: float) -> Recipe:
        fields = {**common, "dataset": name_of(dataset), "fraction": fraction, "compute": compute, "seed": seed}
        return experiment.recipe_for(method, name_of(dataset), fields)

    for method in plan.methods:
        found = recipe_of(method, min(plan.fractions))
        if not isinstance(found.labels, Hard):
            raise ValueError(
                f"the recipe {method} has labels of its own, and here the images keep their classes; "
                f"give {spelt('methods', ('random', 'el2n'))}"
            )
        if not isinstance(found.method, Selection):
            raise ValueError(
                f"{method} makes equally many images of each class, not a fraction of the real ones; "
                f"give {spelt('methods', ('random', 'el2n'))}"
            )
        experiment.check(found)
    chosen = prepare_device(device)
    arrays = open_data(dataset, download)
    network = Functional(plan.network, arrays.input_shape, arrays.num_classes, chosen)
    task = experiment.open_task(arrays, network, **{k: v for k, v in common.items() if k != "network"}, augment="none")

    def prepared(method: str, fraction: float) -> tuple[Selection, Context]:
        resolved = experiment.resolve(recipe_of(method, fraction), arrays, device=chosen)
        assert isinstance(resolved.plan.method, Selection)
        return resolved.plan.method, experiment.prepare(resolved, like=task)

    def select(method: str, fraction: float) -> Tensor:
        selection, ctx = prepared(method, fraction)
        with ctx.compute.arithmetic():
            return torch.cat(list(selection.pick(ctx)))

    _, ctx = prepared(plan.methods[0], plan.fractions[0])
    protocol, named = teachers.opened(plan.protocol, ctx.origin, chosen)
    plan = dataclasses.replace(plan, protocol=protocol)
    with compute.arithmetic():
        findings = plan.run(task, arrays, select, seed=seed, compute=compute, cache=cache_folder(), named=named)
    if folder is not None:
        about = {"dataset": arrays.name, "code": __version__, "application": "pruning", "seed": seed}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "apply-pruning.json", json.dumps({**about, **findings.content()}, indent=1) + "\n")
        write_text(folder / "pruning.svg", plan.figure(findings))
    return findings


def default_networks(syn: SyntheticSet | None, protocol: Protocol) -> tuple[str, ...]:
    """Return the default networks of an evaluation: under ``own`` the network stored in the set, else a ConvNet.

    Raises:
        ValueError: the stored network was given as a callable, so it cannot be built from its name.
    """
    return (own_network(syn),) if syn is not None and protocol.name == "own" else ("auto",)


@checked
def import_set(
    path: Path | str,
    dataset: Data,
    *,
    transform: str = "channel",
    decode: Decode | str = Pixels(),
    name: str | None = None,
    download: bool = False,
) -> SyntheticSet:
    """Read a published set (see ``condense.exchange.published``). Its data and transform are recorded as given.

    ``name`` is that of its method in tables, after ``imported:``; by default it is the layout of the file.

    Raises:
        ValueError: the set cannot be read or does not fit the data, or the name is empty or too long.
    """
    chosen = recipe.choice("decode", decode)
    check_transform(transform)
    if name is not None and not (name.isprintable() and 0 < len(name) <= 60):
        raise ValueError(
            f"{spelt('name', name)} is no name of 1 to 60 printable characters; give {spelt('name', 'mtt')}"
        )
    external = exchange.read(expanded(path))
    return sets.adopted(external, open_data(dataset, download), transform, chosen, name)


@checked
def report(
    folders: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    dataset: Data | None = None,
    *,
    unverified: bool = False,
    download: bool = False,
) -> Path:
    """Write a self-contained HTML file that compares runs and sets.

    Args:
        folders: run folders; also files of sets, such as imported ones, which have no run folder.
        out: the file to write; by default ``report.html`` in the first run folder, or ``FILE.report.html``.
        dataset: the data set of the sets, by default at the location that their runs recorded. The pictures of
            ZCA-whitened sets and the nearest training images need it.
        unverified: whether to show published accuracies that nobody has compared with their source, too.
        download: let torchvision download missing data.

    Raises:
        ValueError: a folder holds no finished run, or a file no set; ``dataset`` cannot be read; the report cannot be
            written, or its file exists and is no report.
    """
    from condense.eval import report

    given = (folders,) if isinstance(folders, Path | str) else folders
    if not given:
        raise ValueError("a report needs at least one run; give folders that `condense distill` wrote")
    paths, first = [zoo.located(path) for path in given], zoo.beside(given[0])
    usual = first / "report.html" if first.is_dir() else first.with_suffix(".report.html")
    target = usual if out is None else expanded(out)
    collected = [report.collect(path) for path in paths]
    check_new_file(target, "report")
    check_replaceable(target, "report", b"<!doctype html>")
    data = None if dataset is None else open_data(dataset, download)
    opened = functools.cache(functools.partial(open_data, download=download))
    transforms: list[Transform | None] = []
    training: list[Images | None] = []
    for path, run in zip(paths, collected, strict=True):
        arrays = data
        if data is None:
            with contextlib.suppress(ValueError):  # the data are not at hand
                arrays = opened(runs.source_of(path, run.dataset))
        training.append(None if arrays is None else sets.training_samples(run.syn, arrays))
        try:
            transforms.append(sets.with_transform(path, arrays, download=download)[1])
        except ValueError as error:
            warnings.warn(f"no pictures of {path}: {error}", stacklevel=2)
            transforms.append(None)
    write_text(target, report.render(collected, transforms, training, unverified=unverified))
    return target


@checked
def prepare(
    photos: Path | str | HuggingFace,
    out: Path | str,
    plan: Preparation = Preparation(),
    *,
    download: bool = False,
    **fields: Any,
) -> Prepared:
    """Make an ``.npz`` data set, which every command takes, of photos of any sizes and formats.

    ``photos`` is a folder or a ``.csv`` file, see ``condense.data.listing.list_photos``, or a data set of Hugging Face,
    also as ``hf:NAME``, which is downloaded only if ``download`` is true. ``fields`` are fields of
    ``Preparation``: ``prepare("photos", "pets.npz", size=64)``. Files that are no photos are left out and named in the
    remarks of the result.

    Raises:
        ValueError: there are no photos; they differ in size and no ``size`` is given; the file exists or cannot be
            written.
    """
    plan = replaced(plan, fields)
    target = expanded(out)
    if target.suffix != ".npz":
        better = target / "photos.npz" if target.is_dir() or not target.name else target.with_suffix(".npz")
        raise ValueError(f"{target} is the file to write: its name ends in .npz; give {better}")
    if target.exists():
        raise ValueError(f"{target} already exists; move it or give another name")
    check_new_file(target, "data set")
    if isinstance(photos, str) and is_name(photos):
        return prepare_photos(list_rows(named_rows(photos, download)), photos, target, plan)
    if isinstance(photos, HuggingFace):
        return prepare_photos(list_rows(photos), "the data set", target, plan)
    return prepare_photos(list_photos(expanded(photos)), str(photos), target, plan)


@checked
def frames(dataset: Data, out: Path | str, *, download: bool = False) -> Path:
    """Write the middle frame of every clip of a data set, with its class, as an ``.npz`` data set of images.

    A set distilled from it has the stills of the decoder ``static-dynamic``.

    Raises:
        ValueError: the data have no clips; the file exists or cannot be written.
    """
    target = expanded(out)
    if target.exists():
        raise ValueError(f"{target} already exists; move it or give another name")
    check_new_file(target, "data set")
    arrays = open_data(dataset, download)
    require_kind("condense frames", ("clips",), arrays.input_shape, "give a data set of clips")
    if not len(arrays.x_test):
        raise ValueError("the clips have no test part, and a data set of their frames needs one; give clips with one")
    middle = arrays.input_shape[0] // 2
    with replacing(target) as fresh, fresh.open("wb") as file:
        np.savez_compressed(
            file,
            x_train=arrays.x_train[:, middle],
            y_train=arrays.y_train,
            x_test=arrays.x_test[:, middle],
            y_test=arrays.y_test,
            classes=np.array(arrays.classes),
            layout=np.array("NCHW"),
        )
    return target


@checked
def draw(syn: Readable, out: Path | str, dataset: Data | None = None, *, download: bool = False) -> None:
    """Draw the images of a set to a PNG file, one row per class.

    Raises:
        ValueError: the set is whitened and its data are not available; the file cannot be written, or it exists and is
            no picture.
    """
    check_replaceable(expanded(out), "PNG picture", b"\x89PNG")
    picture.draw(*sets.with_transform(syn, dataset, download=download), expanded(out))


@checked
def export_set(
    syn: Readable, out: Path | str, kind: str, dataset: Data | None = None, *, download: bool = False
) -> float | None:
    """Write a set as ``npz``, ``folder`` or ``huggingface``; see ``condense.exchange.export``. The card of a Hugging
    Face data set lists the results beside the run or the file.

    Returns:
        The share of pixel values that were clipped to [0, 1]; None for series.

    Raises:
        ValueError: unknown format; ``out`` exists or cannot be written; a file of results is damaged.
    """
    exchange.check_export(expanded(out), kind)
    given, transform = sets.with_transform(syn, dataset, download=download)
    file = evaluation_file(syn) if kind == "huggingface" else None
    rows = read_complete(file) if file is not None and file.exists() else []
    own = checksum(given.state_dict())
    rows = [row for row in rows if row["synthetic_sha256"] == own or row["method"] != given.origin.method]
    return exchange.export(given, transform, expanded(out), kind, rows)


def _option(name: str, value: Any) -> Any:
    """Convert a run option given in Python: a single tracker may be given by its name."""
    return (value,) if name == "track" and isinstance(value, str) else value


def evaluation_file(syn: Readable, split: Scored = "test") -> Path | None:
    """Return the file of results of a run folder or a file; None for a set and a set of the zoo, which have none."""
    name = "evaluation" if split == "test" else split
    if isinstance(syn, SyntheticSet) or zoo.has_name(syn):
        return None
    path = expanded(syn)
    return path / f"{name}.json" if path.is_dir() else path.with_suffix(f".{name}.json")
