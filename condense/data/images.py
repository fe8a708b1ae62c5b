"""Samples where they are drawn from: kept as they were read, transformed as they are taken out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from condense.data.datasets import Array, to_float
from condense.data.transform import Identity, Transform

_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Images:
    """Behaves like a float32 tensor (N, *input_shape) that is indexed, sliced and split; none of its size exists.

    Series and clips are held like images. ``raw`` (M, *input_shape), uint8 or float32, lies on the device where samples
    are wanted; on a CPU it is the memory, or the mapped file, of the array it was made of. ``rows`` (N,) are the
    samples of ``raw`` that belong to it.
    """

    raw: Tensor
    rows: Tensor
    transform: Transform

    @classmethod
    def of(cls, array: Array, device: torch.device) -> Images:
        """All samples of an array (N, *input_shape): pixels, uint8 or float32 in [0, 1], or series, float32."""
        raw = torch.from_numpy(np.require(array, requirements="W")).to(device)
        return cls(raw, torch.arange(len(raw), device=device), Identity())

    def subset(self, index: Tensor) -> Images:
        """The samples at ``index`` (K,), over the same memory."""
        return replace(self, rows=self.rows[index.to(self.device)])

    def with_transform(self, transform: Transform) -> Images:
        """These samples, with the values of the data, in another space.

        What is not pointwise is done here and kept in float32: a matrix product a draw would cost more than all
        the rest of it.
        """
        if transform.pointwise:
            return replace(self, transform=transform)
        done = torch.empty(self.raw.shape, device=self.device)
        for raw, chunk in zip(self.raw.split(_CHUNK), done.split(_CHUNK), strict=True):
            chunk.copy_(transform(to_float(raw)))
        return replace(self, raw=done, transform=Identity())

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.raw.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The samples at ``index``, positions (K,) on any device, or a slice: (K, *input_shape), new memory."""
        if isinstance(index, Tensor):
            index = index.to(self.device, non_blocking=True)
        return self.transform(to_float(self.raw.index_select(0, self.rows[index])))

    def split(self, size: int) -> Iterator[Tensor]:
        """In order, ``size`` at a time; the last may be fewer."""
        return (self[first : first + size] for first in range(0, len(self), size))
