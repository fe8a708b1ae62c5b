"""The commands behind the command line: each parses its flags, calls ``condense.api`` and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagConversionOff as Switch

from condense import api, exchange, networks, recipe, registry
from condense import show as glance
from condense.api import RunOptions
from condense.buffers.imported import import_replay_buffers
from condense.buffers.trajectories import Experts
from condense.cache import Entry, entries, prune
from condense.compute import Compute
from condense.data import datasets
from condense.distributed import AnotherFailed, Ranks, init_distributed, size_of_environment
from condense.eval import protocol
from condense.eval.applications import APPLICATIONS, Application
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.files import expanded
from condense.method import Method
from condense.names import printable, suggest
from condense.recipe import Recipe
from condense.synthetic import DECODERS, LABELS, Decode, save
from condense.synthetic.decode import Pixels
from condense.table import print_results, print_table
from condense.task import Split
from condense.tracking import progress

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class Distill:
    recipe: Annotated[Switch[Recipe], Flat]
    options: Annotated[RunOptions, Flat] = RunOptions()


@dataclass(frozen=True, kw_only=True)
class Buffer:
    dataset: str = "digits"
    """Name of a data set, an .npz file or an image folder."""
    network: str = "convnet"
    """Network to train, e.g. convnet:depth=3."""
    experts: Annotated[Experts, Flat] = Experts()
    transform: str = "channel"
    """none, channel, zca or zca-relative."""
    augment: str = "dsa"
    """none, dsa or a strategy; options as in dsa:mode=M,align_corners=true."""
    split: Split = Split(val_fraction=0.0)
    """The validation part, held out of training."""
    compute: Switch[Compute] = Compute()
    """Exactness against speed."""
    out: Path = Path("artifacts")
    """Root under which the buffer's folder is made."""
    seed: int = 0
    """Root of every random draw."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    download: Switch[bool] = False
    """Let torchvision download a data set that is missing."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    networks: tuple[str, ...] = ()
    """Architectures to train, e.g. convnet mlp torchvision:resnet50 timm:resnet10t; default: convnet, but under the
    protocol own the network that the set is meant for."""
    num_seeds: int = 5
    """Fresh networks of each."""
    protocol: Protocol = PROTOCOLS["canonical"]
    """How they are trained."""
    baselines: tuple[str, ...] = ()
    """Methods or recipes to compare with at the same budget, and `full` for all training data."""
    budget: api.Budget = "images"
    """What they have as much of as the set: images a class, or bytes."""
    dataset: str | None = None
    """Where the data lie; default: as the run recorded it, else by the name in the file."""
    out: Path | None = None
    """Result file; default evaluation.json in the run, or FILE.evaluation.json."""
    seed: int = 0
    """Root of every random draw."""
    compute: Switch[Compute] = Compute()
    """Exactness against speed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    download: Switch[bool] = False
    """Let torchvision download a data set that is missing."""


@dataclass(frozen=True, kw_only=True)
class Import:
    dataset: str = "cifar10"
    """Data set that the experts were trained on, or the images made from."""
    network: str = "convnet"
    """The experts' network."""
    transform: str = "channel"
    """Their transform: published MTT buffers and sets used zca unless their folder says NO_ZCA."""
    decode: Decode = Pixels()
    """How the images of a set are stored: factor where one holds several (IDC)."""
    split: Split = Split(val_fraction=0.0)
    """Their validation split."""
    download: Switch[bool] = False
    """Let torchvision download the data set if it is missing."""


@dataclass(frozen=True, kw_only=True)
class Apply:
    choices: Annotated[Application, Flat]
    baselines: tuple[str, ...] = ("random", "herding")
    """Methods to compare with at the same budget."""
    dataset: str | None = None
    """Where the data lie; default: as the run recorded it, else by the name in the file."""
    out: Path | None = None
    """Result file; default apply-NAME.json in the run."""
    seed: int = 0
    """Root of every random draw."""
    compute: Switch[Compute] = Compute()
    """Exactness against speed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    download: Switch[bool] = False
    """Let torchvision download a data set that is missing."""


@dataclass(frozen=True, kw_only=True)
class Export:
    format: str = ""
    """npz, folder (PNG and labels.csv) or huggingface; default: npz for a name that ends so, else folder."""
    dataset: str | None = None
    """Where the data lie, for a set that is whitened; default: as the run recorded it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    out: Path | None = None
    """The HTML file; default report.html in the first run."""
    dataset: str | None = None
    """Where the data of whitened sets lie; default: as their runs recorded it."""
    download: Switch[bool] = False
    """Let torchvision download a data set that is missing."""


