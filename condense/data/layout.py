"""Shapes of samples: the kind of data that a shape belongs to, and the axis that holds the channels.

A sample is (L,) for a graph (see ``condense.data.graphs``), (C, L) for a series, (C, H, W) for an image and
(T, C, H, W) for a clip; a batch has N in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["graphs", "series", "images", "clips"]

InputShape: TypeAlias = tuple[int, ...]
"""(L,), (C, L), (C, H, W) or (T, C, H, W)"""

_KINDS: dict[int, Kind] = {1: "graphs", 2: "series", 3: "images", 4: "clips"}


def kind(shape: Sequence[int]) -> Kind:
    """Return the kind of a sample of this shape: "graphs" (L,), "series" (C, L), "images" (C, H, W) or "clips"
    (T, C, H, W).

    Raises:
        ValueError: the shape has another number of axes.
    """
    if len(shape) not in _KINDS:
        raise ValueError(
            f"a sample of shape {tuple(shape)} has {len(shape)} axes: a graph has one, a series two (C, L), an image "
            "three (C, H, W) and a clip four (T, C, H, W); reshape it"
        )
    return _KINDS[len(shape)]


def channel_axis(shape: Sequence[int]) -> int:
    """Return the axis that holds the channels of a sample: 1 for clips, 0 for series and images.

    Raises:
        ValueError: the shape belongs to none of these kinds.
    """
    return 1 if kind(shape) == "clips" else 0


def sides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of all axes of a sample except the channels: (L,), (H, W) or (T, H, W).

    Raises:
        ValueError: the shape belongs to none of these kinds.
    """
    axis = channel_axis(shape)
    return (*shape[:axis], *shape[axis + 1 :])


def require_kind(what: str, takes: Sequence[Kind], shape: Sequence[int], remedy: str) -> None:
    """Raise ValueError if ``what`` does not take samples of this shape; the message ends with ``remedy``."""
    if kind(shape) not in takes:
        raise ValueError(f"{what} takes {' and '.join(takes)}, not {kind(shape)} of shape {tuple(shape)}; {remedy}")
