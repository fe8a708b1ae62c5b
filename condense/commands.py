"""The commands of the command line. Each parses its flags, calls ``condense.api`` and prints the result."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagConversionOff as Switch

from condense import (
    api,
    artifacts,
    catalog,
    completion,
    exchange,
    experiment,
    networks,
    overview,
    recipe,
    runs,
    sets,
    sweep,
    zoo,
)
from condense import show as glance
from condense.artifacts import open_buffer
from condense.buffers.imported import import_replay_buffers, import_weights
from condense.buffers.trajectories import Experts
from condense.cache import Entry, cache_folder, entries, prune
from condense.compute import Compute, choose_compiled_folder
from condense.data import datasets, layout
from condense.data.photos import Preparation
from condense.distributed import AnotherFailed, Ranks, init_distributed, size_of_environment
from condense.engine import Diverged
from condense.eval import protocol
from condense.eval.applications import APPLICATIONS, Application, Findings
from condense.eval.applications.pruning import Pruning
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.files import check_new_file, check_new_folder, expanded
from condense.inner import ADJOINTS
from condense.names import printable, suggest
from condense.objective import OBJECTIVES
from condense.plugins import summaries
from condense.recipe import Recipe
from condense.registry import METHODS, citation
from condense.runs import RunOptions
from condense.show import print_results
from condense.synthetic import DECODERS, LABELS, Decode, Stored, ViewLabels, save
from condense.synthetic.decode import Pixels
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import StoredProjector
from condense.table import print_table
from condense.task import Split
from condense.tracking import is_quiet, progress

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class Distill:
    recipe: Annotated[Switch[Recipe], Flat]
    options: Annotated[RunOptions, Flat] = RunOptions()
    seeds: str = ""
    """Seeds of several distillations, e.g. 0-4 or 0,3,7, each in a run folder of its own. Finished ones are skipped
    when the command is repeated."""
    sweep: tuple[str, ...] = ()
    """Fields and their values, e.g. method.optim.lr=1,10,100. Every combination is distilled, and the best is chosen by
    the accuracy of its last set on the validation split. Finished ones are skipped when the command is repeated."""
    json: bool = False
    """With seeds or sweep: print the distillations as JSON."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    dataset: str = "digits"
    """Name of a data set, or path of an .npz file or an image folder."""
    network: str = "auto"
    """Network to train, e.g. convnet:depth=3. auto selects the ConvNet for the kind of data."""
    experts: Annotated[Experts, Flat] = Experts()
    transform: str = "channel"
    """Transform of the images: none, channel, zca or zca-relative."""
    split: Split = Split(val_fraction=0.0)
    """Validation split, which is held out of training."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    out: Path = Path("artifacts")
    """Folder in which the folder of the buffer is created."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    networks: tuple[str, ...] = ()
    """Networks to train, e.g. convnet mlp torchvision:resnet50 timm:resnet10t. The default is the ConvNet for the kind
    of data; under the protocol own it is the network that is stored in the set."""
    num_seeds: int = 5
    """Number of networks to train per architecture, each from a different seed."""
    protocol: Protocol = PROTOCOLS["canonical"]
    """Training protocol of the networks."""
    baselines: tuple[str, ...] = ()
    """Methods or recipes to compare with at the same budget; `full` stands for all training data."""
    budget: api.Budget = "images"
    """Budget of the baselines: as many images per class as the set (images), or as many bytes (bytes)."""
    split: api.Scored = "test"
    """Images on which the networks are scored: test, or validation for the training images that the set was not made
    from."""
    keep: Path | None = None
    """Folder for the weights of the networks, as .safetensors state dicts."""
    buffers: Path = artifacts.DEFAULT_ROOT
    """Folder to search for the teacher of a set whose views are labelled, or the folder of its buffer."""
    dataset: str | None = None
    """Data set that the set was distilled from. The default is the location recorded by the run, else the name in the
    file."""
    out: Path | None = None
    """File for the results. The default is evaluation.json in the run folder, or FILE.evaluation.json; with the split
    validation, validation.json."""
    seed: int = 0
    """Seed of all random numbers."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""
    json: bool = False
    """Print the results as JSON, as in evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Import:
    dataset: str = "cifar10"
    """Data set that the networks were trained on, or that the images were distilled from."""
    network: str = "convnet"
    """Architecture of the networks, e.g. convnet:norm=batch, torchvision:resnet18 or timm:resnet10t."""
    transform: str = "channel"
    """Transform of the training images. Published MTT buffers and sets used zca unless their folder says NO_ZCA."""
    decode: Decode = Pixels()
    """Decoder of the imported set: factor where one stored image holds several images (IDC)."""
    name: str | None = None
    """Name of the method of the imported set in tables, after "imported:". The default is the layout of the file."""
    split: Split = Split(val_fraction=0.0)
    """Validation split that the networks were trained with."""
    features_only: Switch[bool] = False
    """Ignore the classifier of the file, which may be absent or of other classes. Such networks serve methods that use
    features alone."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Apply:
    choices: Annotated[Application, Flat]
    baselines: tuple[str, ...] = ("random", "herding")
    """Methods or recipes to compare with at the same budget."""
    dataset: str | None = None
    """Data set that the set was distilled from. The default is the location recorded by the run, else the name in the
    file."""
    out: Path | None = None
    """File for the results. The default is apply-NAME.json in the run folder."""
    seed: int = 0
    """Seed of all random numbers."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""
    json: bool = False
    """Print the findings as JSON, as in the file of results."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    plan: Annotated[Pruning, Flat]
    transform: str = "channel"
    """Transform of the images: none, channel, zca or zca-relative."""
    out: Path | None = None
    """Folder for apply-pruning.json and pruning.svg. The default is runs/pruning-DATASET."""
    seed: int = 0
    """Seed of all random numbers."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""
    json: bool = False
    """Print the findings as JSON, as in the file of results."""


