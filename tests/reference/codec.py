"""Slow reference of the decoder codec: one image, grid and entry after the other, in double precision, and a real
arithmetic coder in whole numbers that is driven by the same predictions.

A ``Slice`` holds the weights of one class. Everything outside a grid is 0 for the context and the filters; the
upsampling continues the edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any


@dataclass
class Slice:
    context_weight: Array  # (layers, k, k)
    context_bias: Array  # (layers, k)
    scale_weight: Array  # (2, k)
    scale_bias: Array  # (2,)
    upsampling: Array  # (8, 8)
    hidden_weight: Array  # (width, grids)
    hidden_bias: Array
    colour_weight: Array  # (C, width)
    colour_bias: Array
    filter_weight: Array  # (2, C, C, 3, 3)
    filter_bias: Array  # (2, C)


def offsets(k: int) -> list[tuple[int, int]]:
    """The k nearest entries that come before an entry; of equally near ones those of earlier rows and columns first."""
    found = []
    for dy in range(-20, 1):
        for dx in range(-20, 21):
            if dy < 0 or dx < 0:
                found.append((dy * dy + dx * dx, dy, dx))
    return [(dy, dx) for _, dy, dx in sorted(found)[:k]]


def predicted(grid: Array, y: int, x: int, net: Slice) -> tuple[float, float]:
    """Mean and scale of one entry of a grid."""
    height, width = grid.shape
    values = []
    for dy, dx in offsets(net.scale_weight.shape[1]):
        inside = 0 <= y + dy < height and 0 <= x + dx < width
        values.append(float(grid[y + dy, x + dx]) if inside else 0.0)
    h = np.array(values)
    for weight, bias in zip(net.context_weight, net.context_bias, strict=True):
        h = h + np.maximum(weight @ h + bias, 0)
    mean, raw = net.scale_weight @ h + net.scale_bias
    return float(mean), math.exp(min(max(raw - 4, -4.6), 5))


def distribution(x: float, mean: float, scale: float) -> float:
    """The distribution function of a Laplace distribution."""
    if x < mean:
        return 0.5 * math.exp((x - mean) / scale)
    return 1 - 0.5 * math.exp((mean - x) / scale)


def probability(value: float, mean: float, scale: float) -> float:
    """Of the interval of length 1 around a value. On the right of the mean by symmetry, where 1 - F would cancel."""
    value = mean - abs(value - mean)
    return distribution(value + 0.5, mean, scale) - distribution(value - 0.5, mean, scale)


def grids(latent: Array, sizes: list[tuple[int, int]]) -> list[Array]:
    parts = np.split(latent, np.cumsum([h * w for h, w in sizes])[:-1])
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def entries(latent: Array, sizes: list[tuple[int, int]], net: Slice) -> Iterator[tuple[float, float, float]]:
    """Each entry of a latent with its mean and scale, in the order of an entropy code."""
    for grid in grids(latent, sizes):
        for y in range(grid.shape[0]):
            for x in range(grid.shape[1]):
                yield float(grid[y, x]), *predicted(grid, y, x, net)


def bits(latent: Array, sizes: list[tuple[int, int]], net: Slice) -> float:
    """Minus the binary logarithm of the probability of a latent."""
    return sum(-math.log2(probability(*entry)) for entry in entries(latent, sizes, net))


def doubled(grid: Array, kernel: Array) -> Array:
    """Transposed convolution of stride 2: entry i adds to the positions 2 i - 3 .. 2 i + 4."""
    height, width = grid.shape
    made = np.zeros((2 * height, 2 * width))
    for y in range(-2, height + 2):
        for x in range(-2, width + 2):
            value = grid[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            for j in range(8):
                for i in range(8):
                    row, column = 2 * y - 3 + j, 2 * x - 3 + i
                    if 0 <= row < 2 * height and 0 <= column < 2 * width:
                        made[row, column] += value * kernel[j, i]
    return made


def filtered(image: Array, weight: Array, bias: Array) -> Array:
    channels, height, width = image.shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    made = np.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                made[c, y, x] = bias[c] + (weight[c] * padded[:, y : y + 3, x : x + 3]).sum()
    return made


def image(latent: Array, sizes: list[tuple[int, int]], net: Slice) -> Array:
    """The image (C, H, W) of a latent."""
    maps = []
    for number, grid in enumerate(grids(latent, sizes)):
        for height, width in reversed(sizes[:number]):
            grid = doubled(grid, net.upsampling)[:height, :width]
        maps.append(grid)
    height, width = sizes[0]
    made = np.zeros((len(net.colour_bias), height, width))
    for y in range(height):
        for x in range(width):
            hidden = np.maximum(net.hidden_weight @ [each[y, x] for each in maps] + net.hidden_bias, 0)
            made[:, y, x] = net.colour_weight @ hidden + net.colour_bias
    made = made + np.maximum(filtered(made, net.filter_weight[0], net.filter_bias[0]), 0)
    return made + filtered(made, net.filter_weight[1], net.filter_bias[1])


def golomb(number: int, order: int) -> str:
    """The Exp-Golomb code of a whole number; negative ones follow the positive ones."""
    natural = 2 * number - 1 if number > 0 else -2 * number
    head = bin((natural >> order) + 1)[2:]
    tail = format(natural & ((1 << order) - 1), f"0{order}b") if order else ""
    return "0" * (len(head) - 1) + head + tail


def golomb_bits(numbers: list[float]) -> int:
    """Of weights that are multiples of 2^-15, with the best step and order, and 8 bits for these."""
    k = next(k for k in range(16) if all((x * 2**k).is_integer() for x in numbers))
    steps = [int(x * 2**k) for x in numbers]
    return 8 + min(sum(len(golomb(m, order)) for m in steps) for order in range(16))


PRECISION = 32
"""Bits of a cumulative probability of the arithmetic coder."""


def _interval(value: int, mean: float, scale: float, low: int, high: int) -> tuple[int, int]:
    """The interval of a value within [0, 2^PRECISION), where each value from low to high has at least 1."""
    room = 2**PRECISION - (high - low + 1)

    def edge(x: int) -> int:
        if x <= low:
            return 0
        if x > high:
            return 2**PRECISION
        return int(distribution(x - 0.5, mean, scale) * room) + x - low

    return edge(value), edge(value + 1)


def encoded(latent: Array, sizes: list[tuple[int, int]], net: Slice, low: int, high: int) -> str:
    """The bits of a latent in exact arithmetic: a shortest binary fraction within its interval."""
    start, width = Fraction(0), Fraction(1)
    for value, mean, scale in entries(latent, sizes, net):
        first, last = _interval(int(value), mean, scale, low, high)
        start, width = start + width * Fraction(first, 2**PRECISION), width * Fraction(last - first, 2**PRECISION)
    num = 0
    while True:
        code = math.ceil(start * 2**num)
        if Fraction(code + 1, 2**num) <= start + width:
            return format(code, f"0{num}b") if num else ""
        num += 1


def decoded(code: str, sizes: list[tuple[int, int]], net: Slice, low: int, high: int) -> Array:
    """The latent of these bits. Each prediction sees the entries that are already decoded, and no others."""
    point = Fraction(int(code or "0", 2), 2 ** len(code))
    parts = []
    for height, width in sizes:
        grid = np.full((height, width), np.nan)
        for y in range(height):
            for x in range(width):
                mean, scale = predicted(grid, y, x, net)
                for value in range(low, high + 1):
                    first, last = (Fraction(edge, 2**PRECISION) for edge in _interval(value, mean, scale, low, high))
                    if first <= point < last:
                        break
                point = (point - first) / (last - first)
                grid[y, x] = value
        parts.append(grid.flatten())
    return np.concatenate(parts)
