"""What methods share that train a network on the set and differentiate that training: its steps, and masked
distillation training.

Zhu, Lei, Zhang, Fang, Xie, Zhang and Xu, "Rethinking data distillation: do not overlook calibration", ICCV 2023. What
is trained on distilled data is too sure of itself and hard to calibrate, since a set keeps little but what tells the
classes apart. Where a share of the features is hidden from the classifier, the set has to carry more:

    logits = W (m * h(x)) + b,    m ~ Bernoulli(1 - ``mask``)^F for each image of each inner step, not rescaled

RE-IMPLEMENTATION FROM DESCRIPTION: the authors' code is not public. What comes after the inner loop, the loss on real
images and evaluation, sees all features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from condense.augment import Augment
from condense.augment import Params as Drawn
from condense.inner import Adjoint, Exact, Params, Rule, unroll
from condense.method import Context, GradientMethod


@dataclass(frozen=True, kw_only=True)
class Unrolled(GradientMethod):
    """Back-propagates through training on the set."""

    adjoint: Adjoint = Exact()
    """How to differentiate through the steps of the network."""
    mask: float = 0.0
    """Share of the features set to zero in each inner step (masked distillation training); 0.1 is usual, 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask < 1:
            raise ValueError(f"method.mask must lie in [0, 1), got {self.mask}: it is a share; a usual value is 0.1")

    def train(
        self,
        ctx: Context,
        theta: Params,
        batches: Sequence[Minibatch],
        *,
        rule: Rule,
        lr: Tensor | float,
        adjoint: Adjoint,
    ) -> Params:
        """Weights after training on the batches, augmented and masked as they say."""
        return unroll(
            ctx.loss_fn,
            theta,
            batches,
            prepare=functools.partial(prepared, ctx.task.augment),
            rule=rule,
            lr=lr,
            adjoint=adjoint,
            compile=bool(ctx.compute.compile),
        )

    def masked(self, ctx: Context, batches: list[Minibatch], step: int, part: int = 0) -> list[Minibatch]:
        """The batches of a part with masks, drawn for each image of each of them; as they are where ``mask`` is 0."""
        if not self.mask:
            return batches
        task = ctx.task

        def feature_mask(n: int, batch: Minibatch) -> Tensor:
            size = len(batch.chosen) * task.augment.copies, task.network.num_features
            return torch.rand(size, generator=ctx.rng("mask", step, f"{part}/{n}")) >= self.mask

        return [
            batch._replace(feature_mask=feature_mask(n, batch).to(batch.images.device))
            for n, batch in enumerate(batches)
        ]


class Minibatch(NamedTuple):
    images: Tensor
    """All of the set, (n, C, H, W)."""
    targets: Tensor
    chosen: Tensor
    """Indices (m,) of the images that the step sees."""
    drawn: Drawn
    feature_mask: Tensor | None = None
    """Which features (m, F) of the augmented images the classifier sees; None: all."""


def prepared(augment: Augment, batch: Minibatch) -> tuple[Tensor, ...]:
    """What the network sees of a minibatch: augmented images (m, C, H, W), targets, and any ``feature_mask``."""
    images, targets = augment.mirrored(batch.images[batch.chosen], batch.targets[batch.chosen])
    images = augment.apply(images, batch.drawn)
    return (images, targets) if batch.feature_mask is None else (images, targets, batch.feature_mask)