@dataclass(frozen=True, kw_only=True)
class Show:
    png: Path | None = None
    """Where to draw the images of a set, a row for each class."""
    dataset: str | None = None
    """Where the data of a whitened set lie, for its picture; default: as its run recorded it."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    prune: bool = False
    """Remove what was not used for some time, and what earlier versions left; what a process uses now stays."""
    days: float = 30.0
    """Days without use after which --prune removes an entry; 0: all entries."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.days >= 0:
            raise ValueError(f"--days must be at least 0, got {self.days}; give --days 30")


def distill(words: list[str], ranks: Ranks) -> None:
    name = _positional(words, "distill METHOD_OR_RECIPE", "`condense list methods` shows the methods")
    flags = _bare(words[1:], "--resume")
    source, ipc = recipe.take(flags, "--dataset")[1], recipe.take(flags, "--ipc")[1]
    arrays = None
    if source is not None and not _asks_for_help(flags):
        with ranks.rank_zero_first():
            arrays = api.open_data(source, download=recipe.take(flags, "--download")[1] == "True")
    budget = int(ipc) if ipc is not None and ipc.isdigit() else None
    base, origin = api.find_recipe(name, arrays.name if arrays else source, budget)
    command = recipe.parse(Distill, flags, Distill(recipe=base), prog=f"condense distill {name}")
    plan = command.recipe if arrays else api.located(command.recipe, command.options)
    with ranks.rank_zero_first():
        arrays = arrays or api.open_data(plan.dataset, download=command.options.download)
    _say_unknown(arrays)
    say(f"recipe: {origin}")
    folder = api.run_folder(plan, command.options, arrays)
    api.run(plan, command.options, arrays=arrays, ranks=ranks)
    say(f"{folder}: synthetic.safetensors, synthetic.png, log.jsonl; next: condense evaluate {folder}")


def buffer(words: list[str], ranks: Ranks) -> None:
    command = recipe.parse(Buffer, words, Buffer(), prog="condense buffer")
    with ranks.rank_zero_first():
        arrays = api.open_data(command.dataset, download=command.download)
    _say_unknown(arrays)
    folder = api.make_buffer(**_fields(command) | {"dataset": arrays}, ranks=ranks)
    say(f"{folder}")


def evaluate(words: list[str], ranks: Ranks) -> None:
    if _asks_for_help(words):
        recipe.parse(Evaluate, ["--help"], Evaluate(), prog="condense evaluate RUN_OR_FILE")
    target = _positional(words, "evaluate RUN_OR_FILE", "give a run folder or a synthetic.safetensors")
    flags, name = recipe.take(words[1:], "--protocol")
    source = recipe.take(flags, "--dataset")[1]
    with ranks.rank_zero_first():
        syn, arrays = api.open_set(target, source, download=recipe.take(flags, "--download")[1] == "True")
    plan = protocol.named(name or "canonical", syn)
    command = recipe.parse(Evaluate, flags, Evaluate(protocol=plan), prog="condense evaluate RUN_OR_FILE")
    chosen = command.networks or api.default_networks(syn, command.protocol)
    if not command.networks and command.protocol.name == "own":
        say(f"network: {chosen[0]}, which the set is meant for")
    found = api.evaluate(target, **_fields(command) | {"networks": chosen, "dataset": arrays}, ranks=ranks)
    print_results([result.row() for result in found.results])


def show(words: list[str]) -> None:
    target = _positional(words, "show RUN|FILE|BUFFER", "give what `condense distill` or `buffer` wrote")
    command = recipe.parse(Show, words[1:], Show(), prog="condense show RUN|FILE|BUFFER")
    glance.show(expanded(target), command.png, command.dataset)


