"""Render a comparison of runs as one HTML file that loads nothing from the network."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from torch import Tensor

from condense import __version__, picture
from condense.data.datasets import is_known
from condense.data.images import Images
from condense.data.layout import InputShape, kind
from condense.data.transform import Transform
from condense.eval.protocol import changed_in
from condense.eval.report import figures
from condense.eval.report.collect import NOT_RECORDED, Run
from condense.eval.report.figures import Point, readable_bytes
from condense.eval.report.nearest import Nearest, nearest
from condense.eval.report.reproduce import PUBLISHED, commands
from condense.eval.results import alike, balanced, by_protocol, by_set, pool, standing_for
from condense.files import canonical_json
from condense.names import percent
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import ViewLabels

MAX_IMAGES = 200
"""Largest number of images shown of a run at one step; data sets with more classes get fewer columns."""


def render(
    runs: Sequence[Run],
    pixels: Sequence[Transform | None],
    training: Sequence[Images | None],
    *,
    unverified: bool = False,
) -> str:
    """Render the report; each data set has its own comparison with published accuracies.

    Args:
        runs: the runs to compare.
        pixels: for each run, the transform that is inverted to show pixels; None if it is not available.
        training: for each run, the training samples in the space of the data; None if they are not at hand.
        unverified: whether to show published accuracies that nobody compared with their source.
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
    environment.filters["counted"] = counted
    copies = _copies(runs, pixels, training)
    pages = [
        _run(run, name, f"run{k}", None if back is None else _film(run, back, copies.get(k)), runs)
        for k, (run, name, back) in enumerate(zip(runs, names, pixels, strict=True))
    ]
    return environment.get_template("page.html").render(
        title=", ".join(datasets),
        version=__version__,
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        runs=pages,
        best=_best(runs, pages),
        scored=_common([page["scored"] for page in pages]),
        common=_common([page["facts"] for page in pages]) if len(runs) > 1 else {},
        validation=_validation(runs, names),
        tables=_tables(rows),
        pooled=_pooled(runs),
        budgets=[
            _budget(
                name,
                [run for run in runs if run.dataset == name],
                [row for row in rows if row["dataset"] == name],
                unverified,
            )
            for name in datasets
        ],
    )


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    """Return names such as ``dm, ipc 10``, extended where needed so that no two runs have the same name."""
    names = [f"{run.method}, {run.budget}" for run in runs]
    for of_each in ([run.dataset for run in runs], [run.syn.origin.network for run in runs]):
        if len({value for value in of_each if value}) > 1:
            names = [f"{name}, {value}" if value else name for name, value in zip(names, of_each, strict=True)]
    names = _disambiguated(names, [run.path.resolve().name for run in runs])
    return _disambiguated(names, [str(k + 1) for k in range(len(runs))])


