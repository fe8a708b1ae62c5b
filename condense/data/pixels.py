"""Checks of the values that a user gives, for data sets and published sets; each error names a conversion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condense.names import excerpt, reason

Array = NDArray[Any]


def check_pixels(what: str, images: Array) -> Array:
    """Return images of any shape as uint8, or as float32 in [0, 1] if a value is not exactly k/255.

    Args:
        what: the name of the array, for the message.
        images: uint8 (0..255) or floats in [0, 1].

    Raises:
        ValueError: the type or the range is another one; the message names a conversion that gives the same pictures.
    """
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype.kind == "b":
        raise ValueError(f"{what} is bool: {_WANTED}; give x * 1.0")
    if images.dtype.kind not in "iuf":
        raise ValueError(f"{what} is {excerpt(images.dtype)}: {_WANTED}; give numbers")
    low, high = images.min(), images.max()
    if images.dtype.kind in "iu":
        raise ValueError(
            f"{what} is {images.dtype} with values from {low} to {high}: {_WANTED}; {_hint(int(low), int(high))}"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{what} has NaN or infinite pixels: every pixel must be in [0, 1]; clean the data")
    if low < 0 or high > 1:
        hint = "clip rounding errors, x.clip(0, 1)"
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            hint = _hint(float(low), float(high))
        raise ValueError(f"{what} has pixels from {low:g} to {high:g}: floats must lie in [0, 1]; {hint}")
    images = np.ascontiguousarray(images, dtype=np.float32)
    quantised = np.rint(images * 255).astype(np.uint8)
    exact = np.array_equal(quantised.astype(np.float32) / 255, images)
    return quantised if exact else images


def check_series(what: str, series: Array) -> Array:
    """Return series of any shape as float32. Integers are accepted if float32 represents them exactly.

    Args:
        what: the name of the array, for the message.
        series: finite floats or integers.

    Raises:
        ValueError: the type is another one; values are not finite, or float32 cannot represent them.
    """
    if series.dtype.kind not in "iuf":
        fix = "x * 1.0" if series.dtype.kind == "b" else "numbers"
        raise ValueError(f"{what} is {excerpt(series.dtype)}: series are finite floats; give {fix}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(series, dtype=np.float32)
    if not np.isfinite(series).all():
        raise ValueError(f"{what} has NaN or infinite values: series are finite floats; clean the data")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has values up to {np.abs(series).max():g}: float32 cannot hold them; divide them")
    if series.dtype.kind != "f" and not np.array_equal(values.astype(np.float64), series):
        raise ValueError(f"{what} is {series.dtype} with values that float32 cannot represent exactly; divide them")
    return values


def numpy_of(what: str, array: Tensor | Array) -> Array:
    """Return the values of an array, or of a tensor on any device, as a numpy array.

    Raises:
        ValueError: the array is masked; the tensor is nested, sparse or quantised, or has no values (meta device).
    """
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise ValueError(f"{what} is a masked array: no value may be missing; give x.filled(0)")
        return np.asarray(array)
    array = array.detach()
    if array.is_nested or array.is_meta:
        kind = "nested" if array.is_nested else "meta"
        raise ValueError(f"{what} is a {kind} tensor: its values are not one array; give an ordinary tensor")
    if array.layout != torch.strided:
        raise ValueError(f"{what} is a sparse tensor: pixels and labels are dense; give x.to_dense()")
    if array.is_quantized:
        raise ValueError(f"{what} is a quantised tensor: pixels and labels are plain numbers; give x.dequantize()")
    array = array.cpu().resolve_conj().resolve_neg()
    if array.is_floating_point() and array.dtype not in (torch.float16, torch.float32, torch.float64):
        array = array.float()  # numpy lacks bfloat16 and float8
    try:
        return array.numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is not an array: {reason(error)}; give an ordinary tensor") from error


_WANTED = "pixels are uint8 (0 to 255) or floats in [0, 1]"


def _hint(low: float, high: float) -> str:
    """Return the conversion of values in this range to pixels, in code that is valid for arrays and tensors."""
    if low < -1e-3:
        return (
            "undo their normalisation, x * std + mean, or rescale from the range [LOW, HIGH] that a pixel can have, "
            "(x - LOW) / (HIGH - LOW)"
        )
    if isinstance(high, int) and high <= 1:
        return "give x * 1.0"
    if 128 <= high <= 65535:
        top = 2 ** math.ceil(math.log2(high + 1)) - 1
        return f"divide training and test images by the largest value that a pixel can have, x / {top}"
    return (
        "divide by TOP, the largest value that a pixel can have (255 for 8 bits), x / TOP, and leave normalisation to "
        "the transform"
    )
