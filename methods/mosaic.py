"""What the methods that make mosaics of real images share: candidates, crops, and their scores.

Sun et al., "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm", CVPR 2024
(RDED), whose selection others use as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.method import Context, repeated
from condense.methods.selection import highest
from condense.names import spelt
from condense.rng import Draws
from condense.teachers import opened

BATCH = 1000

Labeller = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to logits (N, num_classes)."""


def labellers(networks: Sequence[str], ctx: Context) -> list[Labeller]:
    """Return the teachers with these networks as functions in full precision, so that the images that they select do
    not depend on the compute policy."""
    return [teacher.scorer() for teacher in opened(networks, ctx)]


def require_mosaics(ctx: Context, factor: int, num_candidates: int) -> None:
    """Raise ValueError unless mosaics of factor x factor tiles can be made of the candidates of each class."""
    (height, width), needed = ctx.task.input_shape[1:], ctx.images_per_class * factor**2
    if height % factor or width % factor:
        raise ValueError(
            f"method.factor {factor} does not divide images of {height} x {width} pixels into equal tiles; "
            f"give {spelt('method.factor', 1)} or another divisor of both sides"
        )
    if num_candidates < needed:
        raise ValueError(
            f"method.num_candidates is {num_candidates}, but the mosaics of a class have {needed} tiles, each of "
            f"another image; give {spelt('method.num_candidates', needed)} or more"
        )


def candidates(ctx: Context, label: int, num: int) -> Tensor:
    """Return the indices of ``num`` random training images of a class, or of all of them if it has fewer."""
    members = ctx.task.train.by_class[label]
    return members[ctx.rng("candidates", 0, label).subset(len(members), num).to(members.device)]


def best(scores: Tensor, num: int) -> Tensor:
    """Return the indices (num,) of the highest scores (n,) in descending order; if n < num, they are repeated."""
    order = highest(scores.cpu(), min(num, len(scores)))
    return repeated(order, num).to(scores.device)


@torch.no_grad()
def realism(teachers: Sequence[Labeller], images: Tensor, label: int) -> Tensor:
    """Return the scores (N,) of images (N, C, H, W) of a class: the mean of log p(class) under the teachers."""
    batches = images.split(BATCH)
    scores = [torch.cat([teacher(x).log_softmax(1)[:, label] for x in batches]) for teacher in teachers]
    return torch.stack(scores).mean(0)


def random_crops(images: Tensor, size: tuple[int, int], min_area: float, draws: Draws) -> Tensor:
    """Return a random square crop of each image (N, C, H, W), resized to ``size``: (N, C, *size).

    The area of a crop is a fraction of the largest square in the image, uniform in [min_area, 1]; its position is
    uniform over whole pixels. Resizing is bilinear, and where it reduces the size, antialiased.
    """
    u = draws.uniform(3, len(images)).to(images.device)
    area = min_area + (1 - min_area) * u[0]
    side = (area.sqrt() * min(images.shape[2:])).round().clamp(min=1)
    rows, columns = (
        _resampling((v * (length - side + 1)).floor(), side, length, out).to(images.dtype)
        for v, length, out in zip(u[1:], images.shape[2:], size, strict=True)
    )
    return rows[:, None] @ images @ columns[:, None].mT


def _resampling(first: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Return the matrices (N, size, length) that resize windows of an axis.

    Args:
        first, extent: (N,), the first pixel of each window and its number of pixels.
        length: pixels of the axis.
        size: pixels after resizing.
    """
    scale = (extent / size)[:, None, None]
    centre = first[:, None, None] + (torch.arange(size, device=first.device) + 0.5)[:, None] * scale
    pixel = torch.arange(length, device=first.device) + 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (pixel > first[:, None, None]) & (pixel < (first + extent)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(2, keepdim=True)


def padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (N, C, h, w) in the middle of images (N, C, *size) of zeros, the mean of the data."""
    down, right = (whole - part for whole, part in zip(size, images.shape[2:], strict=True))
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
