"""``condense runs`` and ``condense compare``: tables of the runs below a folder, and of sets under one protocol."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from condense import api, artifacts, runs, sets
from condense.compute import Compute
from condense.data.datasets import Arrays, Data, open_data
from condense.distributed import Ranks
from condense.eval import evaluate as evaluation
from condense.eval.baselines import FULL
from condense.eval.protocol import named
from condense.eval.report import steps_of
from condense.eval.results import Pooled, alike, fits, pool, read_complete, standing_for
from condense.files import checksum, expanded, is_locked, read_header
from condense.names import percent, spelt
from condense.networks import resolve
from condense.schema import checked, from_json
from condense.synthetic.budget import in_words
from condense.synthetic.set import Origin, RecipeRecord, SyntheticSet

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the files of one run folder say about it."""

    folder: str
    method: str
    dataset: str
    budget: str
    """The budget in words: ``ipc 10``, ``ipc 10 in bits`` or ``fraction 0.3``."""
    seed: int
    state: State
    """``stopped`` for an unfinished run that no process on this machine is working on."""
    steps: int
    """Number of steps done."""
    num_steps: int | None
    """Number of steps of the whole run, as far as it is recorded: those of the recipe, which some methods repeat for
    parts of the set."""
    best_val_accuracy: float | None
    """Highest accuracy on the validation split during the run, as a fraction; None if it was not measured."""
    last_val_accuracy: float | None
    """The same of the last set."""
    accuracy: float | None
    """Mean accuracy on the test split of networks trained on the set, as a fraction; None before an evaluation. Of
    several results it is the one on the network of the run, else under a protocol without changes, else of most
    networks."""
    std: float | None
    """Standard deviation over networks; None for a single network."""
    evaluated: str
    """Network, protocol and number of networks of that accuracy; empty without an accuracy."""
    minutes: float | None
    """Minutes that the distillation took; None for an unfinished run."""


