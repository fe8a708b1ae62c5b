"""DATM: Guo, Wang, Cazenavette, Li, Zhang and You, "Towards lossless dataset distillation via difficulty-aligned
trajectory matching", ICLR 2024.

The objective is MTT's (``condense.methods.mtt``, whose symbols hold) under a soft cross-entropy with learned labels:

    l(b; theta) = - mean_j sum_c softmax(y_j)_c log f_c(x_j; theta),    y_j learned

    symbol   code
    y        ``state.syn.provider.logits``; they begin at the mean logits of the experts that are right about the image
    t        start epoch, uniform over ``min_start_epoch`` .. T - 1
    T        ``first_max_epoch``, growing linearly to ``max_start_epoch`` in ``expansion_steps`` updates
    skip     an update whose loss is above ``threshold``, or not a number, changes nothing

The images begin as real ones that experts classify correctly.

Deviations: see docs/methods/datm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.method import Context, GradientState, Optim
from condense.methods.mtt import TrajectoryMatching, judged_by_all
from condense.task import Task
from condense.train import Training

CONFIDENCE = 0.9
"""Probability of its class for an image that no expert classifies correctly."""


@final
@dataclass(frozen=True, kw_only=True)
class DATM(TrajectoryMatching):
    """Trajectory matching that grows in difficulty, with soft labels."""

    num_steps: int = 10000
    """Updates of the images."""
    syn_steps: int = 80
    """Steps of the student on the set."""
    correct_only: bool = True
    """Start from real images that an expert classifies correctly, see ``correctly_classified``; else from any."""
    min_start_epoch: int = 0
    """First epoch of an expert at which the student may start."""
    first_max_epoch: int | None = None
    """The window of start epochs ends here at first, and grows; unset: at ``max_start_epoch`` from the beginning."""
    expansion_steps: int = 1000
    """Updates in which the window grows to ``max_start_epoch``."""
    max_start_epoch: int = 20
    """The window of start epochs ends before this one."""
    threshold: float = 1.0
    """Updates with a larger loss are skipped, and those whose loss is not a number."""
    optim_labels: Optim = Optim(lr=2.0, momentum=0.9)
    """Optimiser of the labels' logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.max_start_epoch if self.first_max_epoch is None else self.first_max_epoch
        if not 0 <= self.min_start_epoch < first <= self.max_start_epoch:
            raise ValueError(
                f"method.min_start_epoch {self.min_start_epoch}, first_max_epoch {first} and max_start_epoch "
                f"{self.max_start_epoch} are no growing window; give 0, 10 and 20, say"
            )
        if self.expansion_steps < 1 or not self.threshold > 0:
            raise ValueError(
                f"method.expansion_steps and threshold must be positive, got {self.expansion_steps} and "
                f"{self.threshold}; the published values are 1000 and 1.0"
            )

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000, batch_size=128)

    def init(self, ctx: Context) -> GradientState:
        images, classes = ctx.initial(self.start)
        if self.start == "real" and self.correct_only:
            images = torch.cat(
                [correctly_classified(ctx, c, ctx.images_per_class) for c in range(ctx.task.num_classes)]
            )
        syn = ctx.new_set(images, mean_logits(ctx, images, classes), lr=self.lr)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def start_epochs(self, step: int) -> range:
        end = self.max_start_epoch
        if self.first_max_epoch is not None:
            end = min(end, self.first_max_epoch + (end - self.first_max_epoch) * step // self.expansion_steps)
        return range(self.min_start_epoch, end)

    def update(self, state: GradientState, record: dict[str, float]) -> None:
        """Nothing where the loss is above ``threshold`` or not a number; gradients may then not be finite either."""
        if record["loss"] <= self.threshold:
            super().update(state, record)
            return
        for name in [name for name, value in record.items() if not math.isfinite(value)]:
            del record[name]
        record["skipped"] = 1.0


def correctly_classified(ctx: Context, label: int, num: int) -> Tensor:
    """Real images of a class, in a random order, that the first expert classifies correctly; where they are too few,
    then those that the next ones do, then any."""
    members = ctx.task.train.by_class[label]
    shuffled = members[torch.randperm(len(members), generator=ctx.rng("initial images", 0, label))]
    images = ctx.task.train.images[shuffled.to(ctx.task.device)]
    left, chosen = torch.ones(len(images), dtype=torch.bool, device=images.device), images[:0]
    for logits in judged_by_all(ctx, images):
        known = (left & (logits.argmax(1) == label)).nonzero().flatten()[: num - len(chosen)]
        chosen, left[known] = torch.cat([chosen, images[known]]), False
        if len(chosen) == num:
            break
    return torch.cat([chosen, images[left][: num - len(chosen)]])


def mean_logits(ctx: Context, images: Tensor, classes: Tensor) -> Tensor:
    """Logits (N, C) of images, averaged over the experts that classify an image correctly; where none does, those of
    its class at ``CONFIDENCE``."""
    total, count = torch.zeros(len(images), ctx.task.num_classes).to(images), torch.zeros(len(images), 1).to(images)
    for logits in judged_by_all(ctx, images):
        right = (logits.argmax(1) == classes)[:, None]
        total, count = total + logits * right, count + right
    odds = CONFIDENCE / (1 - CONFIDENCE) * (ctx.task.num_classes - 1)
    alone = F.one_hot(classes, ctx.task.num_classes) * math.log(odds)
    return torch.where(count > 0, total / count.clamp(min=1), alone.to(total))
