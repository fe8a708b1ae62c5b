"""Accuracy and bytes of labels of views: stored logits, a teacher, and projectors of three ranks.

    python -m benchmarks.labels DATA.npz --network convnet:depth=4,width=32,norm=batch --out FOLDER
                                [--ipc 10] [--num-seeds 3] [--device auto] [--rows FILE.json]

One expert of the given architecture is trained on the real training images. Its last weights are the teacher and the
encoder of the projectors, and five of its epochs are their weak teachers. One set of random real images gets each kind
of labels, and N fresh networks are trained on it under the protocol ``relabelled`` for 300 epochs. ``FILE`` (by default
``labels.json`` in FOLDER) has one row per kind; rows that it has are not measured again, and rows of other settings or
another code are not overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.decoupled import BATCH, TEACHER, images
from benchmarks.harness import Provenance
from condense import api
from condense.compute import prepare_device
from condense.data.datasets import open_data
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import Online, Projector, Stored, StoredProjector, StoredTeacher, ViewLabels

PROJECTOR = Projector(num_teachers=5, epochs=15)

KINDS: dict[str, ViewLabels] = {
    **{f"stored, keep {keep:g}": Stored(keep=keep) for keep in (1.0, 0.1, 0.01)},
    "online": Online(),
    **{f"projector, rank {rank}": dataclasses.replace(PROJECTOR, rank=rank) for rank in (2, 8, 32)},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    labels: str
    accuracies: tuple[float, ...]
    """Fractions, one for each network."""
    bytes: int
    """Of the labels."""
    encoder: int
    """Bytes of the teacher or the encoder among them."""
    minutes: float
    """Time of labelling, training and scoring."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one set, with their provenance."""

    dataset: str
    fingerprint: str
    network: str
    ipc: int
    num_seeds: int
    images: int
    """Bytes of the images."""
    provenance: Provenance
    rows: tuple[Row, ...] = ()


HEAD = harness.table_head(["labels", "accuracy, %", "bytes of labels", "of these the teacher or encoder", "minutes"])


def cells(row: Row) -> str:
    encoder = f"{row.encoder:,}" if row.encoder else "—"
    accuracies = harness.mean_and_std(row.accuracies)
    return harness.table_line([row.labels, accuracies, f"{row.bytes:,}", encoder, f"{row.minutes:.1f}"])


def encoder_bytes(syn: SyntheticSet) -> int:
    """Return the bytes of the teacher or the frozen encoder in the labels of a set."""
    if isinstance(syn.provider, StoredProjector):
        return syn.provider.encoder.nbytes
    return syn.cost().labels - syn.classes.nbytes if isinstance(syn.provider, StoredTeacher) else 0


def begun(file: Path, facts: dict[str, Any], now: Provenance) -> Rows | None:
    """Return the rows of a file that is to be continued, if there is one.

    Raises:
        ValueError: the file has rows of other settings or of another code, device or number of threads, or it is
            missing and cannot be written.
    """
    made = harness.kept(Rows, file, facts)
    if made is not None and dataclasses.replace(made.provenance, date=now.date) != now:
        raise ValueError(f"{file} has rows of {made.provenance}, not of {now}; give another place with --rows")
    return made


def tables(folder: Path) -> list[str]:
    """The lines of a table for each file in ``folder``."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        made = harness.read(Rows, file)
        command = f"python -m benchmarks.labels {made.dataset}.npz --network {made.network} --ipc {made.ipc}"
        lines += [f"`{made.dataset}`, {images(made.ipc)} ({made.images:,} bytes), `{made.network}`:", "", *HEAD]
        lines += [*map(cells, made.rows), "", f"    {command} --num-seeds {made.num_seeds} --out FOLDER", ""]
        lines += [f"{made.provenance}, seed 0.", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="file, or name of a data set")
    parser.add_argument("--network", required=True)
    parser.add_argument("--ipc", type=harness.count, default=10)
    parser.add_argument("--num-seeds", type=harness.count, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=Path, help="file of the rows (default: labels.json in the folder)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experts")
    chosen = parser.parse_args()
    arrays, device = open_data(chosen.data), prepare_device(chosen.device)
    common: dict[str, Any] = {"compute": harness.uncompiled(device), "device": str(device)}
    facts: dict[str, Any] = {
        "dataset": Path(chosen.data).stem,
        "fingerprint": arrays.fingerprint["train"],
        "network": chosen.network,
        "ipc": chosen.ipc,
        "num_seeds": chosen.num_seeds,
    }
    file, now = chosen.rows or chosen.out / "labels.json", Provenance.now(device)
    made = begun(file, facts, now)
    experts = dataclasses.replace(TEACHER, keep="all")
    api.make_buffer(arrays, chosen.network, experts=experts, out=chosen.out / "experts", **common)
    syn = api.distill(
        "random",
        dataset=arrays,
        network=chosen.network,
        ipc=chosen.ipc,
        out=chosen.out / f"random-{chosen.ipc}",
        resume=True,
        **common,
    )
    made = made or Rows(**facts, images=syn.cost().images, provenance=now)
    print("\n".join(HEAD), flush=True)
    for name, kind in KINDS.items():
        row = next((row for row in made.rows if row.labels == name), None)
        if row is None:
            start = time.monotonic()
            fields = {"batch_size": BATCH.get(chosen.ipc, 100)} if isinstance(kind, Stored) else {}
            given = api.relabel(syn, chosen.out / "experts", kind, dataset=arrays, **fields, **common)
            results = api.evaluate(
                given,
                arrays,
                networks=chosen.network,
                num_seeds=chosen.num_seeds,
                protocol="relabelled",
                **common,
            )
            row = Row(
                labels=name,
                accuracies=results.results[0].accuracies,
                bytes=given.cost().labels,
                encoder=encoder_bytes(given),
                minutes=(time.monotonic() - start) / 60,
            )
            made = dataclasses.replace(made, rows=(*made.rows, row))
            harness.write(made, file)
        print(cells(row), flush=True)


if __name__ == "__main__":
    sys.exit(harness.status("labels", main))
