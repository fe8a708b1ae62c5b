"""TF32 emulated on any device: products and convolutions of float32 numbers with ten bits of their mantissas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DROPPED = 13
"""Bits of a float32 mantissa that TF32 drops."""

aten = torch.ops.aten
OPERANDS = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.convolution), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), (1, 2)),
    aten.convolution_backward: (0, 1, 2),
}
"""The positions of the factors among the arguments of each product."""


def rounded(x: Tensor) -> Tensor:
    """Round finite float32 numbers to TF32; halves away from zero, as GPUs convert them. Other types stay as they
    are."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    bits = (bits + (1 << (DROPPED - 1))) & -(1 << DROPPED)
    return bits.view(torch.float32)


class EmulatedTF32(TorchDispatchMode):
    """Round the factors of every product and convolution in this context; sums stay in float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = OPERANDS.get(func.overloadpacket, ())
        return func(*(rounded(x) if i in factors else x for i, x in enumerate(args)), **(kwargs or {}))
