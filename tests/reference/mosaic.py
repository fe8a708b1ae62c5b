"""Slow references of RDED and CIM, image by image and tile by tile; random draws are arguments.

Images are (C, H, W). A tile is given by its number, which counts through the rows of a mosaic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import optim

Logits = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to logits (N, num_classes)."""


def crop(image: Tensor, area: float, down: float, right: float, size: tuple[int, int], min_area: float) -> Tensor:
    """Cut a square out of an image and resize it. ``area``, ``down`` and ``right`` are uniform numbers in [0, 1)."""
    height, width = image.shape[1:]
    side = max(round(math.sqrt(min_area + (1 - min_area) * area) * min(height, width)), 1)
    top, left = math.floor(down * (height - side + 1)), math.floor(right * (width - side + 1))
    window = image[None, :, top : top + side, left : left + side]
    return F.interpolate(window, size=size, mode="bilinear", antialias=True)[0]


def log_probability(teacher: Logits, image: Tensor, label: int) -> float:
    """Return log p(label) of one image under the teacher."""
    logits = teacher(image[None])[0].double()
    return float(logits[label] - logits.exp().sum().log())


def realism(teacher: Logits, tile: Tensor, label: int, shape: tuple[int, int]) -> float:
    """Return log p(label) of a crop in the middle of an image of zeros."""
    image = torch.zeros(tile.shape[0], *shape)
    top, left = (shape[0] - tile.shape[1]) // 2, (shape[1] - tile.shape[2]) // 2
    image[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return log_probability(teacher, image, label)


def mosaic(tiles: Sequence[Tensor], factor: int) -> Tensor:
    """Put factor^2 tiles into one image, by rows."""
    channels, height, width = tiles[0].shape
    image = torch.zeros(channels, factor * height, factor * width)
    for k, tile in enumerate(tiles):
        row, column = k // factor * height, k % factor * width
        image[:, row : row + height, column : column + width] = tile
    return image


def rded(
    images: Sequence[Tensor],
    crops: Callable[[int, int], Tensor],
    teacher: Logits,
    label: int,
    *,
    num_crops: int,
    num: int,
    factor: int,
) -> list[Tensor]:
    """Return ``num`` mosaics. ``crops(i, k)`` is crop k of image i."""
    best = []
    for i, image in enumerate(images):
        shape = (image.shape[1], image.shape[2])
        scored = [(realism(teacher, crops(i, k), label, shape), k) for k in range(num_crops)]
        score, k = max(scored, key=lambda pair: (pair[0], -pair[1]))
        best.append((score, i, crops(i, k)))
    best.sort(key=lambda entry: (-entry[0], entry[1]))
    return [mosaic([best[k * num + i][2] for k in range(factor**2)], factor) for i in range(num)]


def cim(
    originals: Sequence[Tensor],
    num_steps: int,
    *,
    features: Callable[[Tensor], Tensor],
    augment: Callable[[int, Tensor], Tensor],
    num: int,
    factor: int,
    lr: float,
    beta: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss and the ``num`` mosaics of one class after each step of Adam.

    Args:
        originals: num * factor^2 images; original ``k * num + i`` belongs to tile k of mosaic i.
        features: maps one image to its features.
        augment: applies the augmentation of a step to one image.
    """
    height, width = originals[0].shape[1:]
    small = [x[:, ::factor, ::factor] for x in originals]
    mosaics = [mosaic([small[k * num + i] for k in range(factor**2)], factor) for i in range(num)]
    memories: list[optim.Memory] = [{} for _ in mosaics]
    for step in range(num_steps):
        leaves, loss = [x.requires_grad_() for x in mosaics], torch.zeros(())
        for i, image in enumerate(leaves):
            for k in range(factor**2):
                row, column = k // factor * height // factor, k % factor * width // factor
                tile = image[None, :, row : row + height // factor, column : column + width // factor]
                (seen,) = F.interpolate(tile, size=(height, width), mode="bilinear")
                wanted = features(augment(step, originals[k * num + i])).detach()
                loss = loss + (features(augment(step, seen)) - wanted).abs().mean()
        gradients = torch.autograd.grad(loss, leaves)
        mosaics = [
            optim.adam(x.detach(), g, memory, step + 1, lr, beta)
            for x, g, memory in zip(leaves, gradients, memories, strict=True)
        ]
        yield loss.item(), [x.clone() for x in mosaics]
