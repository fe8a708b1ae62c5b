"""Base class of the methods that train a network on the set and minimise its loss on real images (DD, RaT-BPTT,
AT-BPTT, RTP):

min_S  E_theta_0  l(R; theta_N(S)),    theta_{n+1} = rule(theta_n, grad l(b_n; theta_n)),   b_n a minibatch of S.

symbol   code
R        a batch of real images, drawn for each step
theta_0  fresh weights, drawn for each step
theta_N  the result of ``unroll``, differentiated by ``adjoint``
b_n      ``batches``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from condense.inner import Params
from condense.method import Context, GradientState
from condense.methods.unrolled import Unrolled
from condense.objective import OBJECTIVES, ObjectiveName
from condense.rng import Draws
from condense.teachers import has_batch_norm


@dataclass(frozen=True, kw_only=True)
class Bilevel(Unrolled):
    """Back-propagates the loss on real images through training on the set."""

    family: ClassVar[str] = "bilevel"
    objectives: ClassVar[tuple[ObjectiveName, ...]] = tuple(OBJECTIVES)

    def real_loss(self, ctx: Context, theta: Params, buffers: Params, images: Tensor, labels: Tensor) -> Tensor:
        """The loss on real images (N, C, H, W), see ``real_logits``."""
        return ctx.objective.loss(self.real_logits(ctx, theta, buffers, images), labels)

    def real_logits(self, ctx: Context, theta: Params, buffers: Params, images: Tensor) -> Tensor:
        """The logits of real images (N, C, H, W) in evaluation mode. A network with BatchNorm is in training mode
        and uses the statistics of these images, because the inner steps do not update its running statistics."""
        network = ctx.task.network
        return network.logits(theta, buffers, images, train=has_batch_norm(network))


def class_members(ctx: Context, state: GradientState) -> list[Tensor]:
    """Ascending indices of the decoded images of each class. They are the same in all steps and found once."""
    syn = state.syn
    firsts = range(0, len(syn) * ctx.decode.expansion, len(syn))

    def members() -> list[Tensor]:
        return [torch.cat([first + syn.index_of(c) for first in firsts]) for c in range(ctx.task.num_classes)]

    return ctx.kept("members of classes", state, members)


def draw_per_class(members: Sequence[Tensor], num: int, draws: Draws) -> Tensor:
    """Draw the indices of ``num`` images of each class without replacement; of all of them if a class has fewer."""
    return torch.cat([index[draws.subset(len(index), num).to(index.device)] for index in members])
