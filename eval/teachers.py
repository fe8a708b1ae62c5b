"""Networks that are trained on the real images and label the batches of a synthetic set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from condense.compute import Compute
from condense.eval.protocol import PROTOCOLS
from condense.networks import Functional, Weights
from condense.pretraining import pretrained
from condense.rng import Rng
from condense.task import Task


def trained(task: Task, *, seed: int, compute: Compute, cache: Path | None) -> Weights:
    """Train the task's network under ``full-data`` on the training images of the task, never on validation or test
    images. ``pretrained`` caches the result."""
    plan = PROTOCOLS["full-data"]
    compute = compute.resolved(task.network.flops * len(task.train) * plan.num_epochs, task.device)
    rng = Rng(seed).child("teacher", task.network.name)
    initial = task.network.init(rng, "weights")
    return pretrained(task, plan, compute, initial, rng.child("training"), cache=cache)


def labeller(network: Functional, weights: Weights, compute: Compute) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, C, H, W) to the logits of a trained network in evaluation mode."""

    def logits(images: Tensor) -> Tensor:
        return network.logits(*weights, images, train=False).float()

    run: Callable[[Tensor], Tensor] = compute.first_order(logits, network.device)
    return lambda images: run(compute.layout(images))
