"""LeNet-5 with ReLU and max pooling."""

from __future__ import annotations

from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.networks.base import Conv2d, Network, extra_padding, too_small


class LeNet(Network):
    """Two 5x5 convolutions with max pooling (6 and 16 channels), then hidden layers of 120 and 84 units.

    LeCun et al. (1998).

    Raises:
        ValueError: the images are smaller than 16x16.
    """

    def __init__(self, input_shape: InputShape, num_outputs: int) -> None:
        super().__init__()
        channels, *sides = input_shape
        if min(sides) < 16:
            raise too_small(
                "lenet",
                input_shape,
                "two unpadded 5x5 convolutions and two poolings need 16x16",
                "use larger images, or convnet or mlp",
            )
        extra = extra_padding(input_shape)
        height, width = (((side + 2 * extra - 4) // 2 - 4) // 2 for side in sides)
        self.features = nn.Sequential(
            *(Conv2d(channels, 6, 5, padding=extra), nn.ReLU(), nn.MaxPool2d(2)),
            *(Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        )
        self.classifier = nn.Linear(84, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.features(x)
        return hidden
