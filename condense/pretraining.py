"""Train auxiliary networks on the real images, such as teachers and feature extractors, and cache them."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense import __version__
from condense.artifacts import MANIFEST, BufferWriter, Keep, Trajectories, folder_name, open_buffer, pack
from condense.compute import Compute
from condense.files import checksum
from condense.networks import Weights
from condense.rng import Rng
from condense.task import Task
from condense.train import Trainer, Training

MOST_CACHED = 1 << 30
"""The maximum size, in bytes, of the snapshots of one training run that are cached."""


def pretrained(
    task: Task,
    training: Training,
    compute: Compute,
    initial: Weights,
    rng: Rng,
    *,
    cache: Path | None,
    on_epoch: Callable[[int, Weights], None] | None = None,
) -> Weights:
    """Return the weights ``initial`` after ``training`` on the training images of ``task``, without augmentation.

    The result is cached as a buffer of one network in the folder ``networks`` of ``cache``. Its identity is everything
    that determines its bits: the data, the training, the initial weights, ``rng``, the arithmetic and the version of
    this package. Training with the same identity is skipped and the cached result is read. Networks without a name
    (callables) and networks of a dtype other than float32 are not cached.

    Args:
        task: the data and the architecture of ``initial``.
        rng: determines the order of the batches, as in ``Trainer.run``.
        cache: the cache folder; None disables caching.
        on_epoch: called after each epoch with the number of epochs done and the weights. If given, all epochs are
            cached, provided that they take at most ``MOST_CACHED`` bytes.
    """
    network = task.network
    keep: Keep = "last" if on_epoch is None else "all"
    num_rows = 1 if on_epoch is None else training.num_epochs + 1
    is_named = not network.name.startswith("custom:") and network.dtype == torch.float32
    writer = None
    if cache is not None and is_named and 4 * num_rows * network.num_params <= MOST_CACHED:
        identity = {
            **task.identity(),
            "training": training.content(),
            "compute": compute.first_order_identity(),
            "initial": checksum({**initial.params, **initial.buffers}),
            "seed": rng.seed,
            "keep": keep,
            "machine": _machine(task.device),
            "code": __version__,
        }
        writer = _writer(cache / "networks", task.name, identity, initial, keep)
        with contextlib.suppress(ValueError):  # not cached, or damaged: train it
            return _cached(writer, task, training, on_epoch)
    rows: list[tuple[Tensor, Tensor]] = []

    def record(epochs: int, weights: Weights) -> None:
        if writer is not None and (keep == "all" or epochs == training.num_epochs):
            rows.append((pack(weights.params), pack(weights.buffers)))
        if on_epoch is not None and epochs:
            on_epoch(epochs, weights)

    begun = time.perf_counter()
    if keep == "all":
        record(0, initial)
    trainer = Trainer(network, training, compute)
    weights = trainer.run(initial, trainer.source(task.train.images, task.train.labels, rng), on_epoch=record)
    if writer is not None:
        params, buffers = (torch.stack(table) for table in zip(*rows, strict=True))
        about = {"origin": "trained", "seconds": round(time.perf_counter() - begun, 3)}
        try:
            writer.add(0, params, buffers, about, training.num_epochs)
            writer.save()
        except ValueError as error:
            warnings.warn(f"a trained network is not cached: {error}", stacklevel=2)
    return weights


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a result depend on besides its inputs."""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return {"device": device.type, "capability": capability, "threads": threads, "torch": torch.__version__}


def _writer(root: Path, name: str, identity: Mapping[str, Any], initial: Weights, keep: Keep) -> BufferWriter:
    """Return the writer of the buffer of this identity; remove its manifest if it is damaged."""
    try:
        return BufferWriter(root, name, identity, initial, keep)
    except ValueError:
        (root / folder_name(name, identity) / MANIFEST).unlink(missing_ok=True)
        return BufferWriter(root, name, identity, initial, keep)


def _cached(
    writer: BufferWriter, task: Task, training: Training, on_epoch: Callable[[int, Weights], None] | None
) -> Weights:
    """Return the cached weights, calling ``on_epoch`` for every epoch.

    Raises:
        ValueError: the network is missing or damaged. ``on_epoch`` was not called in this case.
    """
    buffer = open_buffer(writer.folder)
    if not isinstance(buffer, Trajectories):
        return buffer.weights(0, task.network)
    snapshots = [buffer.weights(0, task.network, epoch) for epoch in range(1, training.num_epochs + 1)]
    for epoch, weights in enumerate(snapshots, 1):
        if on_epoch is not None:
            on_epoch(epoch, weights)
    return snapshots[-1]
