"""A synthetic set as a picture: one row a class, in pixel space."""

from __future__ import annotations

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
def grid(syn: SyntheticSet, transform: Transform, *, columns: int = 10) -> Tensor:
    """Decoded images in [0, 1], (C, height, width): one row a class, at most ``columns`` images each."""
    images = transform.inverse(syn()[0]).clamp(0, 1).cpu()
    source = syn.classes.cpu().repeat(len(images) // len(syn))
    rows = [images[source == c][:columns] for c in range(syn.origin.num_classes)]
    channels, h, w = images.shape[1:]
    widest = max(len(row) for row in rows)
    canvas = torch.full((channels, len(rows) * (h + GAP) + GAP, widest * (w + GAP) + GAP), BACKGROUND)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = GAP + r * (h + GAP), GAP + c * (w + GAP)
            canvas[:, top : top + h, left : left + w] = image
    return canvas


def draw(syn: SyntheticSet, transform: Transform, path: Path, *, columns: int = 10) -> None:
    """Write the grid as a PNG, enlarged so that small images can be seen."""
    pixels = (grid(syn, transform, columns=columns) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    scale = max(1, round(700 / max(image.size)))
    with replacing(path) as temporary:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(
            temporary, format="PNG"
        )
