"""What is done to a batch before a network sees it: augmentation, mirrored copies, CutMix and MixUp.

A view is replayed from its key: that of batch b of epoch e is a pure function of the root seed, e and b. Whoever has
the seed and the images can make it again, in any order and in another process, so that nothing of it has to be stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.layout import sides
from condense.objective import one_hot
from condense.rng import Rng


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a batch is changed, in this order: mirrored copies, augmentation, CutMix, MixUp."""

    augment: Augment = Augment()
    """Each image has its own draw; with ``flips`` its mirror image joins the batch."""
    cutmix: float = 0.0
    """Probability of CutMix in a batch."""
    mixup: float = 0.0
    """Alpha of MixUp; 0: none."""

    def __call__(
        self, images: Tensor, targets: Tensor, num_classes: int, rng: Rng, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """The view of a batch (n, C, H, W) with targets (n,) or (n, num_classes).

        Where batches are mixed, classes become rows of probabilities.
        """
        x, y = self.augment.mirrored(images, targets)
        drawn = self.augment.sample(rng("augment", epoch, index), len(x), tuple(x.shape[1:]), siamese=False)
        x = self.augment.apply(x, drawn)
        if self.cutmix or self.mixup:
            y = one_hot(y, num_classes)
        if self.cutmix:
            x, y = cutmix(x, y, self.cutmix, rng("cutmix", epoch, index))
        if self.mixup:
            x, y = mixup(x, y, self.mixup, rng("mixup", epoch, index))
        return x, y

    def identity(self) -> dict[str, Any]:
        """What decides the views beside the images, the seed and the order."""
        return {"augment": str(self.augment), "cutmix": self.cutmix, "mixup": self.mixup}


UNCHANGED = Views()


def cutmix(x: Tensor, y: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples (N, *input_shape) of which a part comes from another, and targets (N, C) mixed by its share.

    The part is a rectangle of an image, the same rectangle of all frames of a clip, or a time span of a series. Yun et
    al. (2019): its share is uniform over (0, 1), before it is cut at the border; it is the same for the whole batch,
    which stays as it is with one minus the ``probability``.
    """
    u = torch.rand(4, generator=generator).tolist()
    other = torch.randperm(len(x), generator=generator).to(x.device)
    if u[0] >= probability:
        return x, y
    sizes = sides(x.shape[1:])[-2:]
    length = math.sqrt(u[1]) if len(sizes) == 2 else u[1]
    spans = [_cut(centre, length, size) for centre, size in zip(u[2:], sizes, strict=False)]
    part: tuple[Any, ...] = (..., *(slice(*span) for span in spans))
    mixed = x.clone()
    mixed[part] = x[part][other]
    share = math.prod(last - first for first, last in spans) / math.prod(sizes)
    return mixed, y * (1 - share) + y[other] * share


def mixup(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples (N, *input_shape) and targets (N, C), each blended with another of the batch by one weight from
    Beta(alpha, alpha) for all."""
    seed = int(torch.randint(2**31, (), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(x), generator=generator).to(x.device)
    return weight * x + (1 - weight) * x[other], weight * y + (1 - weight) * y[other]


def _cut(centre: float, side: float, size: int) -> tuple[int, int]:
    middle, half = int(centre * size), int(side * size) // 2
    return max(middle - half, 0), min(middle + half, size)
