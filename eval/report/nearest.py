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
    num_images: int
    """Number of the training samples."""


@torch.no_grad()
def nearest(sets: Sequence[Sequence[Tensor]], images: Images, transform: Transform) -> list[Nearest]:
    """Find the nearest training sample of every sample of several sets. The training samples are read once.

    Args:
        sets: of each set, rows of samples (n, *input_shape) in the space of ``transform``, on the CPU.
        images: the training samples in the space of the data, on the CPU.
        transform: the transform of the sets.
    """
    shown = [torch.cat(list(rows)).flatten(1).float() for rows in sets]
    best = [torch.full((len(samples),), math.inf) for samples in shown]
    index = [torch.zeros(len(samples), dtype=torch.long) for samples in shown]
    size, first = max(1, _CHUNK_VALUES // math.prod(images.shape[1:])), 0
    for chunk in images.split(size):
        real = transform(chunk).flatten(1)
        norms = real.square().sum(1)
        for k, samples in enumerate(shown):
            smallest, where = torch.addmm(norms, samples, real.T, alpha=-2).min(1)
            closer = smallest < best[k]
            best[k], index[k] = torch.where(closer, smallest, best[k]), torch.where(closer, where + first, index[k])
        first += len(chunk)
    result = []
    for rows, samples, places in zip(sets, shown, index, strict=True):
        found, sizes = images[places], [len(row) for row in rows]
        distances = (transform(found).flatten(1) - samples).norm(dim=1)
        result.append(Nearest(found.split(sizes), [part.tolist() for part in distances.split(sizes)], len(images)))
    return result
