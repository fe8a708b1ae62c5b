"""Slow references of the decoder ``patches``: one image, patch and pixel at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Image = NDArray[np.float64]


def importance(logits: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor) -> Image:
    """Return for each pixel the largest |d z / d x| over the channels, where z is the largest of the logits (1, C) of
    the image (1, channels, H, W)."""
    jacobian = torch.autograd.functional.jacobian(logits, image)[0, :, 0]
    assert isinstance(jacobian, torch.Tensor)
    best = max(range(len(jacobian)), key=lambda k: float(logits(image)[0, k]))
    channels, height, width = jacobian[best].shape
    values = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            values[y, x] = max(abs(float(jacobian[best, c, y, x])) for c in range(channels))
    return values


def corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Return the first row and column of each patch."""
    return [(y, x) for y in range(0, height, side) for x in range(0, width, side)]


def keep(importance: Image, side: int, num: int) -> list[int]:
    """Return the numbers of the patches with the largest sums, in ascending order."""
    height, width = importance.shape
    sums = [importance[y : y + side, x : x + side].sum() for y, x in corners(height, width, side)]
    return sorted(sorted(range(len(sums)), key=lambda k: (-sums[k], k))[:num])


def stored(pixels: NDArray[np.uint8], kept: Sequence[int], side: int) -> list[int]:
    """Return the bytes of an image (C, H, W): a bit for each patch, if not all are kept, and the kept patches."""
    channels, height, width = pixels.shape
    places = corners(height, width, side)
    values = []
    if len(kept) < len(places):
        values = [sum(2**k for k in range(8) if 8 * i + k in kept) for i in range(math.ceil(len(places) / 8))]
    for number in kept:
        top, left = places[number]
        for c in range(channels):
            for y in range(top, top + side):
                for x in range(left, left + side):
                    values.append(int(pixels[c, y, x]) if y < height and x < width else 0)
    return values


def restored(pixels: NDArray[np.uint8], kept: Sequence[int], side: int) -> Image:
    """Return the image (C, H, W) in [0, 1] with the patches that are not kept filled from the others."""
    height, width = pixels.shape[1:]
    image, known = np.zeros(pixels.shape), np.zeros((height, width), dtype=bool)
    for number in kept:
        top, left = corners(height, width, side)[number]
        for y in range(top, min(top + side, height)):
            for x in range(left, min(left + side, width)):
                image[:, y, x], known[y, x] = pixels[:, y, x] / 255, True
    return pulled_and_pushed(image, known)


def pulled_and_pushed(image: Image, known: NDArray[np.bool_]) -> Image:
    """Return the image (C, H, W) whose unknown pixels are those of its enlarged half."""
    channels, height, width = image.shape
    if height == width == 1:
        return image
    half = np.zeros((channels, math.ceil(height / 2), math.ceil(width / 2)))
    half_known = np.zeros(half.shape[1:], dtype=bool)
    for y in range(half.shape[1]):
        for x in range(half.shape[2]):
            four = [(2 * y + i, 2 * x + j) for i in range(2) for j in range(2)]
            values = [image[:, at[0], at[1]] for at in four if at[0] < height and at[1] < width and known[at]]
            if values:
                half[:, y, x], half_known[y, x] = sum(values) / len(values), True
    half, result = pulled_and_pushed(half, half_known), image.copy()
    for y in range(height):
        for x in range(width):
            if not known[y, x]:
                result[:, y, x] = bilinear(half, (y + 0.5) / height, (x + 0.5) / width)
    return result


def bilinear(image: Image, row: float, column: float) -> Image:
    """Return the colours at a place of an image whose sides have length 1; pixels lie at their centres."""
    total = np.zeros(len(image))
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            down = min(max(row * image.shape[1] - 0.5, 0), image.shape[1] - 1)
            right = min(max(column * image.shape[2] - 0.5, 0), image.shape[2] - 1)
            total += max(0, 1 - abs(down - y)) * max(0, 1 - abs(right - x)) * image[:, y, x]
    return total