def list_(words: list[str]) -> None:
    if _asks_for_help(words):
        say("usage: condense list methods|decoders|labels|datasets|networks|recipes|protocols [--json]")
        return
    as_json = "--json" in words
    kinds = [word for word in words if word != "--json"]
    tables: dict[str, Callable[[], dict[str, str]]] = {
        "methods": lambda: {name: _summary(cls) for name, cls in _methods().items()},
        "decoders": lambda: {name: _summary(cls) for name, cls in DECODERS.items()},
        "labels": lambda: {name: _summary(cls) for name, cls in LABELS.items()},
        "datasets": lambda: {name: datasets.describe(name) for name in datasets.names()},
        "networks": lambda: {name: networks.describe(name) for name in networks.names()},
        "recipes": lambda: {name: _source(path) for name, path in recipe.recipe_files().items()},
        "protocols": lambda: {
            **{name: plan.describe() for name, plan in PROTOCOLS.items()},
            "own": "the training stored in the file: its network, its labels, its learned step size",
        },
    }
    if len(kinds) != 1 or kinds[0] not in tables:
        asked = " ".join(kinds) or "nothing"
        raise ValueError(f"cannot list {asked}: there are {', '.join(tables)}; e.g. condense list methods")
    found = tables[kinds[0]]()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if kinds[0] != "methods":
        print_table(None, (kinds[0], ""), found.items())
        return
    families: dict[str, dict[str, str]] = {}
    width = max(map(len, found)) + 2
    for name, cls in _methods().items():
        families.setdefault(cls.family, {})[name] = found[name]
    for family, rows in families.items():
        say(f"{family}:")
        for name, line in rows.items():
            say(f"  {name:<{width}}{line}")


def _methods() -> dict[str, type[Method]]:
    return {name: registry.load(name) for name in registry.table()}


def import_(words: list[str]) -> None:
    if _asks_for_help(words):
        recipe.parse(Import, ["--help"], Import(), prog="condense import SRC DST")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError("import needs SRC and DST; e.g. condense import buffers/CIFAR10/ConvNet artifacts")
    command = recipe.parse(Import, words[2:], Import(), prog="condense import SRC DST")
    source, target = expanded(words[0]), expanded(words[1])
    if target.suffix == ".safetensors":
        _import_set(source, target, command)
        return
    if exchange.is_foreign(source) and not _holds_experts(source):
        raise ValueError(
            f"{words[0]} looks like a set; name a file for it, e.g. condense import {words[0]} set.safetensors"
        )
    arrays = api.open_data(command.dataset, download=command.download)
    task = api.plain_task(arrays, command.network, command.transform, command.split)
    with progress("import", 100) as bar:

        def report(done: int, total: int) -> None:
            bar(100 * done // total, f"{done} of {total} files")

        say(str(import_replay_buffers(source, target, task, progress=report)))


def apply(words: list[str]) -> None:
    usage = "apply continual|nas|privacy|ranking RUN_OR_FILE"
    name = _positional(words, usage, "e.g. condense apply continual runs/dm")
    if name not in APPLICATIONS:
        raise ValueError(f"unknown application {name!r}: {suggest(name, APPLICATIONS)}")
    usual, prog = Apply(choices=APPLICATIONS[name]()), f"condense apply {name} RUN_OR_FILE"
    if _asks_for_help(words):
        recipe.parse(Apply, ["--help"], usual, prog=prog)
    target = _positional(words[1:], usage, "give a run folder or a synthetic.safetensors")
    command = recipe.parse(Apply, words[2:], usual, prog=prog)
    fields = _fields(command)
    findings = api.apply(fields.pop("choices"), target, **fields)
    print_table(findings.title, findings.columns, findings.rows)


def _holds_experts(path: Path) -> bool:
    return path.name.startswith("replay_buffer") or (path.is_dir() and any(path.glob("replay_buffer_*.pt")))


def _import_set(source: Path, target: Path, command: Import) -> None:
    if target.exists():
        raise ValueError(f"{target} exists already; move it away or give another name")
    syn = api.import_set(
        source, command.dataset, transform=command.transform, decode=command.decode, download=command.download
    )
    save(syn, target)
    cost = syn.cost()
    say(f"{target}: {len(syn)} images ({syn.label_kind.name} labels, {cost.images + cost.labels} bytes)")
    say(f"that they belong to {command.dataset} and went through {command.transform} is your word, no file says it")


def export(words: list[str]) -> None:
    if _asks_for_help(words):
        recipe.parse(Export, ["--help"], Export(), prog="condense export RUN_OR_FILE DST")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError("export needs RUN|FILE and DST; e.g. condense export runs/dm dm.npz")
    command = recipe.parse(Export, words[2:], Export(), prog="condense export RUN_OR_FILE DST")
    target = expanded(words[1])
    kind = command.format or ("npz" if target.suffix == ".npz" else "folder")
    api.export_set(words[0], target, kind, command.dataset)
    say(f"{target}: {kind}")


def report(words: list[str]) -> None:
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    command = recipe.parse(Report, words[len(folders) :], Report(), prog="condense report RUN...")
    say(str(api.report(folders, command.out, command.dataset, download=command.download)))


def cache(words: list[str]) -> None:
    flags = _bare(_bare(words, "--prune"), "--json")
    command = recipe.parse(Cache, flags, Cache(), prog="condense cache")
    if any(word.partition("=")[0] == "--days" for word in words) and not command.prune:
        raise ValueError("--days says what --prune removes; give --prune --days N")
    folder = api.cache_folder()
    removed = prune(folder, command.days) if folder is not None and command.prune else []
    listed = entries(folder) if folder is not None else []
    if command.json:
        print(json.dumps({"folder": str(folder), "entries": _rows(listed), "removed": _rows(removed)}, indent=1))
        return
    if command.prune:
        say(f"removed: {len(removed)} entries, {_size(sum(entry.size for entry in removed))}")
    for kind, group in itertools.groupby(listed, lambda entry: entry.kind):
        of_kind = list(group)
        lines = [(_size(e.size), f"{datetime.fromtimestamp(e.last_use):%Y-%m-%d}", _about(e)) for e in of_kind]
        total = _size(sum(entry.size for entry in of_kind))
        more = [("", "", f"and {len(lines) - 10} smaller ones")] if len(lines) > 10 else []
        print_table(f"{kind}: {len(lines)} entries, {total}", ("size", "last used", ""), [*lines[:10], *more])
    say(f"{folder}: {len(listed)} entries, {_size(sum(entry.size for entry in listed))}")


def _rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in entries]