@dataclass(frozen=True, kw_only=True)
class Relabel:
    teacher: tuple[Path, ...] = ()
    """Folder of the buffer whose first network is the teacher, or the encoder of a projector; or a folder with one such
    buffer. open_clip:MODEL/WEIGHTS is an encoder of that package, for a projector. With several folders, stored labels
    are the mean of the logits of their networks; online ones, too, with keep-weights False."""
    labels: Switch[ViewLabels] = Stored()
    """Kind of labels: stored, online or projector."""
    weak_teachers: Path | None = None
    """For a projector: folder of a buffer of trajectories, whose first expert gives the weak teachers, or a folder with
    one such buffer. The default is the folder of the teacher."""
    dataset: str | None = None
    """For a projector: data set that the set was distilled from. The default is the location recorded by the run, else
    the name in the file."""
    out: Path | None = None
    """File to write. The default is synthetic-LABELS.safetensors in the run folder, or FILE-LABELS.safetensors; LABELS
    is the kind of labels: stored, online or projector."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Export:
    format: str = ""
    """Format: npz, folder (PNG files and labels.csv) or huggingface. The default is npz if the name ends in .npz, else
    folder."""
    dataset: str | None = None
    """Data set that a ZCA-whitened set was distilled from. The default is the location recorded by the run."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    plan: Annotated[Switch[Preparation], Flat] = Preparation()
    download: Switch[bool] = False
    """Let the library datasets download a missing data set hf:NAME."""


@dataclass(frozen=True, kw_only=True)
class Report:
    out: Path | None = None
    """HTML file to write. The default is report.html in the first run folder, or FILE.report.html."""
    dataset: str | None = None
    """Data set that the sets were distilled from, needed for the pictures of ZCA-whitened sets and the nearest training
    images. The default is the location recorded by each run."""
    unverified: bool = False
    """Show published accuracies that nobody has compared with their source, too."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""


@dataclass(frozen=True, kw_only=True)
class Show:
    png: Path | None = None
    """PNG file to draw the images of a set to, with one row per class."""
    dataset: str | None = None
    """Data set that a ZCA-whitened set was distilled from, needed to draw its images. The default is the location
    recorded by the run."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""
    json: bool = False
    """Print the summary as JSON."""


@dataclass(frozen=True, kw_only=True)
class ShowRecipe:
    recipe: Annotated[Switch[Recipe], Flat]
    json: bool = False
    """Print the name, the source and the fields of the recipe as JSON."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    networks: tuple[str, ...] = ("auto",)
    """Networks to train, e.g. convnet mlp. auto is the ConvNet for the kind of data."""
    num_seeds: int = 5
    """Number of networks to train per architecture and set, each from a different seed."""
    protocol: str = "canonical"
    """Name of the training protocol of the networks; see `condense list protocols`."""
    buffers: Path = artifacts.DEFAULT_ROOT
    """Folder to search for the teacher of a set whose views are labelled, or the folder of its buffer."""
    dataset: str | None = None
    """Data set that the sets were distilled from. The default is the location recorded by each run, else the name in
    the file."""
    seed: int = 0
    """Seed of all random numbers."""
    compute: Switch[Compute] = Compute()
    """Numerical precision and speed."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: Switch[bool] = False
    """Let torchvision or Hugging Face download a missing data set."""
    json: bool = False
    """Print the comparison as JSON; accuracies are fractions."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    json: bool = False
    """Print the runs as JSON; accuracies are fractions."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    prune: bool = False
    """Remove entries that were not used recently, and entries of earlier versions. Entries in use are kept."""
    days: float = 30.0
    """Number of days without use after which --prune removes an entry; 0 removes all entries."""
    json: bool = False
    """Print the entries as JSON."""

    def __post_init__(self) -> None:
        if not self.days >= 0:
            raise ValueError(f"--days must be at least 0, got {self.days}; give --days 30")


