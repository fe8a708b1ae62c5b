"""A synthetic set as pictures, in pixel space: a grid with one row a class, or a strip for each class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from condense.data.transform import Transform
from condense.files import replacing
from condense.synthetic.set import SyntheticSet

GAP = 2
BACKGROUND = 1.0


@torch.no_grad()
def by_class(syn: SyntheticSet, transform: Transform, *, columns: int = 10) -> list[Tensor]:
    """Decoded images in [0, 1], (n, C, h, w) of each class, at most ``columns`` of them; in one row without classes."""
    images = transform.inverse(syn()[0]).clamp(0, 1).cpu()
    source = syn.classes.cpu().repeat(len(images) // len(syn))
    return [images[source == c][:columns] for c in range(syn.origin.num_classes or 1)]


def grid(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images (n, C, h, w) on one canvas (C, height, width)."""
    _, channels, h, w = rows[0].shape
    widest = max(len(row) for row in rows)
    canvas = torch.full((channels, len(rows) * (h + GAP) + GAP, widest * (w + GAP) + GAP), BACKGROUND)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = GAP + r * (h + GAP), GAP + c * (w + GAP)
            canvas[:, top : top + h, left : left + w] = image
    return canvas


def draw(syn: SyntheticSet, transform: Transform, path: Path, *, columns: int = 10) -> None:
    """Write the grid as a PNG, enlarged so that small images can be seen."""
    image = _image(grid(by_class(syn, transform, columns=columns)))
    scale = max(1, round(700 / max(image.size)))
    with replacing(path) as fresh:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(fresh, format="PNG")


def strip(images: Tensor) -> bytes:
    """Images (n, C, h, w) of one or three channels in a row, as a PNG that is transparent between them."""
    n, _, h, w = images.shape
    canvas = Image.new("RGBA" if images.shape[1] == 3 else "LA", (n * (w + GAP) - GAP, h))
    for k, image in enumerate(images):
        canvas.paste(_image(image).convert(canvas.mode), (k * (w + GAP), 0))
    file = io.BytesIO()
    canvas.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _image(pixels: Tensor) -> Image.Image:
    """Pixels (C, h, w) in [0, 1], gray or RGB."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
