"""What the whole training set gives: the ceiling of every table, trained once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path

import torch

from condense import __version__, tracking
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.distributed import Ranks
from condense.eval.crossarch import Network, Progress, Result, load_test, measure, settled
from condense.eval.journal import Journal
from condense.eval.protocol import PROTOCOLS, Protocol, recorded_name
from condense.files import canonical_json, write_text
from condense.networks import Functional
from condense.task import Split, make_task


def full_data(
    arrays: Arrays,
    *,
    network: Network,
    num_seeds: int,
    transform: str = "channel",
    protocol: Protocol = PROTOCOLS["full-data"],
    seed: int = 0,
    compute: Compute,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = tracking.progress,
    ranks: Ranks = Ranks(),
    journal: Journal | None = None,
) -> Result:
    """Accuracy of networks trained on all training images under ``protocol``.

    Kept in the folder ``cache`` under a hash of everything that decides it; then nothing is trained again, if every
    process finds it.

    Raises:
        ValueError: no test images; see also ``make_task`` and ``Functional``.
    """
    task = make_task(
        arrays,
        transform=transform,
        split=Split(val_fraction=0.0),
        network=Functional(network, arrays.image_shape, arrays.num_classes, device),
        augment=Augment(),
        device=device,
        cache=cache,
    )
    compute = settled(compute, task.network, protocol, len(task.train))
    file = None
    if cache is not None:
        identity = {
            **task.identity(),
            "test": arrays.fingerprint["test"],
            "protocol": [recorded_name(protocol), protocol.hash],
            "num_seeds": num_seeds,
            "seed": seed,
            "compute": compute.first_order_identity(),
            "device": device.type,
            "code": __version__,
        }
        digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
        file = cache / "full-data" / f"{digest}.json"
        kept = _read(file)
        num_found = torch.tensor([kept is not None], dtype=torch.int64)
        ranks.sum_([num_found])
        if kept is not None and num_found.item() == ranks.size:
            return kept
    (result,) = measure(
        task.train.images,
        task.train.labels,
        load_test(arrays, task.transform, device),
        arrays=arrays,
        transform=task.transform,
        syn=None,
        networks=[task.network],
        protocol=protocol,
        num_seeds=num_seeds,
        seed=seed,
        compute=compute,
        progress=progress,
        ranks=ranks,
        journal=journal,
    )
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(dataclasses.asdict(result)))
        except (OSError, ValueError) as error:
            warnings.warn(f"the full-data accuracy is not cached: {error}", stacklevel=2)
    return result


def _read(file: Path) -> Result | None:
    """The kept result, or None: a missing file and a damaged one are alike."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Result(**fields | {"accuracies": tuple(fields["accuracies"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
