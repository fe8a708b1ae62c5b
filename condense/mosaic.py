"""Mosaics: images that consist of factor x factor smaller ones, their tiles.

Tile k of an image counts from 0 through the rows. Of N mosaics, tile k of mosaic i is image ``k * N + i`` of a batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def joined(tiles: Tensor, factor: int) -> Tensor:
    """Return the mosaics (N, C, factor * h, factor * w) of tiles (factor^2 * N, C, h, w)."""
    grid = tiles.unflatten(0, (factor, factor, -1))  # (row, column, N, C, h, w)
    return grid.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def tiles_of(mosaics: Tensor, factor: int) -> Tensor:
    """Return the tiles (factor^2 * N, C, h, w) of mosaics (N, C, factor * h, factor * w)."""
    grid = mosaics.unflatten(-2, (factor, -1)).unflatten(-1, (factor, -1))  # (N, C, row, h, column, w)
    return grid.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def enlarged(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """Return tiles (N, C, h, w) at another size, by bilinear interpolation."""
    return F.interpolate(tiles, size=size, mode="bilinear", align_corners=False)
