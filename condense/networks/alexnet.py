"""AlexNet for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.networks.base import Conv2d, Network, extra_padding, make_norm, too_small


class AlexNet(Network):
    """Five convolutions (128, 192, 256, 192, 192 channels) with three max poolings, sized for 32x32 images.

    Krizhevsky et al. (2012), in the variant without norm of published cross-architecture tables.

    Raises:
        ValueError: the images are smaller than 8x8.
    """

    def __init__(self, input_shape: InputShape, num_outputs: int, *, norm: Literal["none", "batch"] = "none") -> None:
        super().__init__()
        channels, *sides = input_shape
        if min(sides) < 8:
            raise too_small(
                "alexnet", input_shape, "its three poolings need 8x8", "use larger images, or convnet or mlp"
            )
        extra = extra_padding(input_shape)
        height, width = ((side + 2 * extra) // 8 for side in sides)
        layers: list[nn.Module] = []
        for outputs, kernel, padding, pool in (
            (128, 5, 2 + extra, True),
            (192, 5, 2, True),
            (256, 3, 1, False),
            (192, 3, 1, False),
            (192, 3, 1, True),
        ):
            layers += [Conv2d(channels, outputs, kernel, padding=padding)]
            layers += [make_norm(norm, outputs), nn.ReLU()]
            if pool:
                layers += [nn.MaxPool2d(2)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * width, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x)
        return maps.flatten(1)
