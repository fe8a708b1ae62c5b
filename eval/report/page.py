"""Runs side by side as one HTML file that asks nothing of a network."""

from __future__ import annotations

import base64
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from condense import __version__, picture
from condense.data.datasets import is_known
from condense.data.layout import InputShape
from condense.data.transform import Transform
from condense.eval.protocol import changes
from condense.eval.report import figures
from condense.eval.report.collect import Run
from condense.eval.report.figures import Point, readable_bytes
from condense.synthetic.set import SyntheticSet
from condense.table import by_protocol, by_set

MAX_IMAGES = 200
"""Shown of a run at one time: more columns for few classes, fewer for many."""

NAMED = ("random", "herding")
"""Published rows that are named in the figure beside those of the methods at hand."""


def render(runs: Sequence[Run], pixels: Sequence[Transform | None]) -> str:
    """The report. Of runs of several data sets, each data set has its own comparison.

    Args:
        pixels: of each run, the transform that leads back to pixels; None where it is not at hand.
    """
    names = _names(runs)
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    rows = _named_rows(runs, names)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = readable_bytes
    return environment.get_template("page.html").render(
        title=", ".join(datasets),
        version=__version__,
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        runs=[
            _run(run, name, f"run{k}", back)
            for k, (run, name, back) in enumerate(zip(runs, names, pixels, strict=True))
        ],
        validation=_validation(runs, names),
        tables=_tables(rows),
        budgets=[
            _budget(name, [run for run in runs if run.dataset == name], [row for row in rows if row["dataset"] == name])
            for name in datasets
        ],
    )


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    """``dm, ipc 10``; with what else is needed to tell the runs apart."""
    names = [f"{run.method}, ipc {run.ipc}" for run in runs]
    for what in ("dataset", "network"):
        if len({getattr(run, what) for run in runs}) > 1:
            names = [f"{name}, {getattr(run, what)}" for name, run in zip(names, runs, strict=True)]
    names = _told_apart(names, [run.folder.resolve().name for run in runs])
    return _told_apart(names, [str(k + 1) for k in range(len(runs))])


def _told_apart(names: Sequence[str], by: Sequence[str]) -> list[str]:
    return [f"{name} ({more})" if names.count(name) > 1 else name for name, more in zip(names, by, strict=True)]


def _run(run: Run, name: str, key: str, transform: Transform | None) -> dict[str, Any]:
    origin, record, cost = run.syn.origin, run.record, run.syn.cost()
    loss, headline = run.curve("loss"), _headline(run)
    return {
        "key": key,
        "name": name,
        "dataset": run.dataset,
        "network": run.network,
        "headline": headline,
        "bytes": cost._asdict(),
        "total_bytes": sum(cost),
        "record": record,
        "film": None if transform is None else _film(run, transform),
        "loss": _figure("loss", key, {"loss": loss}, "step", "loss", log=True) if loss[0] else None,
        "labels": _labels(run.syn),
        "lr": _learned_lr(run, key),
        "reliability": None if headline is None else _reliability(headline, key),
        "per_class": None if headline is None else _per_class(run, headline),
        "uses": run.uses,
        "commands": _commands(run),
        "recipe": yaml.safe_dump(json.loads(json.dumps(dict(origin.recipe))), sort_keys=False),
        "facts": {
            "data": f"{run.dataset}, training split {origin.dataset['fingerprint']}",
            "recipe": origin.recipe_hash or "not recorded",
            "set": run.sha256,
            "code": f"condense {origin.code}, torch {record.get('torch', '?')}, Python {record.get('python', '?')}",
            "ran on": f"{record.get('device', '?')}, {record.get('machine', '?')}, "
            f"{record.get('threads', '?')} threads, {record.get('processes', 1)} processes",
            "finished": str(record.get("finished", "?")),
            "used": ", ".join(f"{found.get('kind')} {found.get('name', '')}" for found in origin.artifacts)
            or "nothing",
        },
    }


def _headline(run: Run) -> Mapping[str, Any] | None:
    """The result to be shown first: on the network of the distillation, if it was scored on that."""
    return max(run.own_results, key=lambda row: (row["network"] == run.network, row["n"]), default=None)


