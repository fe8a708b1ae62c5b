"""The training images nearest to synthetic ones, which show whether a set copies its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condense.data.images import Images
from condense.data.transform import Transform

_CHUNK_VALUES = 2**24


@dataclass(frozen=True)
class Nearest:
    """The nearest training samples of rows of samples."""

    samples: Sequence[Tensor]
    """Of each row (n, *input_shape), in the space of the data."""
    distances: Sequence[Sequence[float]]
    """Euclidean distances in the transformed space."""


@torch.no_grad()
def nearest(rows: Sequence[Tensor], images: Images, transform: Transform) -> Nearest:
    """Find the nearest training sample of every sample.

    Args:
        rows: samples (n, *input_shape) in the space of ``transform``, on the CPU.
        images: the training samples in the space of the data, on the CPU.
        transform: the transform of the set.
    """
    shown = torch.cat(list(rows)).flatten(1).float()
    best, index = torch.full((len(shown),), math.inf), torch.zeros(len(shown), dtype=torch.long)
    size, first = max(1, _CHUNK_VALUES // math.prod(images.shape[1:])), 0
    for chunk in images.split(size):
        real = transform(chunk).flatten(1)
        smallest, where = torch.addmm(real.square().sum(1), shown, real.T, alpha=-2).min(1)
        closer = smallest < best
        best, index = torch.where(closer, smallest, best), torch.where(closer, where + first, index)
        first += len(chunk)
    found = images[index]
    distances = (transform(found).flatten(1) - shown).norm(dim=1)
    sizes = [len(row) for row in rows]
    return Nearest(list(found.split(sizes)), [part.tolist() for part in distances.split(sizes)])
