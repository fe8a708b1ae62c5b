"""Samples that are stored as they were read, and transformed when they are indexed."""

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
    """Behaves like a float32 tensor (N, *input_shape) that can be indexed, sliced and split, without its memory.

    Series and clips are stored like images. ``raw`` (M, *input_shape), uint8 or float32, is on the device of the
    returned samples; on a CPU it shares the memory, or the mapped file, of the original array. ``rows`` (N,) are the
    indices into ``raw`` of the samples that belong to this object.
    """

    raw: Tensor
    rows: Tensor
    transform: Transform

    @classmethod
    def of(cls, array: Array, device: torch.device) -> Images:
        """Return all samples of an array (N, *input_shape) of uint8 or float32 pixels in [0, 1] or float32 series."""
        raw = torch.from_numpy(np.require(array, requirements="W")).to(device)
        return cls(raw, torch.arange(len(raw), device=device), Identity())

    def subset(self, index: Tensor) -> Images:
        """Return the samples at ``index`` (K,), which share the memory of ``raw``."""
        return replace(self, rows=self.rows[index.to(self.device)])

    def with_transform(self, transform: Transform) -> Images:
        """Return these samples, whose ``raw`` must hold values of the data, in the space of ``transform``.

        A transform that is not pointwise is applied here to all samples, which are stored as float32: a matrix product
        per draw would cost more than everything else in it.
        """
        if transform.pointwise:
            return replace(self, transform=transform)
        transformed = torch.empty(self.raw.shape, device=self.device)
        for raw, chunk in zip(self.raw.split(_CHUNK), transformed.split(_CHUNK), strict=True):
            chunk.copy_(transform(to_float(raw)))
        return replace(self, raw=transformed, transform=Identity())

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.raw.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return the samples at ``index``, a slice or positions (K,) on any device: (K, *input_shape), a copy."""
        if isinstance(index, Tensor):
            index = index.to(self.device, non_blocking=True)
        return self.transform(to_float(self.raw.index_select(0, self.rows[index])))

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the samples in order, ``size`` at a time; the last chunk may be smaller."""
        return (self[first : first + size] for first in range(0, len(self), size))
