"""Samples that a user gives: the order of their axes, and checks of their values.

A *layout* names the axes of a batch by one letter each, in the order of the array: "NHWC", "NTHW", "NLC". N stands for
samples, C for channels, L for points of a series, T for frames, H for rows and W for columns. Without C there is one
channel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from condense.data.layout import Kind, channel_axis, kind
from condense.data.pixels import Array, check_pixels, check_series, numpy_of
from condense.names import excerpt

STANDARD: dict[Kind, str] = {"series": "NCL", "images": "NCHW", "clips": "NTCHW"}
"""The layout that Condense uses for each kind."""

IN_FILE = 'np.savez(..., layout="{}")'
"""The code that stores a layout in an ``.npz`` file, for messages; {} is the layout."""

_WITHOUT_LAYOUT = {3: ("NHW",), 4: ("NCHW", "NHWC"), 5: ("NTCHW", "NTHWC")}
"""Number of axes -> possible layouts of an array without a layout. Such arrays hold pixels."""


def check_samples(
    what: str, samples: Tensor | Array, layout: str | None = None, *, channels_first: bool, remedy: str
) -> Array:
    """Check samples and return them in the standard layout.

    Series (N, C, L) are float32; images (N, C, H, W) and clips (N, T, C, H, W) are as ``check_pixels`` returns them.

    Args:
        what: the name of the array, for the message.
        samples: an array with the axes of ``layout``.
        layout: None: the array holds pixels, and ``guess`` finds the layout.
        channels_first: as in ``guess``.
        remedy: the code that gives a layout for this source, with {} in its place, for the message.

    Raises:
        ValueError: axes, type or values are not those of any kind of sample.
    """
    given = numpy_of(what, samples)
    axes = layout
    if axes is None:
        axes = guess(what, given.shape, channels_first=channels_first, remedy=remedy)
    arranged = arrange(what, given, axes)
    if arranged.size == 0:
        need = "at least one sample is needed" if not len(arranged) else "a sample has at least one value"
        raise ValueError(f"{what} is empty (shape {given.shape}): {need}; give other data")
    shape = arranged.shape[1:]
    if kind(shape) == "series":
        return check_series(what, arranged)
    channels = shape[channel_axis(shape)]
    if channels not in (1, 3):
        raise ValueError(
            f"{what} has {channels} channels: {kind(shape)} have one (gray) or three (RGB); select or convert channels"
        )
    try:
        return check_pixels(what, arranged)
    except ValueError as error:
        if layout is None and given.ndim == 3 and given.dtype.kind in "iuf":
            raise ValueError(f"{error}; if these are series, give a layout, {remedy.format('NCL')}") from error
        raise


def arrange(what: str, array: Array, layout: str) -> Array:
    """Return a view of the array with its axes in the standard order: (N, C, L), (N, C, H, W) or (N, T, C, H, W).

    Args:
        what: the name of the array, for the message.
        array: any values, with the axes of ``layout``.
        layout: one letter for each axis, upper or lower case.

    Raises:
        ValueError: the layout is unknown, or the array has another number of axes.
    """
    axes = layout.upper()
    standard = next((s for s in STANDARD.values() if sorted(axes) in (sorted(s), sorted(s.replace("C", "")))), None)
    if standard is None:
        raise ValueError(
            f"{what} has the unknown layout {excerpt(layout)!r}: series are NCL, NLC or NL, images NCHW, NHWC or NHW, "
            "clips NTCHW, NTHWC, NCTHW or NTHW; give one of these"
        )
    if array.ndim != len(axes):
        raise ValueError(
            f"{what} has shape {excerpt(array.shape)}: its layout {axes} names {len(axes)} axes; reshape it, or give "
            "its actual layout"
        )
    if "C" not in axes:
        array, axes = array[..., None], axes + "C"
    return array.transpose([axes.index(axis) for axis in standard])


def guess(what: str, shape: Sequence[int], *, channels_first: bool, remedy: str) -> str:
    """Return the probable layout of an array of pixels that was given without one.

    Three axes are NHW. Four axes are NCHW or NHWC, and five are NTCHW or NTHWC, whichever has one or three channels.

    Args:
        what, remedy: as for ``check_samples``.
        shape: shape of the whole array, samples first.
        channels_first: if both layouts fit, prefer the first one, else the second.

    Raises:
        ValueError: neither layout has one or three channels; there are fewer than three or more than five axes.
    """
    layouts = _WITHOUT_LAYOUT.get(len(shape), ())
    for layout in layouts if channels_first else layouts[::-1]:
        if "C" not in layout or shape[layout.index("C")] in (1, 3):
            return layout
    if not layouts:
        raise ValueError(
            f"{what} has shape {excerpt(tuple(shape))}: images have three or four axes and clips five; reshape it, or "
            f"give a layout, {remedy.format('NL')}"
        )
    second, clips = ("second", "; the layout of gray clips is NTHW") if len(shape) == 4 else ("third", "")
    raise ValueError(
        f"{what} has shape {tuple(shape)}: neither its {second} nor its last axis has length 1 or 3; give "
        f"{' or '.join(layouts[::-1])}, or give a layout, {remedy.format(layouts[0])}{clips}"
    )
