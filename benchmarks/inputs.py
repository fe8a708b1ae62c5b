"""Methods on series or clips of an ``.npz`` file against random real samples.

    python -m benchmarks.inputs DATA.npz [--only NAME ...] [--ipc 1 10] [--num-seeds 5] [--network auto] [--device auto]
                                         [--validate] [--limit MINUTES] [--rows FOLDER]

Every method distils with the settings of the tables below. Then N fresh networks are trained on its set under the
protocol ``canonical``, which gives each sample one class, and scored on the test split. The row ``random`` has N draws
of real samples with one network each, and ``full`` all training samples. Methods whose sets have learned labels or a
learned learning rate are also scored under their own training, beside random samples under that training.

``dm-static-dynamic`` and ``mtt-static-dynamic`` are for clips. Their decoder gets stills that ``dc`` distils from the
middle frames, and stores at most the bytes of as many clips as the other rows.

``--rows`` keeps one JSON file per row; rows that it holds are not measured again. docs/results.md has the tables of the
rows below ``results/inputs``.

``--validate`` puts 30 % of the training samples of each class in the place of the test split. The settings in the
tables were chosen in this way, so that the test split is scored once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Provenance, mean_and_std
from condense import api
from condense.buffers.trajectories import Experts
from condense.compute import Compute, prepare_device
from condense.data.datasets import Arrays, load, open_data
from condense.data.layout import Kind, kind
from condense.eval.baselines import FULL, full_data
from condense.eval.protocol import PROTOCOLS, own, own_network
from condense.experiment import recipe_for
from condense.inner import RandomTruncated
from condense.method import Optim
from condense.names import suggest
from condense.networks import resolve, with_options
from condense.recipe import Recipe
from condense.schedule import Schedule
from condense.synthetic.decode import StaticDynamic
from condense.synthetic.set import SyntheticSet
from condense.task import Split

HELD_OUT = Split(val_fraction=0.3)
"""The part of the training samples that ``--validate`` scores on."""

LAYOUTS: dict[Kind, str] = {"series": "NCL", "clips": "NTCHW"}
"""Of the arrays of a loaded data set."""

OWN = ("mtt", "frepo", "rat-bptt", "mtt-static-dynamic")
"""Methods that are also scored under their own training."""

EXPERTS: dict[Kind, Experts] = {
    "series": Experts(num_experts=10, num_epochs=30, lr=0.02, batch_size=32, augment="none"),
    "clips": Experts(num_experts=5, num_epochs=30, lr=0.02, momentum=0.9, batch_size=16, augment="none"),
}
"""Of the buffer for ``mtt``."""

STILLS: dict[str, Any] = {
    "network": "convnet:width=32",
    "num_steps": 100,
    "start": "real",
    "batch_real": 16,
    "inner_epochs": 5,
    "augment": "none",
}
"""Of ``dc``, which distils the stills of the decoder ``static-dynamic``."""

LAMB = Optim(kind="lamb", lr=0.01, momentum=0.9, schedule=Schedule(cosine_to=0.1))

SERIES: dict[str, dict[str, Any]] = {
    "dm": {"num_steps": 200, "optim": Optim(lr=0.1)},
    "datadam": {"network": {"norm": "batch"}, "num_steps": 200, "optim": Optim(lr=0.3)},
    "mtt": {
        "num_steps": 100,
        "syn_steps": 15,
        "expert_epochs": 4,
        "max_start_epoch": 10,
        "lr": 0.02,
        "optim": Optim(lr=100.0),
        "optim_lr": Optim(lr=0.01),
        "clip": 0.1,
    },
    "herding": {"num_epochs": 20},
    "k-means": {"num_epochs": 20},
    "frepo": {
        "network": {"widen": True, "norm": "batch-before"},
        "num_steps": 300,
        "training_epochs": 1000,
        "optim": LAMB,
        "optim_labels": LAMB,
    },
    "dc": {
        "network": {"activation": "swish"},
        "num_steps": 100,
        "start": "real",
        "inner_epochs": 5,
        "optim": Optim(lr=0.1),
    },
    "rat-bptt": {
        "num_steps": 500,
        "lr": 0.005,
        "batch_real": 256,
        "augment": "none",
        "adjoint": RandomTruncated(lo=0, hi=20, window=10),
        "optim": Optim(kind="adam", lr=0.02, momentum=0.9, schedule=Schedule(cosine_to=0.1)),
    },
}
"""By method, the cheap ones first: fields of the recipe for any data set, or of its method, that are replaced.

