"""ConvNet, the standard network of dataset distillation, and its variant for series."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from condense.data.layout import InputShape, Kind
from condense.networks.base import (
    CONVOLUTIONS,
    LayerNorm,
    Network,
    QuickBatchNorm,
    extra_padding,
    make_norm,
    make_pooling,
    too_small,
)

Activation = Literal["relu", "sigmoid", "leakyrelu", "swish", "softplus"]
Norm = Literal["instance", "batch", "layer", "group", "none", "batch-before"]
Pooling = Literal["avg", "max", "none"]


class ConvNet(Network):
    """Blocks of 3x3 convolution, norm, activation and 2x2 pooling, then a linear layer on the flattened maps.

    Gidaris and Komodakis (2018), as used by Zhao et al. (2021). Depth 4 is usual for images of 64 pixels and depth 5
    for 128 pixels; there are then 16 * width features, as for 32 pixels at depth 3. With ``widen`` each block has twice
    the channels of the one before (Zhou et al. 2022, FRePo). Softplus has beta 60 (Loo et al. 2023, RCIG). With
    ``norm=batch-before`` a BatchNorm precedes the convolution of each block but the first, as in FRePo's networks; this
    is a ``QuickBatchNorm``.

    Raises:
        ValueError: the poolings leave no pixel, or the width is not divisible by the 4 groups of norm=group.
    """

    def __init__(
        self,
        input_shape: InputShape,
        num_outputs: int,
        *,
        depth: int = 3,
        width: int = 128,
        activation: Activation = "relu",
        norm: Norm = "instance",
        pooling: Pooling = "avg",
        widen: bool = False,
    ) -> None:
        super().__init__()
        name, axes, extra = type(self).__name__.lower(), len(input_shape) - 1, extra_padding(input_shape)
        channels, *sides = input_shape
        sides = [side + 2 * extra for side in sides]
        fitting = min(sides).bit_length() - 1
        if pooling != "none" and depth > fitting:
            unit = "time step" if axes == 1 else "pixel"
            raise too_small(
                f"{name}:depth={depth}",
                input_shape,
                f"each block halves the maps, and after the last one no {unit} would be left",
                f"give depth={fitting} or less, or pooling=none" if fitting else "give pooling=none",
            )
        if norm == "group" and width % 4:
            raise ValueError(
                f"{name}:norm=group cannot take width={width}: it needs 4 groups of equal size; "
                f"give width={width + -width % 4}"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            width = width * 2 if widen and block else width
            padding = 1 if block else 1 + extra
            convolution = CONVOLUTIONS[axes - 1](channels, width, 3, padding=padding)
            if norm != "batch-before":
                layers += [convolution, _norm(norm, width, sides)]
            else:
                layers += [_norm(norm, channels, sides), convolution] if block else [convolution]
            layers += [make_activation(activation)]
            if pooling != "none":
                layers += [make_pooling(pooling, 2, axes)]
                sides = [side // 2 for side in sides]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * math.prod(sides), num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x)
        return maps.flatten(1)


class ConvNet1d(ConvNet):
    """The ConvNet for series, with convolutions over three time steps and pooling over two.

    The receptive field of a feature is 22 time steps at depth 3 and 190 at depth 6, so long series need more depth.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("series",)


def _norm(kind: Norm, channels: int, sides: list[int]) -> nn.Module:
    """Extend ``make_norm`` by three kinds; "layer" has a scale and a shift for every element of the map."""
    match kind:
        case "layer":
            return LayerNorm((channels, *sides))
        case "group":
            return nn.GroupNorm(4, channels)
        case "batch-before":
            return QuickBatchNorm(channels)
        case _:
            return make_norm(kind, channels, len(sides))


def make_activation(kind: Activation) -> nn.Module:
    match kind:
        case "relu":
            return nn.ReLU()
        case "sigmoid":
            return nn.Sigmoid()
        case "leakyrelu":
            return nn.LeakyReLU(0.01)
        case "swish":
            return nn.SiLU()
        case "softplus":
            return nn.Softplus(beta=60)
