"""Train auxiliary networks on the real images, such as teachers and feature extractors, and cache them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from condense.artifacts import BufferWriter, Keep, Trajectories, folder_name, open_buffer, pack
from condense.cache import Cache
from condense.compute import Compute, machine
from condense.files import checksum
from condense.networks import Weights
from condense.plugins import code_of
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

    The result is a buffer of one network, cached as an entry of the kind ``networks``. Its key is everything that
    determines its bits: the data, the training, the initial weights, ``rng``, the arithmetic and the code of this
    package and of the network. Training whose result is cached is not repeated. Networks without a name (callables) and
    networks of a dtype other than float32 are not cached. A training of no epochs returns ``initial``.

    Args:
        task: the data and the architecture of ``initial``.
        rng: determines the order of the batches, as in ``Trainer.run``.
        cache: the cache folder; None disables caching.
        on_epoch: called after each epoch with the number of epochs done and the weights. If given, all epochs are
            cached, provided that they take at most ``MOST_CACHED`` bytes.

    Raises:
        ValueError: the training diverged.
    """
    if not training.num_epochs:
        return initial
    network = task.network
    keep: Keep = "last" if on_epoch is None else "all"
    num_rows = 1 if on_epoch is None else training.num_epochs + 1
    is_named = not network.name.startswith("custom:") and network.dtype == torch.float32
    is_small = 4 * num_rows * network.num_params <= MOST_CACHED
    store = Cache(cache if is_named and is_small else None, "networks")
    identity = {
        **task.identity(),
        "training": training.content(),
        "compute": compute.first_order_identity(),
        "initial": checksum({**initial.params, **initial.buffers}),
        **rng.identity(),
        "keep": keep,
        "machine": machine(task.device),
        "code": code_of(network.module),
    }
    cached = store.read(identity, lambda folder: _read(folder / folder_name(task.name, identity), task, training))
    if cached is not None:
        _require_finite(cached[-1], task)
        if on_epoch is not None:
            for epoch, weights in enumerate(cached, 1):
                on_epoch(epoch, weights)
        return cached[-1]
    rows: list[tuple[Tensor, Tensor]] = []

    def record(epochs: int, weights: Weights) -> None:
        if store.root is not None and (keep == "all" or epochs == training.num_epochs):
            rows.append((pack(weights.params), pack(weights.buffers)))
        if on_epoch is not None and epochs:
            on_epoch(epochs, weights)

    begun = time.perf_counter()
    if keep == "all":
        record(0, initial)
    trainer = Trainer(network, training, compute)
    weights = trainer.run(initial, trainer.source(task.train.images, task.train.labels, rng), on_epoch=record)
    _require_finite(weights, task)
    if store.root is not None:
        params, buffers = (torch.stack(table) for table in zip(*rows, strict=True))
        record_of_training = {"origin": "trained", "seconds": round(time.perf_counter() - begun, 3)}

        def write(folder: Path) -> None:
            writer = BufferWriter(folder, task.name, identity, initial, keep)
            writer.add(0, params, buffers, record_of_training, training.num_epochs)
            writer.save()

        store.write(identity, write, about=f"{network.name}, {task.name}, {training.num_epochs} epochs")
    return weights


def _require_finite(weights: Weights, task: Task) -> None:
    if not all(tensor.isfinite().all() for part in weights for tensor in part.values()):
        raise ValueError(
            f"the training of {task.network.name} on {task.name} diverged; give a network with a norm, or data "
            "under the transform channel"
        )


def _read(folder: Path, task: Task, training: Training) -> list[Weights]:
    """Return the weights after each stored epoch. Raises ValueError if the buffer is damaged."""
    buffer = open_buffer(folder)
    if not isinstance(buffer, Trajectories):
        return [buffer.weights(0, task.network)]
    return [buffer.weights(0, task.network, epoch) for epoch in range(1, training.num_epochs + 1)]