@checked
def find_runs(folder: Path | str = "runs") -> list[RunSummary]:
    """Return the runs in a folder and all folders below it, by path. A run with damaged files is left out with a
    warning.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the folder that holds the runs, e.g. condense runs runs")
    found = []
    for file in sorted(root.rglob("recipe.yaml")):
        try:
            found.append(summary(file.parent))
        except ValueError as error:
            warnings.warn(f"{file.parent} is left out: {error}", stacklevel=2)
    if not found:
        raise ValueError(f"{root} holds no run that can be read; `condense distill METHOD` writes one")
    return found


def summary(folder: Path) -> RunSummary:
    """Summarise one run folder.

    Raises:
        ValueError: it holds no run, or a file is damaged.
    """
    written = runs.written_recipe(folder)
    if written is None:
        raise ValueError(f"{folder} is no run folder; give one that `condense distill` wrote")
    where = f"{folder / 'recipe.yaml'}"
    plan, seed = from_json(RecipeRecord, written, where), from_json(_Seed, written, where)
    finished = folder / "synthetic.safetensors"
    sha256 = read_header(finished).get("sha256") if finished.exists() else None
    log, record = steps_of(folder), runs.read_record(folder)
    validated = [line["val_accuracy"] for line in log if "val_accuracy" in line]
    row = headline(folder / "evaluation.json", sha256, plan.network) if sha256 else None
    seconds = record.get("seconds") if sha256 else None
    return RunSummary(
        folder=str(folder),
        method=plan.method.name,
        dataset=seed.dataset,
        budget=in_words(plan.ipc, plan.fraction, plan.budget),
        seed=seed.seed,
        state="finished" if sha256 else "running" if is_locked(folder / runs.RECORD) else "stopped",
        steps=max((line["step"] for line in log), default=0),
        num_steps=record.get("steps", plan.method.num_steps),
        best_val_accuracy=max(validated, default=None),
        last_val_accuracy=validated[-1] if validated else None,
        accuracy=None if row is None else row["mean"],
        std=None if row is None else row["std"],
        evaluated="" if row is None else f"{row['network']}, {row['protocol']}, n = {row['n']}",
        minutes=None if seconds is None else seconds / 60,
    )


def headline(file: Path, sha256: str, network: str | None) -> Mapping[str, Any] | None:
    """Return the row of a file of results that stands for the set with this checksum; None if there is none."""
    rows = read_complete(file) if file.exists() else []
    return standing_for([row for row in rows if row["synthetic_sha256"] == sha256], network)


COLUMNS = ("run", "method", "data", "budget", "seed", "steps", "best val. %", "accuracy %", "minutes", "state")


def cells(run: RunSummary) -> tuple[str, ...]:
    """Return the entries of a run below ``COLUMNS``."""
    total = run.num_steps
    return (
        run.folder,
        run.method,
        run.dataset,
        run.budget,
        str(run.seed),
        str(run.steps) if run.state == "finished" or total is None else f"{run.steps} of {total}",
        percent(run.best_val_accuracy),
        percent(run.accuracy, run.std),
        "-" if run.minutes is None else f"{run.minutes:.1f}",
        run.state,
    )


def as_json(found: Sequence[RunSummary]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(run) for run in found]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One set on one architecture, or sets that differ in the seed of their distillation alone."""

    name: str
    sets: tuple[str, ...]
    """The sets as they were given."""
    network: str
    images: int
    """Number of training images, after decoding."""
    bytes: int
    """Stored bytes of the images, their labels and the decoder."""
    accuracy: Pooled
    """Accuracies on the test split, as fractions."""
    random: float
    """Mean accuracy of networks trained on as many real images of each class, drawn at random."""
    random_std: float | None
    """Standard deviation of these networks; None for a single one."""
    full: float
    """Mean accuracy of networks trained on all training data."""
    full_std: float | None
    """Standard deviation of these networks; None for a single one."""

    @property
    def gain(self) -> float:
        """Accuracy above ``random``, as a fraction."""
        return self.accuracy.mean - self.random

    @property
    def share(self) -> float:
        """Accuracy divided by ``full``."""
        return self.accuracy.mean / self.full if self.full else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sets of one data set under one protocol, on the same networks."""

    dataset: str
    protocol: str
    num_seeds: int
    rows: tuple[Compared, ...]


@checked
def compare(
    targets: Sequence[Path | str],
    dataset: Data | None = None,
    *,
    networks: str | Sequence[str] = "auto",
    num_seeds: int = 5,
    protocol: str = "canonical",
    buffers: Path | str = artifacts.DEFAULT_ROOT,
    compute: Compute = Compute(),
    seed: int = 0,
    device: str = "auto",
    download: bool = False,
    ranks: Ranks = Ranks(),
) -> Comparison:
    """Evaluate sets of one data set under one protocol on the same networks, and compare them with random real images
    of the same budget and with all training data.

    Results that the file of results of a set holds are used, and all others are added to it (see ``evaluate``). Sets
    that differ in the seed of their distillation alone are pooled.

    Args:
        targets: run folders, files of sets (also imported ones) or labelled images.
        dataset: the data set, by default the location that each run recorded, else the name in its file.
        networks: architectures; ``auto`` is the ConvNet for the kind of data.
        num_seeds: networks of each architecture.
        protocol: name of a protocol, or ``own``.
        buffers, compute, seed, device, download, ranks: see ``evaluate``.

    Raises:
        ValueError: fewer than two sets; sets of different data; see also ``evaluate``.
    """
    paths = [str(target) for target in targets]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ValueError("compare needs two or more different sets; e.g. condense compare runs/dm runs/mtt")
    architectures = [networks] if isinstance(networks, str) else list(networks)
    if not architectures:
        raise ValueError(f"compare needs a network; give {spelt('networks', 'convnet')}")
    known = {path: syn for path in paths if isinstance(syn := sets.read_set(path, dataset)[0], SyntheticSet)}
    for path, syn in known.items():
        syn.require_classes("a comparison", path)
    _check_data({path: syn.origin for path, syn in known.items()})
    fields: dict[str, Any] = {"networks": architectures, "num_seeds": num_seeds, "protocol": protocol, "seed": seed}
    for syn in known.values():
        evaluation.check(syn, architectures, named(protocol, syn), num_seeds)
    where: dict[str, Any] = {"buffers": buffers, "compute": compute, "device": device, "download": download}

    def opened(path: str) -> Arrays:
        with ranks.rank_zero_first():
            return open_data(sets.read_set(path, dataset)[1], download)

    def results_of(data: Arrays | None) -> dict[str, list[dict[str, Any]]]:
        found, test = {}, None if data is None else data.fingerprint["test"]
        for path in paths:
            rows = _measured(path, known[path], fields, test) if path in known else None
            if rows is None:
                evaluated = api.evaluate(path, data, **fields, **where, baselines=_REFERENCES, ranks=ranks)
                rows = [result.row() for result in evaluated.results]
            found[path] = rows
        return found

    results = results_of(None if dataset is None else opened(paths[0]))
    if len({row["test_fingerprint"] for rows in results.values() for row in rows}) > 1:
        results = results_of(opened(paths[0]))
    groups = alike({path: known.get(path) for path in paths})
    names = _names({group[0]: known.get(group[0]) for group in groups})
    count, first = len(architectures), results[paths[0]][0]

    def compared(group: Sequence[str], k: int) -> Compared:
        accuracy, random, full = (pool([results[path][part * count + k] for path in group]) for part in range(3))
        return Compared(
            name=names[group[0]] + (f" ({len(group)} seeds)" if len(group) > 1 else ""),
            sets=tuple(group),
            network=results[group[0]][k]["network"],
            images=results[group[0]][k]["num_images"],
            bytes=sum(results[group[0]][k]["stored_bytes"].values()),
            accuracy=accuracy,
            random=random.mean,
            random_std=random.between_networks,
            full=full.mean,
            full_std=full.between_networks,
        )

    return Comparison(
        dataset=first["dataset"],
        protocol=first["protocol"],
        num_seeds=num_seeds,
        rows=tuple(compared(group, k) for group in groups for k in range(count)),
    )


_REFERENCES = ("random", FULL)
"""The baselines of every comparison."""


def _check_data(origins: Mapping[str, Origin]) -> None:
    """Raise ValueError if sets were distilled from different data."""
    for (one, first), (other, origin) in itertools.pairwise(origins.items()):
        if first.fingerprint != origin.fingerprint:
            raise ValueError(
                f"{one} is of {first.dataset_name} ({first.fingerprint[:12]}), {other} of {origin.dataset_name} "
                f"({origin.fingerprint[:12]}); compare sets of one data set"
            )


def _measured(path: str, syn: SyntheticSet, fields: Mapping[str, Any], test: str | None) -> list[dict[str, Any]] | None:
    """Return the results of a set and of its baselines, in the order of ``evaluate``, from its file of results; None if
    one of them is missing. They are of the test images with the fingerprint ``test``; None: any."""
    file, plan = api.evaluation_file(path), named(fields["protocol"], syn)
    rows = read_complete(file) if file is not None and file.exists() else []
    rows = [row for row in rows if row["n"] == fields["num_seeds"] and row["seed"] == fields["seed"]]
    rows = [row for row in rows if fits(row, syn) and test in (None, row["test_fingerprint"])]
    shape, own = syn.origin.input_shape, checksum(syn.state_dict())
    names = [str(resolve(network, shape)) for network in fields["networks"]]

    def is_set(row: Mapping[str, Any]) -> bool:
        return row["synthetic_sha256"] == own and row["protocol_hash"] == plan.hash

    drawn = None if syn.origin.fraction is not None or syn.origin.ipc_policy != "refuse" else syn.ipc
    sizes = {row["num_images"] for row in rows if is_set(row)} if drawn is None else {drawn * syn.origin.num_classes}
    is_drawn_anew = syn.origin.recipe.get("seed") == fields["seed"]

    def is_random(row: Mapping[str, Any]) -> bool:
        is_measured = row["protocol"] == plan.name and row["synthetic_sha256"] is not None
        is_other = row["synthetic_sha256"] != own or is_drawn_anew
        return row["method"] == "random" and is_measured and is_other and row["num_images"] in sizes

    def is_full(row: Mapping[str, Any]) -> bool:
        return row["method"] == FULL and row["synthetic_sha256"] is None

    wanted = [(name, test) for test in (is_set, is_random, is_full) for name in names]
    found = [next((row for row in rows if row["network"] == name and test(row)), None) for name, test in wanted]
    return [row for row in found if row is not None] if None not in found else None


def _names(sets_by_path: Mapping[str, SyntheticSet | None]) -> dict[str, str]:
    """Return a name of each set: its method and budget, with the path where that does not tell sets apart."""
    names = {path: _name(path, syn) for path, syn in sets_by_path.items()}
    counts = Counter(names.values())
    return {path: f"{name} ({path})" if counts[name] > 1 else name for path, name in names.items()}


def _name(path: str, syn: SyntheticSet | None) -> str:
    if syn is None or not syn.origin.method:
        return path
    return f"{syn.origin.method}, {syn.budget_in_words}"


def comparison_table(comparison: Comparison) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a comparison, in percent. A network that all rows share is in the title, and
    the deviation between distillations is left out where all sets are single."""
    networks = {row.network for row in comparison.rows}
    single = all(row.accuracy.between_distillations is None for row in comparison.rows)
    on = f" on {min(networks)}" if len(networks) == 1 else ""
    between = "" if single else ", and between distillations of several seeds"
    title = (
        f"{comparison.dataset}, test accuracy, %: {comparison.protocol}{on}, n = {comparison.num_seeds} networks per "
        f"set; ± between networks{between}"
    )
    columns = {
        "set": [row.name for row in comparison.rows],
        "network": [row.network for row in comparison.rows],
        "images": [str(row.images) for row in comparison.rows],
        "bytes": [f"{row.bytes:,}" for row in comparison.rows],
        "accuracy": [percent(row.accuracy.mean, row.accuracy.between_networks) for row in comparison.rows],
        "distillations": [_between(row.accuracy.between_distillations) for row in comparison.rows],
        "random": [percent(row.random, row.random_std) for row in comparison.rows],
        "gain": [f"{100 * row.gain:+.1f}" for row in comparison.rows],
        "full": [percent(row.full, row.full_std) for row in comparison.rows],
        "% of full": [f"{100 * row.share:.0f}" for row in comparison.rows],
    }
    if len(networks) == 1:
        del columns["network"]
    if single:
        del columns["distillations"]
    return title, tuple(columns), list(zip(*columns.values(), strict=True))


def _between(deviation: float | None) -> str:
    return "-" if deviation is None else f"± {100 * deviation:.1f}"


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison with accuracies as fractions, and the table that is printed."""
    content = dataclasses.asdict(comparison)
    content["rows"] = [
        fields | {"gain": row.gain, "share": row.share}
        for fields, row in zip(content["rows"], comparison.rows, strict=True)
    ]
    title, columns, rows = comparison_table(comparison)
    return {**content, "table": {"title": title, "columns": columns, "rows": rows}}


@dataclass(frozen=True)
class _Seed:
    """Further fields of a recipe that are shown."""

    dataset: str
    seed: int = 0
