"""Networks trained on the real images that label the batches of a synthetic set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from condense.artifacts import MANIFEST
from condense.compute import Compute
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.files import expanded
from condense.labelling import open_teacher
from condense.pretraining import pretrained
from condense.rng import Rng
from condense.synthetic.set import Origin
from condense.task import Task
from condense.teachers import Teacher


def trained(task: Task, *, seed: int, compute: Compute, cache: Path | None) -> Teacher:
    """Train the task's network under ``full-data`` on the training images of the task, never on validation or test
    images. ``pretrained`` caches the result."""
    plan = PROTOCOLS["full-data"]
    compute = task.network.settled(compute, len(task.train) * plan.num_epochs)
    rng = Rng(seed).child("teacher", task.network.name)
    initial = task.network.init(rng, "weights")
    weights = pretrained(task, plan, compute, initial, rng.child("training"), cache=cache)
    return Teacher(task.network, weights)


def is_buffer(teacher: str) -> bool:
    """Whether the teacher of a protocol is the folder of a buffer."""
    return (expanded(teacher) / MANIFEST).is_file()


def opened(protocol: Protocol, origin: Origin, device: torch.device) -> tuple[Protocol, dict[str, Teacher]]:
    """Return a protocol in which a folder as the teacher is replaced by a name that identifies its weights, and the
    teacher by that name, for ``Subject.teachers``. Other protocols are returned unchanged, without a teacher.

    Raises:
        ValueError: the buffer is damaged, or of other data, another split or another transform than the set.
    """
    if not protocol.teacher or not is_buffer(protocol.teacher):
        return protocol, {}
    found = open_teacher(expanded(protocol.teacher), origin, device, "protocol.teacher")
    return dataclasses.replace(protocol, teacher=found.name), {found.name: found.teacher}
