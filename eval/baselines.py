"""What every set is measured against: all training data, the ceiling; and where trained baselines are kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from condense import tracking
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.distributed import Ranks
from condense.eval.crossarch import Network, Progress, Result, load_test, measure, settled
from condense.eval.journal import Journal
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.files import check_writable
from condense.networks import Functional
from condense.task import Split, make_task


def kept(cache: Path | None, arrays: Arrays, rank: int = 0) -> Journal | None:
    """The journal that is never removed, of networks trained on baselines: each under a hash of all that decides it, so
    that the baselines of one evaluation serve the next. None, with a warning, where nothing can be written."""
    if cache is None:
        return None
    folder = cache / "baselines"
    try:
        check_writable(folder)
    except ValueError as error:
        warnings.warn(f"baselines are not cached: {error}", stacklevel=2)
        return None
    return Journal(folder / arrays.fingerprint["train"][:16], rank, needed=False)


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
