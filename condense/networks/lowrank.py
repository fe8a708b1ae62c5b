"""A trained network with changes of low rank and a linear head of its own, of which only these are trained."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from condense.data.layout import InputShape
from condense.networks.base import Network
from condense.networks.functional import Functional

HEAD = "classifier.parametrizations.weight.original"
"""The name of the start of the head among the frozen parameters of ``Adapted``."""


class LowRank(nn.Module):
    """The change B A of a weight W, as a parametrization (Hu et al. 2022, LoRA).

    W counts as a matrix of one row for each output; the weight of a convolution has inputs times kernel positions as
    columns. B (rows, r) is zero at first and A (r, columns) is drawn, so the first change is zero.

    Args:
        weight: W.
        rank: the largest r; it is at most the smaller side of the matrix.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.a = nn.Parameter(weight.new_empty(rank, columns))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.reset()

    def reset(self) -> None:
        """Draw A from the global generator."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


class Adapted(Network):
    """W E(x): the features E of a frozen network, and a head W without bias.

    The weights of all convolutions and linear layers of E, and W, have changes of low rank, the only parameters that
    require grad.

    Args:
        encoder: the network; it is changed, and loses its own classifier.
        num_outputs: the number of rows of W.
        rank, head_rank: the ranks of the changes in the encoder and in the head.
    """

    def __init__(self, encoder: Network, num_outputs: int, rank: int, head_rank: int) -> None:
        super().__init__()
        like = encoder.classifier.weight
        self.classifier = nn.Linear(like.shape[1], num_outputs, bias=False, device=like.device)
        encoder.set_submodule("classifier", nn.Identity())
        self.encoder = encoder
        self.requires_grad_(False)
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        layers = [module for module in encoder.modules() if isinstance(module, kinds)]
        for layer, most in (*((layer, rank) for layer in layers), (self.classifier, head_rank)):
            register_parametrization(layer, "weight", LowRank(layer.weight, most))

    def embed(self, x: Tensor) -> Tensor:
        return self.encoder.embed(x)

    def frozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not trained, by name, in the order of ``Functional.frozen``."""
        return {name: p for name, p in self.named_parameters() if not p.requires_grad}


def low_rank(base: Adapted, input_shape: InputShape, num_outputs: int, device: torch.device) -> Functional:
    """Return the architecture of networks that share the frozen parameters and initial buffers of ``base``."""

    def adapted(input_shape: InputShape, num_outputs: int) -> nn.Module:
        fresh = copy.deepcopy(base)
        for module in fresh.modules():
            if isinstance(module, LowRank):
                module.reset()
        return fresh

    return Functional(adapted, input_shape, num_outputs, device)
