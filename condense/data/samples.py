"""Samples that a user gives: which of an array's axes is which, and whether its values are those of such samples.

A *layout* names the axes of a batch by one letter each, in the order in which an array has them: "NHWC", "NTHW",
"NLC". N counts samples, C channels, L points of a series, T frames, H rows and W columns. Without C there is one
channel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from condense.data.layout import Kind, channel_axis, kind
from condense.data.pixels import Array, check_pixels, check_series, numpy_of
from condense.names import excerpt

STANDARD: dict[Kind, str] = {"series": "NCL", "images": "NCHW", "clips": "NTCHW"}
"""The layout in which this package holds each kind."""

IN_FILE = 'np.savez(..., layout="{}")'
"""How an ``.npz`` file says its layout, for messages; {} is the layout."""

_WITHOUT_LAYOUT = {3: ("NHW",), 4: ("NCHW", "NHWC"), 5: ("NTCHW", "NTHWC")}
"""By number of axes: what an array without a layout may be. All of them are pixels."""


def check_samples(
    what: str, samples: Tensor | Array, layout: str | None = None, *, channels_first: bool, remedy: str
) -> Array:
    """Series (N, C, L) as float32; images (N, C, H, W) and clips (N, T, C, H, W) as ``check_pixels`` gives them.

    Args:
        what: the name of the array, for the message.
        samples: an array whose axes ``layout`` names.
        layout: None: pixels, see ``guess``, also for ``channels_first``.
        remedy: how the source of the array says its layout, with {} in the place of it, for the message.

    Raises:
        ValueError: in one line, for axes, types and values that no kind of sample has.
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
            f"{what} has {channels} channels: {kind(shape)} have one (gray) or three (RGB); give so many channels"
        )
    try:
        return check_pixels(what, arranged)
    except ValueError as error:
        if layout is None and given.ndim == 3 and given.dtype.kind in "iuf":
            raise ValueError(f"{error}; if these are series, say so, {remedy.format('NCL')}") from error
        raise


def arrange(what: str, array: Array, layout: str) -> Array:
    """A view of the array with its axes in the standard order: (N, C, L), (N, C, H, W) or (N, T, C, H, W).

    Args:
        what: the name of the array, for the message.
        array: any values; its axes are those that ``layout`` names.
        layout: one letter for each axis, in any case.

    Raises:
        ValueError: the letters are those of no kind of sample, or another number than the array has axes.
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
            "the layout that it has"
        )
    if "C" not in axes:
        array, axes = array[..., None], axes + "C"
    return array.transpose([axes.index(axis) for axis in standard])


def guess(what: str, shape: Sequence[int], *, channels_first: bool, remedy: str) -> str:
    """The layout of an array of pixels whose source does not say it.

    Three axes are NHW. Four are NCHW or NHWC and five NTCHW or NTHWC: whichever has one or three channels, and the
    first of the two if both have and ``channels_first`` is set, else the second.

    Args:
        what, remedy: as for ``check_samples``.
        shape: of the whole array, samples first.
        channels_first: what is preferred where both fit.

    Raises:
        ValueError: neither has one or three channels; fewer than three or more than five axes.
    """
    layouts = _WITHOUT_LAYOUT.get(len(shape), ())
    for layout in layouts if channels_first else layouts[::-1]:
        if "C" not in layout or shape[layout.index("C")] in (1, 3):
            return layout
    if not layouts:
        raise ValueError(
            f"{what} has shape {excerpt(tuple(shape))}: images have three or four axes and clips five; reshape it, or "
            f"say what its axes are, {remedy.format('NL')}"
        )
    second = "second" if len(shape) == 4 else "third"
    raise ValueError(
        f"{what} has shape {tuple(shape)}: neither its {second} nor its last axis has length 1 or 3; give "
        f"{' or '.join(layouts[::-1])}, or say what its axes are, {remedy.format(layouts[0])}"
    )