``network`` has the options of the network that the method distils with, where they differ from the network trained on
its set. DC distils with a smooth activation, because the gradient of its loss passes through the derivative of the
activation, and that of a ReLU is a step, whose own derivative is zero.
"""

CLIPS: dict[str, dict[str, Any]] = {
    "datadam": {"optim": Optim(lr=1.0)},
    "mtt": {
        "num_steps": 80,
        "syn_steps": 10,
        "batch_syn": 12,
        "expert_epochs": 1,
        "max_start_epoch": 15,
        "optim": Optim(lr=1000.0),
    },
    "herding": {"num_epochs": 60},
    "k-means": {"num_epochs": 60},
    "frepo": {"network": {"norm": "batch", "dropout": False}, "training_epochs": 500},
    "dc": {"network": {}, "num_steps": 60, "batch_real": 16, "optim": Optim(lr=1.0)},
    "rat-bptt": {
        "num_steps": 60,
        "lr": 0.001,
        "batch_real": 83,
        "adjoint": RandomTruncated(lo=0, hi=10, window=10),
        "optim": Optim(kind="adam", lr=0.02, momentum=0.9),
    },
    "dm-static-dynamic": {"num_steps": 200, "optim": Optim(lr=1.0), "optim_decoder": Optim(lr=1e-3)},
    "mtt-static-dynamic": {
        "num_steps": 80,
        "batch_syn": 12,
        "max_start_epoch": 15,
        "lr": 0.02,
        "optim": Optim(lr=1000.0),
        "optim_decoder": Optim(lr=1.0),
        "optim_lr": Optim(lr=0.01),
        "clip": 0.1,
    },
}
"""What differs for clips, and methods for clips alone."""

SETTINGS: dict[Kind, dict[str, dict[str, Any]]] = {
    "series": SERIES,
    "clips": {method: {**SERIES.get(method, {}), **CLIPS.get(method, {})} for method in {**SERIES, **CLIPS}},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget; accuracies are fractions, one for each network."""

    fingerprint: str
    """Of the training samples."""
    network: str
    num_seeds: int
    dataset: str
    """Name of the file without its ending."""
    method: str
    ipc: int
    """Samples per class; 0: all."""
    provenance: Provenance
    accuracies: tuple[float, ...]
    own: tuple[float, ...] = ()
    """Under the training that the set brings along."""
    random_own: tuple[float, ...] = ()
    """Of random samples under that training."""
    bytes: int = 0
    """Of the samples of the set and its decoder; 0 for all samples."""
    seconds: float = 0.0
    """Time of the distillation, without experts and stills."""
    minutes: float = 0.0
    """Time of distillation, training and scoring, and of the experts, stills and random samples that the row is the
    first to need."""
    settings: str = ""
    """Digest of the recipe and of the training of experts and stills; empty in older rows."""

    def cells(self) -> str:
        """A row of the Markdown table."""
        groups = [mean_and_std(values) for values in (self.accuracies, self.own, self.random_own)]
        size = f"{self.bytes:,}" if self.bytes else "—"
        words = [
            f"`{self.method}`",
            str(self.ipc or "all"),
            size,
            *groups,
            f"{self.seconds:.0f}",
            f"{self.minutes:.1f}",
        ]
        return harness.table_line(words)


HEAD = harness.table_head(
    [
        *("method", "samples per class", "bytes", "`canonical`, %", "own training, %", "random under it, %"),
        *("distilled in, s", "minutes"),
    ]
)


