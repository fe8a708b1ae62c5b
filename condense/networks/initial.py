"""Initial weights from keyed draws, whatever module draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from condense.rng import Draws

_ATEN = torch.ops.aten
_UNIFORM, _NORMAL = _ATEN.uniform_.default, _ATEN.normal_.default
_NEW = {
    _ATEN.rand.default: (_ATEN.empty.memory_format, _UNIFORM),
    _ATEN.rand_like.default: (_ATEN.empty_like.default, _UNIFORM),
    _ATEN.randn.default: (_ATEN.empty.memory_format, _NORMAL),
    _ATEN.randn_like.default: (_ATEN.empty_like.default, _NORMAL),
}
"""Functions that return new random tensors: how the tensor is made, and how it is filled."""


class DrawnFrom(TorchDispatchMode):
    """Inside the context, uniform and normal numbers are taken from keyed draws.

    This holds for ``Tensor.uniform_`` and ``Tensor.normal_``, which all initialisations of ``torch.nn.init`` use, and
    for ``torch.rand``, ``torch.randn`` and their variants that end in ``_like``. The numbers are those of the key on
    every device, and a network can be initialised in a step that is captured as a CUDA graph.
    """

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _NEW:
            make, func = _NEW[func]
            args, kwargs = (make(*args, **(kwargs or {})),), {}
        if func not in (_UNIFORM, _NORMAL):
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0]
        first = args[1] if len(args) > 1 else 0.0
        second = args[2] if len(args) > 2 else 1.0
        if func is _UNIFORM:
            numbers = self._draws.uniform(*tensor.shape) * (second - first) + first
        else:
            numbers = self._draws.normal(*tensor.shape) * second + first
        return tensor.copy_(numbers)