def distill(words: list[str], ranks: Ranks) -> None:
    name = _positional(words, "distill METHOD_OR_RECIPE", "`condense list methods` shows the methods")
    flags = _bare(words[1:], "--resume")
    if _asks_for_help(flags):
        resolved = recipe.find(name, recipe.take(flags, "--dataset")[1], _budget(flags))
        recipe.parse(Distill, flags, Distill(recipe=resolved.recipe), f"condense distill {name}", _about(resolved))
    given = recipe.take(flags, "--seeds")[1]
    several, axes = _several(recipe.take(flags, "--seeds")[0], "--sweep")
    if "--sweep" in flags and not axes:
        raise ValueError("--sweep names no values; give e.g. --sweep method.optim.lr=0.1,0.2")
    if given is not None or axes:
        _distill_several(name, several, sweep.grid(axes, () if given is None else sweep.seeds_of(given)), ranks)
        return
    (planned,), arrays = _planned(name, [flags], ranks)
    plan, options, origin = planned
    _say_unknown(arrays)
    _remark(f"recipe: {origin}")
    api.run(plan, options, arrays=arrays, ranks=ranks)
    folder = runs.run_folder(plan, options.out, arrays.name)
    following = "evaluate" if plan.method.has_classes else "apply transfer"
    _remark(f"{folder}: synthetic.safetensors, synthetic.png, log.jsonl; next: condense {following} {folder}")


def _planned(
    name: str, cells: Sequence[list[str]], ranks: Ranks, changes: Mapping[str, Any] | None = None
) -> tuple[list[tuple[Recipe, RunOptions, str]], datasets.Arrays]:
    """Return recipe, options and source of the recipe of each distillation, checked, and the data of all of them.

    Args:
        name: the method or recipe.
        cells: the flags of each distillation.
        ranks: the processes that are started.
        changes: options that replace those of the flags.
    """
    source = recipe.take(cells[0], "--dataset")[1]

    def planned(dataset: str | None) -> list[tuple[Recipe, RunOptions, str]]:
        found = []
        for flags in cells:
            base, origin = experiment.find_recipe(name, dataset, _budget(flags))
            command = recipe.parse(Distill, flags, Distill(recipe=base), f"condense distill {name}")
            if command.json:
                raise ValueError("--json prints the distillations of several; give --seeds or --sweep with it")
            options = dataclasses.replace(command.options, **(changes or {}))
            plan = command.recipe if source is not None else runs.located(command.recipe, options)
            found.append((plan, options, origin))
        return found

    expected = None if source is None else datasets.name_of(source)
    plans = planned(expected)
    with ranks.rank_zero_first():
        for plan, options, _ in plans:
            experiment.check_run(plan, options, dataset=plan.dataset, ranks=ranks)
        arrays = datasets.open_data(plans[0][0].dataset, plans[0][1].download)
    if source is not None and arrays.name != expected:  # the file holds a known data set
        plans = planned(arrays.name)
    return plans, arrays


def _distill_several(name: str, flags: list[str], cells: Sequence[sweep.Cell], ranks: Ranks) -> None:
    """Distil the cells of a sweep, which the processes of torchrun share, and choose the best one.

    Each cell is distilled by one process. A cell whose run is finished is skipped; one that was stopped is resumed.
    """
    swept = [field for field, _ in cells[0].values] + ([] if cells[0].seed is None else ["seed"])
    for field in swept:
        if any(word.partition("=")[0].replace("_", "-") == f"--{field}" for word in flags):
            raise ValueError(f"--{field} is given once and swept; leave one of them out")
    as_json = "--json" in flags
    flags, out = recipe.take([word for word in flags if word != "--json"], "--out")
    places = [[] if out is None else [f"--out={expanded(out) / cell.name}"] for cell in cells]
    commands = [[*flags, *cell.flags, *place] for cell, place in zip(cells, places, strict=True)]
    plans, arrays = _planned(name, commands, ranks, {"resume": True})
    chooses, first = bool(cells[0].values), runs.run_folder(plans[0][0], None, arrays.name)
    sweep_folder = first.with_name(f"{first.name.rpartition('-seed')[0]}-sweep")
    for k, (plan, options, origin) in enumerate(plans):
        if chooses and not plan.split.resolved(selects=True).val_fraction:
            raise ValueError(
                "--sweep chooses by the accuracy on the validation split, but the recipe has none; "
                "give --split.val-fraction 0.1"
            )
        eval_every = options.eval_every or (sweep.LAST_STEP if chooses else 0)
        folder = runs.run_folder(plan, options.out, arrays.name)
        if out is None and chooses:
            folder = sweep_folder / cells[k].name
        plans[k] = plan, dataclasses.replace(options, out=folder, eval_every=eval_every), origin
        experiment.check(plan, validates=eval_every > 0)
    note = (lambda text: None) if as_json else _remark
    if not as_json:
        _say_unknown(arrays)
    diverged: list[int] = []
    for k in ranks.shard(range(len(cells))):
        plan, options, origin = plans[k]
        assert options.out is not None
        if experiment.is_finished(plan, options, arrays, options.out):
            note(f"{options.out}: finished")
            continue
        note(f"{options.out}: recipe {origin}")
        try:
            api.run(plan, options, arrays=arrays, ranks=Ranks(restarted=ranks.restarted))
        except Diverged as error:
            warnings.warn(f"{options.out}: {error}", stacklevel=2)
            diverged.append(k)
    lost = set(itertools.chain(*ranks.gather_objects(diverged)))
    folders = [options.out for _, options, _ in plans if options.out is not None]
    found = [None if k in lost else overview.summary(folder) for k, folder in enumerate(folders)]
    points = sweep.points(cells, folders, found)
    chosen = sweep.best(points) if chooses else None
    if as_json:
        _print_json(sweep.as_json(points, chosen))
    else:
        print_table(None, *sweep.table(points, chosen))
        if chosen is not None:
            pairs = ", ".join(f"{field}={value}" for field, value in chosen.values.items())
            _remark(f"best on the validation split: {pairs}; next: condense evaluate {chosen.folders[0]}")
        elif len(folders) > 1 and not lost:
            _remark(f"next: condense compare {' '.join(map(str, folders))}")
    if len(lost) == len(cells):
        ranks.barrier()
        raise SystemExit(2)