def _film(run: Run, transform: Transform) -> dict[str, Any]:
    """The images of each class after each of the kept steps."""
    classes = run.syn.origin.dataset["classes"]
    columns = max(1, min(10, MAX_IMAGES // len(classes)))
    frames = [
        [_data_uri(picture.strip(images)) for images in picture.by_class(syn, transform, columns=columns)]
        for syn in run.snapshots.values()
    ]
    steps, shown = list(run.snapshots), min(len(classes), MAX_IMAGES)
    return {
        "steps": steps,
        "classes": classes[:shown],
        "left_out": len(classes) - shown,
        "last": frames[-1][:shown],
        "json": Markup(json.dumps({"steps": steps, "frames": [frame[:shown] for frame in frames]})),
    }


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(
    kind: str, key: str, lines: Mapping[str, figures.Points], xlabel: str, ylabel: str, *, log: bool = False
) -> dict[str, Any]:
    """A figure of curves, and its numbers in words and as a table of at most twelve rows."""
    ends = "; ".join(f"{label}: from {y[0]:.4g} to {y[-1]:.4g}" for label, (x, y) in lines.items() if x)
    rows = []
    for label, (x, y) in lines.items():
        every = -(-len(x) // 12)
        rows += [(label, step, f"{value:.4g}") for step, value in list(zip(x, y, strict=True))[::-1][::every][::-1]]
    return {
        "svg": Markup(figures.curves(figures.fingerprint(kind, key), lines, xlabel, ylabel, log=log)),
        "says": f"{ylabel} over {xlabel}. {ends}.",
        "columns": ("curve", xlabel, ylabel),
        "rows": rows,
    }


def _validation(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    lines = {}
    for run, name in zip(runs, names, strict=True):
        steps, accuracies = run.curve("val_accuracy")
        if steps:
            lines[name] = (steps, [100 * value for value in accuracies])
    return _figure("validation", "all", lines, "step", "validation accuracy, %") if lines else None


def _labels(syn: SyntheticSet) -> dict[str, Any]:
    """The kind of labels and, where they are soft, the mean target of each class."""
    kind, classes = syn.label_kind, list(syn.origin.dataset["classes"])
    _, targets = syn()
    if targets.dim() == 1:
        return {"kind": kind.name, "matrix": None}
    source = syn.classes.repeat(len(targets) // len(syn))
    means = [targets[source == c].detach().float().mean(0).tolist() for c in range(len(classes))]
    low, high = min(map(min, means)), max(map(max, means))
    return {
        "kind": kind.name,
        "matrix": [
            (name, [(f"{value:.2f}", _share(value, low, high)) for value in row])
            for name, row in zip(classes, means, strict=True)
        ]
        if len(classes) <= 20
        else None,
        "classes": classes,
        "range": f"between {low:.3g} and {high:.3g}",
    }


def _share(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low), 3) if high > low else 0.0


def _learned_lr(run: Run, key: str) -> dict[str, Any] | None:
    lr = None if run.syn.lr is None else run.syn.lr.detach()
    if lr is None:
        return None
    if lr.dim():
        return _figure("rates", key, {"": (range(len(lr)), lr.tolist())}, "inner step", "learned step size")
    kept = {step: syn.lr for step, syn in run.snapshots.items()}
    points = {step: float(rate.detach()) for step, rate in kept.items() if rate is not None}
    return _figure("rate", key, {"": (list(points), list(points.values()))}, "step", "learned step size")


def _reliability(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Of all networks of a result together."""
    bins = []
    for of_bin in zip(*row["metrics"]["reliability"], strict=True):
        total = sum(share for share, _, _ in of_bin)
        confidence, accuracy = (sum(f[0] * f[i] for f in of_bin) / total if total else 0.0 for i in (1, 2))
        bins.append((total / len(of_bin), confidence, accuracy))
    metrics = {name: statistics.fmean(row["metrics"][name]) for name in ("ece", "nll", "brier", "macro_f1")}
    return {
        "svg": Markup(figures.reliability(figures.fingerprint("reliability", key), bins)),
        "says": f"{row['network']} under {row['protocol']}: expected calibration error {metrics['ece']:.3f}.",
        "metrics": metrics,
        "network": row["network"],
        "protocol": row["protocol"],
        "columns": ("share of images", "confidence", "accuracy"),
        "rows": [tuple(f"{value:.3f}" for value in found) for found in bins if found[0] > 0],
    }


def _per_class(run: Run, row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Accuracy within each class."""
    means = [statistics.fmean(values) for values in zip(*row["metrics"]["per_class"], strict=True)]
    return list(zip(run.syn.origin.dataset["classes"], means, strict=True))


def _named_rows(runs: Sequence[Run], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The results of all runs, each with the name of what was trained on and the network that the set of its run is
    meant to train."""
    rows: list[Mapping[str, Any]] = []
    for run, name in zip(runs, names, strict=True):
        for row in run.results:
            if row["synthetic_sha256"] == run.sha256:
                label = name
            elif row["synthetic_sha256"] is None:
                label = "full data"
            else:
                label = f"{row['method']}, ipc {row['num_images'] // run.syn.origin.num_classes}"
            rows.append({**row, "set": label, "meant_for": run.syn.origin.training.get("network", run.network)})
    return rows


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A heat map for each data set and protocol: sets down, architectures across."""
    tables = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for protocol, found in by_protocol([row for row in rows if row["dataset"] == dataset]).items():
            networks = list(dict.fromkeys(row["network"] for row in found))
            sets = by_set(found, "set")
            shown = [row for cells in sets.values() for row in cells.values()]
            low, high = min(row["mean"] for row in shown), max(row["mean"] for row in shown)
            cells = {name: [_cell(of.get(network), low, high) for network in networks] for name, of in sets.items()}
            tables.append(
                {
                    "dataset": dataset,
                    "protocol": protocol,
                    "changed": changes(found[0]),
                    "networks": networks,
                    "rows": list(cells.items()),
                    "n": ", ".join(map(str, sorted({row["n"] for row in shown}))),
                }
            )
    return tables


def _cell(row: Mapping[str, Any] | None, low: float, high: float) -> dict[str, Any] | None:
    if row is None:
        return None
    interval = row["interval"]
    within = "" if interval is None else f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
    return {
        "value": row["mean"],
        "text": percent(row["mean"], row["std"]),
        "share": _share(row["mean"], low, high),
        "says": f"n = {row['n']}{within}",
    }


def percent(mean: float, std: float | None) -> str:
    """Fractions as percent."""
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _budget(dataset: str, runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy against bytes: what was measured here beside what papers state."""
    own_network = [row for row in rows if row["synthetic_sha256"] is not None and row["network"] == row["meant_for"]]
    groups, measured = by_protocol(own_network), []
    for protocol, of_protocol in groups.items():
        for name, cells in by_set(of_protocol, "set").items():
            for row in cells.values():
                label = name + (f", {protocol}" if len(groups) > 1 else "")
                total = sum(row["stored_bytes"].values())
                measured.append(Point(label=label, num_bytes=total, accuracy=row["mean"], std=row["std"]))
    origin, published, lines = runs[0].syn.origin, [], []
    known = is_known(dataset, origin.dataset["fingerprint"])
    table = json.loads(_resource("published.json")).get(dataset) if known else None
    budgets = {str(run.ipc) for run in runs}
    at_hand = {run.method for run in runs} | set(NAMED)
    for row in table["rows"] if table else []:
        for ipc, (mean, std) in row["accuracy"].items():
            if ipc in budgets:
                label = f"{row['method']}, ipc {ipc}"
                total = _published_bytes(origin.input_shape, origin.num_classes, int(ipc), row["labels"])
                point = Point(
                    label=row["method"] + ("" if row["verified"] else " (unverified)"),
                    num_bytes=total,
                    accuracy=mean / 100,
                    std=None if std is None else std / 100,
                    named=row["method"] in at_hand,
                )
                published.append(point)
                source = row["source"] + ("" if row["verified"] else "; from memory, not verified")
                lines.append(("published", label, total, mean / 100, percent(point.accuracy, point.std), source))
    ceiling = (
        (f"all training data, published: {table['full']['accuracy']} %", table["full"]["accuracy"] / 100)
        if table
        else None
    )
    own = [
        ("measured", point.label, point.num_bytes, point.accuracy, percent(point.accuracy, point.std), "this report")
        for point in measured
    ]
    svg = ""
    if measured or published:
        name = figures.fingerprint("bytes", dataset)
        svg = figures.accuracy_against_bytes(name, measured, published, ceiling)
    return {"dataset": dataset, "svg": Markup(svg), "rows": own + lines, "published": bool(published)}


def _published_bytes(input_shape: InputShape, num_classes: int, ipc: int, labels: str) -> int:
    """As a set of ours would store it: float32 values, classes of eight bytes or float32 targets."""
    return ipc * num_classes * (4 * math.prod(input_shape) + (8 if labels == "hard" else 4 * num_classes))


def _commands(run: Run) -> list[str]:
    """What makes the run and its results again, with its recipe in a file."""
    data, folder = str(run.record.get("dataset", run.dataset)), run.folder.resolve().name
    data = data if data == run.dataset else Path(data).name  # where it lies is nobody's business
    commands = [["condense", "distill", "recipe.yaml", "--dataset", data, "--out", folder]]
    asked: dict[tuple[Any, ...], list[str]] = {}
    for row in run.own_results:
        if not row["protocol"].endswith("*"):
            asked.setdefault((row["protocol"], row["n"], row["seed"]), []).append(row["network"])
    for (protocol, n, seed), networks in asked.items():
        options = ["--num-seeds", str(n), "--protocol", protocol, "--seed", str(seed)]
        commands.append(["condense", "evaluate", folder, "--networks", *networks, *options])
    return [shlex.join(command) for command in commands]
