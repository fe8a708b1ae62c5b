"""DataDAM: Sajedi et al., "DataDAM: Efficient Dataset Distillation with Attention Matching", ICCV 2023.

    min_S  100 E_{theta, omega}  sum_c ( sum_{l < L} || mean_{x in B_c} a_l(A(x)) - mean_{s in S_c} a_l(A(s)) ||^2
                                         + lambda || mean_{x in B_c} psi(A(x)) - mean_{s in S_c} psi(A(s)) ||^2 )

The attention map a_l of layer l shows where its activations are strong. It is v / |v|, where v is the sum over channels
of the p-th powers of their absolute values. The last of the L layers is matched by the features psi instead, as in DM.
DataDAM is therefore implemented as DM with the weighted concatenation of attention maps and features in place of psi.

    symbol  code
    a_l     ``attention_map`` of ``ctx.maps``
    p       ``power``
    lambda  ``balance``
    100     ``SCALE``

The other symbols are those of methods/dm.py. Deviations: see docs/methods/datadam.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from condense.match import attention_map
from condense.method import Context
from condense.methods.dm import DistributionMatching, DMState, Features
from condense.task import Task
from condense.train import Training

SCALE = 100.0
"""Factor of the whole objective."""


@final
@dataclass(frozen=True, kw_only=True)
class DataDAM(DistributionMatching):
    """Matches attention maps and features of random networks."""

    batch_real: int = 64
    """Real images per class in each step; all of them if a class has fewer."""
    power: float = 1.0
    """Power of the activations in an attention map: 1 in the published code, 4 in the paper."""
    balance: float = 0.01
    """Weight of the features, relative to that of the attention maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power >= 1:
            raise ValueError(
                f"method.power must be at least 1, got {self.power}: the gradient at activations of 0 would not be "
                "finite; the published values are 1 and 4"
            )
        self.require_at_least(0, "balance")

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1800, batch_size=64)

    def init(self, ctx: Context) -> DMState:
        ctx.task.network.require_maps()
        return super().init(ctx)

    def features(self, ctx: Context, state: DMState) -> Features:
        def features(images: Tensor) -> Tensor:
            maps, last = ctx.maps(state.params, state.buffers, images)
            attention = [attention_map(layer, self.power) for layer in maps[:-1]]
            return torch.cat([SCALE**0.5 * a for a in attention] + [(SCALE * self.balance) ** 0.5 * last], 1)

        return features
