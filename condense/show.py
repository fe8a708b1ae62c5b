"""``condense show``: print a summary of a run, a set or a buffer, or a recipe as YAML."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from condense import api, artifacts, runs
from condense.data.layout import kind
from condense.eval.report import readable_bytes, steps_of, uses_of
from condense.eval.results import balanced, by_protocol, by_set, read_complete
from condense.files import read_header
from condense.names import percent, printable
from condense.recipe import Recipe, Resolved, to_mapping, to_yaml
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import StoredProjector, ViewLabels
from condense.table import print_table


def show(
    target: Path,
    png: Path | None = None,
    dataset: str | None = None,
    *,
    download: bool = False,
    as_json: bool = False,
) -> None:
    """Print a summary of a run, a file or a buffer.

    Args:
        target: the run folder, file or buffer folder.
        png: file to draw the images of a set to.
        dataset: the data of a whitened set, to draw its images.
        download: whether missing data may be downloaded.
        as_json: print a JSON object, with the results of a run as in ``evaluation.json``.

    Raises:
        ValueError: there is no Condense file; the file is damaged; the picture cannot be written.
    """
    if not target.exists():
        raise ValueError(f"{target} does not exist; check the path")
    is_run = target.is_dir() and (target / "recipe.yaml").exists()
    file = target / "synthetic.safetensors" if is_run else target
    if png is not None:
        if not file.is_file() or read_header(file).get("kind") != "synthetic set":
            raise ValueError(f"{target} holds no images to draw; give a finished run or a set, or leave out --png")
        api.draw(file, png, dataset, download=download)
    if target.is_dir() and (target / "manifest.json").exists():
        summary = _buffer(target)
    elif is_run:
        summary = _run(target)
    elif target.is_file():
        summary = Summary({str(target): _file(target)})
    else:
        raise ValueError(f"{target} is neither a run, a buffer nor a Condense file; give one of these")
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), indent=1))
    else:
        _print(summary)


@dataclass(frozen=True)
class Summary:
    """What ``show`` prints."""

    facts: Mapping[str, Mapping[str, Any]]
    """Facts by name, in groups with a title."""
    remark: str = ""
    results: Sequence[Mapping[str, Any]] = ()
    """Rows of ``evaluation.json``."""
    validation: Sequence[Mapping[str, Any]] = ()
    """Rows of ``validation.json``, scored on held-out training images."""
    uses: Sequence[Mapping[str, Any]] = ()
    """Tables of applications."""


def _print(summary: Summary) -> None:
    for title, facts in summary.facts.items():
        shown = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in facts.items()}
        print_table(None, (title, ""), shown.items())
    if summary.remark:
        print(printable(summary.remark))
    if summary.results:
        print_results(summary.results)
        _calibration(summary.results)
    if summary.validation:
        print_results(summary.validation)
    for use in summary.uses:
        print_table(use["title"], use["columns"], use["rows"])


def show_recipe(resolved: Resolved, plan: Recipe, flags: Sequence[str], as_json: bool) -> None:
    """Print a recipe as JSON, or as a YAML file that can be run, with its source in comments.

    Args:
        resolved: the recipe and its source.
        plan: the recipe after ``flags`` were applied.
        flags: the flags of the command line.
        as_json: print a JSON object with the keys ``name``, ``source`` and ``recipe``.
    """
    if as_json:
        print(json.dumps({"name": resolved.name, "source": resolved.source, "recipe": to_mapping(plan)}, indent=1))
        return
    changes = [] if plan == resolved.recipe else [f"changed by {shlex.join(flags)}"]
    for line in (resolved.name, *resolved.source.splitlines(), *changes):
        print(f"# {printable(line)}")
    print(to_yaml(plan), end="")


def print_results(rows: Sequence[Mapping[str, Any]], *, together: bool = False) -> None:
    """Print the rows of ``evaluation.json`` as one table per protocol, one line per set and one column per network.

    All rows were scored on one split. A cell is the mean accuracy in percent with its standard deviation and, for
    unbalanced test classes, the balanced accuracy in brackets. With ``together`` there is one table with the columns of
    all protocols. A table has columns of bytes where it is of several protocols, where labels take more than images, or
    where a teacher is not stored.
    """
    groups = by_protocol(rows)
    for titles in [list(groups)] if together else [[title] for title in groups]:
        _print_groups({title: groups[title] for title in titles})


def _print_groups(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the rows of some protocols, given by title, as one table."""
    columns, lines = [""], dict[str, list[str]]()
    tables = {title: by_set(rows) for title, rows in groups.items()}
    shown = {title: [row for cells in sets.values() for row in cells.values()] for title, sets in tables.items()}
    every = [row for rows in shown.values() for row in rows]
    counts, is_one = sorted({row["n"] for row in every}), len({row["network"] for row in every}) == 1
    for title, sets in tables.items():
        networks = list(dict.fromkeys(row["network"] for row in shown[title]))
        sizes = len(groups) > 1 or any(row["teacher"] or _outweighs(row["stored_bytes"]) for row in shown[title])
        prefix = f"{title} " if len(groups) > 1 else ""
        columns += [title] if prefix and is_one else [f"{prefix}{network}" for network in networks]
        columns += ["images + labels"] if sizes else []
        for name in dict.fromkeys(name for of_title in tables.values() for name in of_title):
            cells = sets.get(name, {})
            line = [_cell(cells.get(network)) for network in networks] + ([_bytes(cells)] if sizes else [])
            lines.setdefault(name, []).extend(line)
    what = every[0]["network"] if len(groups) > 1 and is_one else ", ".join(groups)
    scored = every[0].get("split", "test")
    heading = f"{scored} accuracy, %: {what}, n = {', '.join(map(str, counts))} networks per cell"
    if any(balanced(row) is not None for row in every):
        heading += " (balanced accuracy)"
    print_table(heading, columns, [(name, *line) for name, line in lines.items()])


