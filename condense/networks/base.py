"""What every network is: features, then one linear layer. And what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data.layout import InputShape, Kind, kind, sides

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

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of samples that the network can be built for."""

    classifier: nn.Linear

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """A batch of samples (N, *input_shape) to what the classifier sees, (N, F)."""

    def forward(self, x: Tensor) -> Tensor:
        """A batch of samples (N, *input_shape) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.embed(x))
        return logits

    def published_name(self, name: str) -> str:
        """What a file of weights calls the parameter or buffer that is ``name`` here."""
        return name


def extra_padding(input_shape: InputShape) -> int:
    """What the field's networks pad more at their first convolution: 2 for 28x28 gray images, as if 32x32."""
    return 2 if tuple(input_shape) == (1, 28, 28) else 0


class InstanceNorm(nn.GroupNorm):
    """What the field calls instance norm: a GroupNorm with one group per channel, (N, C, ...) to the same.

    Under ``torch.compile`` it is written out, so that its derivatives of any order fuse with their neighbours.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not torch.compiler.is_compiling():
            return super().forward(input)
        axes = tuple(range(2, input.dim()))
        var, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
        scale, shift = (p.reshape(-1, *(1 for _ in axes)) for p in (self.weight, self.bias))
        return (input - mean) * torch.rsqrt(var + self.eps) * scale + shift


class QuickBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose running statistics keep a tenth of their old value and take nine tenths from each batch, the
    variance divided by n and not by n - 1; (N, C, ...) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.9)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Any number of spatial axes will do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        seen = input.detach().to(self.running_mean.dtype)
        var, mean = torch.var_mean(seen, (0, *range(2, seen.dim())), correction=0)
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


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""By the number of spatial axes, less one, as the tables below."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLINGS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "avg": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
}


def make_norm(norm: Norm, channels: int, axes: int = 2) -> nn.Module:
    """The normalisation of maps (N, channels, ...) with so many spatial axes, with learned scale and shift."""
    match norm:
        case "instance":
            return InstanceNorm(channels)
        case "batch":
            return BATCH_NORMS[axes - 1](channels)
        case "none":
            return nn.Identity()


def make_pooling(pooling: Literal["avg", "max"], size: int | tuple[int, ...], axes: int = 2) -> nn.Module:
    """Pooling of maps with so many spatial axes over windows of ``size`` that do not overlap."""
    return POOLINGS[pooling][axes - 1](size)


def too_small(network: str, input_shape: InputShape, why: str, remedy: str) -> ValueError:
    """The error of a network that cannot take samples of this size."""
    *time, height, width = (1, *sides(input_shape))[-3:]
    match kind(input_shape):
        case "series":
            samples = f"series of length {width}"
        case "images":
            samples = f"{height}x{width} images"
        case "clips":
            samples = f"clips of {time[0]} frames of {height}x{width} pixels"
    return ValueError(f"{network} cannot take {samples}: {why}; {remedy}")