def buffer(words: list[str], ranks: Ranks) -> None:
    command = recipe.parse(Buffer, words, Buffer(), prog="condense buffer")
    folder = api.make_buffer(**_fields(command), on_data=_say_unknown, ranks=ranks)
    say(f"{folder}")


def evaluate(words: list[str], ranks: Ranks) -> None:
    if _asks_for_help(words):
        recipe.parse(Evaluate, ["--help"], Evaluate(), prog="condense evaluate RUN_OR_FILE")
    target = _positional(words, "evaluate RUN_OR_FILE", "give a run folder or a synthetic.safetensors")
    flags, names = _several(_bare(words[1:], "--json"), "--protocol")
    given, _ = sets.read_set(target, recipe.take(flags, "--dataset")[1])
    syn = given if isinstance(given, SyntheticSet) else None
    if "--protocol" in words and not names:
        raise ValueError("--protocol names no protocol; give e.g. --protocol canonical, or leave it out")
    plan, *others = [protocol.named(name, syn) for name in names or ["canonical"]]
    if others and any(flag.startswith("--protocol.") for flag in flags):
        raise ValueError("fields of a protocol cannot be changed for several protocols; give one --protocol")
    command = recipe.parse(Evaluate, flags, Evaluate(protocol=plan), prog="condense evaluate RUN_OR_FILE")
    if command.protocol.name != plan.name:
        raise ValueError("the name of a protocol cannot be changed; leave out --protocol.name")
    if "--networks" in flags and not command.networks:
        raise ValueError("--networks names no network; give e.g. --networks convnet mlp, or leave it out")
    chosen = command.networks or api.default_networks(syn, command.protocol)
    if not command.networks and command.protocol.name == "own" and not command.json:
        _remark(f"network: {chosen[0]}, which is stored in the set")
    fields = _fields(command) | {"networks": chosen, "protocol": [command.protocol, *others]}
    del fields["json"]
    result = api.evaluate(target, **fields, ranks=ranks)
    rows = [row.row() for row in result.results]
    if command.json:
        _print_json({"results": rows})
    else:
        print_results(rows, together=bool(others))


def relabel(words: list[str]) -> None:
    usual, prog = Relabel(), "condense relabel RUN_OR_FILE"
    if _asks_for_help(words):
        recipe.parse(Relabel, ["--help"], usual, prog=prog)
    target = _positional(words, "relabel RUN_OR_FILE --teacher BUFFER", "give a run folder or a synthetic.safetensors")
    command = recipe.parse(Relabel, words[1:], usual, prog=prog)
    syn = api.relabel(target, **_fields(command))
    assert isinstance(syn.label_kind, ViewLabels)
    kind, cost, provider = syn.label_kind, syn.cost(), syn.provider
    file = command.out or api.relabelled_file(target, kind)
    sizes = f"images {cost.images}, labels {cost.labels} bytes"
    if isinstance(provider, StoredProjector):
        sizes += f", of which {provider.encoder.nbytes} are the encoder"
    _remark(f"{file}: {kind.name} labels by {kind.teacher}; {sizes}")
    if remark := cost.remark():
        _remark(remark)


def show(words: list[str]) -> None:
    usage = "show RUN|FILE|BUFFER|METHOD|RECIPE"
    target = _positional(words, usage, "give what `condense distill` or `buffer` wrote, or the name of a recipe")
    path = zoo.located(target)
    if target.endswith((".yaml", ".yml")) or (":" in target and not path.exists()):
        _show_recipe(target, words[1:])
        return
    if path.exists():
        command = recipe.parse(Show, _bare(words[1:], "--json"), Show(), prog=f"condense {usage}")
        glance.show(path, command.png, command.dataset, download=command.download, as_json=command.json)
        return
    names = [*METHODS, *catalog.recipes()]
    if target not in names:
        near = suggest(target, names, "`condense list recipes`")
        raise ValueError(f"{target} is no file or folder, and no method or recipe has this name: {near}")
    _show_recipe(target, words[1:])


