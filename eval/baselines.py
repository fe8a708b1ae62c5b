"""What every set is measured against: all training data, the ceiling."""

from __future__ import annotations

from pathlib import Path

import torch

from condense import tracking
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.distributed import Ranks
from condense.eval.crossarch import Network, Progress, Result, load_test, measure, settled
from condense.eval.journal import CellStore
from condense.eval.protocol import PROTOCOLS, Protocol
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
    journal: CellStore | None = None,
) -> Result:
    """Accuracy of networks trained on all training images under ``protocol``; what ``journal`` holds is not trained
    again.

    Raises:
        ValueError: no test images; see also ``make_task`` and ``Functional``.
    """
    task = make_task(
        arrays,
        transform=transform,
        split=Split(val_fraction=0.0),
        network=Functional(network, arrays.input_shape, arrays.num_classes, device),
        augment=Augment(),
        device=device,
        cache=cache,
    )
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
        compute=settled(compute, task.network, protocol, len(task.train)),
        progress=progress,
        ranks=ranks,
        journal=journal,
    )
    return result
