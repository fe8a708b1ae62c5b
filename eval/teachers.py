"""Networks trained on the real images that label a synthetic set batch by batch, kept by content."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from condense import __version__
from condense.compute import Compute
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.files import canonical_json, check_writable, read_tensors, write_tensors
from condense.networks import Functional, Weights
from condense.rng import Rng
from condense.task import Task
from condense.train import Trainer


def trained(task: Task, *, seed: int, compute: Compute, cache: Path | None) -> Weights:
    """The task's network after the training ``full-data`` on its training images, never on validation or test images.

    Kept in the folder ``cache`` under a hash of everything that decides it.
    """
    plan: Protocol = PROTOCOLS["full-data"]
    compute = compute.resolved(task.network.flops * len(task.train) * plan.num_epochs, task.device)
    identity = {
        **task.identity(),
        "protocol": plan.hash,
        "seed": seed,
        "compute": compute.first_order_identity(),
        "device": task.device.type,
        "code": __version__,
    }
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
    file = None if cache is None else cache / "teachers" / f"{digest}.safetensors"
    rng = Rng(seed).child("teacher", task.network.name)
    weights = task.network.init(rng, "weights")
    kept = None if file is None else _read(file, weights)
    if kept is not None:
        return kept
    trainer = Trainer(task.network, plan, compute)
    weights = trainer.run(weights, trainer.source(task.train.images, task.train.labels, rng.child("training")))
    if file is not None:
        tensors = {f"params.{k}": v for k, v in weights.params.items()}
        tensors |= {f"buffers.{k}": v for k, v in weights.buffers.items()}
        try:
            check_writable(file.parent)
            write_tensors(file, tensors, {"kind": "teacher", "format": 1, "identity": identity})
        except ValueError as error:
            warnings.warn(f"the teacher is not cached: {error}", stacklevel=2)
    return weights


def labeller(network: Functional, weights: Weights, compute: Compute) -> Callable[[Tensor], Tensor]:
    """Images (N, C, H, W) to the logits of a trained network in evaluation mode."""

    def logits(images: Tensor) -> Tensor:
        return network.logits(*weights, images, train=False).float()

    run: Callable[[Tensor], Tensor] = compute.first_order(logits, network.device)
    return lambda images: run(compute.layout(images))


def _read(file: Path, like: Weights) -> Weights | None:
    """The kept weights, or None: a missing file and a damaged one are alike."""
    try:
        tensors, _ = read_tensors(file, "teacher")
    except (OSError, ValueError):
        return None
    read: list[dict[str, Tensor]] = []
    for table, values in zip(("params", "buffers"), like, strict=True):
        kept = {name: tensors.get(f"{table}.{name}", torch.empty(0)) for name in values}
        if any(kept[name].shape != value.shape or kept[name].dtype != value.dtype for name, value in values.items()):
            return None
        read.append({name: kept[name].to(value.device) for name, value in values.items()})
    return Weights(*read)
