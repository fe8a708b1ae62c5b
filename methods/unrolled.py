"""Base class of the methods that differentiate through the training of a network on the set, and masked distillation
training.

Zhu, Lei, Zhang, Fang, Xie, Zhang and Xu, "Rethinking data distillation: do not overlook calibration", ICCV 2023.
Networks that are trained on distilled data are overconfident and hard to calibrate, because the set keeps little more
than the features that discriminate the classes. Masking a fraction of the features makes the set keep more of them:

    logits = W (m * h(x)) + b,    m ~ Bernoulli(1 - ``mask``)^F for each image of each inner step, not rescaled

RE-IMPLEMENTATION FROM DESCRIPTION: the authors' code is not public. The loss on real images and the evaluation use all
features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from condense.augment import Augment
from condense.augment import Params as Drawn
from condense.inner import Adjoint, Exact, Params, RandomTruncated, Rule, Truncated, unroll
from condense.inner.rules import State
from condense.method import Context, GradientMethod
from condense.names import spelt
from condense.objective import ObjectiveName
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels


@dataclass(frozen=True, kw_only=True)
class Unrolled(GradientMethod):
    """Back-propagates through training on the set."""

    adjoint: Adjoint = Exact()
    """How to differentiate through the training steps of the network."""
    mask: float = 0.0
    """Fraction of the features set to zero in each inner step (masked distillation training); a usual value is 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask < 1:
            raise ValueError(f"method.mask must lie in [0, 1), got {self.mask}: it is a fraction; a usual value is 0.1")

    def training_steps(self) -> int | None:
        """Return the number of training steps of the network, in which the window of the adjoint has to lie; None if
        the fields alone do not determine it."""
        return None

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        num_steps = self.training_steps()
        reason = None if num_steps is None else self.why_no_room(num_steps)
        return reason or super().incompatibility(decode, labels, transform, objective)

    def why_no_room(self, num_steps: int) -> str | None:
        """Return why the adjoint can need more than ``num_steps`` training steps of the network; None if it cannot."""
        match self.adjoint:
            case RandomTruncated(hi=int(longest), window=window):
                field, burn_in, name = "hi", f"up to {longest}", "RandomTruncated"
            case Truncated(burn_in=int(longest), window=window):
                field, burn_in, name = "burn_in", str(longest), "Truncated"
            case _:
                return None
        if longest + window <= num_steps:
            return None
        fix = spelt(f"method.adjoint.{field}", max(num_steps - window, 0), name)
        return (
            f"has a method.adjoint with a burn-in of {burn_in} and a window of {window}, but the network takes "
            f"{num_steps} steps; give {fix} and a window that fits"
        )

    def train(
        self,
        ctx: Context,
        theta: Params,
        batches: Sequence[Minibatch],
        *,
        rule: Rule,
        lr: Tensor | float,
        adjoint: Adjoint,
        state: State | None = None,
    ) -> Params:
        """Return the weights after training on the batches, with their augmentations and feature masks.

        ``state`` is that of the rule, for a training that is continued.
        """
        return unroll(
            ctx.loss_fn,
            theta,
            batches,
            prepare=functools.partial(prepared, ctx.task.augment),
            rule=rule,
            lr=lr,
            adjoint=adjoint,
            state=state,
            compile=bool(ctx.compute.compile),
        )

    def masked(
        self, ctx: Context, batches: list[Minibatch], step: int, part: int = 0, first: int = 0
    ) -> list[Minibatch]:
        """Return the batches of a part with a feature mask for each image of each batch; unchanged if ``mask`` is 0.

        ``first`` is the number of the inner step that the first of these batches belongs to.
        """
        if not self.mask:
            return batches
        task = ctx.task

        def feature_mask(n: int, batch: Minibatch) -> Tensor:
            size = len(batch.chosen) * task.augment.copies, task.network.num_features
            return ctx.rng("mask", step, f"{part}/{n}").uniform(*size) >= self.mask

        return [
            batch._replace(feature_mask=feature_mask(n, batch).to(batch.images.device))
            for n, batch in enumerate(batches, first)
        ]


class Minibatch(NamedTuple):
    images: Tensor
    """All images of the set, (n, C, H, W)."""
    targets: Tensor
    chosen: Tensor
    """Indices (m,) of the images of the step."""
    drawn: Drawn
    feature_mask: Tensor | None = None
    """Features (m, F) of the augmented images that the classifier uses; None: all."""


def prepared(augment: Augment, batch: Minibatch) -> tuple[Tensor, ...]:
    """The inputs of the loss: augmented images (m, C, H, W), targets and, if there is one, the ``feature_mask``."""
    images, targets = augment.mirrored(batch.images[batch.chosen], batch.targets[batch.chosen])
    images = augment.apply(images, batch.drawn)
    return (images, targets) if batch.feature_mask is None else (images, targets, batch.feature_mask)
