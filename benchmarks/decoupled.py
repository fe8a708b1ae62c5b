"""Decoupled methods and selections against random images, with hard labels and with the labels of a teacher.

    python -m benchmarks.decoupled DATA.npz --network convnet:depth=4,width=32,norm=batch --out FOLDER
                                   [--only NAME ...] [--ipc 1 10] [--num-seeds 3] [--device auto] [--limit MINUTES]
                                   [--rows FOLDER]

One teacher of the given architecture is trained on the real training images. Each set is scored three times on the test
split, by N fresh networks each time:

* ``canonical``: one class per image, no augmentation;
* ``fixed``: one vector of the teacher's logits per image, no augmentation;
* ``views``: the teacher's logits for every view of 300 epochs, augmented with DSA and CutMix (FKD).

Networks are trained under the protocol ``relabelled`` in the latter two. The row ``random`` has N draws of random
images with one network each. The settings below are the published ones with fewer steps; none was chosen by accuracy.
``--out`` keeps the teacher and the sets, ``--rows`` (by default the same folder) one JSON file per row; rows that it
holds are not measured again. docs/results.md has the tables of the rows below ``results/decoupled``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Provenance
from condense import api
from condense.buffers.trajectories import Experts
from condense.compute import Compute, prepare_device
from condense.data.datasets import open_data
from condense.experiment import recipe_for
from condense.names import suggest
from condense.recipe import Recipe
from condense.runs import read_record
from condense.schedule import Schedule
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import Stored

TEACHER = Experts(
    num_experts=1,
    num_epochs=15,
    keep="last",
    lr=0.02,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=64,
    schedule=Schedule(cosine_to=0.0),
    augment="flip_crop:mode=M",
)

RECOVERY: dict[str, Any] = {"num_steps": 500, "augment": "resized-crop_flip_roll:mode=M,max_roll=4"}

REAL: dict[str, Any] = {"decode": "pixels-8bit"}
"""Real images take the bytes of recovered ones."""

RANDOM = "random"

SETTINGS: dict[str, dict[str, Any]] = {
    RANDOM: REAL,
    "k-center": {**REAL, "num_epochs": 5},
    "rded": REAL,
    "sre2l": RECOVERY,
    "cda": RECOVERY,
    "cudd": {**RECOVERY, "stages": (1, 4), "student_epochs": 100},
    "fadrm": RECOVERY,
    "cim": {},
}
"""By method: fields of the recipe for any data set, or of its method, that are replaced."""

BATCH = {1: 10, 10: 50}
"""Batch size of the labelled views, by images per class."""

COLUMNS = ("canonical", "fixed", "views")


def labels(column: str, ipc: int) -> Stored:
    batch_size = BATCH.get(ipc, 100)
    if column == "fixed":
        return Stored(epochs=1, augment="none", cutmix=0.0, batch_size=batch_size)
    return Stored(batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget; accuracies are fractions, one for each network."""

    fingerprint: str
    """Of the training samples."""
    network: str
    num_seeds: int
    dataset: str
    """Name of the data set, or of the file without its ending."""
    method: str
    ipc: int
    provenance: Provenance
    accuracies: dict[str, list[float]]
    """By column."""
    bytes: dict[str, list[int]]
    """By column: bytes of the images and of the labels."""
    seconds: float
    """Time of the distillation, without the teacher, as the run recorded it over all its interruptions."""
    minutes: float
    """Time of distillation, labelling, training and scoring."""
    settings: str = ""
    """Digest of the recipe, the training of the teacher and the labels; empty in older rows."""

    def cells(self) -> str:
        """A row of the Markdown table."""
        percents = [harness.mean_and_std(self.accuracies[column]) for column in COLUMNS]
        sizes = [f"{self.bytes['canonical'][0] / 1e3:.4g}"]
        sizes += [f"{self.bytes[column][1] / 1e3:.3g}" for column in COLUMNS]
        words = [f"`{self.method}`", str(self.ipc), *percents, *sizes, f"{self.seconds:.0f}", f"{self.minutes:.1f}"]
        return harness.table_line(words)


HEAD = harness.table_head(
    [
        *("method", "images per class", "`canonical`, %", "fixed, %", "views, %"),
        *("images, kB", "hard, kB", "fixed, kB", "views, kB", "distilled in, s", "minutes"),
    ]
)


def tables(folder: Path) -> list[str]:
    """The lines of a table for each data set and budget of the rows in the folders below ``folder``."""
    rows = [harness.read(Row, file) for file in sorted(folder.glob("*/*.json"))]
    lines = []
    for dataset, network, ipc in dict.fromkeys((row.dataset, row.network, row.ipc) for row in sorted(rows, key=_place)):
        given = [row for row in rows if (row.dataset, row.network, row.ipc) == (dataset, network, ipc)]
        command = f"python -m benchmarks.decoupled {dataset}.npz --network {network} --ipc {ipc}"
        lines += [f"`{dataset}`, {images(ipc)}, `{network}`:", "", *HEAD]
        lines += [*map(Row.cells, sorted(given, key=_place)), ""]
        lines += [f"    {command} --num-seeds {given[0].num_seeds} --out FOLDER", ""]
        lines += [f"{'; '.join(dict.fromkeys(str(row.provenance) for row in given))}; seed 0.", ""]
    return lines


