"""The base class of networks, features followed by one linear layer, and layers that several networks share."""

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
"""Elementwise nonlinear modules, whose outputs are the feature maps of a network."""

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Modules that normalise their input: BatchNorm and InstanceNorm, GroupNorm, LayerNorm and RMSNorm."""


class Network(nn.Module, ABC):
    """A classifier whose last layer is ``classifier``; subclasses set it and implement ``embed``.

    Parameters have PyTorch's default initialisation, which draws from the global generator: build a network under
    ``Rng.forked``.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of samples that the network can be built for."""

    classifier: nn.Linear

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Return the features (N, F) of samples (N, *input_shape), which are the input of the classifier."""

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (N, num_outputs) of features (N, F)."""
        logits: Tensor = self.classifier(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_outputs) of samples (N, *input_shape)."""
        return self.classify(self.embed(x))

    def published_name(self, name: str) -> str:
        """Return the name that a published state dict gives to the parameter or buffer ``name``."""
        return name


def extra_padding(input_shape: InputShape) -> int:
    """Return the extra padding of the first convolution: 2 for grey 28x28 images, which pads them to 32x32, else 0."""
    return 2 if tuple(input_shape) == (1, 28, 28) else 0


def _in_bfloat16_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` lies on a CPU and autocast computes in bfloat16 there."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


class InstanceNorm(nn.GroupNorm):
    """Instance norm as a GroupNorm with one group per channel, for maps (N, C, ...).

    Under ``torch.compile`` it is written out in basic operations, so that its derivatives of any order can be fused. In
    bfloat16 on a CPU, PyTorch's own operation is faster.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not torch.compiler.is_compiling() or _in_bfloat16_on_cpu(input):
            return super().forward(input)
        axes = tuple(range(2, input.dim()))
        var, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
        scale, shift = (p.reshape(-1, *(1 for _ in axes)) for p in (self.weight, self.bias))
        return (input - mean) * torch.rsqrt(var + self.eps) * scale + shift


class QuickBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm for maps (N, C, ...) whose running statistics give each new batch a weight of 0.9.

    The running variance is updated with the biased variance of the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.9)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Accept any number of spatial axes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        detached = input.detach().to(self.running_mean.dtype)
        var, mean = torch.var_mean(detached, (0, *range(2, detached.dim())), correction=0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` in basic operations, since torch's version has wrong gradients of forward-mode derivatives."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        axes = tuple(range(-len(self.normalized_shape), 0))
        var, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
        output = (input - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            output = output * self.weight
        return output if self.bias is None else output + self.bias


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, which pads grey images itself in bfloat16 on a CPU, also by a second channel of zeros.

    oneDNN takes longer for one channel than for two, and 15 times as long for the gradients of weights and bias where
    the padding is as large as the kernel, as for 28x28 images.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if self.in_channels > 1 or not _in_bfloat16_on_cpu(input):
            return super()._conv_forward(input, weight, bias)
        rows, columns = map(int, self.padding)
        input = F.pad(input, (columns, columns, rows, rows, 0, 1))  # noqa: A001
        weight = F.pad(weight, (0, 0, 0, 0, 0, 1))
        return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)


CONVOLUTIONS = (nn.Conv1d, Conv2d, nn.Conv3d)
"""Indexed by the number of spatial axes minus one, like the tables below."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLINGS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "avg": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
}


def make_norm(norm: Norm, channels: int, axes: int = 2) -> nn.Module:
    """Return a norm layer with learned scale and shift for maps (N, channels, ...) with ``axes`` spatial axes."""
    match norm:
        case "instance":
            return InstanceNorm(channels)
        case "batch":
            return BATCH_NORMS[axes - 1](channels)
        case "none":
            return nn.Identity()


def make_pooling(pooling: Literal["avg", "max"], size: int | tuple[int, ...], axes: int = 2) -> nn.Module:
    """Return a pooling of maps with ``axes`` spatial axes over non-overlapping windows of ``size``."""
    return POOLINGS[pooling][axes - 1](size)


def too_small(network: str, input_shape: InputShape, why: str, remedy: str) -> ValueError:
    """Return the error for a network that cannot take samples of this size."""
    *time, height, width = (1, *sides(input_shape))[-3:]
    match kind(input_shape):
        case "series":
            samples = f"series of length {width}"
        case "images":
            samples = f"{height}x{width} images"
        case "clips":
            samples = f"clips of {time[0]} frames of {height}x{width} pixels"
    return ValueError(f"{network} cannot take {samples}: {why}; {remedy}")