def tables(folder: Path) -> list[str]:
    """The lines of a table for each data set and network of the rows in the folders below ``folder``."""
    rows = sorted((harness.read(Row, file) for file in folder.glob("*/*.json")), key=_place)
    lines = []
    for dataset, network, n in dict.fromkeys((row.dataset, row.network, row.num_seeds) for row in rows):
        given = [row for row in rows if (row.dataset, row.network, row.num_seeds) == (dataset, network, n)]
        budgets = " ".join(str(ipc) for ipc in sorted({row.ipc for row in given} - {0}))
        command = f"python -m benchmarks.inputs {dataset}.npz --network {network} --ipc {budgets} --num-seeds {n}"
        lines += [f"`{dataset}`, `{network}`, n = {n}:", "", *HEAD, *map(Row.cells, given), "", f"    {command}", ""]
        lines += [f"{'; '.join(dict.fromkeys(str(row.provenance) for row in given))}; seed 0.", ""]
    return lines


def _place(row: Row) -> tuple[str, float, int]:
    return row.dataset, row.ipc or float("inf"), ["random", FULL, *SETTINGS["clips"]].index(row.method)


@dataclass(frozen=True, kw_only=True)
class Bench(harness.Bench):
    """``draws`` are the sets of random samples by budget, made when they are first needed."""

    compute: Compute
    draws: dict[int, list[SyntheticSet]] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return kind(self.arrays.input_shape)

    def row(self, method: str, ipc: int) -> Row:
        """Distil and score one method; ``random`` and ``full`` are scored only."""
        begun, seconds, size = time.monotonic(), 0.0, 0
        own_accuracies: tuple[float, ...] = ()
        random_own: tuple[float, ...] = ()
        if method == FULL:
            accuracies = self.full()
        elif method == "random":
            accuracies = self.random(ipc)
            size = _bytes(self.draws[ipc][0])
        else:
            needs: dict[str, Any] = {"buffers": self.experts() if method.startswith("mtt") else self.folder}
            if method.endswith("static-dynamic"):
                needs["decode"] = StaticDynamic(stills=str(self.stills(ipc)))
            started = time.monotonic()
            with harness.empty_cache():
                syn = self.distill(method, ipc, **needs)
            seconds = time.monotonic() - started
            accuracies, size = self.score(syn, self.num_seeds), _bytes(syn)
            if method in OWN:
                own_accuracies = self.score(syn, self.num_seeds, like=syn)
                random_own = self.random(ipc, like=syn)
        return Row(
            **self.common,
            dataset=self.name,
            method=method,
            ipc=ipc,
            provenance=self.provenance,
            accuracies=accuracies,
            own=own_accuracies,
            random_own=random_own,
            bytes=size,
            seconds=seconds,
            minutes=(time.monotonic() - begun) / 60,
            settings=self.settings(method, ipc),
        )

    def recipe(self, method: str, ipc: int) -> Recipe:
        fields = dict(SETTINGS[self.kind].get(method, {}))
        network = with_options(self.network, **fields.pop("network", {}))
        fields |= {"dataset": self.arrays.name, "network": network, "ipc": ipc}
        return recipe_for(method, self.arrays.name, fields)

    def settings(self, method: str, ipc: int) -> str:
        """Return the digest of what decides a row beside the facts of ``common``."""
        if method == FULL:
            return harness.digest(method)
        experts = EXPERTS[self.kind] if method.startswith("mtt") else None
        stills = STILLS if method.endswith("static-dynamic") else None
        return harness.digest(self.recipe(method, ipc).hash(self.arrays.fingerprint["train"]), experts, stills)

    def distill(self, method: str, ipc: int, **fields: Any) -> SyntheticSet:
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            return api.distill(
                self.recipe(method, ipc),
                dataset=self.arrays,
                compute=self.compute,
                device=str(self.device),
                out=Path(out) / "run",
                **fields,
            )

    def stills(self, ipc: int) -> Path:
        """The run of the stills for ``ipc`` clips a class, distilled when it is first needed."""
        frames, out = self.folder / "frames.npz", self.folder / f"stills{ipc}"
        if not frames.exists():
            api.frames(self.arrays, frames)
        if not out.exists():
            num = StaticDynamic().statics * StaticDynamic().latents_per_class(
                ipc, self.arrays.input_shape, self.arrays.num_classes
            )
            api.distill("dc", dataset=frames, ipc=num, out=out, device=str(self.device), **STILLS)
        return out

    def experts(self) -> Path:
        """The buffer of this network, built when it is first needed."""
        return api.make_buffer(
            self.arrays,
            self.network,
            experts=EXPERTS[self.kind],
            compute=self.compute,
            device=str(self.device),
            out=self.folder / "experts",
        )

    def score(
        self, syn: SyntheticSet, num_seeds: int, *, seed: int = 0, like: SyntheticSet | None = None
    ) -> tuple[float, ...]:
        """Accuracies under ``canonical``, or under the training that ``like`` brings along."""
        evaluation = api.evaluate(
            syn,
            self.arrays,
            networks=self.network if like is None else own_network(like),
            num_seeds=num_seeds,
            protocol="canonical" if like is None else own(like),
            compute=self.compute,
            device=str(self.device),
            seed=seed,
        )
        return evaluation.results[0].accuracies

    def random(self, ipc: int, like: SyntheticSet | None = None) -> tuple[float, ...]:
        """One accuracy of each draw."""
        if ipc not in self.draws:
            self.draws[ipc] = [self.distill("random", ipc, seed=seed) for seed in range(self.num_seeds)]
        scores = [self.score(syn, 1, seed=seed, like=like) for seed, syn in enumerate(self.draws[ipc])]
        return tuple(accuracy for each in scores for accuracy in each)

    def full(self) -> tuple[float, ...]:
        return full_data(
            self.arrays,
            network=self.network,
            num_seeds=self.num_seeds,
            protocol=PROTOCOLS["canonical"],
            compute=self.compute,
            device=self.device,
        ).accuracies


