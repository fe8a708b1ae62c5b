"""ConvNet, the network most of the field distils on."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from condense.networks.base import InputShape, LayerNorm, Network, QuickBatchNorm, extra_padding, make_norm, too_small

Activation = Literal["relu", "sigmoid", "leakyrelu", "swish", "softplus"]
Norm = Literal["instance", "batch", "layer", "group", "none", "batch-before"]
Pooling = Literal["avg", "max", "none"]


class ConvNet(Network):
    """Blocks of 3x3 convolution, norm, activation and 2x2 pooling, then a linear layer on the flattened maps.

    Gidaris and Komodakis (2018) as used by Zhao et al. (2021). 64 pixels usually go with depth 4, 128 with 5:
    the flattened features then number 16 * width as for 32 pixels at depth 3. With ``widen`` each block has twice the
    channels of the one before (Zhou et al. 2022, FRePo); softplus is sharp, beta 60 (Loo et al. 2023, RCIG). With
    ``norm=batch-before`` a BatchNorm precedes the convolution of each block but the first, as in FRePo's networks; its
    running statistics are those of ``QuickBatchNorm``.

    Raises:
        ValueError: the poolings leave no pixel, or norm=group does not divide the width.
    """

    def __init__(
        self,
        input_shape: InputShape,
        num_classes: int,
        *,
        depth: int = 3,
        width: int = 128,
        activation: Activation = "relu",
        norm: Norm = "instance",
        pooling: Pooling = "avg",
        widen: bool = False,
    ) -> None:
        super().__init__()
        extra = extra_padding(input_shape)
        channels, height, breadth = input_shape[0], input_shape[1] + 2 * extra, input_shape[2] + 2 * extra
        fitting = min(height, breadth).bit_length() - 1
        if pooling != "none" and depth > fitting:
            raise too_small(
                f"convnet:depth={depth}",
                input_shape,
                "each block halves the maps and the last would have no pixel left",
                f"give depth={fitting} or less, or pooling=none" if fitting else "give pooling=none",
            )
        if norm == "group" and width % 4:
            raise ValueError(
                f"convnet:norm=group cannot take width={width}: it forms 4 groups of equal size; "
                f"give width={width + -width % 4}"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            width = width * 2 if widen and block else width
            padding = 1 if block else 1 + extra
            convolution = nn.Conv2d(channels, width, 3, padding=padding)
            if norm != "batch-before":
                layers += [convolution, _norm(norm, width, height, breadth)]
            else:
                layers += [_norm(norm, channels, height, breadth), convolution] if block else [convolution]
            layers += [_activation(activation)]
            if pooling != "none":
                layers += [nn.AvgPool2d(2) if pooling == "avg" else nn.MaxPool2d(2)]
                height, breadth = height // 2, breadth // 2
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * breadth, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x)
        return maps.flatten(1)


def _norm(kind: Norm, channels: int, height: int, width: int) -> nn.Module:
    """As ``make_norm``, with three more kinds; "layer" has a scale and a shift for every element of the map."""
    match kind:
        case "layer":
            return LayerNorm((channels, height, width))
        case "group":
            return nn.GroupNorm(4, channels)
        case "batch-before":
            return QuickBatchNorm(channels)
        case _:
            return make_norm(kind, channels)


def _activation(kind: Activation) -> nn.Module:
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