def _outweighs(stored: Mapping[str, int]) -> bool:
    return stored.get("labels", 0) > stored.get("images", 0)


def _bytes(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the bytes of images and labels of one set, with those of a decoder if there is one."""
    if not cells:
        return "-"
    row = next(iter(cells.values()))
    stored = row["stored_bytes"]
    sizes = [size for name, size in stored.items() if size or name != "decoder"]
    return " + ".join(map(readable_bytes, sizes)) + (", teacher not stored" if row["teacher"] else "")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    of_classes = balanced(row)
    beside = "" if of_classes is None else f" ({100 * of_classes:.1f})"
    return percent(row["mean"], row["std"]) + beside


def _file(path: Path) -> dict[str, Any]:
    header = read_header(path)
    if header.get("kind") != "synthetic set":
        return {k: v for k, v in header.items() if not isinstance(v, dict | list)}
    return _set(api.load(path))


def _set(syn: SyntheticSet) -> dict[str, Any]:
    origin, cost = syn.origin, syn.cost()
    images, _ = syn()
    rate, shape = syn.lr, origin.input_shape
    return {
        "data set": f"{origin.dataset['name']} ({origin.dataset['fingerprint'][:12]})",
        kind(shape): f"{len(images)} of {'x'.join(map(str, shape))}, "
        + (f"{origin.num_classes} classes" if origin.num_classes else f"targets of {origin.target_width} values"),
        "method": origin.method or "unknown",
        "budget": syn.budget_in_full,
        "decode, labels": f"{syn.decode.name}, {syn.label_kind.name}",
        "transform": origin.transform.get("kind"),
        "learned lr": "none" if rate is None else f"{rate.detach().mean().item():.5g}",
        "bytes": f"images {cost.images}, labels {cost.labels}, decoder {cost.decoder} "
        f"(together {readable_bytes(sum(cost))}; {syn.num_bits} bits)",
        **({"labels": cost.remark()} if cost.remark() else {}),
        **({"teacher": _teacher(syn, syn.label_kind)} if isinstance(syn.label_kind, ViewLabels) else {}),
        **({"privacy": origin.guarantee} if origin.privacy else {}),
        "recipe": origin.recipe_hash[:12],
        "code": origin.code,
    }


def _teacher(syn: SyntheticSet, kind: ViewLabels) -> str:
    name = f"{kind.teacher}, {kind.network}" + (", not stored" if kind.is_named else "")
    if not isinstance(syn.provider, StoredProjector):
        return name
    return f"a projector of the encoder {name}" + ("" if kind.is_named else f", {syn.provider.encoder.nbytes} bytes")


def _run(folder: Path) -> Summary:
    groups, remark = dict[str, Mapping[str, Any]](), ""
    finished = folder / "synthetic.safetensors"
    if finished.exists():
        groups[str(folder)] = _set(api.load(folder))
    else:
        remark = f"{folder}: not finished; run its command again with --resume to continue"
    log, record = steps_of(folder), runs.read_record(folder)
    facts: dict[str, Any] = {}
    if "seconds" in record:
        where = f"{record.get('threads', '?')} threads, {record.get('device', '?')}"
        facts["distilled in"] = f"{record['seconds'] / 60:.1f} min, {where}"
    if "peak_memory_bytes" in record:
        facts["peak memory"] = readable_bytes(record["peak_memory_bytes"])
    for name in ("loss", "val_accuracy"):
        values = [line[name] for line in log if name in line]
        if values:
            facts[name] = f"{_sparkline(values)} {values[0]:.4g} to {values[-1]:.4g}"
    if log:
        facts["last step"] = ", ".join(f"{name} {value:.5g}" for name, value in log[-1].items())
    if (folder / "synthetic.png").exists():
        facts["pictures"] = f"{folder / 'synthetic.png'}; page: condense report {folder}"
    rows, validation = (_scores(folder, split) for split in get_args(api.Scored))
    sha256 = read_header(finished).get("sha256", "") if finished.exists() else ""
    if own := [row for row in rows if row["synthetic_sha256"] == sha256]:
        facts["compression"] = f"{own[0]['compression']:,.1f} : 1"
    return Summary(groups | {"run": facts}, remark, rows, validation, uses_of(folder))


def _scores(folder: Path, split: api.Scored) -> list[dict[str, Any]]:
    file = api.evaluation_file(folder, split)
    return read_complete(file, split) if file is not None and file.exists() else []


def _calibration(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print confidence interval, macro F1, NLL and ECE of each cell."""
    lines = []
    for protocol, row in ((title, row) for title, of_one in by_protocol(rows).items() for row in of_one):
        means = {name: statistics.fmean(row["metrics"][name]) for name in ("macro_f1", "nll", "ece")}
        interval = row["interval"]
        lines.append(
            (
                row["method"],
                row["network"],
                protocol,
                "-" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]",
                *(f"{value:.3f}" for value in means.values()),
            )
        )
    columns = ("set", "network", "protocol", "95 %", "macro F1", "NLL", "ECE")
    print_table("of the same networks", columns, lines)


def _buffer(folder: Path) -> Summary:
    buffer = artifacts.open_buffer(folder)
    identity = buffer.manifest["identity"]
    origin = printable(identity.get("origin", "trained"), 60)
    extent = " x ".join(f"{value} {name.removeprefix('num_')}" for name, value in buffer.extent().items())
    return Summary({str(folder): identity}, f"{extent}, {origin}")


def _sparkline(values: Sequence[float], width: int = 20) -> str:
    """Plot values as at most ``width`` characters, each the mean of a segment of the values."""
    size, largest = -(-len(values) // width), max(map(abs, values)) or 1.0
    shares = [value / largest for value in values]  # the sum of very large values would overflow
    means = [statistics.fmean(shares[i : i + size]) for i in range(0, len(shares), size)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] if high > low else "▄" for value in means)
