"""ResNet18 for small images, and its average-pooling variant."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.networks.base import Conv2d, Network, Norm, make_norm, too_small


class ResNet18(Network):
    """Residual network with a 3x3 stem and no first pooling; ap=true downsamples by average pooling, not by stride.

    He et al. (2016), with the CIFAR stem. The networks of published tables pool the last maps by 4x4. For 28 and 32
    pixels this equals the global average pooling used here for every size. The AP variant (Zhao et al., 2021) has no
    last pooling and flattens the maps instead.

    Raises:
        ValueError: the last maps have no pixel, or a single one with instance norm, which makes it constant.
    """

    def __init__(
        self,
        input_shape: InputShape,
        num_outputs: int,
        *,
        norm: Literal["instance", "batch"] = "instance",
        ap: bool = False,
    ) -> None:
        super().__init__()
        channels, *sides = input_shape
        height, width = (side // 8 if ap else -(-side // 8) for side in sides)
        if min(height, width) < 1:
            raise too_small(
                "resnet18:ap=true",
                input_shape,
                "its three poolings need 8x8",
                "use larger images, or ap=false",
            )
        if norm == "instance" and height * width == 1:
            raise too_small(
                "resnet18",
                input_shape,
                "its last maps have a single pixel, which instance norm makes constant",
                "use larger images, or norm=batch",
            )
        self.stem = nn.Sequential(Conv2d(channels, 64, 3, padding=1, bias=False), make_norm(norm, 64), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = 64
        for stage, outputs in enumerate((64, 128, 256, 512)):
            blocks += [_Block(channels, outputs, halve=stage > 0, norm=norm, ap=ap)]
            blocks += [_Block(outputs, outputs, halve=False, norm=norm, ap=ap)]
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Identity() if ap else nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels * height * width if ap else channels, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.pool(self.blocks(self.stem(x)))
        return maps.flatten(1)


class _Block(nn.Module):
    """The block relu(main(x) + shortcut(x)), with two 3x3 convolutions in main."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool, norm: Norm, ap: bool) -> None:
        super().__init__()
        stride = 2 if halve and not ap else 1
        pool = nn.AvgPool2d(2) if halve and ap else nn.Identity()
        self.main = nn.Sequential(
            Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            *(make_norm(norm, outputs), nn.ReLU(), pool),
            *(Conv2d(outputs, outputs, 3, padding=1, bias=False), make_norm(norm, outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                Conv2d(inputs, outputs, 1, stride, bias=False), pool, make_norm(norm, outputs)
            )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.activation(self.main(x) + self.shortcut(x))
        return output
