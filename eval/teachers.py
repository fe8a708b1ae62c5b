"""Networks that are trained on the real images to label the batches of a synthetic set."""

from __future__ import annotations

from pathlib import Path

from condense.compute import Compute
from condense.eval.protocol import PROTOCOLS
from condense.pretraining import pretrained
from condense.rng import Rng
from condense.task import Task
from condense.teachers import Teacher


def trained(task: Task, *, seed: int, compute: Compute, cache: Path | None) -> Teacher:
    """Train the task's network under ``full-data`` on the training images of the task, never on validation or test
    images. ``pretrained`` caches the result."""
    plan = PROTOCOLS["full-data"]
    compute = compute.resolved(task.network.flops * len(task.train) * plan.num_epochs, task.device)
    rng = Rng(seed).child("teacher", task.network.name)
    initial = task.network.init(rng, "weights")
    weights = pretrained(task, plan, compute, initial, rng.child("training"), cache=cache)
    return Teacher(task.network, weights)
