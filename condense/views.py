"""Views: random changes of a batch before the network sees it (mirrored copies, augmentation, CutMix, MixUp).

The view of batch b of epoch e is a pure function of the root seed, e and b. It can be recomputed from the seed and the
images, in any order and in another process, so views are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.layout import sides
from condense.objective import one_hot
from condense.rng import Draws, Rng


@dataclass(frozen=True, kw_only=True)
class Views:
    """The changes that make a view, applied in this order: mirrored copies, augmentation, CutMix, MixUp."""

    augment: Augment = Augment()
    """Augmentation, drawn for each image separately; with ``flips`` the batch also holds all mirror images."""
    cutmix: float = 0.0
    """Probability that CutMix is applied to a batch."""
    mixup: float = 0.0
    """Alpha of the beta distribution of the MixUp weights; 0: no MixUp."""

    def __call__(
        self, images: Tensor, targets: Tensor, num_classes: int, rng: Rng, epoch: int | Tensor, index: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the view of a batch (n, C, H, W) with targets (n,) or (n, num_classes).

        With CutMix or MixUp the returned targets are (n, num_classes).
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

    @property
    def on_device(self) -> bool:
        """Whether views can be drawn by tensors; the weights of MixUp are drawn on the host."""
        return not self.mixup

    def identity(self) -> dict[str, Any]:
        """Return what determines the views, apart from the images, the seed and the order."""
        return {"augment": str(self.augment), "cutmix": self.cutmix, "mixup": self.mixup}


UNCHANGED = Views()


def cutmix(x: Tensor, y: Tensor, probability: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Apply CutMix (Yun et al. 2019) with some probability to samples (N, *input_shape) and targets (N, C).

    A part of each sample is replaced by that of another: a rectangle of an image, the same rectangle of all frames of a
    clip, or a time span of a series. Its relative size is uniform over (0, 1) before it is clipped at the border, and
    the targets are mixed in proportion to the size after that. One draw serves the whole batch.
    """
    u, other = draws.uniform(4).to(x.device), draws.permutation(len(x)).to(x.device)
    sizes = sides(x.shape[1:])[-2:]
    length = u[1].sqrt() if len(sizes) == 2 else u[1]
    part, share = u[0] < probability, torch.ones((), device=x.device)
    for axis, size in enumerate(sizes):
        middle, half = (u[2 + axis] * size).floor(), (length * size / 2).floor()
        first, last = (middle - half).clamp(min=0), (middle + half).clamp(max=size)
        position = torch.arange(size, device=x.device)
        part = part[..., None] & (first <= position) & (position < last)
        share = share * (last - first) / size
    share = share * (u[0] < probability)
    return torch.where(part, x[other], x), y * (1 - share) + y[other] * share


def mixup(x: Tensor, y: Tensor, alpha: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Apply MixUp to samples (N, *input_shape) and targets (N, C): each is averaged with another of the batch, with one
    weight from Beta(alpha, alpha) for the whole batch."""
    seed = draws.integer(0, 2**31)
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = draws.permutation(len(x)).to(x.device)
    return weight * x + (1 - weight) * x[other], weight * y + (1 - weight) * y[other]
