"""Axes of samples: which kind of data a shape belongs to, and which of its axes holds the channels.

A sample is (C, L) for a series, (C, H, W) for an image and (T, C, H, W) for a clip; a batch has N in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["series", "images", "clips"]

_KINDS: dict[int, Kind] = {2: "series", 3: "images", 4: "clips"}


def kind(shape: Sequence[int]) -> Kind:
    """What a sample of this shape is: "series" (C, L), "images" (C, H, W) or "clips" (T, C, H, W).

    Raises:
        ValueError: another number of axes.
    """
    if len(shape) not in _KINDS:
        raise ValueError(
            f"a sample of shape {tuple(shape)} has {len(shape)} axes: a series has two (C, L), an image three "
            "(C, H, W), a clip four (T, C, H, W); reshape it"
        )
    return _KINDS[len(shape)]


def channel_axis(shape: Sequence[int]) -> int:
    """The axis of a sample of this shape that holds its channels: 1 for clips, 0 for series and images.

    Raises:
        ValueError: the shape is of none of these kinds.
    """
    return 1 if kind(shape) == "clips" else 0