def _show_recipe(name: str, flags: list[str]) -> None:
    """Print the recipe that ``condense distill`` runs with the same flags."""
    source = recipe.take(flags, "--dataset")[1]

    def resolve(dataset: str | None) -> tuple[recipe.Resolved, ShowRecipe]:
        resolved = recipe.find(name, dataset, _budget(flags))
        default, about = ShowRecipe(recipe=resolved.recipe), _about(resolved)
        return resolved, recipe.parse(ShowRecipe, flags, default, f"condense show {name}", about)

    resolved, command = resolve(source)
    if source is not None and source not in (resolved.recipe.dataset, *datasets.names()):
        resolved, command = resolve(api.open_data(source).name)  # the file may hold a known data set
    glance.show_recipe(resolved, command.recipe, flags, command.json)


KINDS = (
    *("methods", "decoders", "labels", "adjoints", "objectives", "datasets", "networks", "recipes", "protocols"),
    "zoo",
)
"""What can be listed."""


def list_(words: list[str]) -> None:
    if _asks_for_help(words):
        say("usage: condense list KIND [--json]")
        say("KIND is methods, decoders, labels, adjoints, objectives, datasets, networks, recipes, protocols or zoo")
        say("condense list recipes WORD... lists recipes with all the words, e.g. condense list recipes mtt cifar10")
        return
    as_json = "--json" in words
    kinds = [word for word in words if word != "--json"]
    tables: dict[str, Callable[[], dict[str, str]]] = {
        "methods": lambda: summaries(METHODS, lambda name: _summary(METHODS[name])),
        "decoders": lambda: summaries(DECODERS, lambda name: _summary(DECODERS[name])),
        "labels": lambda: summaries(LABELS, lambda name: _summary(LABELS[name])),
        "adjoints": lambda: summaries(ADJOINTS, lambda name: _summary(ADJOINTS[name])),
        "objectives": lambda: {name: _summary(cls) for name, cls in OBJECTIVES.items()},
        "datasets": lambda: summaries(datasets.names(), datasets.describe),
        "networks": lambda: summaries(networks.names(), networks.describe),
        "recipes": lambda: {entry.name: entry.description for entry in catalog.search(kinds[1:])},
        "protocols": lambda: {
            **summaries(PROTOCOLS, lambda name: PROTOCOLS[name].describe()),
            "own": "the training stored in the set: its network, its labels, its learned learning rate",
        },
        "zoo": lambda: {f"{zoo.PREFIX}{name}": entry.describe() for name, entry in zoo.entries().items()},
    }
    if not kinds or kinds[0] not in tables or (kinds[1:] and kinds[0] != "recipes"):
        asked = f"cannot list {' '.join(kinds)}" if kinds else "list needs a kind"
        raise ValueError(f"{asked}: there are {', '.join(tables)}; e.g. condense list methods")
    rows = tables[kinds[0]]()
    if as_json:
        _print_json(rows)
        return
    if kinds[0] != "methods":
        print_table(None, (kinds[0], ""), rows.items())
        return
    families: dict[str, dict[str, str]] = {}
    width = max(map(len, rows)) + 2
    for name, line in rows.items():
        families.setdefault(_family(name), {})[name] = line
    for family, lines in families.items():
        say(f"{family}:")
        for name, line in lines.items():
            say(f"  {name:<{width}}{line}")


def _family(method: str) -> str:
    try:
        return METHODS[method].family
    except ValueError:
        return "cannot be loaded"


