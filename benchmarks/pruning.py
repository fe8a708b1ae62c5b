"""Accuracy against the share of the training images that selections keep, with and without a teacher.

    python -m benchmarks.pruning DATA.npz [flags of condense apply pruning] --rows FOLDER

The command runs `condense apply pruning` and keeps its results in FOLDER under the name of the data, with their
provenance; docs/results.md has a table of each file in ``results/pruning``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Provenance
from condense.files import check_new_folder, read_json


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    method: str
    fraction: float
    teacher: bool
    accuracies: tuple[float, ...]
    """Fractions, one for each network."""
    network: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The accuracies of one run, with their provenance."""

    dataset: str
    command: str
    minutes: float
    """Wall time."""
    provenance: Provenance
    accuracy_of_teacher: float
    accuracies: tuple[Accuracy, ...]


def tables(folder: Path) -> list[str]:
    """The lines of a table for each file in ``folder``."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        made = harness.read(Curves, file)
        shares = sorted({row.fraction for row in made.accuracies})
        titles = ["images kept by", "teacher", *(f"{100 * share:g} %" for share in shares)]
        network, teacher = made.accuracies[0].network, f"{100 * made.accuracy_of_teacher:.1f} %"
        lines += [f"`{made.dataset}`, `{network}`; the teacher has {teacher}:", ""]
        lines += harness.table_head(titles)
        for curve in dict.fromkeys((row.method, row.teacher) for row in made.accuracies):
            rows = [row for row in made.accuracies if (row.method, row.teacher) == curve]
            cells = {row.fraction: harness.mean_and_std(row.accuracies) for row in rows}
            words = [f"`{curve[0]}`", "yes" if curve[1] else "no", *(cells[share] for share in shares)]
            lines.append(harness.table_line(words))
        n = len(made.accuracies[0].accuracies)
        lines += ["", f"    {made.command}", "", f"{made.provenance}, {made.minutes:.0f} minutes;"]
        lines += [f"n = {n} networks on one selection.", ""]
    return lines


def measure(data: str, flags: Sequence[str], rows: Path) -> Curves:
    """Run the application and write its results.

    Raises:
        ValueError: ``rows`` is no folder, or not writable; nothing was run.
        CalledProcessError: the command failed.
    """
    check_new_folder(rows)
    name, begun = Path(data).stem, time.monotonic()
    words = ["apply", "pruning", data, *flags]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "condense", *words, "--out", out], check=True)
        found = read_json(Path(out) / "apply-pruning.json", fix="run it again")
    accuracies = found["accuracies"]
    curves = Curves(
        dataset=name,
        command=shlex.join(["condense", "apply", "pruning", Path(data).name, *flags]),
        minutes=(time.monotonic() - begun) / 60,
        provenance=dataclasses.replace(Provenance.now(torch.device("cpu")), device=accuracies[0]["device"]),
        accuracy_of_teacher=found["accuracy_of_teacher"],
        accuracies=tuple(
            Accuracy(**{field.name: row[field.name] for field in dataclasses.fields(Accuracy)}) for row in accuracies
        ),
    )
    harness.write(curves, rows / f"{name}.json")
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="file, or name of a data set")
    parser.add_argument("--rows", type=Path, required=True, help="folder of the results")
    chosen, flags = parser.parse_known_args()
    measure(chosen.data, flags, chosen.rows)
    print("\n".join(tables(chosen.rows)))


if __name__ == "__main__":
    sys.exit(harness.status("pruning", main))
