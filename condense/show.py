"""``condense show``: what a run, a file or a buffer says of itself, at a glance in the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from condense import api, artifacts, runs
from condense.eval import crossarch
from condense.eval.report import readable_bytes, steps_of, uses_of
from condense.files import read_header
from condense.names import printable
from condense.synthetic.set import SyntheticSet
from condense.table import by_protocol, print_results, print_table


def show(target: Path, png: Path | None = None, dataset: str | None = None) -> None:
    """Print it; ``png`` is where to draw the images of a set, ``dataset`` where its data lie if it is whitened.

    Raises:
        ValueError: there is nothing, or nothing of ours; the file is damaged; the picture cannot be written.
    """
    if not target.exists():
        raise ValueError(f"there is nothing at {target}; check the path")
    is_run = target.is_dir() and (target / "recipe.yaml").exists()
    file = target / "synthetic.safetensors" if is_run else target
    if png is not None:
        if not file.is_file() or read_header(file).get("kind") != "synthetic set":
            raise ValueError(f"{target} holds no images to draw; give a finished run or a set, or leave --png out")
        api.draw(file, png, dataset)
    if target.is_dir() and (target / "manifest.json").exists():
        _buffer(target)
    elif is_run:
        _run(target)
    elif target.is_file():
        _file(target)
    else:
        raise ValueError(f"{target} is neither a run, a buffer nor a Condense file; give one of these")


def _file(path: Path) -> None:
    header = read_header(path)
    if header.get("kind") != "synthetic set":
        _facts(str(path), {k: v for k, v in header.items() if not isinstance(v, dict | list)})
        return
    _set(str(path), api.load(path))


def _set(title: str, syn: SyntheticSet) -> None:
    origin, cost = syn.origin, syn.cost()
    images, _ = syn()
    rate = syn.lr
    _facts(
        title,
        {
            "data set": f"{origin.dataset['name']} ({origin.dataset['fingerprint'][:12]})",
            "images": f"{len(images)} of {'x'.join(map(str, origin.input_shape))}, "
            + (f"{origin.num_classes} classes" if origin.num_classes else f"targets of {origin.target_width} values"),
            "method": origin.method or "unknown",
            "decode, labels": f"{syn.decode.name}, {syn.label_kind.name}",
            "transform": origin.transform.get("kind"),
            "learned lr": "none" if rate is None else f"{rate.detach().mean().item():.5g}",
            "bytes": f"images {cost.images}, labels {cost.labels}, decoder {cost.decoder} "
            f"(together {readable_bytes(sum(cost))})",
            "recipe": origin.recipe_hash[:12],
            "code": origin.code,
        },
    )


def _run(folder: Path) -> None:
    if (folder / "synthetic.safetensors").exists():
        _set(str(folder), api.load(folder))
    else:
        print(printable(f"{folder}: not finished; the command that began it with --resume continues"))
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
    rows = crossarch.read_complete(folder / "evaluation.json") if (folder / "evaluation.json").exists() else []
    if rows:
        facts["compression"] = f"{rows[0]['compression']:,.1f} : 1"
    _facts("run", facts)
    if rows:
        print_results(rows)
        _calibration(rows)
    for found in uses_of(folder):
        print_table(found["title"], found["columns"], found["rows"])


def _calibration(rows: Sequence[Mapping[str, Any]]) -> None:
    """What else is known of each cell."""
    lines = []
    for protocol, row in ((title, row) for title, found in by_protocol(rows).items() for row in found):
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


def _buffer(folder: Path) -> None:
    buffer = artifacts.Trajectories(folder)
    identity = buffer.manifest["identity"]
    _facts(str(folder), {k: json.dumps(v) if isinstance(v, dict) else v for k, v in identity.items()})
    origin = printable(identity.get("origin", "trained"), 60)
    print(f"{buffer.num_experts} experts x {buffer.num_epochs} epochs, {origin}")


def _facts(title: str, facts: Mapping[str, Any]) -> None:
    print_table(None, (title, ""), facts.items())


def _sparkline(values: Sequence[float], width: int = 20) -> str:
    """The course of the values in at most ``width`` characters, each the mean of a stretch."""
    size, largest = -(-len(values) // width), max(map(abs, values)) or 1.0
    shares = [value / largest for value in values]  # the sum of very large values would overflow
    means = [statistics.fmean(shares[i : i + size]) for i in range(0, len(shares), size)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] if high > low else "▄" for value in means)
