"""Slow reference of ``condense.augment``: the definitions of its operations, pixel by pixel and image by image.

Images are float64 arrays (C, H, W).
"""

import math
from typing import Any

import numpy as np

from condense.augment import Params


def apply(x: np.ndarray, params: Params, align_corners: bool) -> np.ndarray:
    out = []
    for n, image in enumerate(x):
        for op, value in params.values.items():
            row: Any = value[0 if len(value) == 1 else n].tolist()
            if op == "color":
                image = color(image, *row)
            elif op == "crop":
                image = crop(image, *row)
            elif op == "cutout":
                image = cutout(image, *row)
            elif op == "flip":
                image = flip(image) if row else image
            elif op == "scale":
                image = scale(image, row[0], row[1], align_corners)
            elif op == "rotate":
                image = rotate(image, row, align_corners)
            elif op == "jitter":
                image = jitter(image, *row)
            elif op == "zoom":
                factor, right, down = row
                image = warp(image, [[factor, 0.0], [0.0, factor]], align_corners, right, down)
            elif op == "translate":
                image = warp(image, [[1.0, 0.0], [0.0, 1.0]], align_corners, *row)
            elif op == "resized-crop":
                image = resized_crop(image, *row, align_corners)
            elif op == "roll":
                image = roll(image, *row)
            else:
                assert op == "cutout-quarter", op
                image = cutout_quarter(image, *row)
        out.append(image)
    return np.stack(out)


def color(image: np.ndarray, brightness: float, saturation: float, contrast: float) -> np.ndarray:
    channels, height, width = image.shape
    image = image + brightness
    out = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            mean = sum(image[c, i, j] for c in range(channels)) / channels
            for c in range(channels):
                out[c, i, j] = (image[c, i, j] - mean) * saturation + mean
    mean = sum(out.flat) / out.size
    return (out - mean) * contrast + mean


def jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    image = image + brightness
    mean = sum(image.flat) / image.size
    return color((image - mean) * contrast + mean, 0.0, saturation, 1.0)


def cutout_quarter(image: np.ndarray, top: int, left: int) -> np.ndarray:
    _, height, width = image.shape
    out = image.copy()
    for i in range(top, top + height // 4):
        for j in range(left, left + width // 4):
            out[:, i, j] = 0
    return out


def resized_crop(image: np.ndarray, top: int, left: int, tall: int, wide: int, align_corners: bool) -> np.ndarray:
    """Cut out a rectangle, then interpolate it to the size of the image; beyond its edges its last pixels continue."""
    _, height, width = image.shape
    part = image[:, top : top + tall, left : left + wide]
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y = to_pixel(to_unit(i, height, align_corners), tall, align_corners)
            x = to_pixel(to_unit(j, width, align_corners), wide, align_corners)
            for k in (math.floor(y), math.floor(y) + 1):
                for m in (math.floor(x), math.floor(x) + 1):
                    pixel = part[:, min(max(k, 0), tall - 1), min(max(m, 0), wide - 1)]
                    out[:, i, j] += (1 - abs(y - k)) * (1 - abs(x - m)) * pixel
    return out


def roll(image: np.ndarray, up: int, left: int) -> np.ndarray:
    _, height, width = image.shape
    out = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            out[:, i, j] = image[:, (i + up) % height, (j + left) % width]
    return out


def crop(image: np.ndarray, down: int, right: int) -> np.ndarray:
    _, height, width = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i + down < height and 0 <= j + right < width:
                out[:, i, j] = image[:, i + down, j + right]
    return out


def cutout(image: np.ndarray, row: int, column: int) -> np.ndarray:
    _, height, width = image.shape
    tall, wide = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    out = image.copy()
    for i in range(row - tall // 2, row - tall // 2 + tall):
        for j in range(column - wide // 2, column - wide // 2 + wide):
            if 0 <= i < height and 0 <= j < width:
                out[:, i, j] = 0
    return out


def flip(image: np.ndarray) -> np.ndarray:
    out = np.empty_like(image)
    width = image.shape[2]
    for j in range(width):
        out[:, :, j] = image[:, :, width - 1 - j]
    return out


def scale(image: np.ndarray, horizontal: float, vertical: float, align_corners: bool) -> np.ndarray:
    return warp(image, [[horizontal, 0.0], [0.0, vertical]], align_corners)


def rotate(image: np.ndarray, angle: float, align_corners: bool) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return warp(image, [[cos, -sin], [sin, cos]], align_corners)


def warp(
    image: np.ndarray, matrix: list[list[float]], align_corners: bool, right: float = 0.0, down: float = 0.0
) -> np.ndarray:
    _, height, width = image.shape
    (a, b), (c, d) = matrix
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            u, v = to_unit(j, width, align_corners), to_unit(i, height, align_corners)
            x = to_pixel(a * u + b * v + right, width, align_corners)
            y = to_pixel(c * u + d * v + down, height, align_corners)
            for k in (math.floor(y), math.floor(y) + 1):
                for m in (math.floor(x), math.floor(x) + 1):
                    if 0 <= k < height and 0 <= m < width:
                        out[:, i, j] += (1 - abs(y - k)) * (1 - abs(x - m)) * image[:, k, m]
    return out


def to_unit(pixel: float, side: int, align_corners: bool) -> float:
    """Map a pixel index to [-1, 1], between the corner centres if ``align_corners``, else between the edges."""
    return 2 * pixel / (side - 1) - 1 if align_corners else (2 * pixel + 1) / side - 1


def to_pixel(unit: float, side: int, align_corners: bool) -> float:
    return (unit + 1) / 2 * (side - 1) if align_corners else ((unit + 1) * side - 1) / 2
