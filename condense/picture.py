"""Pictures of a synthetic set: a grid with one row per class, or one strip per class.

An image is shown as it is. A clip is shown as a contact sheet of its frames, in rows from left to right, or as an
animation. A series is shown as a plot with one line per channel; all plots of a set have the same scale. A graph is
drawn with a spring layout; the colour of a node is its label, and nodes that are not read out are small.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from pathlib import Path

import networkx
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from condense.data.graphs import decode
from condense.data.layout import kind
from condense.data.transform import Transform
from condense.files import replacing
from condense.synthetic.set import SyntheticSet

GAP = 2
BACKGROUND = 1.0

FRAME_MS = 125
"""Milliseconds for which an animation shows each frame."""

_PLOT_HEIGHT = 64
_PLOT_WIDTHS = (96, 192)
"""Smallest and largest width of a plot in pixels; between them it is the length of the series."""
_MARGIN = 2
"""Pixels of a plot above the largest and below the smallest value."""
_OVERSAMPLING = 2
_GRAPH_SIDE = 96
_MOST_NODES = 150
"""Nodes of a graph that a spring layout places; larger graphs are drawn as circles."""


@torch.no_grad()
def by_class(syn: SyntheticSet, transform: Transform, *, columns: int = 10) -> list[Tensor]:
    """Return at most ``columns`` pictures of each class, (n, C, h, w) in [0, 1] with one or three channels C.

    A set without classes has one row.
    """
    return pictures([transform.to_data(row) for row in samples_by_class(syn, columns)])


@torch.no_grad()
def pictures(rows: list[Tensor]) -> list[Tensor]:
    """Return pictures (n, C, h, w) in [0, 1] of rows of samples (n, *input_shape) in the space of the data."""
    match kind(rows[0].shape[1:]):
        case "images":
            return rows
        case "clips":
            return [_contact_sheets(row) for row in rows]
        case "graphs":
            return [_drawings(row) for row in rows]
        case "series":
            shown = torch.cat(rows)
            return [_plots(row, shown.min().item(), shown.max().item()) for row in rows]


@torch.no_grad()
def played(syn: SyntheticSet, transform: Transform, *, columns: int = 10) -> list[bytes]:
    """Return one animation (PNG) per class of a set of clips, which plays at most ``columns`` clips in a row."""
    return [_animation(transform.to_data(row)) for row in samples_by_class(syn, columns)]


@torch.no_grad()
def samples_by_class(syn: SyntheticSet, columns: int) -> list[Tensor]:
    """Return at most ``columns`` samples of each class, (n, *input_shape), in the transformed space, on the CPU."""
    indices = ((syn.classes == c).nonzero()[:columns, 0] for c in range(syn.origin.num_classes or 1))
    return [syn(index)[0][:columns].cpu() for index in indices]


def grid(rows: Sequence[Tensor]) -> Tensor:
    """Place rows of pictures (n, C, h, w) on one canvas (C, height, width)."""
    _, channels, h, w = rows[0].shape
    widest = max(len(row) for row in rows)
    canvas = torch.full((channels, len(rows) * (h + GAP) + GAP, widest * (w + GAP) + GAP), BACKGROUND)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = GAP + r * (h + GAP), GAP + c * (w + GAP)
            canvas[:, top : top + h, left : left + w] = image
    return canvas


def draw(syn: SyntheticSet, transform: Transform, path: Path, *, columns: int = 10) -> None:
    """Write the grid as a PNG, enlarged so that small pictures are visible."""
    image = drawn(syn, transform, columns=columns)
    with replacing(path) as fresh:
        image.save(fresh, format="PNG")


def drawn(syn: SyntheticSet, transform: Transform, *, columns: int = 10) -> Image.Image:
    """Return the grid, enlarged so that small pictures are visible."""
    image = _image(grid(by_class(syn, transform, columns=columns)))
    scale = max(1, round(700 / max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def strip(images: Tensor) -> bytes:
    """Return a PNG with pictures (n, C, h, w), n > 0, of one or three channels, in a row; the gaps are transparent."""
    file = io.BytesIO()
    _row(images).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _animation(clips: Tensor) -> bytes:
    """Return an animated PNG that plays clips (n, T, C, H, W) in a row without end; the gaps are transparent."""
    first, *others = map(_row, clips.unbind(1))
    file = io.BytesIO()
    first.save(file, format="PNG", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return file.getvalue()


def _row(images: Tensor) -> Image.Image:
    """Place pictures (n, C, h, w), of one or three channels, in a row with transparent gaps."""
    n, _, h, w = images.shape
    canvas = Image.new("RGBA" if images.shape[1] == 3 else "LA", (n * (w + GAP) - GAP, h))
    for k, image in enumerate(images):
        canvas.paste(_image(image).convert(canvas.mode), (k * (w + GAP), 0))
    return canvas


def _contact_sheets(clips: Tensor) -> Tensor:
    """Return clips (n, T, C, H, W) as pictures (n, C, h, w) of their frames in a nearly square arrangement."""
    n, frames, channels, height, width = clips.shape
    columns = math.ceil(math.sqrt(frames))
    rows = -(-frames // columns)
    sheets = torch.full((n, channels, rows * (height + 1) - 1, columns * (width + 1) - 1), BACKGROUND)
    for t in range(frames):
        top, left = t // columns * (height + 1), t % columns * (width + 1)
        sheets[:, :, top : top + height, left : left + width] = clips[:, t]
    return sheets


def _plots(series: Tensor, low: float, high: float) -> Tensor:
    """Plot series (n, C, L) as pictures (n, 3, h, w), one line per channel; the y axis is ``low`` to ``high``."""
    n, channels, length = series.shape
    size = min(max(length, _PLOT_WIDTHS[0]), _PLOT_WIDTHS[1]), _PLOT_HEIGHT
    width, height = (_OVERSAMPLING * side for side in size)
    x = np.linspace(0, width - 1, max(length, 2))
    bottom, top = height - _OVERSAMPLING * _MARGIN, _OVERSAMPLING * _MARGIN
    y = bottom + (top - bottom) * (series.double() - low) / max(high - low, 1e-12)
    plots = torch.empty(n, 3, height // _OVERSAMPLING, width // _OVERSAMPLING)
    for plot, lines in zip(plots, y.expand(n, channels, len(x)).numpy(), strict=True):
        canvas = Image.new("RGB", (width, height), "#f4f4f4")
        pen = ImageDraw.Draw(canvas)
        for channel, line in enumerate(lines):
            red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(0.6 + channel / channels, 0.8, 0.75))
            pen.line(list(zip(x, line, strict=True)), fill=(red, green, blue), width=_OVERSAMPLING)
        plot.copy_(torch.from_numpy(np.array(canvas.reduce(_OVERSAMPLING))).permute(2, 0, 1) / 255)
    return plots


def _drawings(rows: Tensor) -> Tensor:
    """Draw graphs, rows (n, L), as pictures (n, 3, h, w)."""
    side = _GRAPH_SIDE * _OVERSAMPLING
    drawings = torch.empty(len(rows), 3, _GRAPH_SIDE, _GRAPH_SIDE)
    for drawing, graph in zip(drawings, decode(rows), strict=True):
        shape = networkx.Graph(graph.edges.tolist())
        shape.add_nodes_from(range(len(graph.codes)))
        places = (
            networkx.spring_layout(shape, seed=0)
            if len(graph.codes) <= _MOST_NODES
            else networkx.circular_layout(shape)
        )
        x = {node: tuple(side * (0.5 + 0.45 * place)) for node, place in places.items()}
        canvas = Image.new("RGB", (side, side), "#f4f4f4")
        pen = ImageDraw.Draw(canvas)
        for u, v in graph.edges.tolist():
            pen.line([x[u], x[v]], fill="#808080", width=_OVERSAMPLING)
        for node, (label, code) in enumerate(zip(graph.labels.tolist(), graph.codes.tolist(), strict=True)):
            red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(0.6 + 0.382 * label, 0.8, 0.75))
            radius = side / (24 if code >= 0 else 48)
            pen.ellipse(
                [x[node][0] - radius, x[node][1] - radius, x[node][0] + radius, x[node][1] + radius],
                fill=(red, green, blue),
            )
        drawing.copy_(torch.from_numpy(np.array(canvas.reduce(_OVERSAMPLING))).permute(2, 0, 1) / 255)
    return drawings


def _image(pixels: Tensor) -> Image.Image:
    """Convert pixels (C, h, w) in [0, 1], gray or RGB."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