def _about(entry: Entry) -> str:
    return f"{entry.about} (of an earlier version)" if entry.outdated else entry.about


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def demo(words: list[str]) -> None:
    from condense import demo as job

    if _asks_for_help(words):
        say("usage: condense demo [--out FOLDER]")
        return
    job.main(words)


def _divided(command: Callable[[list[str], Ranks], None]) -> Callable[[list[str]], None]:
    """A command that the processes of torchrun share; only the first one prints."""

    def run(words: list[str]) -> None:
        if size_of_environment() > 1:
            api.choose_compiled_folder()  # a process group is made with torch's compiler imported
        try:
            with init_distributed(recipe.take(words, "--device")[1] or "auto") as ranks:
                with contextlib.redirect_stdout(sys.stdout if ranks.first else None):
                    command(words, ranks)
        except AnotherFailed:  # one line is enough
            raise SystemExit(2) from None

    return run


TABLE: dict[str, Callable[[list[str]], None]] = {
    "apply": apply,
    "buffer": _divided(buffer),
    "cache": cache,
    "demo": demo,
    "distill": _divided(distill),
    "evaluate": _divided(evaluate),
    "export": export,
    "import": import_,
    "list": list_,
    "report": report,
    "show": show,
}


def say(text: str) -> None:
    """Lines on standard output; what is not printable in names of files and data sets is escaped."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stdout, flush=True)


def _say_unknown(arrays: datasets.Arrays) -> None:
    if arrays.known is None:
        say(f"{arrays.name}: not a known data set, so its statistics are computed and DSA does not flip")


def _fields(command: Any) -> dict[str, Any]:
    return {f.name: getattr(command, f.name) for f in dataclasses.fields(command)}


def _asks_for_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _bare(words: list[str], flag: str) -> list[str]:
    """Let a switch be spelt ``--flag``, ``--flag True`` or ``--flag False``."""
    following = [*words[1:], ""]
    spelt = [
        f"{flag}=True" if word == flag and after not in ("True", "False") else word
        for word, after in zip(words, following, strict=False)
    ]
    kept, value = recipe.take(spelt, flag)
    return [*kept, flag] if value == "True" else kept


def _positional(words: list[str], usage: str, mend: str) -> str:
    if words and _asks_for_help(words[:1]):
        say(f"usage: condense {usage} ...\n{mend}; `condense {usage.split()[0]} NAME --help` lists the flags")
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise ValueError(f"usage: condense {usage} ...: the first word is missing; {mend}")
    return words[0]


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _source(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