def images(ipc: int) -> str:
    return f"{ipc} image{'' if ipc == 1 else 's'} per class"


def _place(row: Row) -> tuple[str, int, int]:
    return row.dataset, row.ipc, [*SETTINGS].index(row.method)


@dataclass(frozen=True, kw_only=True)
class Bench(harness.Bench):
    @property
    def compute(self) -> Compute:
        return harness.uncompiled(self.device)

    def row(self, method: str, ipc: int) -> Row:
        draws = range(self.num_seeds) if method == RANDOM else range(1)
        sets = [self.distilled(method, ipc, seed) for seed in draws]
        seconds = sum(read_record(self.run(method, ipc, seed))["seconds"] for seed in draws)
        begun = time.monotonic()
        num_seeds = 1 if method == RANDOM else self.num_seeds
        accuracies: dict[str, list[float]] = {}
        sizes: dict[str, list[int]] = {}
        for column in COLUMNS:
            for seed, syn in zip(draws, sets, strict=True):
                given = syn if column == "canonical" else self.labelled(syn, labels(column, ipc))
                accuracies.setdefault(column, []).extend(self.score(given, column, num_seeds, seed))
                cost = given.cost()
                sizes[column] = [cost.images, cost.labels]
        return Row(
            **self.common,
            dataset=self.name,
            method=method,
            ipc=ipc,
            provenance=self.provenance,
            accuracies=accuracies,
            bytes=sizes,
            seconds=seconds,
            minutes=(seconds + time.monotonic() - begun) / 60,
            settings=self.settings(method, ipc),
        )

    def recipe(self, method: str, ipc: int) -> Recipe:
        fields = {"dataset": self.arrays.name, "network": self.network, "ipc": ipc, **SETTINGS[method]}
        return recipe_for(method, self.arrays.name, fields)

    def settings(self, method: str, ipc: int) -> str:
        """Return the digest of what decides a row beside the facts of ``common``."""
        return harness.digest(
            self.recipe(method, ipc).hash(self.arrays.fingerprint["train"]),
            TEACHER,
            [labels(column, ipc) for column in COLUMNS],
        )

    def distilled(self, method: str, ipc: int, seed: int) -> SyntheticSet:
        """The set of one seed. A run that was stopped goes on."""
        with harness.empty_cache():
            return api.distill(
                self.recipe(method, ipc),
                dataset=self.arrays,
                seed=seed,
                buffers=self.teacher,
                compute=self.compute,
                device=str(self.device),
                out=self.run(method, ipc, seed),
                resume=True,
            )

    def run(self, method: str, ipc: int, seed: int) -> Path:
        return self.folder / f"{method}-{ipc}-{seed}"

    @functools.cached_property
    def teacher(self) -> Path:
        """The folder of the teacher, which is trained when it is first needed."""
        where = self.folder / "teacher"
        api.make_buffer(
            self.arrays, self.network, experts=TEACHER, compute=self.compute, device=str(self.device), out=where
        )
        return where

    def labelled(self, syn: SyntheticSet, kind: Stored) -> SyntheticSet:
        return api.relabel(syn, self.teacher, kind, compute=self.compute, device=str(self.device))

    def score(self, syn: SyntheticSet, column: str, num_seeds: int, seed: int) -> tuple[float, ...]:
        evaluation = api.evaluate(
            syn,
            self.arrays,
            networks=self.network,
            num_seeds=num_seeds,
            protocol="canonical" if column == "canonical" else "relabelled",
            compute=self.compute,
            device=str(self.device),
            seed=seed,
        )
        return evaluation.results[0].accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="file, or name of a data set")
    parser.add_argument("--only", nargs="+", help="methods", default=[*SETTINGS])
    parser.add_argument("--ipc", nargs="+", type=harness.count, default=[1, 10])
    parser.add_argument("--num-seeds", type=harness.count, default=3)
    parser.add_argument("--network", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=float("inf"), help="minutes after which no row is begun")
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher and the sets")
    parser.add_argument("--rows", type=Path, help="folder of the rows (default: that of --out)")
    chosen = parser.parse_args()
    for method in chosen.only:
        if method not in SETTINGS:
            raise ValueError(f"there are no settings of {method!r}: {suggest(method, SETTINGS)}")
    rows = chosen.rows or chosen.out
    begun, device = time.monotonic(), prepare_device(chosen.device)
    bench = Bench(
        arrays=open_data(chosen.data),
        network=chosen.network,
        num_seeds=chosen.num_seeds,
        device=device,
        folder=chosen.out,
        name=Path(chosen.data).stem,
        provenance=Provenance.now(device),
    )
    print("\n".join(HEAD), flush=True)
    for ipc in chosen.ipc:
        for method in chosen.only:
            file = rows / f"{method}-{ipc}.json"
            row = harness.kept(Row, file, {**bench.common, "settings": bench.settings(method, ipc)})
            if row is None:
                if time.monotonic() - begun > 60 * chosen.limit:
                    print(f"stopped after {chosen.limit:g} minutes", flush=True)
                    return
                row = bench.row(method, ipc)
                harness.write(row, file)
            print(row.cells(), flush=True)


if __name__ == "__main__":
    sys.exit(harness.status("decoupled", main))