def _bytes(syn: SyntheticSet) -> int:
    cost = syn.cost()
    return cost.images + cost.decoder


def with_held_out(arrays: Arrays) -> Arrays:
    """The training samples alone, of which ``HELD_OUT`` stands in the place of the test split."""
    parts = HELD_OUT.indices(torch.from_numpy(arrays.y_train))
    split = [part for index in parts for part in (arrays.x_train[index.numpy()], arrays.y_train[index.numpy()])]
    return load(split, layout=LAYOUTS[kind(arrays.input_shape)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", help="methods, random or full")
    parser.add_argument("--ipc", nargs="+", type=harness.count, default=[1, 10])
    parser.add_argument("--num-seeds", type=harness.count, default=5)
    parser.add_argument("--network", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--validate", action="store_true", help="score on held-out training samples")
    parser.add_argument("--limit", type=float, default=float("inf"), help="minutes after which no row is begun")
    parser.add_argument("--rows", type=Path, help="folder of the rows; rows that it holds are not measured again")
    chosen = parser.parse_args()
    begun = time.monotonic()
    arrays = open_data(chosen.data)
    if (found := kind(arrays.input_shape)) not in SETTINGS:
        raise ValueError(f"{chosen.data} has {found}, and the settings are for series and clips; give one of these")
    known = ["random", FULL, *SETTINGS[found]]
    methods = chosen.only or known
    for method in methods:
        if method not in known:
            raise ValueError(f"there are no settings of {method!r} for {found}: {suggest(method, known)}")
    arrays = with_held_out(arrays) if chosen.validate else arrays
    device = prepare_device(chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            arrays=arrays,
            network=str(resolve(chosen.network, arrays.input_shape)),
            num_seeds=chosen.num_seeds,
            device=device,
            compute=Compute(compile=False, autocast="bfloat16" if device.type == "cuda" else "none"),
            folder=Path(folder),
            name=chosen.data.stem,
            provenance=Provenance.now(device),
        )
        print("\n".join(HEAD), flush=True)
        asked = [(ipc, method) for ipc in chosen.ipc for method in methods if method != FULL or ipc == chosen.ipc[0]]
        for budget, method in asked:
            ipc = 0 if method == FULL else budget
            file = None if chosen.rows is None else chosen.rows / f"{method}-{ipc or 'all'}.json"
            facts = {**bench.common, "settings": bench.settings(method, ipc)}
            row = None if file is None else harness.kept(Row, file, facts)
            if row is None:
                if time.monotonic() - begun > 60 * chosen.limit:
                    print(f"stopped after {chosen.limit:g} minutes", flush=True)
                    break
                row = bench.row(method, ipc)
                if file is not None:
                    harness.write(row, file)
            print(row.cells(), flush=True)


if __name__ == "__main__":
    sys.exit(harness.status("inputs", main))
