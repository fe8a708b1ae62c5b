"""What every network is: features, then one linear layer. And what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

InputShape = tuple[int, int, int]
"""(channels, height, width)"""

Norm = Literal["instance", "batch", "none"]

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardtanh),
)
"""Modules whose outputs are a network's feature maps: nonlinear, element by element."""

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Modules that normalise their input: BatchNorm and InstanceNorm, GroupNorm, LayerNorm and RMSNorm."""


class Network(nn.Module, ABC):
    """A classifier whose last layer is ``classifier``; subclasses set it and say ``embed``.

    Parameters come from PyTorch's default initialisation, hence from its global generator: build under
    ``Rng.forked``.
    """

    classifier: nn.Linear

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to what the classifier sees, (N, F)."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.embed(x))
        return logits

    def published_name(self, name: str) -> str:
        """What a file of weights calls the parameter or buffer that is ``name`` here."""
        return name


def extra_padding(input_shape: InputShape) -> int:
    """What the field's networks pad more at their first convolution: 2 for 28x28 gray images, as if 32x32."""
    return 2 if tuple(input_shape) == (1, 28, 28) else 0


class InstanceNorm(nn.GroupNorm):
    """What the field calls instance norm: a GroupNorm with one group per channel, (N, C, H, W) to the same.

    Under ``torch.compile`` it is written out, so that its derivatives of any order fuse with their neighbours.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not torch.compiler.is_compiling():
            return super().forward(input)
        var, mean = torch.var_mean(input, (2, 3), correction=0, keepdim=True)
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]
        return (input - mean) * torch.rsqrt(var + self.eps) * scale + shift


class QuickBatchNorm(nn.BatchNorm2d):
    """A BatchNorm whose running statistics keep a tenth of their old value and take nine tenths from each batch, the
    variance divided by n and not by n - 1; (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.9)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        seen = input.detach().to(self.running_mean.dtype)
        var, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``, written out: of torch's own, the gradient of a forward-mode derivative is wrong."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        axes = tuple(range(-len(self.normalized_shape), 0))
        var, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
        output = (input - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            output = output * self.weight
        return output if self.bias is None else output + self.bias


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """The normalisation of (N, channels, H, W) maps, with learned scale and shift."""
    match kind:
        case "instance":
            return InstanceNorm(channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "none":
            return nn.Identity()


def too_small(network: str, input_shape: InputShape, why: str, remedy: str) -> ValueError:
    """The error of a network that cannot take images of this size."""
    _, height, width = input_shape
    return ValueError(f"{network} cannot take {height}x{width} images: {why}; {remedy}")