def import_(words: list[str]) -> None:
    if _asks_for_help(words):
        recipe.parse(Import, ["--help"], Import(), prog="condense import SRC DST")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError(
            "import needs SRC and DST; e.g. condense import resnet18.pth artifacts --network torchvision:resnet18"
        )
    command = recipe.parse(Import, words[2:], Import(), prog="condense import SRC DST")
    source, target = expanded(words[0]), expanded(words[1])
    if not source.exists():
        raise ValueError(f"there is no file or folder {source}; check the path")
    if target.suffix == ".safetensors":
        _import_set(source, target, command)
        return
    is_weights = source.suffix in (".pt", ".pth", ".safetensors") and not _holds_experts(source)
    if exchange.is_foreign(source) and not _holds_experts(source) and not is_weights:
        raise ValueError(
            f"{words[0]} looks like a set; give the file to write, e.g. condense import {words[0]} set.safetensors"
        )
    if command.name is not None:
        raise ValueError("--name names a set, and SRC holds networks; leave it out, or give DST as set.safetensors")
    if command.decode != Import.decode:
        raise ValueError("--decode describes a set, and SRC holds networks; leave it out")
    if command.features_only and not is_weights:
        raise ValueError("--features-only is for the weights of one network, and SRC holds trajectories; leave it out")
    experiment.check_names(command.network, command.transform)
    check_new_folder(target)
    arrays = datasets.open_data(command.dataset, command.download)
    task = experiment.plain_task(arrays, command.network, command.transform, command.split)
    if is_weights:
        folder = import_weights(source, target, task, features_only=command.features_only)
        record = open_buffer(folder).manifest["experts"][0]
        accuracies = {
            "val_accuracy": "accuracy on the validation split",
            "train_accuracy": "accuracy on training images",
            "probe_accuracy": "accuracy of a linear probe on training images",
        }
        for name, what in accuracies.items():
            if name in record:
                _remark(f"{what}: {100 * record[name][-1]:.1f} %")
        say(str(folder))
        return
    with progress("import", 100) as bar:

        def report(done: int, total: int) -> None:
            bar(100 * done // total, f"{done} of {total} files")

        say(str(import_replay_buffers(source, target, task, progress=report)))


def apply(words: list[str]) -> None:
    usage = "apply continual|nas|privacy|probe|ranking|transfer RUN_OR_FILE, or apply pruning DATASET"
    if words[:1] == ["pruning"]:
        return _prune(words[1:])
    name = _positional(words, usage, "e.g. condense apply continual runs/dm")
    if name not in APPLICATIONS:
        raise ValueError(f"unknown application {name!r}: {suggest(name, [*APPLICATIONS, 'pruning'])}")
    application = APPLICATIONS[name]()
    baselines = Apply.baselines if application.takes_baselines else ()
    usual, prog = Apply(choices=application, baselines=baselines), f"condense apply {name} RUN_OR_FILE"
    if _asks_for_help(words):
        recipe.parse(Apply, ["--help"], usual, prog=prog)
    target = _positional(words[1:], usage, "give a run folder or a synthetic.safetensors")
    command = recipe.parse(Apply, _bare(words[2:], "--json"), usual, prog=prog)
    fields = _fields(command)
    as_json = fields.pop("json")
    _print_findings(api.apply(fields.pop("choices"), target, **fields), as_json)


def _prune(words: list[str]) -> None:
    flags, name = recipe.take(words, "--protocol")
    usual, prog = Prune(plan=Pruning(protocol=protocol.fixed(name or "pruned"))), "condense apply pruning DATASET"
    if _asks_for_help(flags):
        recipe.parse(Prune, ["--help"], usual, prog=prog)
    dataset = _positional(flags, "apply pruning DATASET", "give a data set, e.g. digits")
    command = recipe.parse(Prune, _bare(flags[1:], "--json"), usual, prog=prog)
    fields = _fields(command)
    as_json = fields.pop("json")
    fields["out"] = command.out or Path("runs") / f"pruning-{datasets.name_of(dataset)}"
    _print_findings(api.prune(dataset, **fields), as_json)
    if not as_json:
        _remark(f"{fields['out']}: apply-pruning.json, pruning.svg")


def _print_findings(findings: Findings, as_json: bool) -> None:
    if as_json:
        _print_json(findings.content())
    else:
        print_table(findings.title, findings.columns, findings.rows)
        if findings.note:
            print(printable(findings.note))


def _holds_experts(path: Path) -> bool:
    return path.name.startswith("replay_buffer") or (path.is_dir() and any(path.glob("replay_buffer_*.pt")))


def _import_set(source: Path, target: Path, command: Import) -> None:
    usual = Import()
    for name in ("network", "split", "features_only"):
        if getattr(command, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')} describes networks, and DST is a set; leave it out")
    if target.exists():
        raise ValueError(f"{target} already exists; move it or give another name")
    check_new_file(target, "set")
    syn = api.import_set(
        source,
        command.dataset,
        transform=command.transform,
        decode=command.decode,
        name=command.name,
        download=command.download,
    )
    save(syn, target)
    cost, kind = syn.cost(), layout.kind(syn.origin.input_shape)
    _remark(f"{target}: {len(syn)} {kind} ({syn.label_kind.name} labels, {cost.images + cost.labels} bytes)")
    _remark(
        f"the data set {command.dataset} and the transform {command.transform} are recorded as given; "
        "Condense cannot verify them"
    )


def export(words: list[str]) -> None:
    if _asks_for_help(words):
        recipe.parse(Export, ["--help"], Export(), prog="condense export RUN_OR_FILE DST")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError("export needs RUN|FILE and DST; e.g. condense export runs/dm dm.npz")
    command = recipe.parse(Export, words[2:], Export(), prog="condense export RUN_OR_FILE DST")
    target = expanded(words[1])
    kind = command.format or ("npz" if target.suffix == ".npz" else "folder")
    clipped = api.export_set(words[0], target, kind, command.dataset, download=command.download)
    _remark(f"{target}: {kind}" + ("" if clipped is None else f"; {exchange.clipping(clipped)}"))


def frames(words: list[str]) -> None:
    if _asks_for_help(words):
        recipe.parse(Frames, ["--help"], Frames(), prog="condense frames CLIPS DST.npz")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError("frames needs a data set of clips and the file to write; e.g. condense frames c.npz f.npz")
    command = recipe.parse(Frames, words[2:], Frames(), prog="condense frames CLIPS DST.npz")
    target = api.frames(words[0], words[1], download=command.download)
    _remark(f"{target}: the middle frame of every clip; next: condense distill dc --dataset {target}")


def prepare(words: list[str]) -> None:
    prog = "condense prepare PHOTOS DST.npz"
    if _asks_for_help(words):
        recipe.parse(Prepare, ["--help"], Prepare(), prog=prog)
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError(
            "prepare needs a folder of photos, or a table of them, and the file to write; e.g. condense prepare photos "
            "pets.npz --size 64"
        )
    command = recipe.parse(Prepare, words[2:], Prepare(), prog=prog)
    done = api.prepare(words[0], words[1], command.plan, download=command.download)
    for remark in done.remarks:
        _remark(remark)
    shape = "x".join(map(str, done.input_shape[1:]))
    colour = "gray" if done.input_shape[0] == 1 else "RGB"
    _remark(
        f"{done.path}: {done.num_train} training and {done.num_test} test images, {shape} {colour}, of "
        f"{len(done.classes)} classes; next: condense distill dm --dataset {done.path} --ipc 1"
    )


def report(words: list[str]) -> None:
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    flags = _bare(words[len(given) :], "--unverified")
    fields = _fields(recipe.parse(Report, flags, Report(), prog="condense report RUN_OR_FILE..."))
    say(str(api.report(given, **fields)))


def compare(words: list[str], ranks: Ranks) -> None:
    targets = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    flags = _bare(words[len(targets) :], "--json")
    fields = _fields(recipe.parse(Compare, flags, Compare(), prog="condense compare RUN_OR_FILE..."))
    as_json = fields.pop("json")
    found = overview.compare(targets, **fields, ranks=ranks)
    if as_json:
        _print_json(overview.comparison_json(found))
    else:
        print_table(*overview.comparison_table(found))


def runs_(words: list[str]) -> None:
    flags = _bare(words, "--json")
    folder = flags.pop(0) if flags and not flags[0].startswith("-") else "runs"
    command = recipe.parse(Runs, flags, Runs(), prog="condense runs [FOLDER]")
    found = overview.find_runs(folder)
    if command.json:
        _print_json({"runs": overview.as_json(found)})
    else:
        print_table(None, overview.COLUMNS, map(overview.cells, found))


def cache(words: list[str]) -> None:
    flags = _bare(_bare(words, "--prune"), "--json")
    command = recipe.parse(Cache, flags, Cache(), prog="condense cache")
    if any(word.partition("=")[0] == "--days" for word in words) and not command.prune:
        raise ValueError("--days needs --prune; give --prune --days N")
    folder = cache_folder()
    removed = prune(folder, command.days) if folder is not None and command.prune else []
    listed = entries(folder) if folder is not None else []
    if command.json:
        place = None if folder is None else str(folder)
        _print_json({"folder": place, "entries": _rows(listed), "removed": _rows(removed)})
        return
    if command.prune:
        say(f"removed: {len(removed)} entries, {_size(sum(entry.size for entry in removed))}")
    for kind, group in itertools.groupby(listed, lambda entry: entry.kind):
        of_kind = list(group)
        lines = [(_size(e.size), f"{datetime.fromtimestamp(e.last_use):%Y-%m-%d}", _described(e)) for e in of_kind]
        total = _size(sum(entry.size for entry in of_kind))
        more = [("", "", f"and {len(lines) - 10} smaller ones")] if len(lines) > 10 else []
        print_table(f"{kind}: {len(lines)} entries, {total}", ("size", "last used", ""), [*lines[:10], *more])
    if folder is None:
        say("there is no cache: its folder cannot be written, or CONDENSE_CACHE is empty")
        return
    say(f"{folder}: {len(listed)} entries, {_size(sum(entry.size for entry in listed))}")


def _rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in entries]


def _described(entry: Entry) -> str:
    return f"{entry.about} (from an earlier version)" if entry.outdated else entry.about


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def demo(words: list[str]) -> None:
    from condense import demo as job

    if _asks_for_help(words):
        say("usage: condense demo [--out FOLDER]")
        return
    job.main(words)


def completion_(words: list[str]) -> None:
    if _asks_for_help(words):
        say("usage: condense completion bash|zsh|fish")
        say("bash: condense completion bash > ~/.local/share/bash-completion/completions/condense")
        say("zsh:  condense completion zsh > DIR/_condense, for a folder DIR in $fpath")
        say("fish: condense completion fish > ~/.config/fish/completions/condense.fish")
        return
    if len(words) != 1:
        raise ValueError("completion needs one shell, bash, zsh or fish; e.g. condense completion bash")
    print(completion.script(words[0], _completed()))


def _completed() -> completion.Completed:
    """Return what is completed after each command."""
    done, protocols = completion.Completed, {"protocol": (*PROTOCOLS.usable(), "own")}
    recipes = {name: Recipe(method=method()) for name, method in METHODS.usable().items()}
    applied = {name: done(Apply(choices=APPLICATIONS[name]())) for name in APPLICATIONS}
    commands = {
        "apply": done(words={**applied, "pruning": done(Prune(plan=Pruning()))}),
        "buffer": done(Buffer()),
        "cache": done(Cache()),
        "compare": done(Compare(), protocols),
        "completion": done(words={shell: done() for shell in completion.SHELLS}),
        "demo": done(),
        "distill": done(words={name: done(Distill(recipe=each)) for name, each in recipes.items()}),
        "evaluate": done(Evaluate(), protocols),
        "export": done(Export()),
        "frames": done(Frames()),
        "import": done(Import()),
        "list": done(words={kind: done() for kind in KINDS}),
        "prepare": done(Prepare()),
        "relabel": done(Relabel()),
        "report": done(Report()),
        "runs": done(Runs()),
        "show": done(Show()),
    }
    return done(words=commands)


def _distributed(command: Callable[[list[str], Ranks], None]) -> Callable[[list[str]], None]:
    """Wrap a command so that the processes of torchrun share its work and only rank 0 prints."""

    def run(words: list[str]) -> None:
        if size_of_environment() > 1:
            choose_compiled_folder()  # creating a process group imports torch's compiler
        try:
            with init_distributed(recipe.take(words, "--device")[1] or "auto") as ranks:
                with contextlib.redirect_stdout(sys.stdout if ranks.first else None):
                    command(words, ranks)
        except AnotherFailed:  # the other process reports the error
            raise SystemExit(2) from None

    return run


TABLE: dict[str, Callable[[list[str]], None]] = {
    "apply": apply,
    "buffer": _distributed(buffer),
    "cache": cache,
    "compare": _distributed(compare),
    "completion": completion_,
    "demo": demo,
    "distill": _distributed(distill),
    "evaluate": _distributed(evaluate),
    "export": export,
    "frames": frames,
    "import": import_,
    "list": list_,
    "prepare": prepare,
    "relabel": relabel,
    "report": report,
    "runs": runs_,
    "show": show,
}


def say(text: str) -> None:
    """Print lines to standard output, with characters that are not printable escaped."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stdout, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _remark(text: str) -> None:
    """Print lines that are no result, unless the user asked for quiet."""
    if not is_quiet():
        say(text)


def _say_unknown(arrays: datasets.Arrays) -> None:
    if arrays.known is None and layout.kind(arrays.input_shape) != "graphs":
        _remark(f"{arrays.name}: not a known data set, so its mean and std are computed and DSA does not flip images")


def _fields(command: Any) -> dict[str, Any]:
    return {f.name: getattr(command, f.name) for f in dataclasses.fields(command)}


def _asks_for_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _several(words: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Remove ``flag VALUE...`` and ``flag=VALUE`` from ``words``; return the rest and all values."""
    rest, values, is_value = list[str](), list[str](), False
    for word in words:
        if word.startswith("--") or not is_value:
            is_value = word == flag
            if word.startswith(f"{flag}="):
                values.append(word.removeprefix(f"{flag}="))
            elif not is_value:
                rest.append(word)
        else:
            values.append(word)
    return rest, values


def _bare(words: list[str], flag: str) -> list[str]:
    """Accept a switch as ``--flag``, ``--flag True`` or ``--flag False``."""
    following = [*words[1:], ""]
    normalised = [
        f"{flag}=True" if word == flag and after not in ("True", "False") else word
        for word, after in zip(words, following, strict=False)
    ]
    rest, value = recipe.take(normalised, flag)
    if value not in (None, "True", "False"):
        raise ValueError(f"{flag} takes True or False, not {value!r}; give {flag}, or leave it out")
    return [*rest, flag] if value == "True" else rest


def _positional(words: list[str], usage: str, fix: str) -> str:
    if words and _asks_for_help(words[:1]):
        say(f"usage: condense {usage} ...\n{fix}; `condense {usage.split()[0]} NAME --help` lists the flags")
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise ValueError(f"usage: condense {usage} ...: the first word is missing; {fix}")
    return words[0]


def _budget(flags: list[str]) -> int | None:
    """Return the value of ``--ipc``, or None where it is missing or not a number (which ``parse`` reports)."""
    ipc = recipe.take(flags, "--ipc")[1]
    return int(ipc) if ipc is not None and ipc.isdecimal() else None


def _about(resolved: recipe.Resolved) -> str:
    """Return the help text above the flags: the method's docstrings up to the equations, and the recipe's source."""
    cls = type(resolved.recipe.method)
    about = [_summary(cls), citation(cls), f"Recipe: {resolved.name}. {resolved.source}".strip()]
    rows = [entry.dataset for entry in catalog.recipes().values() if entry.stem == resolved.name and entry.dataset]
    if rows:
        about.append(f"There are recipes for {', '.join(dict.fromkeys(rows))}; give --dataset and --ipc to see one.")
    return "\n\n".join(about)


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
