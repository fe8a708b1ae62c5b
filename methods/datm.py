"""DATM: Guo, Wang, Cazenavette, Li, Zhang and You, "Towards lossless dataset distillation via difficulty-aligned
trajectory matching", ICLR 2024.

The objective is that of MTT (see ``condense.methods.mtt`` for its symbols) with a soft cross-entropy, labels learned:

    l(b; theta) = - mean_j sum_c softmax(y_j)_c log f_c(x_j; theta),    y_j learned

    symbol   code
    y        ``state.syn.provider.logits``, initialised with the mean logits of the experts that classify the image
             correctly
    t        start epoch, uniform over ``min_start_epoch`` .. T - 1
    T        ``first_max_epoch``, growing linearly to ``max_start_epoch`` in ``expansion_steps`` updates
    skip     updates whose loss is above ``threshold`` or not a number are skipped

The initial images are real ones that experts classify correctly.

Deviations: see docs/methods/datm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.method import Context, GradientState, Optim, Value, repeated
from condense.methods.mtt import TrajectoryMatching, logits_of_experts
from condense.task import Task
from condense.train import Training

CONFIDENCE = 0.9
"""Initial probability of the true class for an image that no expert classifies correctly."""


@final
@dataclass(frozen=True, kw_only=True)
class DATM(TrajectoryMatching):
    """Trajectory matching with later and later start epochs and learned soft labels."""

    num_steps: int = 10000
    """Number of updates of the images."""
    syn_steps: int = 80
    """Number of training steps of the student on the set."""
    correct_only: bool = True
    """Whether the initial images are real ones that an expert classifies correctly; false: any real images."""
    min_start_epoch: int = 0
    """First epoch of an expert at which the student may start."""
    first_max_epoch: int | None = None
    """Initial end (exclusive) of the range of start epochs; unset: ``max_start_epoch`` from the beginning."""
    expansion_steps: int = 1000
    """Number of updates over which the end of the range of start epochs grows to ``max_start_epoch``."""
    max_start_epoch: int = 20
    """Final end (exclusive) of the range of start epochs."""
    threshold: float = 1.0
    """Largest loss of an update: updates with a larger loss, or one that is not a number, are skipped."""
    optim_labels: Optim = Optim(lr=2.0, momentum=0.9)
    """Optimiser of the logits of the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.max_start_epoch if self.first_max_epoch is None else self.first_max_epoch
        if not 0 <= self.min_start_epoch < first <= self.max_start_epoch:
            raise ValueError(
                f"method.min_start_epoch {self.min_start_epoch}, first_max_epoch {first} and max_start_epoch "
                f"{self.max_start_epoch} do not form a growing window; give for example 0, 10 and 20"
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
        if self.start == "real" and self.correct_only and ctx.first_images is None:
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

    def update(self, state: GradientState, record: dict[str, Value]) -> None:
        """Skip the update if the loss is above ``threshold`` or not a number. Values of the record that are not finite
        are then removed from it. This decision waits for the loss."""
        if record["loss"] <= self.threshold:
            super().update(state, record)
            return
        for name in [name for name, value in record.items() if not math.isfinite(value)]:
            del record[name]
        record["skipped"] = 1.0


def correctly_classified(ctx: Context, label: int, num: int) -> Tensor:
    """Return ``num`` real images of a class that the first expert classifies correctly, in a random order. If there are
    too few, add images that the next experts classify correctly, then any, and then repeat them."""
    members = ctx.task.train.by_class[label]
    shuffled = members[ctx.rng("initial images", 0, label).permutation(len(members)).to(members.device)]
    images = ctx.task.train.images[shuffled.to(ctx.task.device)]
    left, chosen = torch.ones(len(images), dtype=torch.bool, device=images.device), images[:0]
    for logits in logits_of_experts(ctx, images):
        known = (left & (logits.argmax(1) == label)).nonzero().flatten()[: num - len(chosen)]
        chosen, left[known] = torch.cat([chosen, images[known]]), False
        if len(chosen) == num:
            break
    chosen = torch.cat([chosen, images[left][: num - len(chosen)]])
    return repeated(chosen, num)


def mean_logits(ctx: Context, images: Tensor, classes: Tensor) -> Tensor:
    """Logits (N, C) of the images, averaged over the experts that classify an image correctly. If none does, the logits
    give its class the probability ``CONFIDENCE``."""
    total, count = torch.zeros(len(images), ctx.task.num_classes).to(images), torch.zeros(len(images), 1).to(images)
    for logits in logits_of_experts(ctx, images):
        right = (logits.argmax(1) == classes)[:, None]
        total, count = total + logits * right, count + right
    odds = CONFIDENCE / (1 - CONFIDENCE) * (ctx.task.num_classes - 1)
    fallback = F.one_hot(classes, ctx.task.num_classes) * math.log(odds)
    return torch.where(count > 0, total / count.clamp(min=1), fallback.to(total))