def _disambiguated(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    return [f"{name} ({more})" if names.count(name) > 1 else name for name, more in zip(names, suffixes, strict=True)]


def counted(number: int | str, noun: str) -> str:
    """Return a number with its noun: ``1 run``, ``2 runs``, ``2, 3 networks``."""
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _common(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts, by name, that all of these have."""
    first, *others = facts
    return {name: fact for name, fact in first.items() if all(other.get(name) == fact for other in others)}


def _best(runs: Sequence[Run], pages: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys of the runs with the highest accuracy among those of one data set, budget, network and
    protocol."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run, page in zip(runs, pages, strict=True):
        if page["headline"] is not None:
            training = "" if page["headline"]["protocol"] == "own" else page["headline"]["protocol_hash"]
            key = (run.syn.origin.fingerprint, run.budget, page["headline"]["network"], training)
            groups.setdefault(key, []).append(page)
    return {max(group, key=lambda page: page["headline"]["mean"])["key"] for group in groups.values() if len(group) > 1}


def _references(run: Run, headline: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the gain over random images of the same budget and the share of the accuracy on all training data, both
    measured on the network of ``headline``; None where the page has no such result."""
    alike = [other for other in runs if _data(other) == _data(run)]
    where = ("network", "test_fingerprint")
    rows = [
        (other.budget, row)
        for other in alike
        for row in other.results
        if all(row[name] == headline[name] for name in where)
    ]
    full = max((row for _, row in rows if row["synthetic_sha256"] is None), key=lambda row: int(row["n"]), default=None)
    training = ("protocol",) if headline["protocol"] == "own" else ("protocol", "protocol_hash")
    random = {
        row["synthetic_sha256"]: row
        for budget, row in rows
        if row["method"] == "random" and budget == run.budget and all(row[name] == headline[name] for name in training)
    }
    nearest = min((abs(row["num_images"] - len(run.syn)) for row in random.values()), default=0)
    drawn = [row for row in random.values() if abs(row["num_images"] - len(run.syn)) == nearest]
    chance = statistics.fmean(row["mean"] for row in drawn) if drawn else None
    return {
        "gain": None if chance is None or run.method == "random" else headline["mean"] - chance,
        "gain_says": ""
        if chance is None
        else f"{counted(drawn[0]['num_images'], 'random image')}: {100 * chance:.1f} %, "
        f"{counted(sum(row['n'] for row in drawn), 'network')}",
        "share": headline["mean"] / full["mean"] if full and full["mean"] else None,
        "share_says": "" if full is None else f"all training data: {percent(full['mean'], full['std'])} %",
    }


def _data(run: Run) -> tuple[Any, ...]:
    """What two runs share that saw the same images with the same transform."""
    origin = run.syn.origin
    return origin.fingerprint, origin.split, canonical_json(origin.transform)


def _in_words(fields: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        return f"({_in_words(value)})" if isinstance(value, Mapping) else "none" if value in ([], ()) else str(value)

    return ", ".join(f"{name} {word(value)}" for name, value in fields.items())


def _seen(run: Run) -> str:
    """Return in words the part of the training images that the set was made from."""
    split = run.syn.origin.split
    if not run.is_recorded:
        return NOT_RECORDED
    if not split.val_fraction:
        return "all training images"
    rest = f"the rest, drawn by seed {split.seed}, is held out for validation"
    return f"{100 * (1 - split.val_fraction):g} % of the training images ({rest})"


def _run(run: Run, name: str, key: str, film: Mapping[str, Any] | None, runs: Sequence[Run]) -> dict[str, Any]:
    origin, record, cost = run.syn.origin, run.record, run.syn.cost()
    loss, headline = run.curve("loss"), standing_for(run.own_results, _network(run, runs))
    facts = ("machine", "torch", "python", "finished", "device")
    known = {fact: str(record.get(fact, NOT_RECORDED)) for fact in facts}
    return {
        "key": key,
        "name": name,
        "dataset": run.dataset,
        "is_recorded": run.is_recorded,
        "headline": headline,
        **({"gain": None, "share": None} if headline is None else _references(run, headline, runs)),
        "scored": {
            "data": run.dataset,
            "training images seen": _seen(run).split(" of the ")[0].removesuffix(" training images"),
            **({} if headline is None else {name: headline[name] for name in ("network", "protocol")}),
            **({} if headline is None else {"networks": str(headline["n"])}),
        },
        "balanced": None if headline is None else balanced(headline),
        "bytes": cost._asdict(),
        "bits": run.syn.num_bits,
        "total_bytes": sum(cost),
        "minutes": record["seconds"] / 60 if "seconds" in record else None,
        "peak": record.get("peak_memory_bytes"),
        "device": known["device"],
        "film": film,
        "loss": _figure("loss", key, {"loss": loss}, "step", "loss", log=True) if loss[0] else None,
        "labels": _labels(run.syn),
        "lr": _learned_lr(run, key),
        "lr_says": "The set has no learned learning rate."
        if run.syn.lr is None
        else f"The learned learning rate of the set is {run.syn.lr.detach().mean():.4g}.",
        "reliability": None if headline is None else _reliability(headline, key),
        "per_class": None if headline is None else _per_class(run, headline),
        "uses": run.uses,
        "commands": commands(run),
        "published": PUBLISHED if run.method.startswith("imported:") else "",
        "artifacts": [str(used["name"]) for used in origin.artifacts if "name" in used],
        "facts": {
            "data": f"{run.dataset}, training split {origin.dataset['fingerprint']}"
            + ("" if run.is_recorded else ", as given by whoever made the file"),
            "made from": _seen(run),
            "budget": run.syn.budget_in_full,
            "recipe": origin.recipe_hash or NOT_RECORDED,
            "set": run.sha256,
            **({"privacy": origin.guarantee} if origin.privacy else {}),
            "code": f"condense {origin.code}, torch {known['torch']}, Python {known['python']}"
            if run.is_recorded
            else f"{NOT_RECORDED}; the file was written by condense {origin.code}",
            "ran on": f"{known['device']}, {known['machine']}, {counted(record['threads'], 'thread')}, "
            f"{counted(record.get('processes', 1), 'process')}"
            if "threads" in record
            else NOT_RECORDED,
            "finished": known["finished"],
            "artifacts used": ", ".join(f"{used.get('kind')} {used.get('name', '')}" for used in origin.artifacts)
            or ("none" if run.is_recorded else NOT_RECORDED),
        },
    }


def _network(run: Run, runs: Sequence[Run]) -> str:
    """Return the network of the distillation. If a set does not record it, it is one that the set was evaluated on,
    preferably the network of another run on the page."""
    if run.syn.origin.network:
        return run.syn.origin.network
    others = {other.network for other in runs if other.syn.origin.fingerprint == run.syn.origin.fingerprint}
    best = max(run.own_results, key=lambda row: (row["network"] in others, row["n"]), default=None)
    return NOT_RECORDED if best is None else str(best["network"])


def _copies(
    runs: Sequence[Run], pixels: Sequence[Transform | None], training: Sequence[Images | None]
) -> dict[int, Nearest]:
    """Return the training images nearest to those shown, by the number of the run; runs that are not in it have none.
    Runs that saw the same images with the same transform are compared with them together."""
    alike: dict[Any, list[int]] = {}
    for k, run in enumerate(runs):
        is_shown = pixels[k] is not None and training[k] is not None
        if kind(run.syn.origin.input_shape) != "graphs" and is_shown:
            alike.setdefault(_data(run), []).append(k)
    found: dict[int, Nearest] = {}
    for members in alike.values():
        transform, real = pixels[members[0]], training[members[0]]
        assert transform is not None and real is not None
        found |= zip(members, nearest([_shown(runs[k].syn) for k in members], real, transform), strict=True)
    return found


def _columns(syn: SyntheticSet) -> int:
    return max(1, min(10, MAX_IMAGES // max(1, syn.origin.num_classes)))


def _shown(syn: SyntheticSet) -> list[Tensor]:
    """Return the samples of each class that the page shows, in the space of the transform."""
    return picture.samples_by_class(syn, _columns(syn))[:MAX_IMAGES]


def _film(run: Run, transform: Transform, copies: Nearest | None) -> dict[str, Any]:
    """Return the images of each class at each snapshot, the nearest training images of the last one and, of clips, its
    animations; a set without classes has one row."""
    origin = run.syn.origin
    classes = origin.dataset["classes"] if origin.num_classes else [kind(origin.input_shape)]
    columns = _columns(run.syn)
    frames = [
        [_strip(images) for images in picture.by_class(syn, transform, columns=columns)]
        for syn in run.snapshots.values() or (run.syn,)
    ]
    steps, shown = ["0 (start)" if step == 0 else str(step) for step in run.snapshots], min(len(classes), MAX_IMAGES)
    clips = kind(run.syn.origin.input_shape) == "clips"
    played = picture.played(run.syn, transform, columns=columns)[:shown] if clips else []
    strips, says = _nearest(run, copies)
    return {
        "nearest": strips,
        "nearest_says": says,
        "played": [_data_uri(png) for png in played],
        "steps": steps,
        "classes": classes[:shown],
        "left_out": len(classes) - shown,
        "last": frames[-1][:shown],
        "counts": [len(row) for row in _shown(run.syn)],
        "json": Markup(json.dumps({"steps": steps, "frames": [frame[:shown] for frame in frames]})),
    }


def _nearest(run: Run, found: Nearest | None) -> tuple[list[tuple[str, str]], str]:
    """Return for each row the strip of the nearest training images and their distances, and a sentence about them."""
    if kind(run.syn.origin.input_shape) == "graphs":
        return [], "Graphs have no distance by which nearest training graphs could be shown."
    if found is None:
        return [], "The nearest training images are not shown, because the data set is not at hand."
    strips = [_strip(row) for row in picture.pictures(list(found.samples))]
    every = [distance for row in found.distances for distance in row]
    seen = "training images of the run" if run.is_recorded else "training images"
    says = (
        f"Below each row of the finished set are the nearest of {found.num_images} {seen}, by the Euclidean distance "
        f"between the pixels after the transform {run.syn.origin.transform_name}: {min(every):.3g} to "
        f"{max(every):.3g}, median {statistics.median(every):.3g}. A distance of 0 is a copy."
    )
    distances = [" ".join(f"{distance:.3g}" for distance in row) for row in found.distances]
    return list(zip(strips, distances, strict=True)), says


def _strip(images: Tensor) -> str:
    """Return pictures (n, C, h, w) in a row as the address of an image; empty if there are none."""
    return _data_uri(picture.strip(images)) if len(images) else ""


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(
    kind: str, key: str, lines: Mapping[str, figures.Points], xlabel: str, ylabel: str, *, log: bool = False
) -> dict[str, Any]:
    """Return a figure of curves with a description, and a table of at most twelve rows per curve."""
    ends = "; ".join(f"{label}: from {y[0]:.4g} to {y[-1]:.4g}" for label, (x, y) in lines.items() if x)
    rows = []
    for label, (x, y) in lines.items():
        every = -(-len(x) // 12)
        rows += [(label, step, f"{value:.4g}") for step, value in list(zip(x, y, strict=True))[::-1][::every][::-1]]
    return {
        "svg": Markup(figures.curves(figures.fingerprint(kind, key), lines, xlabel, ylabel, log=log)),
        "says": f"{ylabel} against {xlabel}. {ends}.",
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
    """Return what the labels are and, for soft labels, the mean target of each class."""
    kind, classes = syn.label_kind, list(syn.origin.dataset.get("classes", ()))
    if isinstance(kind, ViewLabels):
        by = f"{kind.teacher}, {'which is not stored' if kind.is_named else kind.network}"
        says = [f"Labels: {kind.name}, for every view of the images, by {by}.", syn.cost().remark().capitalize()]
        return {"says": " ".join(filter(None, says)), "matrix": None}
    _, targets = syn()
    if targets.dim() == 1:
        return {"says": "Hard labels: one class per image.", "matrix": None}
    if not syn.origin.num_classes:
        span = f"between {targets.min():.3g} and {targets.max():.3g}"
        return {"says": f"Targets of {targets.shape[1]} values per image, {span}.", "matrix": None}
    source = syn.classes.repeat(len(targets) // len(syn))
    present = source.unique().tolist()
    means = [targets[source == c].detach().float().mean(0).tolist() for c in present]
    low, high = min(map(min, means)), max(map(max, means))
    return {
        "says": f"Labels: {kind.name}. The mean targets of the images of each class are between {low:.3g} and "
        f"{high:.3g}.",
        "matrix": [
            (classes[c], [(f"{value:.2f}", _share(value, low, high)) for value in row])
            for c, row in zip(present, means, strict=True)
        ]
        if len(classes) <= 20
        else None,
        "classes": classes,
    }


def _share(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low), 3) if high > low else 0.0


def _learned_lr(run: Run, key: str) -> dict[str, Any] | None:
    lr = None if run.syn.lr is None else run.syn.lr.detach()
    if lr is None:
        return None
    if lr.dim():
        return _figure("rates", key, {"": (range(len(lr)), lr.tolist())}, "inner step", "learned learning rate")
    rates = {step: syn.lr for step, syn in run.snapshots.items()}
    points = {step: float(rate.detach()) for step, rate in rates.items() if rate is not None}
    if not points:
        return None
    return _figure("rate", key, {"": (list(points), list(points.values()))}, "step", "learned learning rate")


def _reliability(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the reliability diagram over all networks of a result, with their mean metrics."""
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
        "rows": [tuple(f"{value:.3f}" for value in of_bin) for of_bin in bins if of_bin[0] > 0],
    }


def _per_class(run: Run, row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the mean accuracy within each class."""
    means = [statistics.fmean(values) for values in zip(*row["metrics"]["per_class"], strict=True)]
    return list(zip(run.syn.origin.dataset["classes"], means, strict=True))


def _named_rows(runs: Sequence[Run], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the results of all runs. ``set`` names what was trained on, ``budget`` its budget in words, ``meant_for``
    the network that the set of the run was made for, and ``chosen`` that network if the set does not record it."""
    rows: list[Mapping[str, Any]] = []
    for run, name in zip(runs, names, strict=True):
        for row in run.results:
            budget = f"ipc {row['num_images'] // run.syn.origin.num_classes}"
            if row["synthetic_sha256"] == run.sha256:
                label, budget = name, run.budget
            elif row["synthetic_sha256"] is None:
                label = "full data"
            else:
                label = f"{row['method']}, {budget}"
            label += ", teacher not stored" if row["teacher"] else ""
            meant_for = run.syn.origin.training.get("network", _network(run, runs))
            own = row["synthetic_sha256"] == run.sha256
            chosen = f" on {meant_for}" if own and run.network == NOT_RECORDED else ""
            rows.append({**row, "set": label, "budget": budget, "meant_for": meant_for, "chosen": chosen})
    return rows


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a heat map per data set and protocol, with sets as rows and architectures as columns.

    All heat maps of a data set have one scale. The results on all training data have a protocol of their own and are
    the last row of each.
    """
    tables = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_dataset = [row for row in rows if row["dataset"] == dataset]
        groups = by_protocol([row for row in of_dataset if row["synthetic_sha256"] is not None])
        (full,) = by_set([row for row in of_dataset if row["synthetic_sha256"] is None], "set").values() or ({},)
        sets = {protocol: by_set(of_protocol, "set") for protocol, of_protocol in (groups or {"": []}).items()}
        shown = [row for of in sets.values() for cells in of.values() for row in cells.values()] + list(full.values())
        low, high = min(row["mean"] for row in shown), max(row["mean"] for row in shown)
        for protocol, of in sets.items():
            measured = [row for cells in of.values() for row in cells.values()]
            networks = list(dict.fromkeys([row["network"] for row in groups.get(protocol, ())] or full))
            last = [full.get(network) for network in networks]
            counts = sorted({row["n"] for row in (*measured, *filter(None, last))})
            tables.append(
                {
                    "dataset": dataset,
                    "protocol": protocol,
                    "changed": _in_words(changed_in(measured[0])) if measured else "",
                    "networks": networks,
                    "rows": [
                        (name, [_cell(cells.get(network), low, high) for network in networks])
                        for name, cells in of.items()
                    ],
                    "full": [_cell(row, low, high) for row in last] if any(last) else None,
                    "full_protocol": next((row["protocol"] for row in last if row), ""),
                    "n": counted(", ".join(map(str, counts)), "network"),
                }
            )
    return tables


def _pooled(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each network and protocol of runs that differ in the seed of their distillation alone."""
    by_sum = {run.sha256: run for run in runs}
    rows = []
    for group in alike({sha256: run.syn for sha256, run in by_sum.items()}):
        cells: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
        for sha256 in group:
            run = by_sum[sha256]
            for row in sorted(run.own_results, key=lambda row: int(row["n"])):
                training = "" if row["protocol"] == "own" else row["protocol_hash"]
                cells.setdefault((row["network"], row["protocol"], training), {})[sha256] = row
        first = by_sum[group[0]]
        for (network, protocol, _), of_sets in cells.items():
            if len(of_sets) > 1:
                found = pool(list(of_sets.values()))
                rows.append(
                    {
                        "name": f"{first.dataset}, {first.method}, {first.budget}",
                        "network": network,
                        "protocol": protocol,
                        "num_sets": found.num_sets,
                        "n": found.n,
                        "mean": percent(found.mean, None),
                        "networks": _points(found.between_networks),
                        "distillations": _points(found.between_distillations),
                    }
                )
    return rows


def _points(deviation: float | None) -> str:
    return "-" if deviation is None else f"{100 * deviation:.1f}"


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


def _budget(dataset: str, runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], unverified: bool) -> dict[str, Any]:
    """Return accuracy against bytes, measured and published, and the number of published accuracies left out."""
    meant = [row for row in rows if row["network"] == row["meant_for"]]
    groups, measured = by_protocol([row for row in meant if row["synthetic_sha256"] is not None]), list[Point]()
    for protocol, of_protocol in groups.items():
        for name, cells in by_set(of_protocol, "set").items():
            for row in cells.values():
                training = row["chosen"] + (f", {protocol}" if len(groups) > 1 else "")
                measured.append(
                    Point(
                        label=name + training,
                        method=(row["method"] or "set") + training,
                        budget=row["budget"],
                        num_bytes=sum(row["stored_bytes"].values()),
                        accuracy=row["mean"],
                        std=row["std"],
                    )
                )
    origin, published, sources = runs[0].syn.origin, list[Point](), list[str]()
    known = is_known(dataset, origin.dataset["fingerprint"])
    table = json.loads(_resource("published.json")).get(dataset) if known else None
    budgets, hidden = {str(run.ipc) for run in runs}, 0
    for row in table["rows"] if table else []:
        for ipc, (mean, std) in row["accuracy"].items():
            if ipc in budgets and not row["verified"] and not unverified:
                hidden += 1
            elif ipc in budgets:
                method = row["method"] + ("" if row["verified"] else " (unverified)")
                published.append(
                    Point(
                        label=f"{method}, ipc {ipc}",
                        method=method,
                        budget=f"ipc {ipc}",
                        num_bytes=_published_bytes(origin.input_shape, origin.num_classes, int(ipc), row["labels"]),
                        accuracy=mean / 100,
                        std=None if std is None else std / 100,
                        published=True,
                    )
                )
                sources.append(row["source"] + ("" if row["verified"] else "; from memory, not verified"))
    full = max((row for row in meant if row["synthetic_sha256"] is None), key=lambda row: int(row["n"]), default=None)
    line = None if full is None else ("all training data", full["mean"])
    if line is None and table:
        line = ("all training data, published", table["full"]["accuracy"] / 100)
    points = measured + published
    return {
        "dataset": dataset,
        "svg": Markup(
            figures.accuracy_against_bytes(figures.fingerprint("bytes", dataset), points, line) if points else ""
        ),
        "rows": list(
            zip(
                points,
                [percent(point.accuracy, point.std) for point in points],
                ["this report"] * len(measured) + sources,
                strict=True,
            )
        ),
        "published": bool(published),
        "hidden": hidden,
    }


def _published_bytes(input_shape: InputShape, num_classes: int, ipc: int, labels: str) -> int:
    """Return the bytes that our files would need: float32 pixels, and eight bytes per class or float32 targets."""
    return ipc * num_classes * (4 * math.prod(input_shape) + (8 if labels == "hard" else 4 * num_classes))
